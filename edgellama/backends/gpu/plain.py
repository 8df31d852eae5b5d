"""Llama's forward pass as torch operations, in the order of `reference.py`: prefill, and all of it without Triton.

The residual stream, norms and RoPE are float32; matrices and attention compute in the weights' dtype (16 bits, and so
on the tensor cores, on a GPU). A matrix is dequantized when it is needed. Knows one flat batch of tokens; does not know
chunks, rows or what the cache holds beyond what it asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ...config import LlamaConfig
from .cache import Cache
from .weights import Weights

MASKED_SCORES = 1 << 26
"""Queries x heads x keys that attention under a mask takes at once: bounds what an unfused kernel of torch keeps."""

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class Sequence:
    """The tokens of one slot in a batch, and what they may see."""

    slot: int
    index: torch.Tensor | slice  # which tokens of the batch
    length: int  # positions to read from the cache
    causal: bool  # token t sees exactly positions 0..t: torch needs no mask
    positions: torch.Tensor  # int64 [t]


def sequences(positions: np.ndarray, slots: np.ndarray, device: torch.device) -> list[Sequence]:
    """Split a flat batch by slot."""
    found = []
    for slot in np.unique(slots):
        here = np.flatnonzero(slots == slot)
        own = positions[here].astype(np.int64)
        everything = here.size == slots.size
        found.append(
            Sequence(
                int(slot),
                slice(None) if everything else torch.from_numpy(here).to(device),
                1 + int(own.max()),
                bool((own == np.arange(own.size)).all()),
                torch.from_numpy(own).to(device),
            )
        )
    return found


class Program:
    """The layers of one model over one cache."""

    def __init__(self, config: LlamaConfig, weights: Weights, cache: Cache):
        self._config, self._weights, self._cache = config, weights, cache

    def run(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        cos: np.ndarray,
        sin: np.ndarray,
        checkpoint: Callable[[], None],
    ) -> torch.Tensor:
        """The residual stream after the last layer, float32 [T, hidden_size]; keys and values are in the cache.

        cos, sin: float32 [T, head_dim / 2]. `checkpoint` is called before each layer and may raise.
        """
        config, weights = self._config, self._weights
        device, dtype, width = weights.device, weights.dtype, config.head_dim
        batch = sequences(positions, slots, device)
        where = (
            torch.from_numpy(slots.astype(np.int64)).to(device),
            torch.from_numpy(positions.astype(np.int64)).to(device),
        )
        angles = torch.from_numpy(cos).to(device)[:, None], torch.from_numpy(sin).to(device)[:, None]
        act = ACTIVATIONS[config.hidden_act]
        x = weights.embed(torch.from_numpy(tokens.astype(np.int64)).to(device))

        for i in range(config.num_hidden_layers):
            checkpoint()
            layer = f"model.layers.{i}"

            def linear(x: torch.Tensor, name: str, layer: str = layer) -> torch.Tensor:
                return weights.linear(x, weights.matrix(f"{layer}.{name}"))

            h = self.norm(x, f"{layer}.input_layernorm").to(dtype)
            q, k, v = (linear(h, f"self_attn.{name}_proj").unflatten(1, (-1, width)) for name in "qkv")
            q, k = rotate(q, *angles).to(dtype), rotate(k, *angles)
            self._cache.write(i, *where, k, v)
            attended = torch.empty_like(q)
            for each in batch:
                keys, values = self._cache.read(i, each.slot, each.length, dtype)
                attended[each.index] = attention(q[each.index], keys, values, each)
            x = x + linear(attended.flatten(1), "self_attn.o_proj")

            h = self.norm(x, f"{layer}.post_attention_layernorm").to(dtype)
            inner = act(linear(h, "mlp.gate_proj"))
            inner *= linear(h, "mlp.up_proj")
            x = x + linear(inner, "mlp.down_proj")
        return x

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """RMSNorm in float32."""
        variance = x.square().mean(dim=-1, keepdim=True)
        return self._weights.vector(f"{name}.weight") * (x * torch.rsqrt(variance + self._config.rms_norm_eps))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normed hidden states [R, hidden_size] -> float32 [R, vocab_size].

        In float32 whatever the weights' dtype: bfloat16 would round logits of 20 by up to 0.06.
        """
        return self._weights.linear(hidden, self._weights.head, torch.float32)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + head_dim/2]) of x [T, heads, head_dim] by its angle, [T, 1, head_dim/2]; float32."""
    a, b = x.to(torch.float32).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, own: Sequence) -> torch.Tensor:
    """q [t, heads, head_dim] of one slot; keys, values [kv_heads, length, head_dim] -> [t, heads, head_dim].

    A group of query heads that shares keys becomes torch's batch of heads, the keys being expanded without a copy.
    """
    t, heads, head_dim = q.shape
    kv_heads, length, _ = keys.shape
    padding = -head_dim % 8  # torch's fused kernels take multiples of 8; zeros change no product
    if padding:
        q, keys, values = (F.pad(each, (0, padding)) for each in (q, keys, values))
    queries = q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [kv_heads, group, t, head_dim]
    keys, values = (each[:, None].expand(-1, queries.shape[1], -1, -1) for each in (keys, values))

    def attend(part: slice, mask: torch.Tensor | None, causal: bool = False) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            queries[:, :, part], keys, values, attn_mask=mask, is_causal=causal, scale=head_dim**-0.5
        )

    if t == 1:  # its own position is the last one
        out = attend(slice(None), None)
    elif own.causal:
        out = attend(slice(None), None, causal=True)
    else:
        step = max(1, MASKED_SCORES // (heads * length))
        places = torch.arange(length, device=q.device)
        parts = [slice(start, start + step) for start in range(0, t, step)]
        out = torch.cat([attend(part, places <= own.positions[part, None]) for part in parts], dim=2)
    return out.permute(2, 0, 1, 3).flatten(1, 2)[..., :head_dim]
