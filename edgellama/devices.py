"""Devices by name: what is there, and a backend on it.

Knows names, what each device needs to be asked, and what is free on it. Does not know models, prompts or benchmarks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgellama.errors import ContextError, DeviceError
from edgellama.memory import available_bytes

if TYPE_CHECKING:
    from edgellama.backends import Backend
    from edgellama.format import ModelFile

DEVICES = ("cpu", "auto", "cuda", "reference", "torch-cpu")
TORCH_DEVICES = ("cuda", "torch-cpu")
CALIBRATION_DEVICES = ("auto", "cpu", "cuda", "torch-cpu")
"""Where `convert` calibrates."""
KV_CACHES = ("float16", "bfloat16", "int8")
_GPU_WORKSPACE = 350 << 20  # scratch, activations and kernels beside weights and cache


def resolve(device: str, kv_cache: str = "float16") -> str:
    """The device that is meant: "auto" is "cuda" where that works, else "cpu". DeviceError says what is wrong."""
    if device not in DEVICES:
        raise DeviceError(f"unknown device {device!r}; choose {', '.join(DEVICES[:-1])} or {DEVICES[-1]}")
    if kv_cache not in KV_CACHES:
        raise DeviceError(f"unknown kv_cache {kv_cache!r}; choose float16, bfloat16 or int8")
    if device == "auto":
        device = "cuda" if _cuda_works() else "cpu"
    elif device in TORCH_DEVICES:
        from edgellama.backends.gpu import device_problem

        problem = device_problem(device)
        if problem:
            raise DeviceError(problem)
    if kv_cache == "bfloat16" and device not in TORCH_DEVICES:
        raise DeviceError(
            f"kv_cache 'bfloat16' is for the devices cuda and torch-cpu; on {device} choose float16 or int8"
        )
    return device


def _cuda_works() -> bool:
    from edgellama.backends.gpu import available_devices, device_problem

    return "cuda" in available_devices() and device_problem("cuda") is None


def available() -> list[str]:
    """Devices of this installation, the best first; without importing what is slow to import."""
    from edgellama.backends.gpu import available_devices

    return available_devices()


def free_bytes(device: str) -> int | None:
    """Bytes that a resolved device has for weights and cache; None where nobody tells."""
    if device != "cuda":
        return available_bytes()
    from edgellama.backends.gpu import free_bytes

    return max(0, free_bytes() - _GPU_WORKSPACE)


def make_backend(
    device: str, file: ModelFile, n_ctx: int, n_slots: int = 1, n_threads: int | None = None, kv_cache: str = "float16"
) -> Backend:
    """A backend on a resolved device; `n_threads` is the CPU's. ContextError where memory does not suffice."""
    try:
        if device == "reference":
            from edgellama.backends.reference import ReferenceBackend

            return ReferenceBackend(file, n_ctx, n_slots)
        if device in TORCH_DEVICES:
            from edgellama.backends.gpu.backend import make_backend as make_torch_backend

            return make_torch_backend(device, file, n_ctx, n_slots, kv_cache=kv_cache)
        from edgellama.backends.cpu import CpuBackend

        return CpuBackend(file, n_ctx, n_slots, n_threads, kv_cache=kv_cache)
    except MemoryError:
        raise ContextError(
            f"not enough memory for {n_slots} sequences of {n_ctx} tokens; ask for less with n_ctx and n_slots"
        ) from None
