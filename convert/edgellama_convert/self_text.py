"""Text that a model writes itself, for calibration without a data set: ids sampled from an int4 version of it.

Many sequences are written at once by the CPU backend, whose logits do not depend on threads or batches. They start with
BOS and go on at temperature 1, through ends of text: what comes after one is how the model was trained to begin.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgellama.backends.cpu import CpuBackend
from edgellama.errors import ConvertError
from edgellama.format import open_model
from edgellama.kv_cache import bytes_per_position

_TOGETHER = 32
_CACHE_BYTES = 2 << 30
"""At most, of the KV cache of those that are written at once."""
_SEED = 20231


def sample(model: Path, sequences: int, length: int, bos_id: int | None, n_threads: int) -> np.ndarray:
    """int32[sequences, length]; where there is no BOS, sequences start with different tokens, drawn at random.

    ConvertError if the model's logits are not finite.
    """
    rng = np.random.default_rng(_SEED)
    with open_model(model) as file:
        vocab_size = file.config.vocab_size
        ids = np.empty((sequences, length), np.int32)
        ids[:, 0] = rng.integers(vocab_size, size=sequences) if bos_id is None else bos_id
        together = min(_TOGETHER, sequences, max(1, _CACHE_BYTES // (bytes_per_position(file.config) * length)))
        backend = CpuBackend(file, length, n_slots=together, n_threads=n_threads)
        try:
            for first in range(0, sequences, together):
                rows = ids[first : first + together]
                slots = np.arange(len(rows), dtype=np.int32)
                for position in range(length - 1):
                    logits = backend.forward(rows[:, position], np.full(len(rows), position), slots, slots)
                    if not np.isfinite(logits).all():
                        raise ConvertError("the model cannot write text to calibrate with: its weights overflow")
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
    ids = [np.searchsorted(row, target, side="right") for row, target in pairs]
    return np.minimum(ids, logits.shape[1] - 1)  # a point just below 1 may be rounded to it
