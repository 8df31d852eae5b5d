"""Quantizes one matrix given the second moments of its input, in torch: `solve` and `kernels` for a GPU.

The arithmetic is theirs up to rounding, and so are the names. Rows go side by side; the inputs of a group come one
after the other, each in four or five operations on all rows, which lie along the last dimension: [inputs, rows]. Inside
a group everything is counted in units of the row's scale, so that a code is what is there, rounded.

Float32, but for Cholesky's and the inverses of 128 x 128 blocks, which are float64. Knows no files and no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edgellama.quant import GROUP_SIZE, ZERO_POINT

from ..checkpoint import row_slabs
from ..scale_search import FIRST_4, FIRST_8, LAST_4, LAST_8, N_CANDIDATES
from . import solve
from .solve import DAMPING

_PANEL = 2048  # inputs of a product with half of a symmetric matrix
_NUMBERS = 1 << 24  # codes of several candidates that are held at once


@dataclass
class Moments:
    """`solve.Moments` on a device."""

    hessian: torch.Tensor
    lack: torch.Tensor

    @classmethod
    def zeros(cls, in_features: int, lacking: int, device: torch.device) -> Moments:
        return cls(*(torch.zeros((n, in_features), dtype=torch.float32, device=device) for n in (in_features, lacking)))

    def add(self, x: torch.Tensor, lacks: torch.Tensor) -> None:
        """Count in inputs float32[tokens, in] and what is lacking, float32[tokens, lacking]."""
        for begin, end in row_slabs(x.shape[1], _PANEL):
            self.hessian[begin:end, begin:].addmm_(x[:, begin:end].T, x[:, begin:])
        self.lack.addmm_(lacks.T, x)

    def complete(self) -> None:
        """Mirror the Hessian."""
        for begin, end in row_slabs(len(self.hessian), _PANEL):
            self.hessian[begin:end, :begin] = self.hessian[:begin, begin:end].T


class Factor:
    """H = R R^T of a damped Hessian, R upper triangular: `solve.Factor` on a device."""

    def __init__(self, hessian: torch.Tensor):
        """`hessian` is damped in place, more than `DAMPING` only where rounding needs it."""
        diagonal = hessian.diagonal().clone()
        mean = float(diagonal.mean(dtype=torch.float64)) or 1.0
        damping = DAMPING
        while True:
            hessian.diagonal().copy_(diagonal + damping * mean)
            self.r, self.inverses, positive = _factor(hessian)
            if positive:
                break
            damping *= 4
        self.hessian = hessian

    def solve(self, b: torch.Tensor) -> None:
        """b H^-1 in place of `b`, float32[rows, in]."""
        r = self.r
        blocks = list(row_slabs(len(r), GROUP_SIZE))
        for (begin, end), inverse in zip(reversed(blocks), reversed(self.inverses), strict=True):
            b[:, begin:end].addmm_(b[:, end:], r[begin:end, end:].T, alpha=-1)
            b[:, begin:end] = b[:, begin:end] @ inverse.T
        for (begin, end), inverse in zip(blocks, self.inverses, strict=True):
            b[:, begin:end].addmm_(b[:, :begin], r[:begin, begin:end], alpha=-1)
            b[:, begin:end] = b[:, begin:end] @ inverse


def _factor(h: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], bool]:
    """(R, inverses of its diagonal blocks, whether `h` is positive); block columns from the last to the first."""
    r = torch.zeros_like(h)
    inverses, failures = [], []
    for begin, end in reversed(list(row_slabs(len(h), GROUP_SIZE))):
        here = slice(begin, end)
        column = torch.addmm(h[:end, here], r[:end, end:], r[here, end:].T, alpha=-1)
        flipped = column[begin:].flip(0, 1).to(torch.float64)
        lower, failed = torch.linalg.cholesky_ex(flipped)  # `failed` stays on the device: nothing waits for it
        failures.append(failed)
        upper = lower.flip(0, 1)
        unit = torch.eye(end - begin, dtype=torch.float64, device=h.device)
        inverses.append(torch.linalg.solve_triangular(upper, unit, upper=True).to(torch.float32))
        r[here, here] = upper.to(torch.float32)
        r[:begin, here] = column[:begin] @ inverses[-1].T
    inverses.reverse()
    return r, inverses, not bool(torch.stack(failures).any())


@dataclass
class Codes:
    """`solve.Codes` on a device."""

    codes: torch.Tensor
    scales: torch.Tensor
    errors: torch.Tensor


def shift(weights: torch.Tensor, lack: torch.Tensor, of_output: bool) -> torch.Tensor:
    """`solve.shift` on a device."""
    return solve.FEEDBACK * (lack if of_output else weights @ lack)


def dequantize(codes: Codes, bits: int) -> torch.Tensor:
    """float32[out, in]; exact, as `edgellama.quant.dequantize`."""
    rows, k = codes.codes.shape
    out = torch.empty((rows, k), dtype=torch.float32, device=codes.codes.device)
    for g, (begin, end) in enumerate(row_slabs(k, GROUP_SIZE)):
        out[:, begin:end] = (codes.codes[:, begin:end].float() - ZERO_POINT[bits]) * codes.scales[:, g, None].float()
    return out


def quantize_matrix(target: torch.Tensor, factor: Factor, bits: int = 4) -> Codes:
    """int4 or int8 codes and scales for float32[out, in] that keep the output close, over the inputs behind `factor`.

    codes uint8[out, in] with the zero point added, scales float16[out, groups], errors float32[out, in].
    """
    rows, k = target.shape
    groups = list(row_slabs(k, GROUP_SIZE))
    hessian, r = factor.hessian, factor.r
    diagonal = hessian.diagonal()
    importance = diagonal / diagonal.mean(dtype=torch.float64).float()
    codes = torch.empty((rows, k), dtype=torch.uint8, device=target.device)
    scales = torch.empty((rows, len(groups)), dtype=torch.float16, device=target.device)
    errors = torch.empty_like(target)

    def keep(g: int, here: slice, q: torch.Tensor, scale: torch.Tensor) -> None:
        """Codes without the zero point and scales of a group, [n, rows] and [rows]."""
        scales[:, g] = scale
        errors[:, here] = target[:, here] - (q * scale).T
        codes[:, here] = (q + ZERO_POINT[bits]).T

    for g, (begin, end) in enumerate(groups):
        here = slice(begin, end)
        unit = r[here, here] / r.diagonal()[here]
        adjusted = target[:, here] + (errors[:, :begin] @ r[:begin, here]) @ factor.inverses[g]
        keep(g, here, *_quantize_group(adjusted.T.contiguous(), unit, importance[here], bits))
    for _ in range(solve.REFINEMENTS):
        for g, (begin, end) in enumerate(groups):
            here = slice(begin, end)
            gradient = (errors @ hessian[:, here]).T.contiguous()
            q = codes[:, here].T.float().sub_(ZERO_POINT[bits])
            keep(g, here, *_refine_group(gradient, q, scales[:, g].float(), hessian[here, here].contiguous(), bits))
    return Codes(codes, scales, errors)


def _quantize_group(
    adjusted: torch.Tensor, unit: torch.Tensor, importance: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose scales for a group, then codes one input after the other, each making up for the errors before it.

    adjusted float32[n, rows], unit float32[n, n], importance float32[n]: as in `kernels.quantize_group`. Gives codes
    float32[n, rows] without the zero point, and scales float32[rows], which are float16 numbers.
    """
    scale = choose_scales(adjusted, importance, bits)
    low, high = -ZERO_POINT[bits], ZERO_POINT[bits] - 1
    wish = adjusted * _inverse(scale)
    exact, q, error = wish.clone(), torch.empty_like(wish), torch.empty_like(scale)
    for j, (ours, aim, code) in enumerate(zip(wish.unbind(), exact.unbind(), q.unbind(), strict=True)):
        torch.round(ours, out=code).clamp_(low, high)
        torch.sub(aim, code, out=error)
        wish[j + 1 :].addr_(unit[j, j + 1 :], error)
    return q, scale


