"""Log-probabilities of logits. Knows one row of logits."""

import math

import numpy as np


def log_sum_exp(logits: np.ndarray) -> float:
    """log(sum(exp(logits))); exact to 1e-6."""
    best = float(logits.max())
    return best + math.log(float(np.exp(logits - logits.dtype.type(best)).sum(dtype=np.float64)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The natural logarithms of the probabilities, float32 [vocab_size]."""
    return logits - logits.dtype.type(log_sum_exp(logits))


def top_logprobs(logits: np.ndarray, token_id: int, k: int) -> tuple[float, list[tuple[int, float]]]:
    """(log-probability of `token_id`, the k most probable as (id, log-probability), best first).

    >>> top_logprobs(np.log(np.array([0.2, 0.8], np.float32)), 0, 1)     # up to rounding
    (-1.609, [(1, -0.223)])
    """
    from edgellama.sampling.filters import top_k

    total = log_sum_exp(logits)
    best: list[tuple[int, float]] = []
    if k > 0:
        ids, kept = top_k(logits, k)
        best = [(index, value - total) for index, value in zip(ids.tolist(), kept.tolist(), strict=True)]
    return float(logits[token_id]) - total, best
