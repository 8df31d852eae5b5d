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

torch and triton are imported by these modules alone (and torch by calibrated conversion's), none of which is imported
before a device asks for it. The name is not `torch`, so that nobody has to think about which one `import torch` means.
"""

from .availability import available_devices, device_problem, free_bytes, total_bytes

__all__ = ["available_devices", "device_problem", "free_bytes", "total_bytes"]
