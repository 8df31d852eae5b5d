"""Kernels of the float32 forward pass: a product of matrices, and weights as the file stores them to float32.

The product gives the same bits for any number of threads, any division of its rows and on every machine: each of its
elements is one chain of fma over the inputs, in order and from zero, with a token to each lane. A BLAS promises none of
this, and what is measured with it could not be stored in a file that is to be reproduced. The speed is a BLAS's, too.
Knows arrays, not models. `edgellama.quant` is the oracle of the unpackers.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.core import cgutils

from edgellama.backends.cpu.jit import entry_point
from edgellama.backends.cpu.simd import (
    ADDRESS,
    V_F32,
    emit_broadcast_f32,
    emit_fma,
    emit_load,
    emit_offset,
    emit_store,
    vector_intrinsic,
    vexp,
    vload,
    vstore,
)
from edgellama.backends.cpu.target import TARGET
from edgellama.quant import GROUP_SIZE, ROW_BLOCK, round_up

PANEL = 16 * TARGET.attention_lines
"""Tokens whose sums lie in registers together; does not change any bit."""
_ROWS = 6  # of the weights, whose sums do: 6 x PANEL / 16 accumulators leave registers for what they are made of
_DEPTH = 1024  # inputs of a panel that stay in the cache while all rows pass


def _tile(rows: int):
    """sums[row][token] += w[row] . x[token] for `rows` rows and PANEL tokens; strides in bytes."""
    lines = PANEL // 16

    def tile(b, w, w_stride, x, depth, out, out_stride):
        places = [[emit_offset(b, out, (out_stride, r), 64 * j) for j in range(lines)] for r in range(rows)]
        cells = [[cgutils.alloca_once(b, V_F32) for _ in range(lines)] for _ in range(rows)]
        for r in range(rows):
            for j in range(lines):
                b.store(emit_load(b, places[r][j], V_F32, 4), cells[r][j])
        with cgutils.for_range(b, depth) as loop:
            loaded = [emit_load(b, emit_offset(b, x, (loop.index, 4 * PANEL), 64 * j), V_F32, 4) for j in range(lines)]
            for r in range(rows):
                weight = emit_broadcast_f32(b, emit_offset(b, w, (w_stride, r), (loop.index, 4)))
                for line, cell in zip(loaded, cells[r], strict=True):
                    b.store(emit_fma(b, weight, line, b.load(cell)), cell)
        for r in range(rows):
            for j in range(lines):
                emit_store(b, b.load(cells[r][j]), places[r][j], 4)

    return vector_intrinsic(types.void, *[ADDRESS] * 6)(tile)


_tile_many, _tile_one = _tile(_ROWS), _tile(1)


@entry_point
def _multiply(w, n_rows, w_stride, panels, n_panels, depth, out, out_stride):
    """out float32[rows, panels * PANEL] = w float32[rows, depth] @ panels float32[panels, depth, PANEL], by address."""
    for start in range(0, depth, _DEPTH):
        part = min(_DEPTH, depth - start)
        for p in range(n_panels):
            x = panels + (p * depth + start) * 4 * PANEL
            row = 0
            while row + _ROWS <= n_rows:
                here, to = w + row * w_stride + 4 * start, out + row * out_stride + 4 * PANEL * p
                _tile_many(here, w_stride, x, part, to, out_stride)
                row += _ROWS
            while row < n_rows:
                here, to = w + row * w_stride + 4 * start, out + row * out_stride + 4 * PANEL * p
                _tile_one(here, w_stride, x, part, to, out_stride)
                row += 1


class Panels:
    """A right-hand side x float32 [in, tokens], arranged once for products with many rows of weights."""

    def __init__(self, x: np.ndarray):
        depth, self.tokens = x.shape
        self._data = np.zeros((round_up(self.tokens, PANEL) // PANEL, depth, PANEL), np.float32)
        for panel, start in zip(self._data, range(0, self.tokens, PANEL), strict=True):
            part = x[:, start : start + PANEL]
            panel[:, : part.shape[1]] = part

    def product(self, w: np.ndarray) -> np.ndarray:
        """w @ x: float32 [rows, tokens] of w float32 [rows, in], whose rows are contiguous. Releases the GIL."""
        n, depth, _ = self._data.shape
        assert w.dtype == np.float32 and w.shape[1] == depth and w.strides[1] == 4
        out = np.zeros((len(w), n * PANEL), np.float32)
        _multiply(
            w.ctypes.data, len(w), w.strides[0], self._data.ctypes.data, n, depth, out.ctypes.data, out.strides[0]
        )
        return out[:, : self.tokens]


def matmul(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """w @ x in float32 with reproducible bits.

    >>> matmul(np.eye(2, dtype=np.float32), np.ones((2, 3), np.float32)).shape
    (2, 3)
    """
    return Panels(x).product(np.ascontiguousarray(w, np.float32))


@entry_point
def _exp(x, n):
    for at in range(x, x + 4 * n, 64):
        vstore(at, vexp(vload(at)))


def exp(x: np.ndarray) -> np.ndarray:
    """e**x of float32, within 3 ulp and the same on every machine, which NumPy's is not; at most e**88."""
    padded = np.zeros(round_up(x.size, 16), np.float32)
    values = padded[: x.size].reshape(x.shape)
    values[...] = x
    _exp(padded.ctypes.data, padded.size)
    return values


def row_buffer(rows: int, columns: int) -> np.ndarray:
    """float32 [rows, columns], not set; rows a cache line longer than they need, for powers of two share cache sets."""
    return np.empty((rows, round_up(columns, 16) + 16), np.float32)[:, :columns]


@entry_point
def _unpack_int4(packed, scales, out):
    for block in range(packed.shape[0]):
        for group in range(packed.shape[1]):
            for line in range(16):
                k = group * GROUP_SIZE + 8 * line
                for row in range(ROW_BLOCK):
                    scale = np.float32(scales[block, group, row])
                    for j in range(4):
                        pair = np.int32(packed[block, group, 64 * line + 4 * row + j])
                        out[block * ROW_BLOCK + row, k + j] = np.float32((pair & 15) - 8) * scale
                        out[block * ROW_BLOCK + row, k + 4 + j] = np.float32((pair >> 4) - 8) * scale


@entry_point
def _unpack_int8(packed, scales, out):
    for block in range(packed.shape[0]):
        for group in range(packed.shape[1]):
            for line in range(32):
                k = group * GROUP_SIZE + 4 * line
                for row in range(ROW_BLOCK):
                    scale = np.float32(scales[block, group, row])
                    for j in range(4):
                        code = np.int32(packed[block, group, 64 * line + 4 * row + j]) - 128
                        out[block * ROW_BLOCK + row, k + j] = np.float32(code) * scale


def unpack(packed: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """Stored codes uint8[B, G, 1024|2048] and scales float16[B, G, 16] to weights float32 `out` [16 * B, 128 * G]."""
    assert out.shape == (packed.shape[0] * ROW_BLOCK, packed.shape[1] * GROUP_SIZE)
    kernel = _unpack_int4 if packed.shape[2] == GROUP_SIZE * ROW_BLOCK // 2 else _unpack_int8
    kernel(packed, scales.astype(np.float32), out)
