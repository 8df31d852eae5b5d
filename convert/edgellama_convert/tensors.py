"""The tensors of a conversion, one after the other, as what the file stores of each: streams of bytes.

Watches the memory and tells progress. Knows which part makes a tensor (`pipeline` on the way, or `gptq` before), not
what they do, and not where the bytes go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.format import LAYOUTS, TensorSpec, unit_names
from edgellama.quant import GROUP_SIZE, padded_shape
from edgellama.sizing import layer_weights

from . import sensitivity
from .budget import CODE_BITS, Budget
from .checkpoint import Checkpoint, SourceTensor
from .gptq import CalibratedLayers, WorkFolder
from .names import Plan, refuse_untied
from .pipeline import Pipeline
from .resources import MIB, check_memory, plan_buffers, private_bytes

_GAINS = "gains.npz"


class Tensors:
    """The tensors of one conversion as streams of bytes, with memory watched and progress told."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        specs: Sequence[TensorSpec],
        plan: Plan,
        method: str,
        max_ram: int | None,
        n_threads: int,
        files: Mapping[str, bytes],
        progress: Callable[[int, int], None] | None,
    ):
        self.checkpoint, self.plan, self.method, self.max_ram = checkpoint, plan, method, max_ram
        self.n_threads = n_threads
        self.progress = progress or (lambda done, total: None)
        tensors = {tensor.name: tensor for tensor in plan.sources.values()}
        self.total = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
        self.also = 0
        """Weights of other work that is told as progress."""
        self.done = 0
        self.peak_rss = private_bytes()
        self.scales: dict[str, np.ndarray] = {}
        self.layers: CalibratedLayers | None = None
        buffers = plan_buffers(
            max_ram,
            widest=max(tensor.shape[-1] for tensor in tensors.values() if len(tensor.shape) == 2),
            weight_bytes=max(tensor.nbytes // max(1, int(np.prod(tensor.shape))) for tensor in tensors.values()),
            held_bytes=_held_bytes(specs) + sum(len(data) for data in files.values()),
            n_threads=n_threads,
        )
        self.pipeline = Pipeline(checkpoint, buffers, n_threads, self.on_weights)

    def on_weights(self, n: int) -> None:
        """Count `n` weights as done, and look at the memory."""
        held = private_bytes()
        check_memory(self.max_ram, held)
        if held is not None:
            self.peak_rss = max(held, self.peak_rss or 0)
        self.done += n
        self.progress(self.done, self.total + self.also)

    def choose_units(
        self, budget: Budget, config: LlamaConfig, method: str, ids: np.ndarray, folder: WorkFolder
    ) -> list[str]:
        """The units of 8 bits. What they gain is measured on `ids`, or was before the conversion was killed."""
        if folder.is_whole(_GAINS, ["gains"]):
            self.on_weights(layer_weights(config))
            gains = dict(zip(unit_names(config), folder.load_array(_GAINS, "gains").tolist(), strict=True))
        else:
            gains = sensitivity.measure(
                self.checkpoint,
                config,
                ids,
                folder,
                method=method,
                n_threads=self.n_threads,
                on_weights=self.on_weights,
            )
            folder.save_arrays(_GAINS, {"gains": np.array(list(gains.values()))})
        return budget.choose(gains)

    def calibrate(self, layers: CalibratedLayers) -> None:
        """Quantize the layers' matrices; `data` takes them from there."""
        layers.run()
        self.layers = layers

    def data(self, spec: TensorSpec) -> Iterator[np.ndarray] | np.ndarray:
        """What the file stores of one tensor, in pieces that are valid until the next is asked for."""
        tensor = self.plan.sources[spec.name]
        if self.layers is not None and spec.name.endswith((".qweight", ".scales")) and ".layers." in spec.name:
            self.pipeline.errors[tensor.name] = self.layers.error(tensor)
            return self.layers.codes(tensor) if spec.name.endswith(".qweight") else self.layers.scales(tensor)
        if spec.layout in CODE_BITS:
            n, k = padded_shape(*spec.shape)
            scales = np.empty((n // 16, k // GROUP_SIZE, 16), np.float16)
            self.scales[spec.name.removesuffix(".qweight") + ".scales"] = scales
            return self.pipeline.quantized(tensor, CODE_BITS[spec.layout], self.method, scales)
        if spec.layout == "scales.g128":
            return self.scales.pop(spec.name)
        if spec.layout in ("f16", "f16.r16"):
            return self.pipeline.float16(tensor, blocked=spec.layout == "f16.r16")
        assert spec.layout == "f32"
        return self._vector(tensor)

    def _vector(self, tensor: SourceTensor) -> np.ndarray:
        values = self.checkpoint.read(tensor)
        if not np.isfinite(values).all():
            bad = int(np.argmin(np.isfinite(values)))
            raise ConvertError(
                f"tensor {tensor.name}: value [{bad}] is {values[bad]:g}; the checkpoint is damaged, download it again"
            )
        self.on_weights(values.size)
        return values

    def compare_tied(self) -> None:
        """A tied model that stores lm_head as well must store the same values there: only one is kept."""
        if self.plan.must_equal is not None and not self.pipeline.equal(*self.plan.must_equal):
            raise refuse_untied()


def _held_bytes(specs: Sequence[TensorSpec]) -> int:
    """Upper bound of what is held besides slabs: the scales of one layer (or of lm_head) and a vector."""
    by_layer: dict[str, int] = {}
    for spec in specs:
        if spec.layout in ("scales.g128", "f32"):
            layer = ".".join(spec.name.split(".")[:3])
            by_layer[layer] = by_layer.get(layer, 0) + 2 * LAYOUTS[spec.layout].nbytes(spec.shape)
    return max(by_layer.values(), default=0) + MIB
