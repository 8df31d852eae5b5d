"""A checkpoint whose tensors are made from what is stored: renamed, cut out of fused ones, averaged, extended.

`DerivedCheckpoint` looks like the `Checkpoint` below it: whoever streams rows need not know that a row is computed
while it is read. So nothing is ever held but the rows asked for, and nothing is written beside the source.

Knows rows of numbers, not what a tensor means (`siblings`, `surgery`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from edgellama.errors import ConvertError

from .checkpoint import STORED, Checkpoint, SourceTensor, to_float32

Span = tuple[int, int]
"""(first, last + 1) of rows."""


class Part(Protocol):
    """How one tensor comes about. `dtype` as in safetensors; `read` fills `raw` with rows from `first` on."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self, checkpoint: Checkpoint, first: int, raw: np.ndarray) -> None: ...


Derive = Callable[[Mapping[str, SourceTensor]], tuple[Mapping[str, Part], Iterable[str]]]
"""The tensors there are -> (new ones by name, names of those that they are made of and replace)."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor, span after span; all of them by default, which renames it."""

    base: SourceTensor
    spans: tuple[Span, ...] = ()

    @property
    def dtype(self) -> str:
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        if not self.spans:
            return self.base.shape
        return (sum(last - first for first, last in self.spans), *self.base.shape[1:])

    @property
    def _spans(self) -> tuple[Span, ...]:
        return self.spans or ((0, self.base.shape[0]),)

    def read(self, checkpoint: Checkpoint, first: int, raw: np.ndarray) -> None:
        done = 0
        for start, stop in self._spans:
            n = min(stop - start - first, len(raw) - done)
            if n > 0:
                checkpoint.read_rows(self.base, start + first, raw[done : done + n])
                done += n
            first = max(0, first - (stop - start))
            if done == len(raw):
                return


@dataclass(frozen=True)
class ZeroRow:
    """A tensor whose row `row` is zero, and any before it that it did not have: a token that says nothing."""

    base: SourceTensor
    row: int

    @property
    def dtype(self) -> str:
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (max(self.base.shape[0], self.row + 1), *self.base.shape[1:])

    def read(self, checkpoint: Checkpoint, first: int, raw: np.ndarray) -> None:
        stored = min(max(0, self.base.shape[0] - first), len(raw))
        if stored:
            checkpoint.read_rows(self.base, first, raw[:stored])
        raw[stored:] = 0
        if first <= self.row < first + len(raw):
            raw[self.row - first] = 0


@dataclass(frozen=True)
class PooledHeads:
    """The mean of each `group` neighbouring heads of `head_dim` rows, in float32."""

    base: SourceTensor
    head_dim: int
    group: int

    dtype = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.base.shape[0] // self.group, *self.base.shape[1:])

    def read(self, checkpoint: Checkpoint, first: int, raw: np.ndarray) -> None:
        done = 0
        while done < len(raw):  # the rows of one head at a time
            head, row = divmod(first + done, self.head_dim)
            out = raw[done : done + self.head_dim - row]
            stored = np.empty(out.shape, STORED[self.base.dtype])
            values = np.empty(out.shape, np.float32)
            out[...] = 0
            for member in range(head * self.group, (head + 1) * self.group):
                checkpoint.read_rows(self.base, member * self.head_dim + row, stored)
                to_float32(stored, values)
                out += values
            out /= np.float32(self.group)
            done += len(out)


@dataclass(frozen=True)
class Zeros:
    """A tensor that nobody stored because it is zero."""

    shape: tuple[int, ...]
    dtype: str = "F32"

    def read(self, checkpoint: Checkpoint, first: int, raw: np.ndarray) -> None:
        raw[...] = 0


class DerivedCheckpoint(Checkpoint):
    """A `Checkpoint` with the `steps` applied to its tensors, each to the result of those before it."""

    def __init__(self, folder: Path, steps: Iterable[Derive]):
        super().__init__(folder)
        self._parts: dict[SourceTensor, Part] = {}
        try:
            for number, step in enumerate(steps):
                made, used = step(self.tensors)
                for name in used:
                    del self.tensors[name]
                for name, part in made.items():
                    if name in self.tensors:
                        raise ConvertError(f"tensor {name} is there twice, the second time under another name")
                    nbytes = int(np.prod(part.shape)) * STORED[part.dtype].itemsize if part.dtype in STORED else 0
                    # No file has such a name: a derived tensor never equals a stored one.
                    tensor = SourceTensor(name, f"derived/{number}", part.dtype, part.shape, 0, nbytes)
                    self.tensors[name] = tensor
                    self._parts[tensor] = part
        except BaseException:
            self.close()
            raise

    def read_rows(self, tensor: SourceTensor, first: int, raw: np.ndarray) -> None:
        part = self._parts.get(tensor)
        if part is None:
            super().read_rows(tensor, first, raw)
        else:
            part.read(self, first, raw)
