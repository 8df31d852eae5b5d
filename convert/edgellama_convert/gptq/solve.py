"""Quantizes one matrix given the second moments of its input: GPTQ as a Cholesky factor and blocked feedback.

With inputs X [tokens, in] of the quantized model, the Hessian of the squared output error is H = X^T X. Factored as
H = A D A^T with A unit upper triangular, the error of codes chosen one input after the other is sum D_k e_k^2, where
e_k is input k's rounding error after all errors before it were made up for: E A, column by column (Chee et al. 2023,
QuIP, theorem 6: this is GPTQ, Frantar et al. 2022, without its inverse). Then rounds of coordinate descent lower
tr(E H E^T) further, scales and codes in turn.

Float32 in BLAS, blocks of fixed sizes; the loops inside a group are `kernels`. Knows no files and no model.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from edgellama.quant import GROUP_SIZE, ZERO_POINT

from ..checkpoint import row_slabs
from ..scale_search import LANES
from .kernels import quantize_group, refine_group
from .parts import each, each_part

DAMPING = 0.05
"""Of the Hessian's mean diagonal, added to its diagonal: what calibration text cannot know."""
FEEDBACK = 0.75
"""Share of the error made so far that a matrix is asked to undo: all of it would fit the calibration text too well."""
REFINEMENTS = 2
_BLOCK = GROUP_SIZE
PANEL = 512  # inputs, or rows, of a product that is one thread's
_ROWS_OF_A_JOB = 16 * LANES


@dataclass
class Moments:
    """Sums over calibration tokens: what a matrix's input is like, and what the quantized model lacks by now.

    hessian: X^T X, float32[in, in], X the input in the quantized model; above the diagonal and near it only, until
    `complete`. lack: R^T X, float32[lacking, in]. R is what X lacks of the source's input, where several matrices share
    it; for a matrix whose output goes to the residual stream, what that stream would lack of the source's, were the
    matrix left as it is. The latter is cheaper where there are fewer outputs than inputs.
    """

    hessian: np.ndarray
    lack: np.ndarray

    @classmethod
    def zeros(cls, in_features: int, lacking: int) -> Moments:
        return cls(np.zeros((in_features, in_features), np.float32), np.zeros((lacking, in_features), np.float32))

    def add(self, x: np.ndarray, lacks: np.ndarray, pool: Executor | None = None) -> None:
        """Count in inputs float32[tokens, in] and what is lacking, float32[tokens, lacking]."""
        panels = list(row_slabs(x.shape[1], PANEL))

        def count(row: int, row_end: int, begin: int, end: int) -> None:
            self.hessian[row:row_end, begin:end] += x[:, row:row_end].T @ x[:, begin:end]

        each(pool, [(*rows, *columns) for columns in panels for rows in panels if rows <= columns], count)

        def count_lack(row: int, row_end: int) -> None:
            self.lack[row:row_end] += lacks[:, row:row_end].T @ x

        each_part(pool, lacks.shape[1], PANEL, count_lack)

    def complete(self) -> None:
        """Mirror the Hessian."""
        for begin, end in row_slabs(len(self.hessian), PANEL):
            self.hessian[begin:end, :begin] = self.hessian[:begin, begin:end].T


class Factor:
    """H = R R^T of a damped Hessian, R upper triangular; solves with it. Inverts blocks on the diagonal only."""

    def __init__(self, hessian: np.ndarray, pool: Executor | None = None):
        """`hessian` is damped in place, more than `DAMPING` only where rounding needs it."""
        diagonal = np.diagonal(hessian).copy()
        mean = float(diagonal.mean(dtype=np.float64)) or 1.0
        damping = DAMPING
        while True:
            np.fill_diagonal(hessian, diagonal + np.float32(damping * mean))
            try:
                self.r, self.inverses = _factor(hessian, pool)
                break
            except np.linalg.LinAlgError:
                damping *= 4
        self.hessian = hessian

    def solve(self, b: np.ndarray) -> None:
        """b H^-1 in place of `b`, float32[rows, in]."""
        r = self.r
        blocks = list(row_slabs(len(r), _BLOCK))
        for (begin, end), inverse in zip(reversed(blocks), reversed(self.inverses), strict=True):
            b[:, begin:end] -= b[:, end:] @ r[begin:end, end:].T
            b[:, begin:end] = b[:, begin:end] @ inverse.T
        for (begin, end), inverse in zip(blocks, self.inverses, strict=True):
            b[:, begin:end] -= b[:, :begin] @ r[:begin, begin:end]
            b[:, begin:end] = b[:, begin:end] @ inverse


