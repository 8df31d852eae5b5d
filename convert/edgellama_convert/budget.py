"""Which of the layers' units get 8 bits instead of 4, so that a stated number of bits per weight is kept.

Bits are counted as the file stores them, in the layers' matrices: codes, scales and padding, over the weights that are
there. Knows sizes and gains; what a unit's 8 bits gain is `sensitivity`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.format import LAYOUTS, TensorSpec, model_tensors, unit_names
from edgellama.format.schema import UNITS

CODE_BITS = {"int4.g128": 4, "int8.g128": 8}


class Budget:
    """A number of bits per weight, checked against what is possible. ConvertError tells the range otherwise."""

    def __init__(self, config: LlamaConfig, bpw: float):
        specs = model_tensors(config, 16)
        self.bpw, self._units = bpw, list(unit_names(config))
        least, most = linear_bits(specs), linear_bits(model_tensors(config, 16, self._units))
        if not least <= bpw <= most:
            raise ConvertError(
                f"bpw {bpw:g} is not possible for this model: from {math.ceil(100 * least) / 100:.2f} (4 bits "
                f"everywhere) to {math.floor(100 * most) / 100:.2f} (8 bits)"
            )
        nbytes = {spec.name: LAYOUTS[spec.layout].nbytes(spec.shape) for spec in specs if spec.layout in CODE_BITS}
        self._room = math.floor(bpw * _weights(specs) / 8) - _stored(specs)
        self._cost = {unit: sum(nbytes[f"{name}.qweight"] for name in unit_matrices(unit)) for unit in self._units}

    def choose(self, gains: Mapping[str, float]) -> list[str]:
        """The units that get 8 bits, in file order: those that gain most for a byte, as long as there is room."""
        room, chosen = self._room, set()
        for unit in sorted(self._units, key=lambda unit: -gains[unit] / self._cost[unit]):
            if self._cost[unit] <= room:
                chosen.add(unit)
                room -= self._cost[unit]
        return [unit for unit in self._units if unit in chosen]


def unit_matrices(unit: str) -> list[str]:
    """A unit's matrices.

    >>> unit_matrices("model.layers.3.mlp.gate_up_proj")
    ['model.layers.3.mlp.gate_proj', 'model.layers.3.mlp.up_proj']
    """
    model, layers, i, name = unit.split(".", 3)
    return [f"{model}.{layers}.{i}.{matrix}" for matrix in UNITS[name]]


def linear_bits(specs: Iterable[TensorSpec]) -> float:
    """Bits per weight of the layers' matrices: codes, scales and padding."""
    specs = list(specs)
    return 8 * _stored(specs) / _weights(specs)


def _layers(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    return [spec for spec in specs if spec.name.startswith("model.layers.") and len(spec.shape) == 2]


def _stored(specs: Iterable[TensorSpec]) -> int:
    """Bytes of the layers' matrices."""
    return sum(LAYOUTS[spec.layout].nbytes(spec.shape) for spec in _layers(specs))


def _weights(specs: Iterable[TensorSpec]) -> int:
    return sum(math.prod(spec.shape) for spec in _layers(specs) if spec.layout in CODE_BITS)
