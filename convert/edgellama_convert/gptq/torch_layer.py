"""One decoder layer in float32 torch over whole calibration sequences: `layer.LayerMath` for a GPU.

Knows no files and nothing of quantization. Attention is written out: torch's fused kernels differ between GPUs, and are
free to round the factors of a product.
"""

from __future__ import annotations

import numpy as np
import torch

from edgellama.backends.gpu.plain import ACTIVATIONS, rotate
from edgellama.config import LlamaConfig
from edgellama.rope import cos_sin

from ..checkpoint import row_slabs
from .layer import Linear

_SCORES = 1 << 24
"""Attention scores that are held at once: 64 MiB, and twice that for a moment."""


class TorchLayerMath:
    """The parts of a layer that are the same in every layer. Sequences lie one after another in [tokens, ...]."""

    def __init__(self, config: LlamaConfig, seq_len: int, device: torch.device):
        self.config, self.seq_len, self.device = config, seq_len, device
        angles = cos_sin(config, np.arange(seq_len), seq_len)
        self._cos, self._sin = (torch.from_numpy(each).to(device)[:, None] for each in angles)  # [T, 1, head_dim / 2]
        self._mask = torch.full((seq_len, seq_len), -torch.inf, dtype=torch.float32, device=device).triu(1)

    def linear(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] -> [tokens, out]"""
        return torch.nn.functional.linear(x, linear.weight, linear.bias)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        variance = x.square().mean(dim=-1, keepdim=True)
        return weight * (x / torch.sqrt(variance + self.config.rms_norm_eps))

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """float32 [tokens, heads * head_dim] of projected inputs -> what o_proj takes, the same shape as q."""
        config, t = self.config, self.seq_len
        out = torch.empty_like(q)
        together = max(1, _SCORES // (config.num_attention_heads * t * t))
        for first, last in row_slabs(len(q) // t, together):
            here = slice(first * t, last * t)
            heads = (each[here].unflatten(0, (-1, t)).unflatten(2, (-1, config.head_dim)) for each in (q, k, v))
            out[here] = self._attend(*heads).flatten(0, 1).flatten(1)
        return out

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Whole sequences: [sequences, T, heads, head_dim], and as many heads of k and v as there are."""
        t, width, kv_heads = self.seq_len, self.config.head_dim, self.config.num_key_value_heads
        q, k = rotate(q, self._cos, self._sin), rotate(k, self._cos, self._sin)
        # Query heads that share keys stand below each other: [sequences, kv_heads, shared * T, head_dim]
        queries = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(len(q), kv_heads, -1, width)
        scores = queries @ k.permute(0, 2, 3, 1)
        scores *= width**-0.5
        scores = scores.unflatten(2, (-1, t)).add_(self._mask).softmax(dim=-1).flatten(2, 3)
        attended = scores @ v.permute(0, 2, 1, 3)
        return attended.unflatten(2, (-1, t)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What down_proj takes."""
        return ACTIVATIONS[self.config.hidden_act](gate).mul_(up)
