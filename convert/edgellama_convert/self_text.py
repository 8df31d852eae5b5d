"""Text that a model writes itself, for calibration without a data set: ids sampled from an int4 version of it.

All sequences are written at once by the CPU backend, whose logits do not depend on threads or batches. They start with
BOS and go on at temperature 1, through ends of text: what comes after one is how the model was trained to begin.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgellama.backends.cpu import CpuBackend
from edgellama.format import open_model

_TOGETHER = 32
_SEED = 20231


def sample(model: Path, sequences: int, length: int, bos_id: int | None, n_threads: int) -> np.ndarray:
    """int32[sequences, length]; where there is no BOS, sequences start with different tokens, drawn at random."""
    rng = np.random.default_rng(_SEED)
    with open_model(model) as file:
        vocab_size = file.config.vocab_size
        ids = np.empty((sequences, length), np.int32)
        ids[:, 0] = rng.integers(vocab_size, size=sequences) if bos_id is None else bos_id
        together = min(_TOGETHER, sequences)
        backend = CpuBackend(file, length, n_slots=together, n_threads=n_threads)
        try:
            for first in range(0, sequences, together):
                rows = ids[first : first + together]
                slots = np.arange(len(rows), dtype=np.int32)
                for position in range(length - 1):
                    logits = backend.forward(rows[:, position], np.full(len(rows), position), slots, slots)
                    rows[:, position + 1] = _draw(logits, rng.random(len(rows)))
        finally:
            backend.close()
    return ids


def _draw(logits: np.ndarray, points: np.ndarray) -> np.ndarray:
    """One id for each row of logits [n, vocab]: the inverse of the cumulative distribution at `points` in [0, 1)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    cumulative = np.cumsum(np.exp(shifted), axis=1)
    targets = points * cumulative[:, -1]
    pairs = zip(cumulative, targets, strict=True)
    return np.array([np.searchsorted(row, target, side="right") for row, target in pairs])
