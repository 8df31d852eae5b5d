"""Quantizers: blocks of 16 float32 rows to packed codes and scales, ready for the file.

Knows: the arithmetic of one group of 128 weights and where its bytes go in a row block. Does not know files, names,
threads or models. `edgellama.quant` is the oracle: `rtn` here gives the bits of `quantize_rtn` + `pack_*` there.

Two methods choose a group's float16 scale `s`; codes are then always `clip(rint(x / s))`:

- `rtn`: absmax / 7 (or / 127). Elementwise IEEE operations only.
- `search`: 16 scales for each sign of the long end of the code range (-8, -128); each one's codes give a least squares
  scale; the best is refitted twice, rounded to float16, and kept only if its exact squared error is below `rtn`'s.

Both give the same bits on every machine and for any division of the rows: sums that choose between candidates are
integer sums (exact in any order, so the compiler may vectorize them), and the exact errors are summed in an order the
code spells out. No fast-math, no contraction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgellama.backends.cpu.halves import from_half, to_half
from edgellama.backends.cpu.jit import entry_point, kernel
from edgellama.quant import GROUP_SIZE, ROW_BLOCK, ZERO_POINT, padded_shape

METHODS = ("rtn", "search")
GROUP_BYTES = {4: GROUP_SIZE * ROW_BLOCK // 2, 8: GROUP_SIZE * ROW_BLOCK}
"""Bytes of one (row block, group) of packed codes, by bits."""

# Adding and subtracting 1.5 * 2**23 rounds a float32 below 2**22 to an integer, ties to even, on every machine.
ROUND = np.float32(12582912.0)
_ROUND_BITS = np.int32(0x4B400000)  # of ROUND; the bits above them are the integer
N_CANDIDATES = 16
# |long end of the codes| / (absmax / scale) runs over these: above zero - 0.5 the largest weights are clipped.
FIRST_4, LAST_4 = 6.0, 12.0
_FIRST_8, _LAST_8 = 112.0, 134.0
_INFINITY_BITS = np.int32(0x7F800000)
_HALF_INFINITY = np.uint16(0x7C00)

# What `quantize_blocks` returns when every weight is fine.
ALL_FINITE = -1


@kernel
def _absmax_bits(x_bits):
    """Largest |x| of a group, as float32 bits: integers order like the magnitudes, infinity and NaN on top."""
    largest = np.int32(0)
    for i in range(GROUP_SIZE):
        largest = max(largest, np.int32(x_bits[i] & 0x7FFFFFFF))
    return largest


@kernel
def _correlate(x, x_int, inverse_scale, zero):
    """For the codes q that `inverse_scale` gives: the integer sums of q * x_int and q * q."""
    q_x = np.int32(0)
    q_q = np.int32(0)
    low, high = np.int32(-zero), np.int32(zero - 1)
    for i in range(GROUP_SIZE):
        q = np.int32(np.float32(x[i] * inverse_scale + ROUND).view(np.int32) - _ROUND_BITS)
        q = min(max(q, low), high)
        q_x = np.int32(q_x + np.int32(q * x_int[i]))
        q_q = np.int32(q_q + np.int32(q * q))
    return q_x, q_q


@kernel
def _sum_of_squares(values):
    """Of float64[128], in four lanes and then in order: an order the compiler must keep."""
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    for i in range(0, GROUP_SIZE, 4):
        a += values[i] * values[i]
        b += values[i + 1] * values[i + 1]
        c += values[i + 2] * values[i + 2]
        d += values[i + 3] * values[i + 3]
    return (a + b) + (c + d)


@kernel
def _squared_error(x, scale, zero, differences):
    """Squared error (float64) of a group with `scale`, which is not 0; `differences` is float64[128] to work in."""
    low, high = np.float32(-zero), np.float32(zero - 1)
    for i in range(GROUP_SIZE):
        q = min(max((x[i] / scale + ROUND) - ROUND, low), high)
        differences[i] = np.float64(x[i]) - np.float64(q * scale)  # the product is exact: at most 19 bits
    return _sum_of_squares(differences)


@kernel
def _search_scale(x, x_int, absmax, zero):
    """Float16 bits of the best scale found for one group; 0 where none is usable."""
    # x in integers such that a sum of 128 products with codes stays inside int32: 20 bits for int4, 16 for int8.
    unit = absmax / (np.float32(1048576.0) if zero == 8 else np.float32(65536.0))
    for i in range(GROUP_SIZE):
        x_int[i] = np.int32((x[i] / unit + ROUND) - ROUND)
    first, last = (FIRST_4, LAST_4) if zero == 8 else (_FIRST_8, _LAST_8)
    best = -1.0
    scale = 0.0
    for candidate in range(2 * N_CANDIDATES):
        end = first + (last - first) * (candidate >> 1) / (N_CANDIDATES - 1)
        inverse = np.float32(end if candidate & 1 else -end) / absmax
        q_x, q_q = _correlate(x, x_int, inverse, zero)
        if q_q > 0:
            gain = np.float64(q_x) * np.float64(q_x) / np.float64(q_q)  # what least squares takes off sum(x**2)
            if gain > best:
                best = gain
                scale = np.float64(q_x) / np.float64(q_q)
    half = np.uint16(0)
    for _ in range(3):  # round to float16; refit to that scale's codes; twice
        half = to_half(np.float32(scale * unit))
        if half & 0x7FFF == 0 or half & 0x7FFF >= _HALF_INFINITY:
            return np.uint16(0)
        q_x, q_q = _correlate(x, x_int, np.float32(1.0) / from_half(half), zero)
        if q_q > 0:
            scale = np.float64(q_x) / np.float64(q_q)
    return half


@kernel
def _encode(x, scale, zero, codes):
    """Codes (uint8, zero point added) of one group."""
    if scale == 0:
        codes[:] = zero
        return
    low, high = np.float32(-zero), np.float32(zero - 1)
    for i in range(GROUP_SIZE):
        q = (x[i] / scale + ROUND) - ROUND
        codes[i] = np.uint8(np.int32(min(max(q, low), high)) + zero)


@kernel
def _pack(codes, zero, out):
    """codes uint8[16, 128] of one (row block, group) to its bytes; FORMAT.md, int4.g128 and int8.g128."""
    if zero == 8:
        for line in range(16):
            for row in range(ROW_BLOCK):
                for j in range(4):
                    low, high = codes[row, 8 * line + j], codes[row, 8 * line + 4 + j]
                    out[64 * line + 4 * row + j] = low | (high << 4)
    else:
        for line in range(32):
            for row in range(ROW_BLOCK):
                for j in range(4):
                    out[64 * line + 4 * row + j] = codes[row, 4 * line + j]


@entry_point
def quantize_blocks(w, w_bits, zero, search, packed, scales, sums):
    """Quantize whole row blocks.

    w float32[16 * B, K] with zeros where it pads, w_bits its int32 view; zero is 8 (int4) or 128 (int8).
    Fills packed uint8[B, K/128, 1024 or 2048], scales uint16[B, K/128, 16] (float16 bits) and sums float64[B, 2]
    (squared error, squared weights of each block). Returns ALL_FINITE, or row * groups + group of the first group
    that holds a NaN, an infinity or a weight too large for a float16 scale.
    """
    n_blocks, n_groups = packed.shape[0], packed.shape[1]
    codes = np.empty((ROW_BLOCK, GROUP_SIZE), np.uint8)
    x_int = np.empty(GROUP_SIZE, np.int32)
    differences = np.empty(GROUP_SIZE, np.float64)
    for block in range(n_blocks):
        error = 0.0
        energy = 0.0
        for group in range(n_groups):
            for r in range(ROW_BLOCK):
                row = block * ROW_BLOCK + r
                x = w[row, group * GROUP_SIZE : (group + 1) * GROUP_SIZE]
                largest = _absmax_bits(w_bits[row, group * GROUP_SIZE : (group + 1) * GROUP_SIZE])
                if largest >= _INFINITY_BITS:
                    return row * n_groups + group
                absmax = np.int32(largest).view(np.float32)
                half = to_half(absmax / np.float32(zero - 1))
                if half >= _HALF_INFINITY:
                    return row * n_groups + group
                scale = from_half(half)
                differences[:] = x
                group_energy = _sum_of_squares(differences)
                group_error = group_energy if half == 0 else _squared_error(x, scale, zero, differences)
                if search and half != 0:
                    found = _search_scale(x, x_int, absmax, zero)
                    if found != 0:
                        found_error = _squared_error(x, from_half(found), zero, differences)
                        if found_error < group_error:
                            half, scale, group_error = found, from_half(found), found_error
                energy += group_energy
                scales[block, group, r] = half
                error += group_error
                _encode(x, scale, zero, codes[r])
            _pack(codes, zero, packed[block, group])
        sums[block, 0] = error
        sums[block, 1] = energy
    return ALL_FINITE


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix: packed uint8[N/16, K/128, 1024|2048], scales float16[N/16, K/128, 16] and its error.

    `squared_error` and `squared_sum` are over the matrix; the relative rms error is the root of their quotient.
    """

    packed: np.ndarray
    scales: np.ndarray
    squared_error: float
    squared_sum: float


