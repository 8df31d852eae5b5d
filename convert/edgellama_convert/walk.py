"""The forward pass of several models at once, layer by layer, in float32 and bounded memory.

Models of the same shapes, as a checkpoint and what was quantized from it, go through each matrix together: a slab of
rows of every model's is read, multiplied and forgotten. What is held is the activations, features x tokens: columns are
tokens, so every product is `weights @ x`. Written after `edgellama.backends.reference`, which is its oracle.

Bits depend on weights and tokens alone: not on threads, nor on which other models or sequences go along, for nothing is
summed but in a fixed order (`float_kernels`; NumPy's sums here run along the first axis, column by column).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from edgellama.backends.reference import ACTIVATIONS
from edgellama.config import LlamaConfig
from edgellama.quant import ROW_BLOCK
from edgellama.rope import cos_sin

from .checkpoint import row_slabs
from .float_kernels import Panels, exp, matmul
from .pipeline import TensorError
from .weights import Rows, Weights

SLAB_WEIGHTS = 2 << 20
"""Weights of each model that are read at a time, at most; a slab never has more than SLAB_ROWS rows."""
SLAB_ROWS = 768
_CHUNK_ROWS = 3 * ROW_BLOCK  # what a thread turns into float32 and multiplies at a time

OnWeights = Callable[[int], None]


class Stream:
    """One model's activations on their way. `sequences`: token ids, each sequence on its own from position 0."""

    def __init__(self, weights: Weights, sequences: Sequence[np.ndarray]):
        self.weights, self.config = weights, weights.config
        self.tokens = np.concatenate(sequences)
        ends = np.cumsum([len(sequence) for sequence in sequences])
        self.spans = [slice(int(end) - len(sequence), int(end)) for end, sequence in zip(ends, sequences, strict=True)]
        parts = [cos_sin(self.config, np.arange(len(each)), len(each)) for each in sequences]
        self.cos, self.sin = (np.concatenate(each).T.copy() for each in zip(*parts, strict=True))  # [head_dim/2, T]
        self.x = np.zeros((self.config.hidden_size, len(self.tokens)), np.float32)  # the residual stream, [hidden, T]

    def norm(self, name: str, columns: np.ndarray | None = None) -> np.ndarray:
        """RMS norm of the stream, or of these columns of it: [hidden, columns]."""
        weight = self.weights.vector(f"{name}.weight")
        assert weight is not None
        x = self.x if columns is None else np.take(self.x, columns, axis=1)
        variance = np.square(x, dtype=np.float64).sum(axis=0) / len(x)
        scale = (1 / np.sqrt(variance + self.config.rms_norm_eps)).astype(np.float32)
        return weight[:, None] * (x * scale)


