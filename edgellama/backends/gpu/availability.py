"""Whether torch, a CUDA GPU and Triton are there, and what to do where they are not: one line each.

Importing torch takes a second or two and is done only for a device that needs it; `available_devices` does without.
"""

from __future__ import annotations

import functools
import importlib.metadata

MIN_CAPABILITY = (7, 5)
"""Compute capability from which a GPU is taken: Turing, the first one with the tensor cores' int and fp16 forms."""
_INSTALL = "pip install 'edgellama[cuda]'"


def available_devices() -> list[str]:
    """Devices that `load` can be asked for in this installation; whether a GPU is there shows only at loading."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ["cpu"]
    return ["cpu", "torch-cpu"] if version.endswith("+cpu") else ["cpu", "cuda", "torch-cpu"]


def device_problem(device: str) -> str | None:
    """Why `device` ("cuda" or "torch-cpu") cannot be used here, and what to do; None where it can."""
    try:
        import torch
    except ImportError as error:
        why = (
            "torch is not installed" if isinstance(error, ModuleNotFoundError) else f"torch cannot be imported: {error}"
        )
        return f"device {device!r}: {why}; {_INSTALL} brings it, device 'cpu' needs nothing"
    if device == "torch-cpu":
        return None
    if torch.version.cuda is None:
        return (
            f"device 'cuda': the installed torch {torch.__version__} is built without CUDA; install a CUDA build "
            "(see pytorch.org) or use device 'cpu'"
        )
    if not torch.cuda.is_available():
        return "device 'cuda': torch finds no CUDA GPU (driver missing? CUDA_VISIBLE_DEVICES empty?); use device 'cpu'"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name()
        return f"device 'cuda': {name} has compute capability {capability[0]}.{capability[1]}, 7.5 is needed; use 'cpu'"
    return None


def free_bytes() -> int:
    """Bytes that can still be allocated on the GPU."""
    import torch

    return torch.cuda.mem_get_info()[0]


def total_bytes() -> int:
    """Bytes of the GPU's memory."""
    import torch

    return torch.cuda.mem_get_info()[1]


@functools.cache
def triton_problem() -> str | None:
    """Why Triton's kernels cannot run on the GPU; None where a small one has just been compiled and run.

    Triton compiles a launcher with the system's C compiler, so an installed Triton need not be one that works.
    """
    try:
        import torch

        from . import kernels

        values = torch.arange(16, dtype=torch.float32, device="cuda")
        kernels.double[(1,)](values)
        if values.tolist() != [2.0 * i for i in range(16)]:
            return "Triton's first kernel gave wrong results"
    except ModuleNotFoundError:
        return "Triton is not installed"
    except Exception as error:  # whatever a compiler, a driver or a linker comes up with
        return f"Triton cannot compile here ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return None
