"""Files with some units of 8 bits, for tests: random weights, rounded by `edgellama.quant`, through the writer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints import DEFAULTS, random_weights
from edgellama import quant
from edgellama.format import ModelWriter

UNITS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
CODE_BITS = {"int4.g128": 4, "int8.g128": 8}


def units(*places: str) -> list[str]:
    """The units of "0.qkv", "1.down" and so on, in file order.

    >>> units("1.o", "0.gate_up")
    ['model.layers.0.mlp.gate_up_proj', 'model.layers.1.self_attn.o_proj']
    """
    wanted = {tuple(place.split(".")) for place in places}
    layers = range(1 + max(int(layer) for layer, _ in wanted))
    return [
        f"model.layers.{i}.{unit}"
        for i in layers
        for unit in UNITS
        if (str(i), unit.split(".")[1].removesuffix("_proj")) in wanted
    ]


def write_mixed(
    path: str | Path, int8_units: Sequence[str], *, lm_head_bits: int = 8, seed: int = 0, **overrides: Any
) -> Path:
    """Write a file of `checkpoints.DEFAULTS` with `overrides`, these units in 8 bits."""
    config = {**DEFAULTS, **overrides}
    weights = random_weights(config, seed)
    scales = {}
    with ModelWriter(path, config, lm_head_bits=lm_head_bits, method="rtn", int8_units=int8_units) as writer:
        for spec in writer.specs:
            name = spec.name.removesuffix(".qweight").removesuffix(".scales")
            if spec.layout in CODE_BITS:
                bits = CODE_BITS[spec.layout]
                codes, scales[name] = quant.quantize_rtn(weights[f"{name}.weight"], bits)
                data = (quant.pack_int4 if bits == 4 else quant.pack_int8)(codes)
            elif spec.layout == "scales.g128":
                data = quant.pack_scales(scales.pop(name))
            elif spec.layout == "f16.r16":
                data = quant.pack_f16(weights[name].astype("<f2"))
            else:
                data = weights[name].astype("<f2" if spec.layout == "f16" else "<f4")
            writer.write(spec.name, data)
        writer.finish({}, {})
    return Path(path)
