"""Quantizes a model's layers in order, each given what the quantized layers in front of it make of calibration text.

Two residual streams go through the model side by side, the source's and the quantized model's, both on disk. A layer is
worked on in four steps (q, k, v; o; gate, up; down), so that a matrix is quantized for the inputs that it will get. One
layer of the source is in memory at a time, the sequences pass in chunks. Finished layers are kept in a `WorkFolder`.

Knows the order of things; `layer` has the forward pass, `solve` the arithmetic of a matrix, `calibration` the text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.quant import dequantize, pack_int4, pack_scales, unpack_int4, unpack_int8, unpack_scales

from ..checkpoint import STORED, Checkpoint, SourceTensor, to_float32
from ..names import EMBEDDING
from ..pipeline import TensorError, bad_weight
from ..quantizers import quantize
from .layer import LayerMath, Linear
from .solve import Factor, Moments, quantize_matrix, shift
from .work import Stream, WorkFolder

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
O, GATE, UP, DOWN = "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
MATRICES = (*QKV, O, GATE, UP, DOWN)
_CHUNK_BYTES = 64 << 20
"""Of the widest activation of a chunk of sequences, float32; about eight such arrays live at once."""
_LARGEST_WEIGHT = 65504.0 * 7


def memory_needed(config: LlamaConfig, seq_len: int) -> int:
    """Bytes that `CalibratedLayers.run` holds at its peak, without the process as it was before."""
    hidden, wide = config.hidden_size, config.intermediate_size
    down = 3 * wide * wide + 4 * hidden * wide  # Hessian, drift and a product; or Hessian and factor with four matrices
    mlp = 4 * wide * hidden + 3 * hidden * hidden + 3 * wide * hidden
    return 4 * max(down, mlp) + 8 * max(_CHUNK_BYTES, 4 * seq_len * wide)


class CalibratedLayers:
    """One calibrated conversion's layers: `run()`, then `codes`, `scales` and `errors` of each matrix."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: LlamaConfig,
        ids: np.ndarray,
        work: WorkFolder,
        *,
        embedding_bits: int,
        n_threads: int,
        on_weights: Callable[[int], None],
    ):
        """`ids` int32[sequences, length]; `embedding_bits` as stored (16: float16); `on_weights(n)` after n weights."""
        self._checkpoint, self._config, self._ids, self._work = checkpoint, config, ids, work
        self._embedding_bits, self._n_threads, self._on_weights = embedding_bits, n_threads, on_weights
        self._math = LayerMath(config, ids.shape[1])
        widest = max(config.intermediate_size, config.num_attention_heads * config.head_dim, config.hidden_size)
        sequences = max(1, _CHUNK_BYTES // (4 * widest * ids.shape[1]))
        self._chunk = sequences * ids.shape[1]

    def run(self) -> None:
        """Do the layers that the work folder lacks."""
        done, layers = self._work.layers_done(), self._config.num_hidden_layers
        if 0 < done < layers and not self._work.exists(f"x-{done:05d}.quantized"):
            done = 0
        for i in range(done):
            self._on_weights(sum(self._tensor(i, name).shape[0] * self._tensor(i, name).shape[1] for name in MATRICES))
        if done == 0:
            self._embed()
        with ThreadPoolExecutor(self._n_threads, thread_name_prefix="gptq") as pool:
            for i in range(done, layers):
                self._layer(i, pool)
                self._work.discard(f"x-{i:05d}.*")
        self._work.discard("x-*")

    def codes(self, tensor: SourceTensor) -> np.ndarray:
        """uint8[N/16, K/128, 1024] as the file stores them."""
        return self._stored(tensor, "codes")

    def scales(self, tensor: SourceTensor) -> np.ndarray:
        """float16[N/16, K/128, 16]"""
        return self._stored(tensor, "scales")

    def error(self, tensor: SourceTensor) -> TensorError:
        return TensorError(*self._stored(tensor, "error").tolist())

    def _stored(self, tensor: SourceTensor, what: str) -> np.ndarray:
        _, _, layer, part, name, _ = tensor.name.split(".")
        return self._work.load_array(_layer_file(int(layer)), f"{part}.{name}.{what}")

    # -- the streams ---------------------------------------------------------------------------------------------

    def _embed(self) -> None:
        """The first layer's input: the source's embedding, and the stored one."""
        tensor = self._checkpoint.tensors[EMBEDDING]
        tokens = self._ids.reshape(-1)
        with self._streams("x-00000", self._config.hidden_size) as (source, quantized):
            for first, last in self._chunks():
                rows = self._rows(tensor, tokens[first:last])
                source.write(first, rows)
                quantized.write(first, _as_stored(rows, self._embedding_bits))

    def _rows(self, tensor: SourceTensor, tokens: np.ndarray) -> np.ndarray:
        """float32 rows of the embedding, each distinct one read once."""
        distinct, places = np.unique(tokens, return_inverse=True)
        raw = np.empty((len(distinct), tensor.shape[1]), STORED[tensor.dtype])
        for i, token in enumerate(distinct.tolist()):
            self._checkpoint.read_rows(tensor, token, raw[i : i + 1])
        rows = np.empty(raw.shape, np.float32)
        to_float32(raw, rows)
        return rows[places]

    @contextlib.contextmanager
    def _streams(self, name: str, width: int) -> Iterator[tuple[Stream, Stream]]:
        streams = [self._work.stream(f"{name}.{which}", width) for which in ("source", "quantized")]
        try:
            yield streams[0], streams[1]
        finally:
            for stream in streams:
                stream.close()

    def _chunks(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self._ids.size, self._chunk):
            yield first, min(first + self._chunk, self._ids.size)

    # -- one layer -----------------------------------------------------------------------------------------------

    def _layer(self, i: int, pool: ThreadPoolExecutor) -> None:
        config, math = self._config, self._math
        hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
        norm = self._vector(f"model.layers.{i}.input_layernorm.weight")
        norm2 = self._vector(f"model.layers.{i}.post_attention_layernorm.weight")
        results: dict[str, np.ndarray] = {}

        def quantize(names: Sequence[str], moments: Moments) -> tuple[list[Linear], list[Linear]]:
            return self._quantize(i, names, moments, results, pool)

        with (
            self._streams(f"x-{i:05d}", hidden) as x,
            self._streams("scratch-attended", width) as attended,
            self._streams("scratch-middle", hidden) as middle,
            self._streams("scratch-gated", config.intermediate_size) as gated,
            self._streams(f"x-{i + 1:05d}", hidden) as following,
        ):
            moments = Moments.zeros(hidden)
            for first, last in self._chunks():
                source, quantized = (math.norm(stream.read(first, last), norm) for stream in x)
                moments.add(quantized, source)
            models = quantize(QKV, moments)

            moments = Moments.zeros(width, hidden)
            for first, last in self._chunks():
                streams = [stream.read(first, last) for stream in x]
                outs = []
                for stream, (q, k, v), out in zip(streams, models, attended, strict=True):
                    h = math.norm(stream, norm)
                    outs.append(math.attention(q(h), k(h), v(h)))
                    out.write(first, outs[-1])
                moments.add(outs[1], outs[0], streams[0] - streams[1])
            models = quantize([O], moments)

            moments = Moments.zeros(hidden)
            for first, last in self._chunks():
                normed = []
                for before, inputs, (o,), out in zip(x, attended, models, middle, strict=True):
                    h = before.read(first, last) + o(inputs.read(first, last))
                    out.write(first, h)
                    normed.append(math.norm(h, norm2))
                moments.add(normed[1], normed[0])
            models = quantize([GATE, UP], moments)

            moments = Moments.zeros(config.intermediate_size, hidden)
            for first, last in self._chunks():
                streams = [stream.read(first, last) for stream in middle]
                outs = []
                for stream, (gate, up), out in zip(streams, models, gated, strict=True):
                    h = math.norm(stream, norm2)
                    outs.append(math.gated(gate(h), up(h)))
                    out.write(first, outs[-1])
                moments.add(outs[1], outs[0], streams[0] - streams[1])
            models = quantize([DOWN], moments)

            for first, last in self._chunks():
                for before, inputs, (down,), out in zip(middle, gated, models, following, strict=True):
                    out.write(first, before.read(first, last) + down(inputs.read(first, last)))
            for out in following:
                out.flush()
        self._work.save_arrays(_layer_file(i), results)
        self._work.discard("scratch-*")

    def _quantize(
        self, i: int, names: Sequence[str], moments: Moments, results: dict[str, np.ndarray], pool: ThreadPoolExecutor
    ) -> tuple[list[Linear], list[Linear]]:
        """The matrices `names`, which share their input: the source's and the quantized; these go into `results`."""
        if not np.isfinite(np.diagonal(moments.hessian)).all():
            raise ConvertError(f"layer {i}: its activations are not finite; the checkpoint is damaged")
        sources = []
        for name in names:
            weight = self._matrix(i, name)
            sources.append((name, weight, shift(weight, moments)))
        moments.drift = np.zeros((0, 0), np.float32)
        factor = Factor(moments.hessian)
        models: tuple[list[Linear], list[Linear]] = ([], [])
        for name, weight, change in sources:
            factor.solve(change)
            change += weight
            codes = quantize_matrix(change, factor, pool)
            stored = dequantize(codes.codes, codes.scales, 4)
            difference = (stored - weight).reshape(-1)
            results[f"{name}.error"] = np.array([_square_sum(difference), _square_sum(weight.reshape(-1))])
            results[f"{name}.codes"] = pack_int4(codes.codes)
            results[f"{name}.scales"] = pack_scales(codes.scales)
            bias = f"model.layers.{i}.{name}.bias"
            b = self._vector(bias) if bias in self._checkpoint.tensors else None
            models[0].append(Linear(weight, b))
            models[1].append(Linear(stored, b))
            self._on_weights(weight.size)
        return models

    def _tensor(self, i: int, name: str) -> SourceTensor:
        return self._checkpoint.tensors[f"model.layers.{i}.{name}.weight"]

    def _matrix(self, i: int, name: str) -> np.ndarray:
        tensor = self._tensor(i, name)
        return _finite(self._checkpoint.read(tensor), tensor)

    def _vector(self, name: str) -> np.ndarray:
        return self._checkpoint.read(self._checkpoint.tensors[name])


def _layer_file(i: int) -> str:
    return f"layer-{i:05d}.npz"


def _as_stored(rows: np.ndarray, bits: int) -> np.ndarray:
    """float32 rows of an embedding as the file will have them: a row's codes depend on the row alone."""
    if bits == 16:
        return rows.astype(np.float16).astype(np.float32)
    result = quantize(rows, bits, "search")
    codes = (unpack_int4 if bits == 4 else unpack_int8)(result.packed, *rows.shape)
    return dequantize(codes, unpack_scales(result.scales, len(rows)), bits)


def _finite(weights: np.ndarray, tensor: SourceTensor) -> np.ndarray:
    """`weights`, every one of which an int4 scale can hold; ConvertError otherwise."""
    fine = np.abs(weights) <= _LARGEST_WEIGHT  # false for NaN
    if not fine.all():
        row, column = divmod(int(np.argmin(fine)), weights.shape[1])
        raise bad_weight(tensor, row, column, float(weights[row, column]))
    return weights


def _square_sum(values: np.ndarray) -> float:
    """float64, a slab at a time."""
    parts = np.array_split(values, 1 + values.size // 2**20)
    return sum(float(np.square(part, dtype=np.float64).sum()) for part in parts)
