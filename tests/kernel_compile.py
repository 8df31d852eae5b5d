"""Compiles Triton kernels for GPUs that are not there: Triton's own launcher and ptxas, and a driver that names one.

For a process of its own: the driver stays.

Knows Triton's runtime; does not run anything. `compile_launches` takes what `Decoder.step` returns.
"""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from edgellama.backends.gpu.decode import OPTIONS


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


def compile_launches(launches: list[tuple[Any, Any, Any, Any]], capability: int) -> list[tuple[str, Any]]:
    """[(kernel's name, what Triton compiled)] for each launch; raises what Triton or ptxas raises."""
    driver.set_active(_Driver(capability))
    compiled = []
    for kernel, grid, arguments, constants in launches:
        kernel.device_caches.clear()  # may be of another target
        compiled.append((kernel.__name__, kernel.run(*arguments, grid=grid, warmup=True, **constants, **OPTIONS)))
    return compiled
