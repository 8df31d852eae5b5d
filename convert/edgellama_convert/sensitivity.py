"""How much each unit of the layers' matrices costs at 4 bits: what its rounding does to the model's distribution.

Text goes forward through the source's layers, then a gradient goes backward. Each position's loss is the surprise at a
token drawn from the model's own distribution, for then, to second order, a change c of what a unit puts out moves the
distribution by KL = E[(g . c)^2] / 2, g being the gradient there (the Fisher information, as in Kim et al. 2023,
SqueezeLLM, but for whole matrices and with the real rounding errors, so that their directions count). What 8 bits leave
is a few hundred times less, so this is what they gain.

One layer of the source is in memory at a time; what goes into each layer waits on disk. The same figures for any number
of threads. Knows units and figures; `budget` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor

import numpy as np

from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.format import unit_names
from edgellama.format.schema import UNITS
from edgellama.quant import ROW_BLOCK, dequantize, unpack_int4, unpack_scales
from edgellama.sizing import layer_weights

from .checkpoint import Checkpoint, SourceTensor, row_slabs
from .gptq.layer import LayerMath, Linear, whole_sequences
from .gptq.parts import each_part, threads
from .gptq.solve import Factor, Moments, quantize_matrix
from .gptq.work import Stream, WorkFolder
from .gradients import Layer, norm_back
from .names import EMBEDDING
from .quantizers import METHODS, quantize

MEASURED_TOKENS = 4096
_CHUNK_BYTES = 48 << 20
"""Of the widest activation of a chunk of sequences, float32; about eight such arrays live at once."""
_SLAB_BYTES = 32 << 20
"""Of the logits, and of the head's rows, that are in memory at a time."""
_TILE = 512
_SEED = 4096
_LARGEST = np.float32(1)
"""KL of one token, in nats, that is counted at most: where a position's gradient is huge, second order is far off."""


def memory_needed(config: LlamaConfig, length: int, method: str) -> int:
    """Bytes that measuring holds at its peak, without the process as it was before."""
    hidden, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    layer = layer_weights(config) // config.num_hidden_layers
    hessians = 0 if method in METHODS else 2 * hidden * hidden + heads * heads + 2 * wide * wide  # and one's factor
    streams = 4 * max(MEASURED_TOKENS, length) * hidden
    activations = 10 * max(_CHUNK_BYTES, 4 * length * max(wide, heads, hidden)) + 8 * _SLAB_BYTES
    return 4 * (2 * layer + wide * hidden + hessians + streams) + activations


