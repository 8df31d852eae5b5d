"""A decoder layer backwards, in float32 NumPy over whole sequences: from the gradient of its output to its input's.

On the way it tells what a small change of each unit of matrices does to the loss. The forward arithmetic is
`gptq.layer`'s. Knows no files, no loss, and nothing of quantization. The oracle is torch's autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor

import numpy as np

from edgellama.backends.layerwise import rotate
from edgellama.backends.reference import ACTIVATIONS
from edgellama.format.schema import UNITS
from edgellama.rope import cos_sin

from .checkpoint import row_slabs
from .gptq.driver import DOWN, GATE_UP, QKV, O
from .gptq.layer import LayerMath, Linear
from .gptq.parts import each, each_part

_TILE = 512  # tokens, and inputs of a matrix, of a product that is one thread's
_NUMBERS = 1 << 18  # of whatever is done element by element, at a time
_STEP = np.float32(2**-6)  # of an activation's slope: truncation and rounding are both below 1e-4

OnInput = Callable[[str, np.ndarray], None]
"""(unit of `UNITS`, its input [tokens, in])"""
Change = Callable[[str, np.ndarray], np.ndarray]
"""(name of a matrix in `UNITS`, its input [tokens, in]) -> how its output changes, [tokens, out]"""


class Layer:
    """One layer: `matrices` by their names in `UNITS`, and the weights of its two norms."""

    def __init__(self, math: LayerMath, matrices: Mapping[str, Linear], norms: Sequence[np.ndarray], pool: Executor):
        self._math, self._matrices, self._norms, self._pool = math, matrices, norms, pool
        self._cos, self._sin = cos_sin(math.config, np.arange(math.seq_len), math.seq_len)

    def forward(self, x: np.ndarray, on_input: OnInput = lambda unit, x: None) -> np.ndarray:
        """[tokens, hidden] -> the same of the next layer; tells what goes into each unit."""
        h, _, middle, attended = self._attention(x)
        h2, gate, up = self._gate_up(middle)
        inner = self._math.gated(gate, up)
        for unit, each_input in ((QKV, h), (O, attended), (GATE_UP, h2), (DOWN, inner)):
            on_input(unit, each_input)
        return middle + self._linear(DOWN, inner)

    def backward(self, x: np.ndarray, gradient: np.ndarray, change: Change) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Of this input and the gradient of this layer's output: (the gradient of the input, what moves the loss).

        The latter: unit -> float32[tokens], the first order's change of the loss where that unit alone is changed, by
        the position whose output of the unit (of attention, for q, k and v) is another then.
        """
        moved: dict[str, np.ndarray] = {}
        h, (q, k, v), middle, attended = self._attention(x)
        h2, gate, up = self._gate_up(middle)
        active, slope = self._activate(gate)
        active_up = active * up
        moved[DOWN] = _dot(gradient, change(DOWN, active_up))
        d_inner = self._back([DOWN], [gradient])
        d_gate, d_up = d_inner * up * slope, d_inner * active
        gate_name, up_name = UNITS[GATE_UP]
        moved[GATE_UP] = _dot(d_gate, change(gate_name, h2)) + _dot(d_up, change(up_name, h2))
        d_middle = self._back(UNITS[GATE_UP], [d_gate, d_up])
        d_middle = gradient + self._norm_back(d_middle, middle, self._norms[1])
        moved[O] = _dot(d_middle, change(O, attended))
        d_attended = self._back([O], [d_middle])
        changed = [each + change(name, h) for name, each in zip(UNITS[QKV], (q, k, v), strict=True)]
        # Not by the outputs of k and v: what all keys have in common moves nothing, and each of them would seem to.
        moved[QKV] = _dot(d_attended, self._math.attention(*changed) - attended)
        d_x = self._back(UNITS[QKV], self._attention_back(q, k, v, d_attended))
        return d_middle + self._norm_back(d_x, x, self._norms[0]), moved

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return self._math.linear(self._matrices[name], x)

    def _attention(self, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], np.ndarray, np.ndarray]:
        """(normed input, [q, k, v], the residual stream behind attention, what went into o_proj)"""
        h = self._math.norm(x, self._norms[0])
        qkv = [self._linear(name, h) for name in UNITS[QKV]]
        attended = self._math.attention(*qkv)
        return h, qkv, x + self._linear(O, attended), attended

    def _gate_up(self, middle: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        h = self._math.norm(middle, self._norms[1])
        gate, up = (self._linear(name, h) for name in UNITS[GATE_UP])
        return h, gate, up

    def _activate(self, gate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(activation, its slope) of each number."""
        function = ACTIVATIONS[self._math.config.hidden_act]
        active, slope = np.empty_like(gate), np.empty_like(gate)

        def some(t: int, end: int) -> None:
            part = gate[t:end]
            active[t:end] = function(part)
            slope[t:end] = (function(part + _STEP) - function(part - _STEP)) / (2 * _STEP)

        each_part(self._pool, len(gate), max(1, _NUMBERS // gate.shape[1]), some)
        return active, slope

    def _back(self, names: Sequence[str], gradients: Sequence[np.ndarray]) -> np.ndarray:
        """Gradients of the outputs of matrices with one input -> the gradient of that input, [tokens, in]."""
        weights = [self._matrices[name].weight for name in names]
        out = np.zeros((len(gradients[0]), weights[0].shape[1]), np.float32)

        def multiply(t: int, t_end: int, i: int, i_end: int) -> None:
            for gradient, weight in zip(gradients, weights, strict=True):
                out[t:t_end, i:i_end] += gradient[t:t_end] @ weight[:, i:i_end]

        tiles = [(*t, *i) for t in row_slabs(len(out), _TILE) for i in row_slabs(out.shape[1], _TILE)]
        each(self._pool, tiles, multiply)
        return out

    def _norm_back(self, gradient: np.ndarray, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return norm_back(gradient, x, weight, self._math.config.rms_norm_eps, self._pool)

    def _attention_back(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, gradient: np.ndarray) -> list[np.ndarray]:
        """The gradient of `LayerMath.attention`'s output -> those of q, k and v."""
        out = [np.empty_like(each) for each in (q, k, v)]
        length, heads = self._math.seq_len, self._math.config.num_key_value_heads

        def some(t: int, head: int) -> None:
            here = slice(t, t + length)
            inputs = [each[here].reshape(length, -1, self._math.config.head_dim) for each in (q, k, v, gradient)]
            outputs = [each[here].reshape(length, -1, self._math.config.head_dim) for each in out]
            self._head_back(head, *inputs, *outputs)

        each(self._pool, [(t, head) for t in range(0, len(q), length) for head in range(heads)], some)
        return out

    def _head_back(self, head: int, q, k, v, gradient, d_q, d_k, d_v) -> None:
        """One sequence and one KV head: all are [length, heads, head_dim]."""
        config = self._math.config
        shared, scale = config.num_attention_heads // config.num_key_value_heads, np.float32(config.head_dim**-0.5)
        keys, values = rotate(k[:, head : head + 1], self._cos, self._sin)[:, 0], v[:, head]
        d_keys, d_values = np.zeros_like(keys), np.zeros_like(values)
        for i in range(head * shared, (head + 1) * shared):
            query = rotate(q[:, i : i + 1], self._cos, self._sin)[:, 0]
            scores = query @ keys.T
            scores *= scale
            scores[np.triu_indices(len(scores), 1)] = -np.inf  # the future
            scores -= scores.max(axis=-1, keepdims=True)
            weights = np.exp(scores)
            weights /= weights.sum(axis=-1, keepdims=True)
            d_values += weights.T @ gradient[:, i]
            d_weights = gradient[:, i] @ values.T
            d_scores = weights * (d_weights - (d_weights * weights).sum(axis=-1, keepdims=True))
            d_scores *= scale
            d_keys += d_scores.T @ query
            d_q[:, i] = rotate((d_scores @ keys)[:, None], self._cos, -self._sin)[:, 0]
        d_k[:, head] = rotate(d_keys[:, None], self._cos, -self._sin)[:, 0]
        d_v[:, head] = d_values


def norm_back(gradient: np.ndarray, x: np.ndarray, weight: np.ndarray, eps: float, pool: Executor) -> np.ndarray:
    """The gradient of y = weight * x / rms(x) -> that of x, [tokens, hidden]."""
    out = np.empty_like(x)

    def some(t: int, end: int) -> None:
        part, scaled = x[t:end], gradient[t:end] * weight
        mean_square = np.mean(part * part, axis=-1, keepdims=True) + np.float32(eps)
        along = np.mean(scaled * part, axis=-1, keepdims=True) / mean_square
        out[t:end] = (scaled - part * along) / np.sqrt(mean_square)

    each_part(pool, len(x), max(1, _NUMBERS // x.shape[1]), some)
    return out


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The inner product of each row, [tokens]."""
    return np.einsum("ij,ij->i", a, b)
