"""Compiles the Triton kernels for GPUs that are not there: Triton's launcher and ptxas, and a driver that names one.

    python tests/kernel_compile.py EMPTY_FOLDER CAPABILITY...

Takes the launches of whole decode steps of Llama-2-7B's and Llama-3-8B's layers, so every kernel is compiled with the
very arguments and constants that it is launched with. Prints one JSON object: capability -> {"kernel, tokens" -> [bytes
of spilled registers, bits of the widest load]} of the worst variant. Nothing is run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what `decode.OPTIONS` asks for: no warning
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import random_model

from edgellama.backends.gpu import decode, kernels
from edgellama.backends.gpu.backend import TorchBackend
from edgellama.format import open_model
from edgellama.format.schema import UNITS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _Driver:
    """What a launch asks of a driver before it launches."""

    def __init__(self, capability: int):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(launches: list[tuple[str, Any]], capability: int) -> list[tuple[str, Any]]:
    """[(name, what Triton compiled)] for each launch; raises what Triton or ptxas raises."""
    driver.set_active(_Driver(capability))
    compiled = []
    for name, (kernel, grid, arguments, constants) in launches:
        kernel.device_caches.clear()  # may be of another target
        options = {**constants, **decode.OPTIONS}
        compiled.append((name, kernel.run(*arguments, grid=grid, warmup=True, **options)))
    return compiled


def disassemble(compiled: Any, folder: Path) -> tuple[str, int]:
    """(SASS, bytes of stack that registers are spilled to)"""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    sass, usage = (
        subprocess.run([TOOLS / tool, option, cubin], capture_output=True, text=True, check=True).stdout
        for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
    )
    return sass, int(re.search(r"STACK:(\d+)", usage)[1])


def launches_of(backend: TorchBackend) -> list[tuple[str, Any]]:
    """("kernel, tokens", launch) of steps of one token and of several, and of what dequantizes for prefill."""
    decoder = backend._decoder
    assert decoder is not None
    decoder._processors = 132  # an H200's
    steps = [
        (f"{launch[0].__name__}, {n}", launch)
        for n, splits in ((1, 1), (1, 8), (5, 8))
        for launch in decoder.step(n, splits)
    ]
    matrix = backend._weights.matrix("model.layers.0.mlp.down_proj")
    out = torch.empty(matrix.groups * 128, matrix.blocks * 16, dtype=torch.bfloat16)
    arguments = matrix.codes.view(torch.int32), matrix.scales, out, matrix.groups, out.shape[1]
    constants = {"BITS": 4, "ROWS": 64, "num_warps": 4}
    return [*steps, ("dequantize, all", (kernels.dequantize, (1, 1), arguments, constants))]


EVERY_UNIT = [f"model.layers.0.{unit}" for unit in UNITS]
CASES = [("7b-layer", "bfloat16", "float16"), ("8b-layer", "float16", "int8")]


def main() -> None:
    folder = Path(sys.argv[1])
    random_model.SHAPES["7b-layer"] = (320, 4096, 11008, 1, 32, 32, 4096, 1e4, False)
    random_model.SHAPES["8b-layer"] = (320, 4096, 14336, 1, 32, 8, 8192, 5e5, False)
    launches = []
    for shape, dtype, kv_cache in CASES:
        for bits in (4, 8):
            path = folder / f"{shape}-{bits}.edgellama"
            random_model.write_edgellama(shape, path, int8_units=EVERY_UNIT if bits == 8 else [])
            backend = TorchBackend(
                open_model(path), 512, device="cpu", kv_cache=kv_cache, dtype=dtype, kernels=True, step_tokens=5
            )
            launches += [
                (f"{name}, 8 bits" if launch[3].get("BITS") == 8 and bits == 8 else name, launch)
                for name, launch in launches_of(backend)
            ]
    outcome: dict[str, dict[str, list[int]]] = {}
    for capability in map(int, sys.argv[2:]):
        worst = outcome.setdefault(str(capability), {})
        seen: set[str] = set()
        for name, compiled in compile_launches(launches, capability):
            if compiled.hash in seen:
                continue
            seen.add(compiled.hash)
            sass, spilled = disassemble(compiled, folder)
            width = max([32, *(int(bits) for bits in re.findall(r"LDG\S*\.(64|128)\b", sass))])
            before = worst.get(name, [0, 128])
            worst[name] = [max(before[0], spilled), min(before[1], width)]
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
