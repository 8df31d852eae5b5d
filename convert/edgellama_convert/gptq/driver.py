"""Quantizes a model's layers in order, each given what the quantized layers in front of it make of calibration text.

Two residual streams go through the model side by side, the source's and the quantized model's, both on disk. A layer is
worked on in four steps (q, k, v; o; gate, up; down), so that a matrix is quantized for the inputs that it will get. One
layer of the source is in memory at a time, the sequences pass in chunks. Finished layers are kept in a `WorkFolder`.

Knows the order of things; `arithmetic` has the forward pass (`layer`) and the solution of a matrix (`solve`), on a CPU
or a GPU; `calibration` has the text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.format.schema import UNITS
from edgellama.quant import dequantize, pack_int4, pack_int8, pack_scales, unpack_int4, unpack_int8, unpack_scales
from edgellama.sizing import layer_weights

from ..checkpoint import Checkpoint, SourceTensor, row_slabs
from ..names import EMBEDDING
from ..pipeline import TensorError, bad_weight
from ..quantizers import quantize
from .arithmetic import Arithmetic, arithmetic_on
from .layer import Array, Linear, whole_sequences
from .work import Stream, WorkFolder

QKV, O, GATE_UP, DOWN = UNITS
MATRICES = [matrix for unit in UNITS.values() for matrix in unit]
_CHUNK_BYTES = 64 << 20
"""Of the widest activation of a chunk of sequences, float32; about eight such arrays live at once."""
_LARGEST_WEIGHT = 65504.0 * 7


def memory_needed(config: LlamaConfig, seq_len: int) -> int:
    """Bytes that `CalibratedLayers.run` holds at its peak, where it computes; without what was held there before."""
    hidden, wide = config.hidden_size, config.intermediate_size
    summing = wide * wide + 6 * wide * hidden  # Hessian, lack, down_proj, the source's and the quantized gate and up
    choosing = 2 * wide * wide + 5 * wide * hidden  # Hessian and factor; source, target, errors, result and a product
    gate_up = 8 * wide * hidden + 3 * hidden * hidden
    return 4 * max(summing + 8 * max(_CHUNK_BYTES // 4, seq_len * wide), choosing, gate_up)


def disk_needed(config: LlamaConfig, tokens: int) -> int:
    """Bytes that the streams of a layer, for so many calibration tokens, take in the work folder."""
    width = config.num_attention_heads * config.head_dim
    return 4 * tokens * (6 * config.hidden_size + width + config.intermediate_size)


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
        device: str = "cpu",
    ):
        """`ids` int32[sequences, length]; `embedding_bits` as stored (16: float16); `on_weights(n)` after n weights.

        `int8_units`: the units that get 8 bits (`edgellama.format.unit_names`); the others get 4. `device`, a resolved
        one ("cpu", "cuda", "torch-cpu"), is where it computes.
        """
        self._checkpoint, self._config, self._ids, self._work = checkpoint, config, ids, work
        self._embedding_bits, self._n_threads, self._on_weights = embedding_bits, n_threads, on_weights
        self._int8_units, self._device = frozenset(int8_units), device
        self._chunk = whole_sequences(config, ids.shape[1], _CHUNK_BYTES)

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
        with arithmetic_on(self._device, self._config, self._ids.shape[1], self._n_threads) as math:
            if done == 0:
                self._work.discard("layer-*")
                self._embed()
            for i in range(done, layers):
                self._layer(i, math)
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
                rows = self._checkpoint.look_up(tensor, tokens[first:last])
                source.write(first, rows)
                quantized.write(first, _as_stored(rows, self._embedding_bits))

    @contextlib.contextmanager
    def _stream(self, name: str, width: int, math: Arithmetic | None) -> Iterator[Stream]:
        """Its rows are NumPy's, or those of `math`."""
        with self._work.stream(name, width) as stream:
            yield stream if math is None else math.stream(stream)

    @contextlib.contextmanager
    def _streams(self, name: str, width: int, math: Arithmetic | None = None) -> Iterator[tuple[Stream, Stream]]:
        with (
            self._stream(f"{name}.source", width, math) as source,
            self._stream(f"{name}.quantized", width, math) as quantized,
        ):
            yield source, quantized

    def _chunks(self) -> Iterator[tuple[int, int]]:
        return row_slabs(self._ids.size, self._chunk)

    # -- one layer -----------------------------------------------------------------------------------------------

    def _layer(self, i: int, math: Arithmetic) -> None:
        config = self._config
        hidden, width, wide = config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size
        norm = math.array(self._vector(f"model.layers.{i}.input_layernorm.weight"))
        norm2 = math.array(self._vector(f"model.layers.{i}.post_attention_layernorm.weight"))
        results: dict[str, np.ndarray] = {}

        def quantize(unit: str, linears: Mapping[str, Linear], moments, of_output: bool) -> list[Linear]:
            bits = 8 if f"model.layers.{i}.{unit}" in self._int8_units else 4
            return self._quantize(i, linears, moments, of_output, bits, results, math)

        def inputs_of(before, models, norm: Array, combine: Callable[..., Array]) -> list[Array]:
            """What goes into o or down, from the residual streams of both models."""
            inputs = []
            for h, linears in zip(before, models, strict=True):
                normed = math.norm(h, norm)
                inputs.append(combine(*(math.linear(linear, normed) for linear in linears)))
            return inputs

        def source_output(moments, linear: Linear, before, inputs) -> Array:
            """The source's residual stream after `linear`, counted in what the quantized model would lack of it."""
            source, quantized = (h + math.linear(linear, x) for h, x in zip(before, inputs, strict=True))
            math.count(moments, inputs[1], source - quantized)
            return source

        with (
            self._streams(f"x-{i:05d}", hidden, math) as x,
            self._streams(f"x-{i + 1:05d}", hidden, math) as following,
            self._streams("scratch-middle", hidden, math) as middle,
            self._stream("scratch-attended", width, math) as attended,
            self._stream("scratch-gated", wide, math) as gated,
        ):
            moments = math.moments(hidden, hidden)
            for first, last in self._chunks():
                source, quantized = (math.norm(stream.read(first, last), norm) for stream in x)
                math.count(moments, quantized, source - quantized)
            qkv = self._linears(i, QKV, math)
            models = list(qkv.values()), quantize(QKV, qkv, moments, of_output=False)

            moments, output = math.moments(width, hidden), self._linears(i, O, math)
            for first, last in self._chunks():
                before = [stream.read(first, last) for stream in x]
                inputs = inputs_of(before, models, norm, math.attention)
                attended.write(first, inputs[1])
                middle[0].write(first, source_output(moments, output[O], before, inputs))
            (o,) = quantize(O, output, moments, of_output=True)
            del models, qkv

            moments = math.moments(hidden, hidden)
            for first, last in self._chunks():
                h = x[1].read(first, last) + math.linear(o, attended.read(first, last))
                middle[1].write(first, h)
                source, quantized = (math.norm(each, norm2) for each in (middle[0].read(first, last), h))
                math.count(moments, quantized, source - quantized)
            gate_up = self._linears(i, GATE_UP, math)
            models = list(gate_up.values()), quantize(GATE_UP, gate_up, moments, of_output=False)

            moments, output = math.moments(wide, hidden), self._linears(i, DOWN, math)
            for first, last in self._chunks():
                before = [stream.read(first, last) for stream in middle]
                inputs = inputs_of(before, models, norm2, math.gated)
                gated.write(first, inputs[1])
                following[0].write(first, source_output(moments, output[DOWN], before, inputs))
            del models, gate_up, before, inputs  # memory is tightest now
            (down,) = quantize(DOWN, output, moments, of_output=True)

            for first, last in self._chunks():
                following[1].write(first, middle[1].read(first, last) + math.linear(down, gated.read(first, last)))
            for out in following:
                out.flush()
        self._work.save_arrays(_layer_file(i), results)
        self._work.discard("scratch-*")

    def _quantize(
        self,
        i: int,
        linears: Mapping[str, Linear],
        moments,
        of_output: bool,
        bits: int,
        results: dict[str, np.ndarray],
        math: Arithmetic,
    ) -> list[Linear]:
        """Quantize matrices that share their input; their codes go into `results`. Uses `moments` up."""
        if not math.is_finite(moments):
            raise ConvertError(f"layer {i}: its activations are not finite; the checkpoint is damaged")
        moments.complete()
        targets = [math.shift(linear.weight, moments.lack, of_output) for linear in linears.values()]
        del moments.lack
        factor = math.factor(moments.hessian)
        quantized = []
        for (name, linear), target in zip(linears.items(), targets, strict=True):
            math.solve(factor, target)
            target += linear.weight
            codes = math.quantize(target, factor, bits)
            stored = math.dequantize(codes, bits)
            squares = [math.square_sum(each) for each in (stored - linear.weight, linear.weight)]
            results[f"{name}.error"] = np.array(squares)
            results[f"{name}.codes"] = (pack_int4 if bits == 4 else pack_int8)(math.numpy(codes.codes))
            results[f"{name}.scales"] = pack_scales(math.numpy(codes.scales))
            quantized.append(Linear(stored, linear.bias))
            self._on_weights(int(np.prod(linear.weight.shape)))
        return quantized

    def _linears(self, i: int, unit: str, math: Arithmetic) -> dict[str, Linear]:
        """The source's matrices of a unit, with their biases."""
        linears = {}
        for name in UNITS[unit]:
            tensor, bias = self._tensor(i, name), f"model.layers.{i}.{name}.bias"
            weight = math.array(_finite(self._checkpoint.read(tensor), tensor))
            biased = bias in self._checkpoint.tensors
            linears[name] = Linear(weight, math.array(self._vector(bias)) if biased else None)
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
