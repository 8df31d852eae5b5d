"""What a conversion may use of the machine: memory held by this process, and a budget for it.

Knows the operating systems' ways to ask and the sizes of the pipeline's buffers; nothing of files or tensors' meaning.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from edgellama.errors import ConvertError
from edgellama.quant import GROUP_SIZE, ROW_BLOCK, round_up

MIB = 1 << 20
DEFAULT_SLAB_WEIGHTS = 2 * MIB
"""Weights of a slab for each thread: large enough that Python's part is small, small enough to stay near the cache."""
_CHUNK_WEIGHTS = MIB // 4


def private_bytes() -> int | None:
    """Resident memory of this process without pages of mapped files; where that is unknown (macOS), the peak with them.

    None if nobody tells.
    """
    try:
        if sys.platform == "linux":
            status = Path("/proc/self/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines() if line.startswith("Rss"))
            return (int(fields["RssAnon"].split()[0]) + int(fields["RssShmem"].split()[0])) * 1024
        if sys.platform == "win32":
            return _windows_private_bytes()
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    except (ImportError, OSError, KeyError, ValueError, AttributeError):
        return None


def _windows_private_bytes() -> int | None:
    import ctypes
    from ctypes import wintypes

    class Counters(ctypes.Structure):
        _fields_ = [
            ("cb", wintypes.DWORD),
            ("PageFaultCount", wintypes.DWORD),
            *(
                (name, ctypes.c_size_t)
                for name in ("peak_wss", "wss", "qppp", "qpp", "qpnpp", "qnpp", "private", "peak")
            ),
        ]

    counters = Counters(cb=ctypes.sizeof(Counters))
    kernel32 = ctypes.windll.kernel32  # type: ignore[attr-defined]
    kernel32.GetCurrentProcess.restype = wintypes.HANDLE
    query = kernel32.K32GetProcessMemoryInfo
    query.argtypes = [wintypes.HANDLE, ctypes.c_void_p, wintypes.DWORD]
    if not query(kernel32.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
        return None
    return int(counters.private)


@dataclass(frozen=True)
class Buffers:
    """Sizes of the pipeline's buffers: rows move in slabs, each slab is shared among the threads in chunks."""

    slab_weights: int
    chunk_weights: int

    def slab_rows(self, in_features: int) -> int:
        return _block_rows(self.slab_weights, in_features)

    def chunk_rows(self, in_features: int) -> int:
        return _block_rows(self.chunk_weights, in_features)


def _block_rows(weights: int, in_features: int) -> int:
    """Whole row blocks, at least one, of about so many weights."""
    return max(1, weights // (ROW_BLOCK * round_up(in_features, GROUP_SIZE))) * ROW_BLOCK


def plan_buffers(max_ram: int | None, *, widest: int, weight_bytes: int, held_bytes: int, n_threads: int) -> Buffers:
    """Buffer sizes that keep the process within `max_ram` bytes; ConvertError with the least that would do.

    widest: the most in_features of a matrix. weight_bytes: of a stored weight of the source. held_bytes: what is kept
    besides slabs (scales of a layer, a vector, the tokenizer).
    """
    slab, chunk = DEFAULT_SLAB_WEIGHTS * max(2, n_threads), _CHUNK_WEIGHTS
    if max_ram is None:
        return Buffers(slab, chunk)
    block = ROW_BLOCK * round_up(widest, GROUP_SIZE)
    # Two slabs in turn, each the raw weights and at most two bytes of result; blocking a 16-bit result copies it twice.
    slab_cost = 2 * (weight_bytes + 2) + 2 * 2
    # Each thread's chunk as float32, and for 16-bit results the squares in float64.
    chunk_cost = n_threads * 16
    base = (private_bytes() or 0) + held_bytes
    least = base + block * (slab_cost + chunk_cost)
    if max_ram < least:
        raise ConvertError(
            f"--max-ram {_mib(max_ram)} MiB is too little for this model: it takes at least {_mib(least + MIB)} MiB "
            f"with {n_threads} threads"
        )
    chunk = max(block, min(chunk, (max_ram - base) // 2 // chunk_cost))
    slab = max(block, min(slab, (max_ram - base - chunk * chunk_cost) // slab_cost))
    return Buffers(slab, chunk)


def check_memory(max_ram: int | None, held: int | None) -> None:
    """ConvertError if the memory measured is above the limit: the plan was too small, say so rather than go on."""
    if max_ram is not None and held is not None and held > max_ram:
        raise ConvertError(
            f"stopped: the conversion holds {_mib(held)} MiB, more than --max-ram {_mib(max_ram)} MiB; "
            "raise it, or use fewer --threads"
        )


def check_calibration_memory(max_ram: int | None, needed: int) -> None:
    """ConvertError if calibrating, which holds `needed` bytes at its peak, cannot stay within the limit."""
    needed += private_bytes() or 0
    if max_ram is not None and needed > max_ram:
        raise ConvertError(
            f"--max-ram {_mib(max_ram)} MiB is too little to calibrate this model: it takes {_mib(needed + MIB)} MiB; "
            "--method search takes far less"
        )


def _mib(n: int) -> int:
    return n // MIB
