"""One decoder layer in float32 NumPy over whole calibration sequences, in parts: matrices are quantized in between.

The arithmetic is `edgellama.backends.reference`'s, for batches of equally long sequences without a cache. Knows no
files and nothing of quantization.
"""

from __future__ import annotations

import numpy as np

from edgellama.backends.reference import ACTIVATIONS
from edgellama.config import LlamaConfig
from edgellama.rope import cos_sin

_SCORES_BYTES = 4 << 20  # held at a time: they should stay in a cache


class Linear:
    """y = x W^T + b"""

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None = None):
        self.weight, self.bias = weight, bias

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """[tokens, in] -> [tokens, out]"""
        y = x @ self.weight.T
        if self.bias is not None:
            y += self.bias
        return y


class LayerMath:
    """The parts of a layer that are the same in every layer. Sequences lie one after another in [tokens, ...]."""

    def __init__(self, config: LlamaConfig, seq_len: int):
        self.config, self.seq_len = config, seq_len
        self._cos, self._sin = (part[:, None, :] for part in cos_sin(config, np.arange(seq_len), seq_len))
        self._mask = np.triu(np.full((seq_len, seq_len), -np.inf, np.float32), 1)

    def norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        variance = np.mean(x * x, axis=-1, keepdims=True)
        return weight * (x / np.sqrt(variance + np.float32(self.config.rms_norm_eps)))

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """float32 [tokens, heads * head_dim] of projected inputs -> what o_proj takes, the same shape as q."""
        config = self.config
        out = np.empty_like(q)
        shape = (self.seq_len, -1, config.head_dim)
        shared = config.num_attention_heads // config.num_key_value_heads
        together = max(1, _SCORES_BYTES // (4 * self.seq_len**2 * shared))  # KV heads whose scores are held at once
        for first in range(0, len(q), self.seq_len):
            here = slice(first, first + self.seq_len)
            queries = self._rotate(q[here].reshape(shape)).transpose(1, 0, 2)  # [heads, T, head_dim]
            keys = self._rotate(k[here].reshape(shape)).transpose(1, 2, 0)  # [kv_heads, head_dim, T]
            values = v[here].reshape(shape).transpose(1, 0, 2)
            merged = out[here].reshape(shape)
            for head in range(0, config.num_key_value_heads, together):
                some = slice(head, head + together)
                group = queries[head * shared : (head + together) * shared]
                scores = np.matmul(group.reshape(-1, shared, *group.shape[1:]), keys[some, None])
                scores *= np.float32(config.head_dim**-0.5)
                scores += self._mask
                scores -= scores.max(axis=-1, keepdims=True)
                np.exp(scores, out=scores)
                scores /= scores.sum(axis=-1, keepdims=True)
                mixed = np.matmul(scores, values[some, None])  # [some, shared, T, head_dim]
                merged[:, head * shared : (head + together) * shared] = mixed.reshape(-1, *mixed.shape[2:]).transpose(
                    1, 0, 2
                )
        return out

    def gated(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """What down_proj takes."""
        return ACTIVATIONS[self.config.hidden_act](gate) * up

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        """Turn each pair (x[i], x[i + head_dim/2]) of x [T, heads, head_dim] by its position's angle."""
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * self._cos - b * self._sin, b * self._cos + a * self._sin], axis=-1)
