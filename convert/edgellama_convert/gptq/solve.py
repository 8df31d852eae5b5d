"""Quantizes one matrix given the second moments of its input: GPTQ as a Cholesky factor and blocked feedback.

With inputs X [tokens, in] of the quantized model, the Hessian of the squared output error is H = X^T X. Factored as
H = A D A^T with A unit upper triangular, the error of codes chosen one input after the other is sum D_k e_k^2, where
e_k is input k's rounding error after all errors before it were made up for: E A, column by column (Chee et al. 2023,
QuIP, theorem 6: this is GPTQ, Frantar et al. 2022, without its inverse). Then rounds of coordinate descent lower
tr(E H E^T) further, scales and codes in turn.

Float32 in BLAS, blocks of fixed sizes; the loops inside a group are `kernels`. Knows no files and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from edgellama.quant import GROUP_SIZE

from ..scale_search import LANES
from .kernels import quantize_group, refine_group

DAMPING = 0.05
"""Of the Hessian's mean diagonal, added to its diagonal: what calibration text cannot know."""
FEEDBACK = 0.75
"""Share of the error made so far that a matrix is asked to undo: all of it would fit the calibration text too well."""
REFINEMENTS = 2
_BLOCK = GROUP_SIZE
_PANEL = 1024
_ROWS_OF_A_JOB = 8 * LANES

Run = Callable[[Callable[[int, int], None], int], None]


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

    def add(self, x: np.ndarray, lacks: np.ndarray) -> None:
        """Count in inputs float32[tokens, in] and what is lacking, float32[tokens, lacking]."""
        for begin, end in _blocks(x.shape[1], _PANEL):  # half of the products, and faster than NumPy's syrk
            self.hessian[:end, begin:end] += x[:, :end].T @ x[:, begin:end]
        self.lack += lacks.T @ x

    def complete(self) -> None:
        """Mirror the Hessian."""
        for begin, end in _blocks(len(self.hessian), _PANEL):
            self.hessian[begin:end, :begin] = self.hessian[:begin, begin:end].T


class Factor:
    """H = R R^T of a damped Hessian, R upper triangular; solves with it. Inverts blocks on the diagonal only."""

    def __init__(self, hessian: np.ndarray):
        """`hessian` is damped in place, more than `DAMPING` only where rounding needs it."""
        diagonal = np.diagonal(hessian).copy()
        mean = float(diagonal.mean(dtype=np.float64)) or 1.0
        damping = DAMPING
        while True:
            np.fill_diagonal(hessian, diagonal + np.float32(damping * mean))
            try:
                self.r, self._inverses = _factor(hessian)
                break
            except np.linalg.LinAlgError:
                damping *= 4
        self.hessian = hessian

    def solve(self, b: np.ndarray) -> None:
        """b H^-1 in place of `b`, float32[rows, in]."""
        r = self.r
        blocks = list(_blocks(len(r)))
        for (begin, end), inverse in zip(reversed(blocks), reversed(self._inverses), strict=True):
            b[:, begin:end] -= b[:, end:] @ r[begin:end, end:].T
            b[:, begin:end] = b[:, begin:end] @ inverse.T
        for (begin, end), inverse in zip(blocks, self._inverses, strict=True):
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


def quantize_matrix(target: np.ndarray, factor: Factor, pool: ThreadPoolExecutor) -> Codes:
    """int4 codes and scales for float32[out, in] that keep the output close, over the inputs behind `factor`."""
    rows, k = target.shape
    groups = list(_blocks(k))
    hessian, r = factor.hessian, factor.r
    diagonal = np.diagonal(r)
    importance = np.diagonal(hessian) / np.float32(np.diagonal(hessian).mean(dtype=np.float64))
    codes = np.empty((rows, k), np.uint8)
    scales = np.empty((len(groups), rows), np.uint16)
    errors = np.empty((rows, k), np.float32)
    for g, (begin, end) in enumerate(groups):
        here = slice(begin, end)
        unit = r[here, here] / diagonal[here]
        adjusted = target[:, here] + (errors[:, :begin] @ r[:begin, here]) / diagonal[here]

        def choose(i: int, j: int, g: int = g, here: slice = here, adjusted=adjusted, unit=unit) -> None:
            quantize_group(
                adjusted[i:j], target[i:j, here], unit, importance[here], codes[i:j, here], scales[g, i:j],
                errors[i:j, here],
            )  # fmt: skip

        _each_part(pool, rows, choose)
    for _ in range(REFINEMENTS):
        for g, (begin, end) in enumerate(groups):
            here = slice(begin, end)
            gradient = errors @ hessian[:, here]
            block = np.ascontiguousarray(hessian[here, here])

            def refine(i: int, j: int, g: int = g, here: slice = here, gradient=gradient, block=block) -> None:
                refine_group(gradient[i:j], block, codes[i:j, here], scales[g, i:j], errors[i:j, here])

            _each_part(pool, rows, refine)
    return Codes(codes, np.ascontiguousarray(scales.T).view(np.float16), errors)


def _factor(h: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """(R, inverses of its diagonal blocks); block columns from the last to the first. LinAlgError: not positive."""
    r = np.zeros_like(h)
    inverses = []
    for begin, end in reversed(list(_blocks(len(h)))):
        here = slice(begin, end)
        column = h[:end, here] - r[:end, end:] @ r[here, end:].T
        lower = np.linalg.cholesky(column[begin:][::-1, ::-1].astype(np.float64))  # of the flipped block
        upper = lower[::-1, ::-1]
        inverse = np.linalg.inv(upper)
        inverses.append(np.ascontiguousarray(inverse, np.float32))
        r[here, here] = upper
        r[:begin, here] = column[:begin] @ inverses[-1].T
    inverses.reverse()
    return r, inverses


def _blocks(k: int, size: int = _BLOCK) -> Iterator[tuple[int, int]]:
    for begin in range(0, k, size):
        yield begin, min(begin + size, k)


def _each_part(pool: ThreadPoolExecutor, rows: int, work: Callable[[int, int], None]) -> None:
    """Run `work(first, last + 1)` over all rows, in parts that do not depend on the number of threads."""
    parts: Iterable[int] = range(0, rows, _ROWS_OF_A_JOB)
    for job in [pool.submit(work, i, min(i + _ROWS_OF_A_JOB, rows)) for i in parts]:
        job.result()