@dataclass
class Codes:
    """A quantized matrix: codes uint8[out, in], scales float16[out, groups], and target - dequantized, float32."""

    codes: np.ndarray
    scales: np.ndarray
    errors: np.ndarray


def shift(weights: np.ndarray, lack: np.ndarray, of_output: bool) -> np.ndarray:
    """What to add to H-weighted least squares' right side: what is lacking by now, seen through the input.

    lack: as in `Moments`, of this matrix's output or of its input. float32[out, in]; `Factor.solve` turns it into a
    change of the weights.
    """
    return np.float32(FEEDBACK) * (lack if of_output else weights @ lack)


def quantize_matrix(target: np.ndarray, factor: Factor, bits: int = 4, pool: Executor | None = None) -> Codes:
    """Codes of 4 or 8 bits and scales for float32[out, in] that keep the output close, over the inputs of `factor`."""
    rows, k = target.shape
    zero = ZERO_POINT[bits]
    groups = list(row_slabs(k, _BLOCK))
    hessian, r = factor.hessian, factor.r
    diagonal = np.diagonal(r)
    importance = np.diagonal(hessian) / np.float32(np.diagonal(hessian).mean(dtype=np.float64))
    codes = np.empty((rows, k), np.uint8)
    scales = np.empty((len(groups), rows), np.uint16)
    errors = np.empty((rows, k), np.float32)

    def quantize(i: int, j: int) -> None:
        """Rows are independent of each other."""
        ours, found = target[i:j], errors[i:j]
        for g, (begin, end) in enumerate(groups):
            here = slice(begin, end)
            unit = r[here, here] / diagonal[here]
            adjusted = ours[:, here] + (found[:, :begin] @ r[:begin, here]) @ factor.inverses[g]
            quantize_group(
                adjusted, ours[:, here], unit, importance[here], zero, codes[i:j, here], scales[g, i:j], found[:, here]
            )
        for _ in range(REFINEMENTS):
            for g, (begin, end) in enumerate(groups):
                here = slice(begin, end)
                gradient, block = found @ hessian[:, here], np.ascontiguousarray(hessian[here, here])
                refine_group(gradient, ours[:, here], block, zero, codes[i:j, here], scales[g, i:j], found[:, here])

    each_part(pool, rows, _ROWS_OF_A_JOB, quantize)
    return Codes(codes, np.ascontiguousarray(scales.T).view(np.float16), errors)


def _factor(h: np.ndarray, pool: Executor | None) -> tuple[np.ndarray, list[np.ndarray]]:
    """(R, inverses of its diagonal blocks); block columns from the last to the first. LinAlgError: not positive."""
    r = np.zeros_like(h)
    inverses = []
    for begin, end in reversed(list(row_slabs(len(h), _BLOCK))):
        here = slice(begin, end)
        column = np.empty((end, end - begin), np.float32)

        def subtract(i: int, j: int, here: slice = here, end: int = end, column: np.ndarray = column) -> None:
            column[i:j] = h[i:j, here] - r[i:j, end:] @ r[here, end:].T

        each_part(pool, end, PANEL, subtract)
        lower = np.linalg.cholesky(column[begin:][::-1, ::-1].astype(np.float64))  # of the flipped block
        upper = lower[::-1, ::-1]
        inverse = np.linalg.inv(upper)
        inverses.append(np.ascontiguousarray(inverse, np.float32))
        r[here, here] = upper
        r[:begin, here] = column[:begin] @ inverses[-1].T
    inverses.reverse()
    return r, inverses
