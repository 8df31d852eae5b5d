"""GPTQ's inner loops in Numba: one group of up to 128 inputs, many rows at once.

Knows: the arithmetic of a group given its Hessian. Does not know where weights and Hessians come from.

Rows are independent of each other, so a SIMD lane holds a row, and every sum runs over inputs in the order the code
spells out: the same bits for any number of threads, any division of the rows and any vector width. No fast-math.
"""

from __future__ import annotations

import numpy as np

from edgellama.backends.cpu.halves import from_half, to_half
from edgellama.backends.cpu.jit import entry_point, kernel

from ..scale_search import LANES, LARGEST_HALF, ROUND, WORK_ROWS, choose_scales


@entry_point
def quantize_group(adjusted, target, upper, weight, zero, codes, scales, errors):
    """Choose scales for a group, then codes one input after the other, each making up for the errors before it.

    adjusted float32[rows, n]: what would make up best for the groups before; target float32[rows, n]: the weights.
    upper float32[n, n]: unit upper triangular factor A of the Hessian A D A^T; weight float32[n]: of a squared error.
    zero: 8 (int4) or 128 (int8). Fills codes uint8[rows, n] (zero point added), scales uint16[rows] (float16 bits),
    errors float32[rows, n] (target - dequantized).
    """
    rows, n = adjusted.shape
    low, high, zero_point = np.float32(-zero), np.float32(zero - 1), np.float32(zero)
    x = np.empty((n, LANES), np.float32)
    importance = np.empty((n, LANES), np.float32)
    for j in range(n):
        importance[j] = weight[j]
    work = np.empty((WORK_ROWS, LANES), np.float32)
    inverse = np.empty(LANES, np.float32)
    scale = np.empty(LANES, np.float32)
    error = np.empty(LANES, np.float32)
    halves = np.empty(LANES, np.uint16)
    for first in range(0, rows, LANES):
        m = min(LANES, rows - first)
        x[:] = 0
        for r in range(m):
            for j in range(n):
                x[j, r] = adjusted[first + r, j]
        choose_scales(x, importance, zero, work, scale, halves)
        for r in range(m):
            scales[first + r] = halves[r]
        for r in range(LANES):
            inverse[r] = np.float32(1) / scale[r] if scale[r] != 0 else np.float32(0)
        error[:] = 0
        for j in range(n):
            for r in range(m):
                q = min(max((x[j, r] * inverse[r] + ROUND) - ROUND, low), high)
                codes[first + r, j] = np.uint8(q + zero_point)
                error[r] = adjusted[first + r, j] - q * scale[r]
                errors[first + r, j] = target[first + r, j] - q * scale[r]
            for i in range(j + 1, n):
                a = upper[j, i]
                for r in range(LANES):
                    x[i, r] += error[r] * a


@kernel
def _add(x, factor, row, first):
    """x[i] += factor * row[i] from i = `first` on."""
    for i in range(first, x.shape[0]):
        x[i] += factor * row[i]


@entry_point
def refine_group(gradient, target, hessian, zero, codes, scales, errors):
    """One round of coordinate descent on tr(E H E^T) over a group: first its scale, then its codes in order.

    gradient float32[rows, n]: (E H) of the group's inputs, changed here; target float32[rows, n]: the weights; hessian
    float32[n, n]: its diagonal block. Changes codes, scales and errors in place (these and zero: as in
    `quantize_group`); a step is taken only if it lowers the objective.
    """
    rows, n = gradient.shape
    low, high, zero_point = np.float32(-zero), np.float32(zero - 1), np.float32(zero)
    q = np.empty(n, np.float32)
    hq = np.empty(n, np.float32)
    for row in range(rows):
        scale = from_half(scales[row])
        if scale == 0:
            continue
        p = gradient[row]
        hq[:] = 0
        for j in range(n):
            q[j] = np.float32(codes[row, j]) - zero_point
            if q[j] != 0:
                _add(hq, q[j], hessian[j], 0)
        slope = np.float32(0)
        curve = np.float32(0)
        for j in range(n):
            slope += q[j] * p[j]
            curve += q[j] * hq[j]
        if curve > 0:
            half = to_half(scale + slope / curve)
            if half & 0x7FFF != 0 and half & 0x7FFF <= LARGEST_HALF:
                step = scale - from_half(half)
                if step * (np.float32(2) * slope + step * curve) < 0:
                    scale = from_half(half)
                    scales[row] = half
                    _add(p, step, hq, 0)
        inverse = np.float32(1) / scale
        for j in range(n):
            wish = q[j] + p[j] / hessian[j, j] * inverse
            code = min(max((wish + ROUND) - ROUND, low), high)
            if code != q[j]:
                _add(p, (q[j] - code) * scale, hessian[j], 0)
                q[j] = code
                codes[row, j] = np.uint8(code + zero_point)
            errors[row, j] = target[row, j] - q[j] * scale
