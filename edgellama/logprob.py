"""Log-probabilities of logits, for whoever compares whole texts. Knows arrays only, no sampling."""

import numpy as np

from edgellama.errors import EdgellamaError


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64, over the last axis. Raises EdgellamaError for logits with NaN or infinity on top.

    float64 because these are summed over a text: a float32 logit is exact in it, so nothing is added to its own error.
    """
    top = logits.max(axis=-1, keepdims=True)
    if not np.isfinite(top).all():
        raise EdgellamaError(
            "the model's logits are not finite: its weights are damaged or overflow; `edgellama verify` tells which"
        )
    shifted = logits.astype(np.float64) - top
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def token_logprobs(logits: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """float64 [R]: of the token that came, `token_ids` int [R], after each row of `logits` [R, vocab_size].

    >>> float(np.exp(token_logprobs(np.log([[0.75, 0.25]]), np.array([1])))[0])
    0.25
    """
    return np.take_along_axis(log_softmax(logits), np.asarray(token_ids, np.int64)[:, None], axis=-1)[:, 0]
