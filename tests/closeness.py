"""How close two sets of logits are: in numbers of the oracle's tests, with the bars and where they come from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# The reference backend against transformers, both float32: largest difference over the range of the logits. Rounding
# alone gives 5e-7 to 1e-6 (sums of up to 1536 products and some 15 matrices in a row, in another order). The smallest
# real mistake that was tried, gelu's tanh form for the exact one, gives 1.2e-4.
ORACLE_TOLERANCE = 1e-5

# A backend with rounded activations and an fp16 cache against the reference, in nats a token (int4 weights themselves
# cost 0.06 to 0.4 on real models). Measured on the random models: 1e-6 with 15-bit activations; 0.0001 to 0.0023 with 8
# bits, and the same when nothing is done but round the reference's own activations so.
MAX_KL = 0.003
MIN_GREEDY_AGREEMENT = 0.97

# Random logits are full of near ties, where a greedy choice is a coin toss. A divergence of d comes of an error of some
# sqrt(2 d) in each logit, which moves the difference of two by sqrt(2) as much: where a random model is run with mostly
# 8-bit activations (the default from 576 wide on), a choice counts as agreeing if the reference's own best leads it by
# less than two such errors. Without this margin the agreement is 94 to 99 % there (576 wide: 96.5 % of 4000 choices).
TIE_MARGIN = 2 * math.sqrt(2) * math.sqrt(2 * MAX_KL)


def relative_error(logits: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the range of `expected`."""
    return float(np.abs(logits - expected).max() / np.ptp(expected))


def kl_divergence(expected: np.ndarray, logits: np.ndarray) -> float:
    """Mean over the positions of KL(softmax(expected) || softmax(logits)), in nats; both [T, vocab_size]."""
    log_p, log_q = _log_softmax(expected), _log_softmax(logits)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())


def greedy_agreement(expected: np.ndarray, logits: np.ndarray, tie_margin: float = 0.0) -> float:
    """Share of the positions whose most likely token is that of `expected`, or there within `tie_margin` nats of it."""
    chosen = np.take_along_axis(expected, logits.argmax(axis=-1)[:, None], axis=-1)[:, 0]
    return float((expected.max(axis=-1) - chosen <= tie_margin).mean())


def all_logits(backend: Any, tokens: np.ndarray) -> np.ndarray:
    """float32 [T, vocab_size]: one sequence in one call, in slot 0."""
    return _forward(backend, tokens, range(len(tokens)))


def stepwise_logits(backend: Any, tokens: np.ndarray, prefill: int) -> np.ndarray:
    """float32 [T, vocab_size]: `prefill` tokens in one call, the rest one by one."""
    logits = [all_logits(backend, tokens[:prefill])]
    logits += [_forward(backend, tokens[i : i + 1], [i]) for i in range(prefill, len(tokens))]
    return np.concatenate(logits)


def _forward(backend: Any, tokens: np.ndarray, positions: Any) -> np.ndarray:
    slots, rows = np.zeros(len(tokens), np.int32), np.arange(len(tokens), dtype=np.int32)
    return backend.forward(np.asarray(tokens, np.int32), np.asarray(positions, np.int32), slots, rows)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