def measure(
    checkpoint: Checkpoint,
    config: LlamaConfig,
    ids: np.ndarray,
    work: WorkFolder,
    *,
    method: str,
    n_threads: int,
    on_weights: Callable[[int], None],
) -> dict[str, float]:
    """What 8 bits gain in each unit, in nats a token. `ids` int32[sequences, length] of text; `method`: of rounding.

    `on_weights(n)` after n weights. ConvertError where activations or weights are not finite.
    """
    take = max(1, min(len(ids), MEASURED_TOKENS // ids.shape[1]))
    ids = ids[[i * len(ids) // take for i in range(take)]]
    with threads(n_threads) as pool, np.errstate(over="ignore", invalid="ignore"):
        gains = _Pass(checkpoint, config, ids, work, method, pool, on_weights).run()
    bad = next((unit for unit, gain in gains.items() if not np.isfinite(gain)), None)
    if bad is not None:
        raise ConvertError(f"{bad}: its activations or gradients are not finite; the checkpoint is damaged")
    return gains


class _Pass:
    """The layers forward, the head, the layers backward."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: LlamaConfig,
        ids: np.ndarray,
        work: WorkFolder,
        method: str,
        pool: Executor,
        on_weights: Callable[[int], None],
    ):
        self._checkpoint, self._config, self._ids, self._work = checkpoint, config, ids, work
        self._method, self._pool, self._on_weights = method, pool, on_weights
        self._math = LayerMath(config, ids.shape[1], pool)
        self._weights = layer_weights(config) // config.num_hidden_layers
        self._chunk = whole_sequences(config, ids.shape[1], _CHUNK_BYTES)

    def run(self) -> dict[str, float]:
        layers = self._config.num_hidden_layers
        gains = {}
        try:
            x = self._checkpoint.look_up(self._checkpoint.tensors[EMBEDDING], self._ids.reshape(-1))
            for i in range(layers):
                with self._stream(i) as inputs:
                    inputs.write(0, x)
                x = self._forward(i, x)
            gradient = self._head(x)
            for i in reversed(range(layers)):
                gradient, of_layer = self._backward(i, gradient)
                gains.update({f"model.layers.{i}.{unit}": gain / len(x) for unit, gain in of_layer.items()})
        finally:
            self._work.discard("input-*")
        return {unit: gains[unit] for unit in unit_names(self._config)}

    def _stream(self, i: int) -> Stream:
        return self._work.stream(f"input-{i:05d}", self._config.hidden_size)

    def _chunks(self) -> Iterator[slice]:
        return (slice(*span) for span in row_slabs(self._ids.size, self._chunk))

    def _forward(self, i: int, x: np.ndarray) -> np.ndarray:
        layer, _ = self._layer(i)
        out = np.empty_like(x)
        for here in self._chunks():
            out[here] = layer.forward(x[here])
        self._on_weights(self._weights // 4)
        return out

    def _backward(self, i: int, gradient: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        layer, matrices = self._layer(i)
        errors = self._errors(i, layer, matrices)
        gains = dict.fromkeys(UNITS, 0.0)
        out = np.empty_like(gradient)
        with self._stream(i) as inputs:
            for here in self._chunks():
                x = inputs.read(here.start, here.stop)
                out[here], moved = layer.backward(x, gradient[here], lambda name, x: self._math.linear(errors[name], x))
                for unit, change in moved.items():
                    gains[unit] += float(np.minimum(change * change / 2, _LARGEST).sum(dtype=np.float64))
        self._on_weights(self._weights - self._weights // 4)
        return out, gains

    def _layer(self, i: int) -> tuple[Layer, dict[str, Linear]]:
        """Layer i of the source, and its matrices by name."""
        prefix, tensors = f"model.layers.{i}", self._checkpoint.tensors
        matrices = {}
        for name in (name for unit in UNITS.values() for name in unit):
            bias = tensors.get(f"{prefix}.{name}.bias")
            weight = self._checkpoint.read(tensors[f"{prefix}.{name}.weight"])
            matrices[name] = Linear(weight, None if bias is None else self._checkpoint.read(bias))
        norms = [
            self._checkpoint.read(tensors[f"{prefix}.{name}.weight"])
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        return Layer(self._math, matrices, norms, self._pool), matrices

    def _errors(self, i: int, layer: Layer, matrices: dict[str, Linear]) -> dict[str, Linear]:
        """What 4 bits change of each matrix, by the method that the conversion uses."""
        if self._method in METHODS:
            return {name: Linear(self._rounding(linear.weight, f"{i}.{name}")) for name, linear in matrices.items()}
        moments: dict[str, Moments] = {}

        def count(unit: str, x: np.ndarray) -> None:
            if unit not in moments:
                moments[unit] = Moments.zeros(x.shape[1], 0)
            moments[unit].add(x, np.empty((len(x), 0), np.float32), self._pool)

        with self._stream(i) as inputs:
            for here in self._chunks():
                layer.forward(inputs.read(here.start, here.stop), count)
        errors = {}
        for unit, names in UNITS.items():
            of_unit = moments.pop(unit)
            of_unit.complete()
            factor = Factor(of_unit.hessian, self._pool)
            for name in names:
                errors[name] = Linear(quantize_matrix(matrices[name].weight, factor, 4, self._pool).errors)
        return errors

    def _rounding(self, weight: np.ndarray, name: str) -> np.ndarray:
        """What 4 bits change of a matrix, each weight by itself."""
        out = np.empty_like(weight)

        def some(row: int, end: int) -> None:
            result = quantize(weight[row:end], 4, self._method)
            codes = unpack_int4(result.packed, end - row, weight.shape[1])
            out[row:end] = dequantize(codes, unpack_scales(result.scales, end - row), 4) - weight[row:end]

        try:
            each_part(self._pool, len(weight), 8 * ROW_BLOCK, some)
        except ValueError as error:
            raise ConvertError(f"model.layers.{name}: {error}; the checkpoint is damaged") from None
        return out

    # -- the head ------------------------------------------------------------------------------------------------

    def _head(self, x: np.ndarray) -> np.ndarray:
        """The gradient of the last layer's output [tokens, hidden], `x` being that output.

        The losses are surprises at tokens that are drawn here; a classifier's, for want of a distribution that
        everybody agrees on, its scores, each added or subtracted by chance.
        """
        tensor = self._checkpoint.tensors[f"{self._config.head}.weight"]
        norm = self._checkpoint.read(self._checkpoint.tensors["model.norm.weight"])
        normed = self._math.norm(x, norm)
        out = np.zeros_like(x)
        if self._config.is_classifier:
            signs = np.random.default_rng(_SEED).choice(np.array([-1, 1], np.float32), (len(x), tensor.shape[0]))
            out += signs @ self._checkpoint.read(tensor)
        else:
            drawn, log_total = self._draw(tensor, normed)
            for first, rows, logits in self._logits(tensor, normed):
                logits -= log_total[:, None]
                np.exp(logits, out=logits)
                mine = np.flatnonzero((drawn >= first) & (drawn < first + len(rows)))
                logits[mine, drawn[mine] - first] -= 1

                def back(t: int, end: int, logits: np.ndarray = logits, rows: np.ndarray = rows) -> None:
                    out[t:end] += logits[t:end] @ rows

                each_part(self._pool, len(x), _TILE, back)
        return norm_back(out, x, norm, self._config.rms_norm_eps, self._pool)

    def _draw(self, tensor: SourceTensor, normed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(a token for each position from its distribution, the logarithm of the sum of its exponentials)

        The largest of logits with Gumbel noise is such a draw, and takes one pass (Gumbel 1954).
        """
        n = len(normed)
        best, drawn = np.full(n, -np.inf, np.float32), np.zeros(n, np.int64)
        top, total = np.full(n, -np.inf, np.float32), np.zeros(n)
        for first, _, logits in self._logits(tensor, normed):
            rng = np.random.default_rng([_SEED, first])
            largest = np.maximum(top, logits.max(axis=1))
            total *= np.exp(top - largest, dtype=np.float64)
            top = largest
            total += np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)
            logits += rng.gumbel(size=logits.shape).astype(np.float32)
            here = logits.argmax(axis=1)
            found = logits[np.arange(n), here]
            drawn = np.where(found > best, first + here, drawn)
            best = np.maximum(best, found)
        return drawn, (top + np.log(total)).astype(np.float32)

    def _logits(self, tensor: SourceTensor, normed: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first id, rows of the head, logits float32[tokens, rows]), a slab of ids at a time."""
        slab = max(ROW_BLOCK, _SLAB_BYTES // (4 * max(normed.shape)))
        for first, last in row_slabs(tensor.shape[0], slab):
            rows = self._checkpoint.read(tensor, first, last)
            yield first, rows, self._math.linear(Linear(rows), normed)
