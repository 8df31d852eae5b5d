"""The static KV cache of the torch backend: allocated once, written in place, its addresses never change.

    keys, values    [layer][slot][kv_head][n_ctx][head_dim]
    scales          float32 [layer][slot][kv_head][n_ctx], of an int8 cache, for keys and for values

One head's positions are contiguous, so attention streams them. Knows positions and heads, not tokens or attention.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ...config import LlamaConfig
from ...kv_cache import check_slot_arrays

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float32": torch.float32,  # for comparisons with the oracle
}


class Cache:
    """Keys and values of `n_slots` sequences of up to `n_ctx` positions; `kind` is a name in `DTYPES`."""

    def __init__(self, config: LlamaConfig, n_ctx: int, n_slots: int, kind: str, device: torch.device):
        self._config, self._n_ctx, self.kind = config, n_ctx, kind
        shape = config.num_hidden_layers, n_slots, config.num_key_value_heads, n_ctx, config.head_dim
        self.keys = torch.zeros(shape, dtype=DTYPES[kind], device=device)
        self.values = torch.zeros_like(self.keys)
        scales_shape = shape[:-1] if kind == "int8" else (shape[0], 0)
        self.key_scales = torch.zeros(scales_shape, dtype=torch.float32, device=device)
        self.value_scales = torch.zeros_like(self.key_scales)

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self._parts().values())

    def _parts(self) -> dict[str, torch.Tensor]:
        parts = {"keys": self.keys, "values": self.values}
        if self.kind == "int8":
            parts |= {"key_scales": self.key_scales, "value_scales": self.value_scales}
        return parts

    def write(self, layer: int, slots: torch.Tensor, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k, v [T, kv_heads, head_dim] at `positions` of `slots` (int64 [T] each)."""
        for new, into, scales in ((k, self.keys, self.key_scales), (v, self.values, self.value_scales)):
            if self.kind == "int8":
                new, scale = quantize(new.to(torch.float32))
                scales[layer][slots, :, positions] = scale
            into[layer][slots, :, positions] = new.to(into.dtype)

    def read(self, layer: int, slot: int, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `length` positions, [kv_heads, length, head_dim] each, in `dtype`."""
        found = []
        for stored, scales in ((self.keys, self.key_scales), (self.values, self.value_scales)):
            part = stored[layer, slot, :, :length]
            if self.kind == "int8":
                part = part.to(torch.float32) * scales[layer, slot, :, :length, None]
            found.append(part.to(dtype))
        return found[0], found[1]

    def copy(self, source: int, target: int, n: int, start: int = 0) -> None:
        """Positions [start, n) of slot `source` to slot `target`, bit by bit; the target's others stay."""
        if source == target:
            return
        for part in self._parts().values():
            part[:, target, :, start:n] = part[:, source, :, start:n]

    def read_slot(self, slot: int, n: int) -> dict[str, np.ndarray]:
        """The first `n` positions of a slot as new arrays; see `kv_cache.slot_arrays`."""
        return {name: _as_array(part[:, slot, :, :n]) for name, part in self._parts().items()}

    def write_slot(self, slot: int, data: Mapping[str, np.ndarray]) -> None:
        """Put back what `read_slot` of a cache of this kind, of any length, took out. ValueError for anything else."""
        n = check_slot_arrays(self._config, self.kind, self._n_ctx, data)
        for name, part in self._parts().items():
            array = torch.from_numpy(np.ascontiguousarray(data[name]))
            part[:, slot, :, :n] = (array.view(torch.bfloat16) if self.kind == "bfloat16" else array).to(part.device)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., head_dim] -> codes (float32, whole numbers) and scales float32 [...]: absmax / 127.

    Rounds halves up, which is what the kernels' arithmetic has.
    """
    top = x.abs().amax(dim=-1)
    factor = torch.where(top > 1e-30, 127.0 / top, torch.zeros_like(top))
    return torch.floor(x * factor[..., None] + 0.5), top / 127.0


def _as_array(part: torch.Tensor) -> np.ndarray:
    part = part.to("cpu", copy=True).contiguous()
    return part.view(torch.uint16).numpy() if part.dtype == torch.bfloat16 else part.numpy()
