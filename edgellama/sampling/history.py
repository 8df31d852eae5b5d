"""What a sequence has said so far, kept so that a step need not go through it again. Knows ids only."""

import copy

import numpy as np


class History:
    """The ids of one sequence: its prompt, then what was generated. Appending costs O(1) on average."""

    def __init__(self, prompt_ids: np.ndarray):
        self.prompt_size = self.size = prompt_ids.size
        self._buffer = np.empty(max(64, 2 * self.size), np.int32)
        self._buffer[: self.size] = prompt_ids

    @property
    def ids(self) -> np.ndarray:
        """int32 [size], read-only; valid until the next append."""
        view = self._buffer[: self.size]
        view.flags.writeable = False
        return view

    @property
    def generated(self) -> int:
        return self.size - self.prompt_size

    def append(self, token_id: int) -> None:
        if self.size == self._buffer.size:
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        self._buffer[self.size] = token_id
        self.size += 1

    def ends_with(self, ids: tuple[int, ...]) -> bool:
        size = len(ids)
        return size <= self.size and tuple(self._buffer[self.size - size : self.size].tolist()) == ids

    def fork(self) -> "History":
        twin = copy.copy(self)
        twin._buffer = self._buffer.copy()
        return twin


class Counts:
    """How often each id occurs among the last ones: id -> row of two parallel arrays, which a step can use whole.

    `window` -1: among all.
    """

    def __init__(self, ids: np.ndarray, window: int):
        self._window = window
        recent = ids if window < 0 else ids[max(0, ids.size - window) :]
        unique, counts = np.unique(recent, return_counts=True)
        self._used = unique.size
        self._ids = np.concatenate([unique, np.zeros(64, unique.dtype)])
        self._counts = np.concatenate([counts, np.zeros(64, counts.dtype)])
        self._rows = {index: row for row, index in enumerate(unique.tolist())}

    def add(self, token_id: int, ids_before: np.ndarray) -> None:
        """One more, after `ids_before`: the oldest of a full window leaves."""
        if self._window == 0:
            return
        if 0 < self._window <= ids_before.size:
            self._counts[self._rows[int(ids_before[-self._window])]] -= 1
        row = self._rows.get(token_id)
        if row is None:
            row = self._rows[token_id] = self._used
            if row == self._ids.size:
                self._ids, self._counts = (np.concatenate([each, each]) for each in (self._ids, self._counts))
            self._ids[row], self._counts[row] = token_id, 0
            self._used += 1
        self._counts[row] += 1

    def present(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids, counts) of those that occur."""
        ids, counts = self._ids[: self._used], self._counts[: self._used]
        if self._window < 0:
            return ids, counts
        kept = np.flatnonzero(counts)
        return ids[kept], counts[kept]

    def fork(self) -> "Counts":
        twin = copy.copy(self)
        twin._ids, twin._counts, twin._rows = self._ids.copy(), self._counts.copy(), self._rows.copy()
        return twin
