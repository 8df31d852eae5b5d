"""The compiled program run one layer at a time: between two calls of it the residual stream is a NumPy array.

More dispatches, the same bits: the program is told to embed nothing and to run one layer of its table. Where tokens are
more than a chunk, each layer takes the chunks one after the other. Does not know why anyone wants to look.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...quant import round_up
from ..layerwise import Weights, head_weights, rotate

if TYPE_CHECKING:
    from ...kv_cache import KVCache
    from . import CpuBackend
    from .plan import Plan


class CpuLayerPass:
    """See `edgellama.backends.layerwise.LayerPass`; made by `CpuBackend.layers`, good until its next call."""

    def __init__(self, backend: CpuBackend, plan: Plan, cache: KVCache, chunk: int, places: tuple[np.ndarray, ...]):
        """`chunk`: tokens that the plan's buffers hold. `places`: place, slot, cos and sin of each token."""
        self._backend, self._plan, self._cache, self._chunk = backend, plan, cache, chunk
        self._config, self._places = backend.config, places
        backend.prepare()

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        x = np.empty((len(tokens), self._config.hidden_size), np.float32)
        for part in self._chunks(len(tokens)):
            self._backend.run_part(tokens[part], embeds=True)
            x[part] = self._stream(part)
        return x

    def layer(self, i: int, x: np.ndarray, with_weights: bool = False) -> tuple[np.ndarray, Weights]:
        after = np.empty_like(x)
        weights: list[Weights] = []
        for part in self._chunks(len(x)):
            self._stream(part)[...] = x[part]
            places = tuple(each[part] for each in self._places)
            self._backend.run_part(np.zeros(len(x[part]), np.int32), places=places, layer=i)
            after[part] = self._stream(part)
            if with_weights:
                weights.append(self._weights(i, *places))
        return after, _joined(weights)

    def norm(self, x: np.ndarray) -> np.ndarray:
        return self._rows(x, round_up(self._config.hidden_size, 128), hidden=True)[:, : self._config.hidden_size]

    def logits(self, x: np.ndarray) -> np.ndarray:
        return self._rows(x, round_up(self._config.n_outputs, 16), hidden=False)[:, : self._config.n_outputs]

    def _rows(self, x: np.ndarray, width: int, hidden: bool) -> np.ndarray:
        """float32 [R, width]: what the program stores for each row of `x`."""
        out = np.empty((len(x) + self._plan.tile_tokens, width), np.float32)  # whole tiles of tokens are stored
        for part in self._chunks(len(x)):
            self._stream(part)[...] = x[part]
            rows = np.arange(len(x[part]), dtype=np.int32)
            self._backend.run_part(np.zeros(len(rows), np.int32), rows=rows, out=out[part.start :], hidden=hidden)
        return out[: len(x)]

    def _chunks(self, n: int) -> list[slice]:
        return [slice(start, min(start + self._chunk, n)) for start in range(0, n, self._chunk)]

    def _stream(self, part: slice) -> np.ndarray:
        """The program's own x of a chunk, float32 [tokens, hidden_size]: a view."""
        return self._plan.rows("x")[: part.stop - part.start, : self._config.hidden_size]

    def _weights(self, i: int, places: np.ndarray, slots: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> Weights:
        """From the queries that the program left behind, and the keys as the cache has them."""
        config = self._config
        heads, head_dim = config.num_attention_heads, config.head_dim
        q = self._plan.rows("qkv")[: len(places), : heads * head_dim].reshape(-1, heads, head_dim)
        q = rotate(q, cos, sin)
        weights: Weights = {}
        for slot in np.unique(slots):
            mine = slots == slot
            keys = self._cache.keys(i, int(slot), 1 + int(places[mine].max()))
            shared = heads // config.num_key_value_heads
            of_heads = [head_weights(q[mine, head], keys[head // shared], places[mine]) for head in range(heads)]
            weights[int(slot)] = np.stack(of_heads)
        return weights


def _joined(chunks: list[Weights]) -> Weights:
    """The chunks' weights as those of one pass: later tokens see more positions, which are 0 for the earlier ones."""
    joined: Weights = {}
    for slot in dict.fromkeys(slot for chunk in chunks for slot in chunk):
        parts = [chunk[slot] for chunk in chunks if slot in chunk]
        width = max(part.shape[2] for part in parts)
        padded = [np.pad(part, ((0, 0), (0, 0), (0, width - part.shape[2]))) for part in parts]
        joined[slot] = np.concatenate(padded, axis=1)
    return joined
