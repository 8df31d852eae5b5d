"""The torch backend: the same file on a CUDA GPU, or as plain torch operations anywhere.

    availability.py      what is missing, in one line; imports torch only when asked
    backend.py           the `Backend`: checks, chunks, choice of path
    weights.py           the file's bytes on the device, as they are; matrix products with them
    dense.py             the layouts of FORMAT.md, section 4, as torch arithmetic
    cache.py             the static KV cache
    plain.py             the forward pass as torch operations: prefill, and everything where Triton is missing
    decode.py, graph.py  few tokens: the fused Triton kernels, captured in a CUDA graph
    kernels.py, attention_kernels.py    those kernels
    selection.py         the next token, chosen on the device

torch and triton are imported by these modules alone, and none of them is imported before a device asks for it. The name
is not `torch`, so that nobody has to think about which one `import torch` means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .availability import available_devices, device_problem, free_bytes

if TYPE_CHECKING:
    from ...format import ModelFile
    from .backend import TorchBackend

DEVICES = ("cuda", "torch-cpu")


def make_backend(device: str, file: ModelFile, n_ctx: int, n_slots: int = 1, **options: Any) -> TorchBackend:
    """A backend on "cuda" or "torch-cpu"; `options` are `TorchBackend`'s. DeviceError says what is missing."""
    from ...errors import ContextError, DeviceError

    problem = device_problem(device)
    if problem:
        raise DeviceError(problem)
    import torch

    from .backend import TorchBackend

    try:
        return TorchBackend(file, n_ctx, n_slots, device="cuda" if device == "cuda" else "cpu", **options)
    except torch.OutOfMemoryError:
        raise ContextError(
            f"not enough memory on the GPU for this model and a context of {n_ctx} tokens; "
            "ask for fewer with n_ctx (-c), or for kv_cache int8"
        ) from None


__all__ = ["DEVICES", "available_devices", "device_problem", "free_bytes", "make_backend"]
