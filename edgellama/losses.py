"""The losses that transformers' Llama models compute from `labels`, in float64. Knows arrays only, no model."""

from __future__ import annotations

import numpy as np

from edgellama.logprob import log_softmax

IGNORE_INDEX = -100
"""A label that does not count."""
_ROWS = 64  # of logits at a time: float64 is twice as large


def causal_lm_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross entropy of each next token: logits [B, T, V] at t against labels int [B, T] at t + 1.

    Labels of -100 do not count; without any other it is nan, as in torch.
    """
    rows = logits[:, :-1].reshape(-1, logits.shape[-1])
    return cross_entropy(rows, labels[:, 1:].reshape(-1))


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean of -log p(target) over logits [N, C] whose target, int [N], is not -100. ValueError for one out of range."""
    counted = np.flatnonzero(targets != IGNORE_INDEX)
    bad = [int(each) for each in targets[counted] if not 0 <= each < logits.shape[1]]
    if bad:
        raise ValueError(
            f"labels must be from 0 to {logits.shape[1] - 1}, or {IGNORE_INDEX} to be ignored; got {bad[0]}"
        )
    if not counted.size:
        return float("nan")
    total = 0.0
    for at in range(0, counted.size, _ROWS):
        rows = counted[at : at + _ROWS]
        total -= float(np.take_along_axis(log_softmax(logits[rows]), targets[rows][:, None], axis=1).sum())
    return total / counted.size


def classification_loss(logits: np.ndarray, labels: np.ndarray, problem_type: str | None) -> float:
    """Of logits [B, num_labels], after `problem_type`; None is what transformers takes it for.

    "regression" (one label): mean squared error. "single_label_classification" (labels int [B]): cross entropy.
    "multi_label_classification" (labels [B, num_labels] of 0..1, floats): binary cross entropy of each label.
    """
    n_labels = logits.shape[1]
    if problem_type is None:
        whole = labels.dtype.kind in "iu"
        kinds = "regression", "single_label_classification", "multi_label_classification"
        problem_type = kinds[0] if n_labels == 1 else kinds[1] if whole else kinds[2]
    if problem_type == "single_label_classification":
        if labels.dtype.kind not in "iu" or labels.size != len(logits):
            raise ValueError(f"labels must be {len(logits)} whole numbers, one for each text, got {_form(labels)}")
        return cross_entropy(logits, labels.reshape(-1).astype(np.int64))
    if problem_type not in ("regression", "multi_label_classification"):
        raise ValueError(
            'problem_type must be "regression", "single_label_classification" or "multi_label_classification", '
            f"got {problem_type!r}"
        )
    if labels.size != logits.size or (n_labels > 1 and labels.shape != logits.shape):
        raise ValueError(f"labels must have the shape {list(logits.shape)} of the logits, got {_form(labels)}")
    y, t = logits.astype(np.float64), labels.reshape(logits.shape).astype(np.float64)
    if problem_type == "regression":
        return float(np.square(y - t).mean())
    return float((np.logaddexp(0, y) - t * y).mean())


def _form(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
