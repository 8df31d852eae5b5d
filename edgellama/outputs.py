"""What a forward pass over a batch gives back, in the shape of transformers' output classes, as NumPy arrays.

Knows names only. As there, `output["logits"]` and `output[0]` work too, and what is None is left out of both.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from edgellama.past import SequenceCache


class ModelOutput:
    """Access by name or number to the fields that are there."""

    def keys(self) -> list[str]:
        return [each.name for each in fields(self) if getattr(self, each.name) is not None]  # type: ignore[arg-type]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]


@dataclass(frozen=True)
class CausalLMOutputWithPast(ModelOutput):
    """`loss`: a number, where there are labels. `logits`: float32 [B, T, vocab_size].

    `hidden_states`: of the embedding and after each layer, the last one normalized: num_hidden_layers + 1 arrays
    float32 [B, T, hidden_size]. `attentions`: the weights of each layer, float32 [B, heads, T, past + T]. Rows (and of
    attentions, columns) of padding are 0.
    """

    loss: float | None
    logits: np.ndarray
    past_key_values: SequenceCache | None = None
    hidden_states: tuple[np.ndarray, ...] | None = None
    attentions: tuple[np.ndarray, ...] | None = None


@dataclass(frozen=True)
class SequenceClassifierOutputWithPast(CausalLMOutputWithPast):
    """`logits`: float32 [B, num_labels], at each sequence's last token that is not padding; the rest as above."""