def _refine_group(
    gradient: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One round of coordinate descent on tr(E H E^T) over a group: first its scale, then its codes in order.

    gradient float32[n, rows]: (E H)^T of the group's inputs; q float32[n, rows], scale float32[rows]: its codes without
    the zero point, and scales; hessian float32[n, n]: its diagonal block. Gives new codes and scales.
    """
    along = hessian @ q
    slope, curve = (q * gradient).sum(dim=0), (q * along).sum(dim=0)
    other = (scale + slope / curve).to(torch.float16).to(torch.float32)
    step = scale - other
    better = (scale != 0) & (curve > 0) & (other != 0) & other.isfinite() & (step * (2 * slope + step * curve) < 0)
    scale = torch.where(better, other, scale)
    gradient += torch.where(better, step, 0) * along

    low, high = -ZERO_POINT[bits], ZERO_POINT[bits] - 1
    diagonal = hessian.diagonal()
    steps = gradient * _inverse(scale) / diagonal[:, None]  # how far each code is from its best, the others given
    spread = hessian / diagonal
    found, change = torch.empty_like(q), torch.empty_like(scale)
    for j, (ours, wish, code) in enumerate(zip(q.unbind(), steps.unbind(), found.unbind(), strict=True)):
        torch.add(ours, wish, out=code).round_().clamp_(low, high)
        torch.sub(ours, code, out=change)
        steps[j + 1 :].addr_(spread[j, j + 1 :], change)
    return found, scale


def choose_scales(x: torch.Tensor, importance: torch.Tensor, bits: int) -> torch.Tensor:
    """`scale_search.choose_scales` for weights float32[n, rows] and importance float32[n]: scales float32[rows].

    They are float16 numbers; 0 where all of a row is.
    """
    zero = ZERO_POINT[bits]
    first, last = (FIRST_4, LAST_4) if bits == 4 else (FIRST_8, LAST_8)
    ends = [first + (last - first) * i / (N_CANDIDATES - 1) for i in range(N_CANDIDATES)]
    long_ends = torch.tensor([sign * end for end in ends for sign in (-1, 1)], dtype=torch.float32, device=x.device)
    largest = x.abs().amax(dim=0)
    inverse_largest = _inverse(largest)
    importance = importance[:, None]
    weighted = importance * x

    def fit(inverses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of importance * q * x and of importance * q * q for the codes that [candidates, rows] give."""
        q = (x * inverses[:, None]).round_().clamp_(-zero, zero - 1)
        product = (q * weighted).sum(dim=1)
        return product, q.square_().mul_(importance).sum(dim=1)

    best, scale = torch.full_like(largest, -1), torch.zeros_like(largest)
    for begin, end in row_slabs(len(long_ends), max(1, _NUMBERS // x.numel())):
        product, square = fit(long_ends[begin:end, None] * inverse_largest)
        gain = torch.where(square > 0, product * product / square, -1)  # what least squares takes off the error
        gain, place = gain.max(dim=0)
        found = (product / square).gather(0, place[None])[0]
        scale = torch.where(gain > best, found, scale)
        best = torch.maximum(gain, best)
    scale = _as_halves(scale)
    for _ in range(2):
        product, square = fit(_inverse(scale)[None])
        scale = _as_halves(torch.where(square[0] > 0, product[0] / square[0], scale))
    return scale


def _as_halves(scale: torch.Tensor) -> torch.Tensor:
    """The nearest float16 numbers, as float32: the largest one instead of infinity, no -0."""
    largest = torch.finfo(torch.float16).max
    return scale.clamp(-largest, largest).to(torch.float16).to(torch.float32) + 0.0


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, 0 where that is 0."""
    return torch.where(scale != 0, 1 / scale, 0)
