"""Streams a matrix: rows are read in slabs, worked on by threads in chunks, and handed on in order.

While the threads work on one slab, the caller's thread writes the one before and reads the one after, so two slabs are
all that is held. The result is the same bits for any slab, chunk or thread count: a row block's bytes depend on its
16 rows alone, and the error sums are added up in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import numpy as np

from edgellama.errors import ConvertError
from edgellama.quant import GROUP_SIZE, ROW_BLOCK, pack_f16, padded_shape

from .checkpoint import STORED, Checkpoint, SourceTensor, row_slabs, to_float32
from .quantizers import GROUP_BYTES, quantize_into
from .resources import Buffers


class TensorError(NamedTuple):
    """How far a stored tensor is from the source: sums of squares over all its weights (float64)."""

    squared_error: float
    squared_sum: float

    @property
    def relative_rms(self) -> float:
        return (self.squared_error / self.squared_sum) ** 0.5 if self.squared_sum else 0.0


class Pipeline:
    """Threads and buffers for one conversion. `on_rows(n)` is called in the caller's thread after n weights are done.

    `errors` collects a `TensorError` for each tensor that was streamed, under its source name.
    """

    def __init__(
        self, checkpoint: Checkpoint, buffers: Buffers, n_threads: int, on_weights: Callable[[int], None]
    ) -> None:
        self._checkpoint, self._buffers, self._on_weights = checkpoint, buffers, on_weights
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="convert")
        self.errors: dict[str, TensorError] = {}

    def quantized(self, tensor: SourceTensor, bits: int, method: str, scales: np.ndarray) -> Iterator[np.ndarray]:
        """Slabs uint8[blocks, K/128, 1024|2048] of packed codes, in order; fills scales float16[N/16, K/128, 16]."""
        n, k = padded_shape(*tensor.shape)
        groups = k // GROUP_SIZE
        scale_bits = scales.view(np.uint16)
        sums = np.zeros((n // ROW_BLOCK, 2))
        out = [np.empty((self._slab_rows(tensor) // ROW_BLOCK, groups, GROUP_BYTES[bits]), np.uint8) for _ in "ab"]

        def work(raw: np.ndarray, first: int, row: int, packed: np.ndarray) -> None:
            """Rows of `raw` from `row` of the slab on, which starts at row `first` of the tensor."""
            blocks = -(-len(raw) // ROW_BLOCK)
            padded = np.zeros((blocks * ROW_BLOCK, k), np.float32)
            to_float32(raw, padded[: len(raw), : tensor.shape[1]])
            begin = (first + row) // ROW_BLOCK
            here = slice(begin, begin + blocks)
            packed = packed[row // ROW_BLOCK : row // ROW_BLOCK + blocks]
            bad = quantize_into(padded, bits, method, packed, scale_bits[here], sums[here])
            if bad is not None:
                raise bad_weight(tensor, first + row + bad[0], bad[1], padded[bad])

        for slab, rows in self._stream(tensor, out, work):
            yield slab[: -(-rows // ROW_BLOCK)]
        self.errors[tensor.name] = TensorError(float(sums[:, 0].sum()), float(sums[:, 1].sum()))

    def float16(self, tensor: SourceTensor, blocked: bool) -> Iterator[np.ndarray]:
        """Slabs of the tensor as float16: rows in order, or (blocked) float16[blocks, K, 16] of the f16.r16 layout."""
        sums = np.zeros((tensor.shape[0], 2))
        rows = self._slab_rows(tensor)
        out = [np.empty((rows, tensor.shape[1]), np.float16) for _ in "ab"]

        def work(raw: np.ndarray, first: int, row: int, halves: np.ndarray) -> None:
            here = halves[row : row + len(raw)]
            values = raw
            if raw.dtype != np.float16:
                values = np.empty(raw.shape, np.float32)
                to_float32(raw, values)
            with np.errstate(over="ignore"):
                here[...] = values
            finite = np.isfinite(here)
            if not finite.all():
                bad = np.unravel_index(int(np.argmin(finite)), here.shape)
                raise bad_weight(tensor, first + row + int(bad[0]), int(bad[1]), values[bad])
            if raw.dtype != np.float16:  # float16 is kept exactly
                rows = sums[first + row : first + row + len(raw)]
                rows[:, 1] = np.square(values, dtype=np.float64).sum(axis=1)
                values -= here
                rows[:, 0] = np.square(values, dtype=np.float64).sum(axis=1)

        for slab, n in self._stream(tensor, out, work):
            yield pack_f16(slab[:n]) if blocked else slab[:n]
        self.errors[tensor.name] = TensorError(float(sums[:, 0].sum()), float(sums[:, 1].sum()))

    def equal(self, a: SourceTensor, b: SourceTensor) -> bool:
        """Whether two tensors of one shape and dtype hold the same bytes."""
        rows = self._slab_rows(a) // 2 or 1
        buffers = np.empty((2, rows, *a.shape[1:]), STORED[a.dtype])
        same = True
        for first, last in row_slabs(a.shape[0], rows):
            for buffer, tensor in zip(buffers, (a, b), strict=True):
                self._checkpoint.read_rows(tensor, first, buffer[: last - first])
            same = same and bool((buffers[0, : last - first] == buffers[1, : last - first]).all())
        return same

    def _slab_rows(self, tensor: SourceTensor) -> int:
        """Rows of a slab: whole blocks, but no more of them than the tensor has."""
        n = padded_shape(*tensor.shape)[0]
        return min(n, self._buffers.slab_rows(tensor.shape[1]))

    def _stream(
        self, tensor: SourceTensor, out: list[np.ndarray], work: Callable[[np.ndarray, int, int, np.ndarray], None]
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Yield (output buffer, rows in it) for each slab in order, `work` having filled the buffer."""
        rows, chunk = self._slab_rows(tensor), self._buffers.chunk_rows(tensor.shape[1])
        raw = [np.empty((rows, tensor.shape[1]), STORED[tensor.dtype]) for _ in "ab"]
        running: tuple[list[Future[None]], np.ndarray, int] | None = None
        for i, (first, last) in enumerate(row_slabs(tensor.shape[0], rows)):
            source, target = raw[i % 2][: last - first], out[i % 2]
            self._checkpoint.read_rows(tensor, first, source)
            jobs = [
                self._pool.submit(work, source[row:stop], first, row, target)
                for row, stop in row_slabs(last - first, chunk)
            ]
            if running is not None:
                yield self._finish(running, tensor)
            running = jobs, target, last - first
        if running is not None:
            yield self._finish(running, tensor)

    def _finish(
        self, running: tuple[list[Future[None]], np.ndarray, int], tensor: SourceTensor
    ) -> tuple[np.ndarray, int]:
        jobs, target, rows = running
        for job in jobs:
            job.result()
        self._on_weights(rows * tensor.shape[1])
        return target, rows

    def close(self) -> None:
        """Wait for the chunks that are being worked on, drop the others."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def bad_weight(tensor: SourceTensor, row: int, column: int, value: float) -> ConvertError:
    """The error for a weight that no scale can hold."""
    where = f"tensor {tensor.name}: weight [{row}, {column}] is {value:g}"
    if np.isfinite(value):
        return ConvertError(f"{where}, too large for a float16; this checkpoint cannot be converted")
    return ConvertError(f"{where}; the checkpoint is damaged, download it again")
