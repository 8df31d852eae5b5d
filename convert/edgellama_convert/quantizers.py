"""Quantizers: blocks of 16 float32 rows to packed codes and scales, ready for the file.

Knows: the arithmetic of one group of 128 weights and where its bytes go in a row block. Does not know files, names,
threads or models. `edgellama.quant` is the oracle: `rtn` here gives the bits of `quantize_rtn` + `pack_*` there.

Two methods choose a group's float16 scale `s`; codes are then always `clip(rint(x / s))`:

- `rtn`: absmax / 7 (or / 127). Elementwise IEEE operations only.
- `search`: the scale of `scale_search`, kept where its error is below `rtn`'s. Errors count in proportion to the
  weight's size (|x| + rms of the group): a large weight's error is felt more than as many small ones, on every model
  measured (benchmarks/LOG.md), and no text is needed to know it.

Both give the same bits on every machine and for any division of the rows: every sum has an order that the code spells
out. No fast-math, no contraction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgellama.backends.cpu.halves import from_half, to_half
from edgellama.backends.cpu.jit import entry_point, kernel
from edgellama.quant import GROUP_SIZE, ROW_BLOCK, ZERO_POINT, padded_shape

from .scale_search import LANES, ROUND, WORK_ROWS, choose_scales

METHODS = ("rtn", "search")
GROUP_BYTES = {4: GROUP_SIZE * ROW_BLOCK // 2, 8: GROUP_SIZE * ROW_BLOCK}
"""Bytes of one (row block, group) of packed codes, by bits."""

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
def _set_errors(x, scale, zero, errors):
    """float64[128]: a group minus what its codes say with `scale`, which is not 0."""
    low, high = np.float32(-zero), np.float32(zero - 1)
    for i in range(GROUP_SIZE):
        q = min(max((x[i] / scale + ROUND) - ROUND, low), high)
        errors[i] = np.float64(x[i]) - np.float64(q * scale)  # the product is exact: at most 19 bits


@kernel
def _felt(errors, roots, weighted):
    """Sum of the squared errors by importance, whose square roots are `roots` float64[128]."""
    for i in range(GROUP_SIZE):
        weighted[i] = errors[i] * roots[i]
    return _sum_of_squares(weighted)


@kernel
def _set_importance(x, importance, rms):
    """|x| + rms of the group, for groups float32[128, LANES]; the rms of each lane into `rms`."""
    rms[:] = 0
    for i in range(GROUP_SIZE):
        for r in range(LANES):
            rms[r] += x[i, r] * x[i, r]
    for r in range(LANES):
        rms[r] = np.sqrt(rms[r] / np.float32(GROUP_SIZE))
    for i in range(GROUP_SIZE):
        for r in range(LANES):
            importance[i, r] = abs(x[i, r]) + rms[r]


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
    errors, roots, weighted = np.empty(GROUP_SIZE), np.empty(GROUP_SIZE), np.empty(GROUP_SIZE)
    lanes = np.empty((GROUP_SIZE, LANES), np.float32)
    importance = np.empty((GROUP_SIZE, LANES), np.float32)
    work = np.empty((WORK_ROWS, LANES), np.float32)
    found = np.empty(LANES, np.float32)
    found_halves = np.empty(LANES, np.uint16)
    rms = np.zeros(LANES, np.float32)
    for block in range(n_blocks):
        error = 0.0
        energy = 0.0
        for group in range(n_groups):
            here = slice(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
            for r in range(ROW_BLOCK):
                row = block * ROW_BLOCK + r
                largest = _absmax_bits(w_bits[row, here])
                if largest >= _INFINITY_BITS:
                    return row * n_groups + group
                half = to_half(np.int32(largest).view(np.float32) / np.float32(zero - 1))
                if half >= _HALF_INFINITY:
                    return row * n_groups + group
                scales[block, group, r] = half
            if search:
                for r in range(ROW_BLOCK):
                    x = w[block * ROW_BLOCK + r, here]
                    for i in range(GROUP_SIZE):
                        lanes[i, r] = x[i]
                _set_importance(lanes, importance, rms)
                choose_scales(lanes, importance, zero, work, found, found_halves)
            for r in range(ROW_BLOCK):
                x = w[block * ROW_BLOCK + r, here]
                errors[:] = x
                row_energy = _sum_of_squares(errors)
                row_error = row_energy
                scale = from_half(scales[block, group, r])
                if scale != 0:
                    _set_errors(x, scale, zero, errors)
                    row_error = _sum_of_squares(errors)
                    if search and found[r] != 0:
                        for i in range(GROUP_SIZE):
                            roots[i] = np.sqrt(np.float64(importance[i, r]))
                        felt = _felt(errors, roots, weighted)
                        _set_errors(x, found[r], zero, errors)
                        if _felt(errors, roots, weighted) < felt:
                            scales[block, group, r], scale = found_halves[r], found[r]
                            row_error = _sum_of_squares(errors)
                energy += row_energy
                error += row_error
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