def quantize(weights: np.ndarray, bits: int, method: str) -> Quantized:
    """Quantize float32 [out, in] in memory; ValueError where a weight is not finite or too large.

    >>> quantize(np.eye(16, 128, dtype=np.float32), 4, "rtn").packed.shape
    (1, 1, 1024)
    """
    n, k = padded_shape(*weights.shape)
    padded = np.zeros((n, k), np.float32)
    padded[: weights.shape[0], : weights.shape[1]] = weights
    packed = np.empty((n // ROW_BLOCK, k // GROUP_SIZE, GROUP_BYTES[bits]), np.uint8)
    scales = np.empty((n // ROW_BLOCK, k // GROUP_SIZE, ROW_BLOCK), np.uint16)
    sums = np.empty((n // ROW_BLOCK, 2), np.float64)
    bad = quantize_into(padded, bits, method, packed, scales, sums)
    if bad is not None:
        raise ValueError(f"weights[{bad[0]}, {bad[1]}] = {weights[bad]} cannot be quantized")
    return Quantized(packed, scales.view(np.float16), float(sums[:, 0].sum()), float(sums[:, 1].sum()))


def quantize_into(
    padded: np.ndarray, bits: int, method: str, packed: np.ndarray, scales: np.ndarray, sums: np.ndarray
) -> tuple[int, int] | None:
    """Run the kernel on whole row blocks (shapes: `quantize_blocks`); (row, column) of a bad weight, or None."""
    assert method in METHODS and bits in GROUP_BYTES
    assert padded.dtype == np.float32 and padded.flags.c_contiguous
    assert padded.shape == (packed.shape[0] * ROW_BLOCK, packed.shape[1] * GROUP_SIZE)
    assert packed.shape[2] == GROUP_BYTES[bits] and scales.shape == (*packed.shape[:2], ROW_BLOCK)
    zero = np.int32(ZERO_POINT[bits])
    bad = quantize_blocks(padded, padded.view(np.int32), zero, method == "search", packed, scales, sums)
    if bad == ALL_FINITE:
        return None
    row, group = divmod(bad, packed.shape[1])
    magnitudes = np.abs(padded[row, group * GROUP_SIZE : (group + 1) * GROUP_SIZE])
    return row, group * GROUP_SIZE + int(np.argmax(np.where(np.isnan(magnitudes), np.inf, magnitudes)))
