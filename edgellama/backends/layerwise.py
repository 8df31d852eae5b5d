"""A forward pass that its caller drives layer by layer, to look at the residual stream between them or to change it.

Knows what such a pass can do (`LayerPass`) and how attention weights follow from queries and keys, in NumPy. Does not
know where keys come from, nor what the caller does with the stream.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

Weights = dict[int, np.ndarray]
"""Attention weights by slot: float32 [heads, tokens of this pass in that slot, positions of it that are filled]."""


class LayerPass(Protocol):
    """One pass over T tokens whose places in the cache are fixed. `x` is the residual stream, float32 [T, hidden_size].

    `logits(layer(1, layer(0, embed(tokens))))` of a model with two layers is `Backend.forward`, bit for bit.
    """

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """`x` of tokens int32 [T]."""

    def layer(self, i: int, x: np.ndarray, with_weights: bool = False) -> tuple[np.ndarray, Weights]:
        """A new `x`, after layer `i`, whose keys and values are then in the cache; the weights where wanted."""

    def norm(self, x: np.ndarray) -> np.ndarray:
        """float32 [R, hidden_size]: rows of `x`, normalized by the model's last norm."""

    def logits(self, x: np.ndarray) -> np.ndarray:
        """float32 [R, config.n_outputs] of rows of `x`, not normalized yet."""


class Layered(Protocol):
    """A backend that has such passes; not every device does."""

    def layers(self, places: np.ndarray, slots: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> LayerPass:
        """A pass of T tokens at `places` of `slots` (int32 [T]) that are rotated by `cos` and `sin` (float32 [T,
        head_dim / 2]), whatever their places. A token attends to the places of its slot up to its own."""


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn each pair (x[i], x[i + head_dim/2]) of x [T, heads, head_dim] by its angle; cos, sin [T, head_dim/2]."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def head_weights(q: np.ndarray, keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Softmax of one head: q [T, head_dim] at `places`, keys [n, head_dim] of the places before -> float32 [T, n]."""
    scores = q @ keys.T * np.float32(q.shape[1] ** -0.5)
    scores[np.arange(len(keys))[None, :] > places[:, None]] = -np.inf  # the future
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights
