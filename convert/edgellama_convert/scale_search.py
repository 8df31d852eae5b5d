"""The scale of a group: many candidates, least squares, a few refits, for a block of rows at once.

Knows the arithmetic of one group of weights, each with the importance of its squared error. Knows nothing of where
weights and importances come from (`quantizers`: from the weights themselves; `gptq`: from calibration text).

Rows are independent of each other, so a SIMD lane holds a row, and every sum runs over inputs in the order the code
spells out: the same bits for any division of the rows and any vector width. No fast-math, no contraction.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from edgellama.backends.cpu.halves import from_half, to_half
from edgellama.backends.cpu.jit import kernel
from edgellama.backends.cpu.simd import (
    ADDRESS,
    F32,
    V_F32,
    emit_fma,
    emit_load,
    emit_max,
    emit_min,
    emit_offset,
    emit_splat,
    emit_store,
    vector_intrinsic,
)
from edgellama.quant import ROW_BLOCK

LANES = ROW_BLOCK
LARGEST_HALF = np.uint16(0x7BFF)
# Adding and subtracting 1.5 * 2**23 rounds a float32 below 2**22 to an integer, ties to even, on every machine.
ROUND = np.float32(12582912.0)
N_CANDIDATES = 16
# |long end of the codes| / (absmax / scale) runs over these: above zero - 0.5 the largest weights are clipped.
FIRST_4, LAST_4 = 6.0, 12.0
FIRST_8, LAST_8 = 112.0, 134.0
TOGETHER = 4  # candidates that share the loads of weights; an even number, for signs alternate
WORK_ROWS = 3 * TOGETHER + 2


def _fit(candidates: int):
    """A kernel that fits `candidates` scales at once; all by address, x and importance float32[n, LANES].

    For codes q = clip(rint(x * inverse)), inverses float32[candidates, LANES]: each lane's sums of importance * q * x
    and of importance * q * q, over the inputs in order, into sums float32[candidates, 2, LANES].
    """

    def fit(b, x, importance, n, zero, inverses, sums):
        low, high = (
            emit_splat(b, b.sitofp(each, F32)) for each in (b.neg(zero), b.sub(zero, ir.Constant(zero.type, 1)))
        )
        shift = emit_splat(b, ir.Constant(F32, float(ROUND)))
        inverse = [emit_load(b, emit_offset(b, inverses, 64 * c), V_F32, 4) for c in range(candidates)]
        cells = [cgutils.alloca_once_value(b, ir.Constant(V_F32, [0.0] * LANES)) for _ in range(2 * candidates)]
        with cgutils.for_range(b, n) as loop:
            value, weight = (emit_load(b, emit_offset(b, a, (loop.index, 64)), V_F32, 4) for a in (x, importance))
            for c in range(candidates):
                code = b.fsub(b.fadd(b.fmul(value, inverse[c]), shift), shift)
                code = emit_min(b, emit_max(b, code, low), high)
                weighted = b.fmul(weight, code)
                for cell, other in ((cells[2 * c], value), (cells[2 * c + 1], code)):
                    b.store(emit_fma(b, weighted, other, b.load(cell)), cell)
        for i, cell in enumerate(cells):
            emit_store(b, b.load(cell), emit_offset(b, sums, 64 * i), 4)

    return vector_intrinsic(types.void, *[ADDRESS] * 6)(fit)


fit_several, fit_one = _fit(TOGETHER), _fit(1)


@kernel
def choose_scales(x, importance, zero, work, scale, halves):
    """Float16 bits of each lane's scale into `halves` (uint16[LANES]), its float32 value into `scale`.

    x, importance float32[n, LANES]; zero is 8 (int4) or 128 (int8); work float32[WORK_ROWS, LANES] is for this
    function. Each of 16 scales and both signs of the long end of the codes gives codes; the codes give a least squares
    scale; the one that leaves the smallest error is rounded to float16 and refitted to its codes, twice. 0 where all
    of a lane is 0.
    """
    inverse, sums = work[:TOGETHER], work[TOGETHER : 3 * TOGETHER]
    largest, best = work[3 * TOGETHER], work[3 * TOGETHER + 1]
    largest[:] = 0
    for j in range(x.shape[0]):
        for r in range(LANES):
            largest[r] = max(largest[r], abs(x[j, r]))
    best[:] = np.float32(-1)
    scale[:] = 0
    first, last = (FIRST_4, LAST_4) if zero == 8 else (FIRST_8, LAST_8)
    places = x.ctypes.data, importance.ctypes.data, inverse.ctypes.data, sums.ctypes.data
    for candidate in range(0, 2 * N_CANDIDATES, TOGETHER):
        for c in range(TOGETHER):
            long_end = first + (last - first) * ((candidate + c) >> 1) / (N_CANDIDATES - 1)
            end = np.float32(long_end if c & 1 else -long_end)
            for r in range(LANES):
                inverse[c, r] = end / largest[r] if largest[r] > 0 else np.float32(0)
        fit_several(places[0], places[1], x.shape[0], zero, places[2], places[3])
        for c in range(TOGETHER):
            for r in range(LANES):
                product, square = sums[2 * c, r], sums[2 * c + 1, r]
                if square > 0:
                    gain = product * product / square  # what least squares takes off sum(importance * x**2)
                    if gain > best[r]:
                        best[r] = gain
                        scale[r] = product / square
    for refit in range(3):
        for r in range(LANES):
            half = to_half(scale[r])
            if half & 0x7FFF == 0:
                half = np.uint16(0)  # no -0
            elif half & 0x7FFF > LARGEST_HALF:
                half = np.uint16((half & 0x8000) | LARGEST_HALF)
            halves[r] = half
            scale[r] = from_half(half)
            inverse[0, r] = np.float32(1) / scale[r] if scale[r] != 0 else np.float32(0)
        if refit < 2:
            fit_one(places[0], places[1], x.shape[0], zero, places[2], places[3])
            for r in range(LANES):
                if sums[1, r] > 0:
                    scale[r] = sums[0, r] / sums[1, r]
