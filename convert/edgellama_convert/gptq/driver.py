"""Quantizes a model's layers in order, each given what the quantized layers in front of it make of calibration text.

Two residual streams go through the model side by side, the source's and the quantized model's, both on disk. A layer is
worked on in four steps (q, k, v; o; gate, up; down), so that a matrix is quantized for the inputs that it will get. One
layer of the source is in memory at a time, the sequences pass in chunks. Finished layers are kept in a `WorkFolder`.

Knows the order of things; `layer` has the forward pass, `solve` the arithmetic of a matrix, `calibration` the text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Executor

import numpy as np

from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.format.schema import UNITS
from edgellama.quant import dequantize, pack_int4, pack_int8, pack_scales, unpack_int4, unpack_int8, unpack_scales
from edgellama.sizing import layer_weights

from ..checkpoint import STORED, Checkpoint, SourceTensor, row_slabs, to_float32
from ..names import EMBEDDING
from ..pipeline import TensorError, bad_weight
from ..quantizers import quantize
from .layer import LayerMath, Linear
from .parts import each_part, threads
from .solve import PANEL, Factor, Moments, quantize_matrix, shift
from .work import Stream, WorkFolder

QKV, O, GATE_UP, DOWN = UNITS
MATRICES = [matrix for unit in UNITS.values() for matrix in unit]
_CHUNK_BYTES = 64 << 20
"""Of the widest activation of a chunk of sequences, float32; about eight such arrays live at once."""
_LARGEST_WEIGHT = 65504.0 * 7


def memory_needed(config: LlamaConfig, seq_len: int) -> int:
    """Bytes that `CalibratedLayers.run` holds at its peak, without the process as it was before."""
    hidden, wide = config.hidden_size, config.intermediate_size
    summing = wide * wide + 6 * wide * hidden  # Hessian, lack, down_proj, the source's and the quantized gate and up
    choosing = 2 * wide * wide + 5 * wide * hidden  # Hessian and factor; source, target, errors, result and a product
    gate_up = 8 * wide * hidden + 3 * hidden * hidden
    return 4 * max(summing + 8 * max(_CHUNK_BYTES // 4, seq_len * wide), choosing, gate_up)


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
        int8_units: Collection[str] = (),
        n_threads: int,
        on_weights: Callable[[int], None],
    ):
        """`ids` int32[sequences, length]; `embedding_bits` as stored (16: float16); `on_weights(n)` after n weights.

        `int8_units`: the units that get 8 bits (`edgellama.format.unit_names`); the others get 4.
        """
        self._checkpoint, self._config, self._ids, self._work = checkpoint, config, ids, work
        self._embedding_bits, self._n_threads, self._on_weights = embedding_bits, n_threads, on_weights
        self._int8_units = frozenset(int8_units)
        widest = max(config.intermediate_size, config.num_attention_heads * config.head_dim, config.hidden_size)
        sequences = max(1, _CHUNK_BYTES // (4 * widest * ids.shape[1]))
        self._chunk = sequences * ids.shape[1]

    def run(self) -> None:
        """Do the layers that the work folder lacks."""
        layers = self._config.num_hidden_layers
        keys = [f"{name}.{what}" for name in MATRICES for what in ("codes", "scales", "error")]
        done = 0
        while done < layers and self._work.is_whole(_layer_file(done), keys):
            done += 1
        nbytes = 4 * self._ids.size * self._config.hidden_size
        inputs = f"x-{done:05d}.source", f"x-{done:05d}.quantized"
        if done < layers and any(self._work.nbytes(name) != nbytes for name in inputs):
            done = 0
        for _ in range(done):
            self._on_weights(layer_weights(self._config) // layers)
        with (
            threads(self._n_threads) as pool,
            np.errstate(over="ignore", invalid="ignore"),  # `_quantize` looks at what comes of it
        ):
            if done == 0:
                self._work.discard("layer-*")
                self._embed()
            for i in range(done, layers):
                self._layer(i, pool)
                self._work.discard(f"x-{i:05d}.*")
        self._work.discard("x-*")

    def codes(self, tensor: SourceTensor) -> np.ndarray:
        """uint8[N/16, K/128, 1024 or 2048] as the file stores them."""
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
        with (
            self._work.stream(f"{name}.source", width) as source,
            self._work.stream(f"{name}.quantized", width) as quantized,
        ):
            yield source, quantized

    def _chunks(self) -> Iterator[tuple[int, int]]:
        return row_slabs(self._ids.size, self._chunk)

    # -- one layer -----------------------------------------------------------------------------------------------

    def _layer(self, i: int, pool: Executor) -> None:
        config, parts = self._config, LayerMath(self._config, self._ids.shape[1], pool)
        hidden, width, wide = config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size
        norm = self._vector(f"model.layers.{i}.input_layernorm.weight")
        norm2 = self._vector(f"model.layers.{i}.post_attention_layernorm.weight")
        results: dict[str, np.ndarray] = {}

        def quantize(unit: str, linears: Mapping[str, Linear], moments: Moments, of_output: bool) -> list[Linear]:
            bits = 8 if f"model.layers.{i}.{unit}" in self._int8_units else 4
            return self._quantize(i, linears, moments, of_output, bits, results, pool)

        def inputs_of(before, models, norm: np.ndarray, combine: Callable[..., np.ndarray]) -> list[np.ndarray]:
            """What goes into o or down, from the residual streams of both models."""
            inputs = []
            for h, linears in zip(before, models, strict=True):
                normed = parts.norm(h, norm)
                inputs.append(combine(*(parts.linear(linear, normed) for linear in linears)))
            return inputs

        def source_output(moments: Moments, linear: Linear, before, inputs) -> np.ndarray:
            """The source's residual stream after `linear`, counted in what the quantized model would lack of it."""
            source, quantized = (h + parts.linear(linear, x) for h, x in zip(before, inputs, strict=True))
            moments.add(inputs[1], source - quantized, pool)
            return source

        with (
            self._streams(f"x-{i:05d}", hidden) as x,
            self._streams(f"x-{i + 1:05d}", hidden) as following,
            self._streams("scratch-middle", hidden) as middle,
            self._work.stream("scratch-attended", width) as attended,
            self._work.stream("scratch-gated", wide) as gated,
        ):
            moments = Moments.zeros(hidden, hidden)
            for first, last in self._chunks():
                source, quantized = (parts.norm(stream.read(first, last), norm) for stream in x)
                moments.add(quantized, source - quantized, pool)
            qkv = self._linears(i, QKV)
            models = list(qkv.values()), quantize(QKV, qkv, moments, of_output=False)

            moments, output = Moments.zeros(width, hidden), self._linears(i, O)
            for first, last in self._chunks():
                before = [stream.read(first, last) for stream in x]
                inputs = inputs_of(before, models, norm, parts.attention)
                attended.write(first, inputs[1])
                middle[0].write(first, source_output(moments, output[O], before, inputs))
            (o,) = quantize(O, output, moments, of_output=True)

            moments = Moments.zeros(hidden, hidden)
            for first, last in self._chunks():
                h = x[1].read(first, last) + parts.linear(o, attended.read(first, last))
                middle[1].write(first, h)
                source, quantized = (parts.norm(each, norm2) for each in (middle[0].read(first, last), h))
                moments.add(quantized, source - quantized, pool)
            gate_up = self._linears(i, GATE_UP)
            models = list(gate_up.values()), quantize(GATE_UP, gate_up, moments, of_output=False)

            moments, output = Moments.zeros(wide, hidden), self._linears(i, DOWN)
            for first, last in self._chunks():
                before = [stream.read(first, last) for stream in middle]
                inputs = inputs_of(before, models, norm2, parts.gated)
                gated.write(first, inputs[1])
                following[0].write(first, source_output(moments, output[DOWN], before, inputs))
            del models, gate_up, qkv, before, inputs  # memory is tightest now
            (down,) = quantize(DOWN, output, moments, of_output=True)

            for first, last in self._chunks():
                following[1].write(first, middle[1].read(first, last) + parts.linear(down, gated.read(first, last)))
            for out in following:
                out.flush()
        self._work.save_arrays(_layer_file(i), results)
        self._work.discard("scratch-*")

    def _quantize(
        self,
        i: int,
        linears: Mapping[str, Linear],
        moments: Moments,
        of_output: bool,
        bits: int,
        results: dict[str, np.ndarray],
        pool: Executor,
    ) -> list[Linear]:
        """Quantize matrices that share their input; their codes go into `results`. Uses `moments` up."""
        if not (np.isfinite(np.diagonal(moments.hessian)).all() and np.isfinite(moments.lack).all()):
            raise ConvertError(f"layer {i}: its activations are not finite; the checkpoint is damaged")
        moments.complete()
        targets = [np.empty_like(linear.weight) for linear in linears.values()]
        for linear, target in zip(linears.values(), targets, strict=True):

            def aim(row: int, end: int, weight: np.ndarray = linear.weight, target: np.ndarray = target) -> None:
                lack = moments.lack[row:end] if of_output else moments.lack
                target[row:end] = shift(weight[row:end], lack, of_output)

            each_part(pool, len(target), PANEL, aim)
        moments.lack = np.zeros((0, 0), np.float32)
        factor = Factor(moments.hessian, pool)
        quantized = []
        for (name, linear), target in zip(linears.items(), targets, strict=True):

            def solve(row: int, end: int, weight: np.ndarray = linear.weight, target: np.ndarray = target) -> None:
                factor.solve(target[row:end])
                target[row:end] += weight[row:end]

            each_part(pool, len(target), PANEL, solve)
            codes = quantize_matrix(target, factor, bits, pool)
            stored = dequantize(codes.codes, codes.scales, bits)
            difference = (stored - linear.weight).reshape(-1)
            results[f"{name}.error"] = np.array([_square_sum(difference), _square_sum(linear.weight.reshape(-1))])
            results[f"{name}.codes"] = (pack_int4 if bits == 4 else pack_int8)(codes.codes)
            results[f"{name}.scales"] = pack_scales(codes.scales)
            quantized.append(Linear(stored, linear.bias))
            self._on_weights(linear.weight.size)
        return quantized

    def _linears(self, i: int, unit: str) -> dict[str, Linear]:
        """The source's matrices of a unit, with their biases."""
        linears = {}
        for name in UNITS[unit]:
            tensor, bias = self._tensor(i, name), f"model.layers.{i}.{name}.bias"
            weight = _finite(self._checkpoint.read(tensor), tensor)
            linears[name] = Linear(weight, self._vector(bias) if bias in self._checkpoint.tensors else None)
        return linears

    def _tensor(self, i: int, name: str) -> SourceTensor:
        return self._checkpoint.tensors[f"model.layers.{i}.{name}.weight"]

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
