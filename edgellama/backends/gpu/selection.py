"""The next token chosen on the device: greedy, or top_k, top_p, min_p and temperature, as `sampling` has them.

The random number comes from the caller, so a seed gives the token that the host's sampler would give, up to rounding of
the logits. Shapes do not depend on values: a CUDA graph can hold it. Knows logits and five numbers a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch


@dataclass(frozen=True)
class Choice:
    """How to choose one token; the defaults are greedy. `u`, at least 0 and below 1: where to draw."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    u: float = 0.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


def as_rows(choices: Sequence[Choice]) -> torch.Tensor:
    """float64 [R, 5], on the CPU."""
    return torch.tensor([astuple(each) for each in choices], dtype=torch.float64)


def choose(logits: torch.Tensor, choices: torch.Tensor | None) -> torch.Tensor:
    """logits float32 [R, V], choices float64 [R, 5] of `Choice`s (None: greedy) -> int64 [R].

    -1 for a row whose largest logit is not finite. Equal logits: the lower id.
    """
    if choices is None:
        best, ids = logits.max(dim=1).values, logits.argmax(dim=1)
        return torch.where(torch.isfinite(best), ids, -1)
    temperature, top_k, top_p, min_p, u = (column[:, None] for column in choices.unbind(1))
    ordered, order = torch.sort(logits, dim=1, descending=True, stable=True)
    gap = ordered.to(torch.float64) - ordered[:, :1].to(torch.float64)  # 0, then falling
    rank = torch.arange(logits.shape[1], device=logits.device)[None]
    kept = (rank < top_k) | (top_k == 0)
    likely = torch.exp(gap) * kept
    cumulative = torch.cumsum(likely / likely.sum(dim=1, keepdim=True), dim=1)
    before = torch.cat((torch.full_like(cumulative[:, :1], -1), cumulative[:, :-1]), dim=1)
    kept &= (before < top_p) | (top_p >= 1)
    kept &= (gap >= torch.log(min_p)) | (rank == 0)  # log(0) keeps all
    weights = torch.exp(gap / temperature.clamp(min=1e-30)) * kept
    # The Sampler draws among candidates by falling logit where there is a top_k, else by rising id.
    by_id = top_k == 0
    total = torch.cumsum(torch.where(by_id, torch.zeros_like(weights).scatter(1, order, weights), weights), dim=1)
    index = (total <= u * total[:, -1:]).sum(dim=1, keepdim=True)
    index = torch.minimum(index, (total < total[:, -1:]).sum(dim=1, keepdim=True))  # never one without weight
    ids = torch.where(by_id, index, order.gather(1, index))
    ids = torch.where(temperature == 0, order[:, :1], ids)[:, 0]
    return torch.where(torch.isfinite(ordered[:, 0]), ids, -1)
