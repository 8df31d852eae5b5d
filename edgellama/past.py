"""`SequenceCache`: the keys and values of a batch of sequences, for a caller to keep: fork, crop, copy, go on from.

Each sequence is a handle on a slot of the backend's cache. It stays there as long as nobody else needs the place; then
its contents are taken out into memory, and put back, into any slot, when the sequence goes on. So there can be more of
them than slots. Knows slots and their contents, not how they are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np

from edgellama.generate.engine import Engine
from edgellama.generate.slots import Slot


class Row:
    """One sequence: its first `n` places, in `slot` or saved (of which the first `n_saved` are right), or both."""

    def __init__(self, engine: Engine, n: int = 0, saved: Mapping[str, np.ndarray] | None = None):
        self.engine, self.n = engine, n
        self.slot: Slot | None = None
        """Where it is now; the slot table sets it."""
        self._saved, self._n_saved = saved, n if saved is not None else 0

    def save(self) -> None:
        """Take out what is only in the slot: somebody else is about to get it, or wants a copy."""
        if self.slot is not None and self.n > self._n_saved:
            self._saved, self._n_saved = self.engine.backend.read_slot(self.slot.index, self.n), self.n

    def restore(self) -> None:
        """Put it into the slot that it has just been given."""
        if self.n and self._saved is not None and self.slot is not None:
            self.engine.backend.write_slot(self.slot.index, {k: v[:, :, : self.n] for k, v in self._saved.items()})

    def crop(self, n: int) -> None:
        self.n, self._n_saved = min(self.n, n), min(self._n_saved, n)

    def fork(self) -> Row:
        """A twin that goes its own way; the saved arrays are shared, and never written."""
        self.save()
        return Row(self.engine, self.n, self._saved)


class SequenceCache:
    """What `forward` returns as `past_key_values`, and takes: it is extended in place, as transformers' caches are.

    >>> out = llm.forward([[1, 15, 27]], use_cache=True)
    >>> draft = out.past_key_values.copy()
    >>> llm.forward([[5]], past_key_values=draft).logits.shape, out.past_key_values.get_seq_length()
    ((1, 1, 32000), 3)
    """

    def __init__(
        self,
        engine: Engine,
        exclusive: Callable[[], AbstractContextManager[object]],
        rows: Sequence[Row],
        mask: np.ndarray,
    ):
        """`exclusive()`: the model to oneself. `mask`: bool [B, columns], False where a column is padding."""
        self.engine, self._exclusive = engine, exclusive
        self.rows, self.mask = list(rows), mask

    @property
    def batch_size(self) -> int:
        return len(self.rows)

    def get_seq_length(self) -> int:
        """Columns, padding included."""
        return self.mask.shape[1]

    __len__ = get_seq_length

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` columns only; of a negative number: all but so many."""
        length = self.get_seq_length()
        end = min(length, max_length if max_length >= 0 else max(0, length + max_length))
        with self._exclusive():
            self.mask = self.mask[:, :end]
            for row, mask in zip(self.rows, self.mask, strict=True):
                row.crop(int(mask.sum()))

    def copy(self) -> SequenceCache:
        """The same sequences once more: what one goes on with does not touch the other."""
        return self.select(range(self.batch_size))

    def fork(self, n: int) -> SequenceCache:
        """A new cache in which every sequence stands `n` times, one beside the other (`batch_repeat_interleave`)."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        return self.select([i for i in range(self.batch_size) for _ in range(n)])

    def select(self, indices: Sequence[int] | np.ndarray) -> SequenceCache:
        """A new cache with these sequences, each as often as it is named (as for beams)."""
        chosen = [int(i) for i in indices]
        for i in chosen:
            if not 0 <= i < self.batch_size:
                raise ValueError(f"there is no sequence {i}: the cache has {self.batch_size}")
        with self._exclusive():
            rows = [self.rows[i].fork() for i in chosen]
        return SequenceCache(self.engine, self._exclusive, rows, self.mask[chosen])

    def __deepcopy__(self, memo: object) -> SequenceCache:
        return self.copy()

    def __repr__(self) -> str:
        return f"<SequenceCache of {self.batch_size} sequences, {self.get_seq_length()} columns>"
