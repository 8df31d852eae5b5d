"""One decoder layer in float32 NumPy over whole calibration sequences, in parts: matrices are quantized in between.

The arithmetic is `edgellama.backends.reference`'s, for batches of equally long sequences without a cache. Knows no
files and nothing of quantization.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from edgellama.backends.layerwise import rotate
from edgellama.backends.reference import ACTIVATIONS
from edgellama.config import LlamaConfig
from edgellama.rope import cos_sin

from ..checkpoint import row_slabs
from .parts import each, each_part

_TILE = 512  # tokens, and rows of a matrix, of a product that is one thread's
_NUMBERS = 1 << 18  # of whatever is done element by element, at a time


Array: TypeAlias = Any
"""float32 of an arithmetic's own (`arithmetic`): `np.ndarray`, or a `torch.Tensor` on its device."""


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b"""

    weight: Array
    bias: Array | None = None


def whole_sequences(config: LlamaConfig, seq_len: int, nbytes: int) -> int:
    """Tokens of as many sequences, at least one, as have a widest activation of up to `nbytes` in float32."""
    widest = max(config.intermediate_size, config.num_attention_heads * config.head_dim, config.hidden_size)
    return max(1, nbytes // (4 * widest * seq_len)) * seq_len


class LayerMath:
    """The parts of a layer that are the same in every layer. Sequences lie one after another in [tokens, ...]."""

    def __init__(self, config: LlamaConfig, seq_len: int, pool: Executor | None = None):
        self.config, self.seq_len, self._pool = config, seq_len, pool
        self._cos, self._sin = cos_sin(config, np.arange(seq_len), seq_len)
        self._mask = np.triu(np.full((seq_len, seq_len), -np.inf, np.float32), 1)

    def linear(self, linear: Linear, x: np.ndarray) -> np.ndarray:
        """[tokens, in] -> [tokens, out]"""
        weight, bias = linear.weight, linear.bias
        y = np.empty((len(x), len(weight)), np.float32)

        def multiply(t: int, t_end: int, row: int, row_end: int) -> None:
            here = y[t:t_end, row:row_end]
            np.matmul(x[t:t_end], weight[row:row_end].T, out=here)
            if bias is not None:
                here += bias[row:row_end]

        places = [(*tokens, *rows) for tokens in row_slabs(len(x), _TILE) for rows in row_slabs(len(weight), _TILE)]
        each(self._pool, places, multiply)
        return y

    def norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)

        def some(t: int, end: int) -> None:
            part = x[t:end]
            variance = np.mean(part * part, axis=-1, keepdims=True)
            y[t:end] = weight * (part / np.sqrt(variance + np.float32(self.config.rms_norm_eps)))

        each_part(self._pool, len(x), max(1, _NUMBERS // x.shape[1]), some)
        return y

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """float32 [tokens, heads * head_dim] of projected inputs -> what o_proj takes, the same shape as q."""
        out = np.empty_like(q)
        heads = self.config.num_key_value_heads
        starts = range(0, len(q), self.seq_len)

        def attend(t: int, head: int) -> None:
            here = slice(t, t + self.seq_len)
            self._attend(head, q[here], k[here], v[here], out[here])

        each(self._pool, [(t, head) for t in starts for head in range(heads)], attend)
        return out

    def _attend(self, head: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray) -> None:
        """One sequence, one KV head and the query heads that share it."""
        config = self.config
        shape, shared = (self.seq_len, -1, config.head_dim), config.num_attention_heads // config.num_key_value_heads
        keys = rotate(k.reshape(shape)[:, head : head + 1], self._cos, self._sin)[:, 0].T  # [head_dim, T]
        values = v.reshape(shape)[:, head]  # [T, head_dim]
        for i in range(head * shared, (head + 1) * shared):
            query = rotate(q.reshape(shape)[:, i : i + 1], self._cos, self._sin)[:, 0]
            scores = query @ keys
            scores *= np.float32(config.head_dim**-0.5)
            scores += self._mask
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            out.reshape(shape)[:, i] = scores @ values

    def gated(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """What down_proj takes, in place of `gate`."""
        activation = ACTIVATIONS[self.config.hidden_act]

        def some(t: int, end: int) -> None:
            gate[t:end] = activation(gate[t:end]) * up[t:end]

        each_part(self._pool, len(gate), max(1, _NUMBERS // gate.shape[1]), some)
        return gate
