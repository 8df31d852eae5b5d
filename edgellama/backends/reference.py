"""The oracle: Llama's forward pass in float32 NumPy, in the order of transformers' `modeling_llama.py`.

Every faster backend is tested against this one, and this one against transformers. So it is written to be read: no
kernels, no threads, no tricks; weights are dequantized to float32 and multiplied. It knows the names of the tensors and
leaves their bytes to `quant.py`. `forward` of a small model takes milliseconds, of a large one minutes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from edgellama import quant, rope
from edgellama.backends import check_batch, check_slots
from edgellama.backends.layerwise import Weights, head_weights, rotate
from edgellama.errors import CancelledError
from edgellama.kv_cache import check_slot_arrays

if TYPE_CHECKING:
    from edgellama.format import ModelFile

# Models up to this size in float32 are dequantized once; of larger ones each matrix anew when it is needed.
KEEP_BYTES = 2 << 30


class ReferenceBackend:
    """A `Backend` with a float32 KV cache, [layers, slots, n_ctx, kv_heads, head_dim] each for keys and values."""

    kv_cache = "float32"
    pass_tokens = 256
    batch_invariant = False  # BLAS adds up in another order for other shapes

    def __init__(self, model_file: ModelFile, n_ctx: int, n_slots: int = 1):
        config = model_file.config
        self.config, self.n_ctx, self.n_slots = config, n_ctx, n_slots
        self._file = model_file
        self._kept: dict[str, np.ndarray] | None = {} if _float32_bytes(model_file) <= KEEP_BYTES else None
        cache_shape = (config.num_hidden_layers, n_slots, n_ctx, config.num_key_value_heads, config.head_dim)
        self._keys: np.ndarray = np.zeros(cache_shape, np.float32)
        self._values: np.ndarray = np.zeros(cache_shape, np.float32)
        self._cancelled = threading.Event()

    def close(self) -> None:
        self._kept = None
        self._keys = self._values = np.zeros(0, np.float32)

    def forward(self, tokens: ArrayLike, positions: ArrayLike, slots: ArrayLike, rows: ArrayLike) -> np.ndarray:
        """See `Backend.forward`."""
        return self._logits(self._states(tokens, positions, slots, rows))

    def hidden(self, tokens: ArrayLike, positions: ArrayLike, slots: ArrayLike, rows: ArrayLike) -> np.ndarray:
        """See `Backend.hidden`."""
        return self._norm(self._states(tokens, positions, slots, rows))

    def layers(self, places: ArrayLike, slots: ArrayLike, cos: np.ndarray, sin: np.ndarray) -> ReferenceLayerPass:
        """See `edgellama.backends.layerwise.Layered`."""
        zeros = np.zeros(np.size(places), np.int32)
        _, places, slots, _ = check_batch(zeros, places, slots, [], vocab_size=1, backend=self)
        return ReferenceLayerPass(self, places, slots, cos, sin)

    def _states(self, tokens: ArrayLike, positions: ArrayLike, slots: ArrayLike, rows: ArrayLike) -> np.ndarray:
        """float32 [R, hidden_size]: the residual stream after the last layer."""
        tokens, positions, slots, rows = check_batch(
            tokens, positions, slots, rows, vocab_size=self.config.vocab_size, backend=self
        )
        each = ReferenceLayerPass(self, positions, slots, *self._cos_sin(positions, slots))
        x = each.embed(tokens)
        for i in range(self.config.num_hidden_layers):
            x, _ = each.layer(i, x)
        return x[rows]

    def _embed(self, tokens: np.ndarray) -> np.ndarray:
        """[T, hidden]: the residual stream, where it begins."""
        return self._matrix("model.embed_tokens")[tokens]

    def _layer(
        self,
        i: int,
        x: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        cos: np.ndarray,
        sin: np.ndarray,
        weights: Weights | None = None,
    ) -> np.ndarray:
        """Layer `i`: [T, hidden] -> [T, hidden]; `weights` collects those of its attention."""
        layer = f"model.layers.{i}"

        # Attention: which earlier positions matter to each token, and what they say.
        h = self._rms_norm(x, f"{layer}.input_layernorm")
        q = self._heads(self._linear(h, f"{layer}.self_attn.q_proj"))  # [T, heads, head_dim]
        k = self._heads(self._linear(h, f"{layer}.self_attn.k_proj"))  # [T, kv_heads, head_dim]
        v = self._heads(self._linear(h, f"{layer}.self_attn.v_proj"))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        self._keys[i, slots, positions] = k
        self._values[i, slots, positions] = v
        attended = np.empty_like(q)
        for slot in np.unique(slots):
            mine = slots == slot
            length = 1 + int(positions[mine].max())
            keys, values = self._keys[i, slot, :length], self._values[i, slot, :length]
            attended[mine], seen = _attention(q[mine], keys, values, positions[mine])
            if weights is not None:
                weights[int(slot)] = seen
        x = x + self._linear(attended.reshape(len(x), -1), f"{layer}.self_attn.o_proj")

        # MLP: gated, on each token alone.
        h = self._rms_norm(x, f"{layer}.post_attention_layernorm")
        gate = ACTIVATIONS[self.config.hidden_act](self._linear(h, f"{layer}.mlp.gate_proj"))  # [T, intermediate]
        up = self._linear(h, f"{layer}.mlp.up_proj")
        x = x + self._linear(gate * up, f"{layer}.mlp.down_proj")
        if self._cancelled.is_set():
            self._cancelled.clear()
            raise CancelledError("the forward pass was cancelled; what was computed before stays in the cache")
        return x

    def _norm(self, x: np.ndarray) -> np.ndarray:
        return self._rms_norm(x, "model.norm")

    def _logits(self, x: np.ndarray) -> np.ndarray:
        return self._linear(self._norm(x), self.config.head)

    def copy_slot(self, source: int, target: int, n: int, start: int = 0) -> None:
        """See `Backend.copy_slot`."""
        check_slots(self, (source, target), n, start)
        for cache in (self._keys, self._values):
            cache[:, target, start:n] = cache[:, source, start:n]

    def read_slot(self, slot: int, n: int) -> dict[str, np.ndarray]:
        """See `Backend.read_slot`."""
        check_slots(self, (slot,), n)
        caches = {"keys": self._keys, "values": self._values}
        return {name: cache[:, slot, :n].swapaxes(1, 2).copy() for name, cache in caches.items()}

    def write_slot(self, slot: int, data: Mapping[str, np.ndarray]) -> None:
        """See `Backend.write_slot`."""
        n = check_slot_arrays(self.config, self.kv_cache, self.n_ctx, data)
        check_slots(self, (slot,), n)
        for name, cache in (("keys", self._keys), ("values", self._values)):
            cache[:, slot, :n] = data[name].swapaxes(1, 2)

    def cancel(self) -> None:
        """See `Backend.cancel`."""
        self._cancelled.set()

    def _cos_sin(self, positions: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 [T, head_dim / 2] each; every slot's sequence has a length of its own."""
        cos, sin = np.empty((2, len(positions), self.config.head_dim // 2), np.float32)
        for slot in np.unique(slots):
            mine = slots == slot
            seq_len = 1 + int(positions[mine].max())
            cos[mine], sin[mine] = rope.cos_sin(self.config, positions[mine], seq_len)
        return cos, sin

    def _rms_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        variance = np.mean(x * x, axis=-1, keepdims=True)
        return self._file.array(f"{name}.weight") * (x / np.sqrt(variance + np.float32(self.config.rms_norm_eps)))

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        """[T, in] -> [T, out]"""
        y = x @ self._matrix(name).T
        return y + self._file.array(f"{name}.bias") if f"{name}.bias" in self._file.tensors else y

    def _heads(self, x: np.ndarray) -> np.ndarray:
        """[T, heads * head_dim] -> [T, heads, head_dim]"""
        return x.reshape(len(x), -1, self.config.head_dim)

    def _matrix(self, name: str) -> np.ndarray:
        """float32 [out_features, in_features]"""
        if self._kept is None:
            return quant.load_matrix(self._file, name)
        if name not in self._kept:
            self._kept[name] = quant.load_matrix(self._file, name)
        return self._kept[name]


def _float32_bytes(model_file: ModelFile) -> int:
    return sum(4 * math.prod(entry.shape) for entry in model_file.tensors.values())


class ReferenceLayerPass:
    """See `edgellama.backends.layerwise.LayerPass`: T tokens at `positions` of `slots`, turned by `cos` and `sin`."""

    def __init__(
        self, backend: ReferenceBackend, positions: np.ndarray, slots: np.ndarray, cos: np.ndarray, sin: np.ndarray
    ):
        self._backend, self._places = backend, (positions, slots, cos, sin)

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        return self._backend._embed(tokens)

    def layer(self, i: int, x: np.ndarray, with_weights: bool = False) -> tuple[np.ndarray, Weights]:
        weights: Weights = {}
        return self._backend._layer(i, x, *self._places, weights if with_weights else None), weights

    def norm(self, x: np.ndarray) -> np.ndarray:
        return self._backend._norm(x)

    def logits(self, x: np.ndarray) -> np.ndarray:
        return self._backend._logits(x)


def _attention(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """q [T, heads, head_dim] of one slot; keys, values [n, kv_heads, head_dim] -> [T, heads, head_dim], and the weights
    [heads, T, n].

    Each group of heads / kv_heads query heads shares one head of keys and values.
    """
    n_tokens, heads, _ = q.shape
    shared = heads // keys.shape[1]
    out, weights = np.empty_like(q), np.empty((heads, n_tokens, len(keys)), np.float32)
    for head in range(heads):
        weights[head] = head_weights(q[:, head], keys[:, head // shared], positions)
        out[:, head] = weights[head] @ values[:, head // shared]
    return out, weights


def silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(100) is inf in float32, and x / inf the right answer
        return x / (1 + np.exp(-x))


_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x: np.ndarray) -> np.ndarray:
    return (x * 0.5 * (1 + _erf(x / math.sqrt(2)))).astype(np.float32)


def gelu_pytorch_tanh(x: np.ndarray) -> np.ndarray:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_pytorch_tanh": gelu_pytorch_tanh, "relu": relu}