class Walk:
    """Streams of models of one shape, the layers' work shared among threads. A context manager.

    `errors`: with `compare`, name of a matrix -> how far the second model's is from the first's, of those met so far.
    `on_weights(n)` is called in the caller's thread after n weights (of each model) were used.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        n_threads: int,
        on_weights: OnWeights = lambda n: None,
        compare: bool = False,
    ):
        self.streams, self.config, self._on_weights, self._compare = streams, streams[0].config, on_weights, compare
        self.errors: dict[str, TensorError] = {}
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="walk")

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def embed(self) -> None:
        """Tokens to the streams' first activations."""
        for stream in self.streams:
            tokens = stream.tokens
            for token in np.unique(tokens):
                first = int(token) // ROW_BLOCK * ROW_BLOCK
                row = stream.weights.rows("model.embed_tokens", first, int(token) + 1)(0, int(token) + 1 - first)[-1]
                stream.x[:, tokens == token] = row[:, None]

    def layer(self, i: int) -> None:
        """One decoder layer."""
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        inputs = self._norms(f"model.layers.{i}.input_layernorm")
        q, k, v = (self._linear(f"{attention}.{name}", inputs) for name in ("q_proj", "k_proj", "v_proj"))
        attended = [self._attend(*each) for each in zip(self.streams, q, k, v, strict=True)]
        self._add(f"{attention}.o_proj", attended)

        inputs = self._norms(f"model.layers.{i}.post_attention_layernorm")
        gated = self._linear(f"{mlp}.gate_proj", inputs)
        activation = _silu if self.config.hidden_act == "silu" else ACTIVATIONS[self.config.hidden_act]
        for gate in gated:
            for first, last in row_slabs(len(gate), 256):
                gate[first:last] = activation(gate[first:last])
        for first, last, products in self.products(f"{mlp}.up_proj", inputs):
            for gate, up in zip(gated, products, strict=True):
                gate[first:last] *= up
        self._add(f"{mlp}.down_proj", gated)

    def logits(self, columns: Sequence[np.ndarray]) -> Iterator[tuple[int, int, list[np.ndarray]]]:
        """(first, last, a float32 [last - first, R] of each stream): logits of those ids after `columns` of each."""
        inputs = [stream.norm("model.norm", mine) for stream, mine in zip(self.streams, columns, strict=True)]
        return self.products(self.config.head, inputs)

    def _norms(self, name: str) -> list[np.ndarray]:
        return [stream.norm(name) for stream in self.streams]

    def _linear(self, name: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """[out, T] of each stream."""
        rows = self.streams[0].weights.shape(name)[0]
        outputs = [np.empty((rows, x.shape[1]), np.float32) for x in inputs]
        for first, last, products in self.products(name, inputs):
            for output, product in zip(outputs, products, strict=True):
                output[first:last] = product
        return outputs

    def _add(self, name: str, inputs: Sequence[np.ndarray]) -> None:
        """A product is added to each stream."""
        for first, last, products in self.products(name, inputs):
            for stream, product in zip(self.streams, products, strict=True):
                stream.x[first:last] += product

    def products(self, name: str, inputs: Sequence[np.ndarray]) -> Iterator[tuple[int, int, list[np.ndarray]]]:
        """(first, last, rows first..last-1 of `weights @ input + bias` of each stream), in order."""
        models = [stream.weights for stream in self.streams]
        n_rows, in_features = models[0].shape(name)
        panels = [Panels(x) for x in inputs]
        biases = [model.vector(f"{name}.bias") for model in models]
        squares = np.zeros((n_rows, 2)) if self._compare else None
        slab = max(_CHUNK_ROWS, min(SLAB_WEIGHTS // in_features, SLAB_ROWS) // _CHUNK_ROWS * _CHUNK_ROWS)
        running: tuple[int, int, list[Future[list[np.ndarray]]]] | None = None
        for first, last in row_slabs(n_rows, slab):
            read = [model.rows(name, first, last) for model in models]
            jobs = [
                self._pool.submit(
                    _multiply, read, panels, start, stop, None if squares is None else squares[first:last]
                )
                for start, stop in row_slabs(last - first, _CHUNK_ROWS)
            ]
            if running is not None:
                yield self._finish(running, biases, in_features)
            running = first, last, jobs
        if running is not None:
            yield self._finish(running, biases, in_features)
        if squares is not None:
            self.errors[name] = TensorError(float(squares[:, 0].sum()), float(squares[:, 1].sum()))

    def _finish(
        self,
        running: tuple[int, int, list[Future[list[np.ndarray]]]],
        biases: Sequence[np.ndarray | None],
        in_features: int,
    ) -> tuple[int, int, list[np.ndarray]]:
        first, last, jobs = running
        products = [np.concatenate(chunks) for chunks in zip(*(job.result() for job in jobs), strict=True)]
        for product, bias in zip(products, biases, strict=True):
            if bias is not None:
                product += bias[first:last, None]
        self._on_weights((last - first) * in_features)
        return first, last, products

    def _attend(self, stream: Stream, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """q [heads * head_dim, T], k and v [kv_heads * head_dim, T] -> [heads * head_dim, T]."""
        _rotate(q, stream, self.config)
        _rotate(k, stream, self.config)
        out = np.empty_like(q)
        size = self.config.head_dim
        share = self.config.num_attention_heads // self.config.num_key_value_heads

        def group(kv_head: int, span: slice) -> None:
            mine = slice(kv_head * size, (kv_head + 1) * size)
            for head in range(kv_head * share, (kv_head + 1) * share):
                rows = slice(head * size, (head + 1) * size)
                out[rows, span] = _attention(q[rows, span], k[mine, span], v[mine, span])

        jobs = [
            self._pool.submit(group, kv_head, span)
            for span in stream.spans
            for kv_head in range(self.config.num_key_value_heads)
        ]
        for job in jobs:
            job.result()
        return out


def _multiply(
    read: Sequence[Rows], panels: Sequence[Panels], start: int, stop: int, squares: np.ndarray | None
) -> list[np.ndarray]:
    """Rows start..stop-1 of a slab, of every model, times its input; and the squares of their difference."""
    weights = [rows(start, stop) for rows in read]
    products = [panel.product(w) for panel, w in zip(panels, weights, strict=True)]
    if squares is not None:
        squares[start:stop, 1] = np.square(weights[0], dtype=np.float64).sum(axis=1)
        squares[start:stop, 0] = np.square(weights[0] - weights[1], dtype=np.float64).sum(axis=1)
    return products


def _rotate(x: np.ndarray, stream: Stream, config: LlamaConfig) -> None:
    """Turn each pair (x[i], x[i + head_dim/2]) of every head of x [heads * head_dim, T], in place."""
    heads = x.reshape(-1, 2, config.head_dim // 2, x.shape[1])
    for head in heads:
        a, b = head[0].copy(), head[1].copy()
        head[0] = a * stream.cos - b * stream.sin
        head[1] = b * stream.cos + a * stream.sin


@np.errstate(over="ignore", invalid="ignore")
def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One head of one sequence, q, k, v [head_dim, T] -> [head_dim, T]: each position mixes those up to its own."""
    head_dim, length = q.shape
    scores = matmul(k.T, q) * np.float32(head_dim**-0.5)  # [keys, queries]
    scores[np.tri(length, k=-1, dtype=bool)] = -np.inf  # the future: keys below the diagonal
    weights = exp(scores - scores.max(axis=0))
    weights /= weights.sum(axis=0)
    return matmul(v, weights)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + exp(-x))
