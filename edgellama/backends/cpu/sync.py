"""Atomics, the spin barrier and the chunk counter that a team of threads shares inside jitted code.

All state lies in int64 words of one zeroed buffer, a cache line (64 bytes) each. Knows nothing of
Python threads (`team`) or of what the chunks are.
"""

from __future__ import annotations

import platform
import sys

from numba import types

from .jit import kernel
from .shapes import LINE
from .simd import ADDRESS, I64, emit_call, ir, vector_intrinsic

SPINS_BEFORE_YIELD = 4000


@vector_intrinsic(types.int64, ADDRESS, types.int64)
def fetch_add(b, a, value):
    """Add to the int64 at `a`; the old value."""
    return b.atomic_rmw("add", b.inttoptr(a, I64.as_pointer()), value, "acq_rel")


@vector_intrinsic(types.int64, ADDRESS)
def atomic_load(b, a):
    return b.load_atomic(b.inttoptr(a, I64.as_pointer()), "acquire", 8)


@vector_intrinsic(types.void, ADDRESS, types.int64)
def atomic_store(b, a, value):
    b.store_atomic(value, b.inttoptr(a, I64.as_pointer()), "release", 8)


@vector_intrinsic(types.void)
def pause(b):
    """Tell the core that this is a spin loop."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        emit_call(b, "llvm.x86.sse2.pause", ir.VoidType(), [])
    elif platform.machine().lower() in ("aarch64", "arm64"):
        emit_call(b, "llvm.aarch64.hint", ir.VoidType(), [ir.IntType(32)(1)])


@vector_intrinsic(types.void)
def give_way(b):
    """Let another thread have the core: on a busy machine the one waited for may need it."""
    if sys.platform == "win32":
        emit_call(b, "SwitchToThread", ir.IntType(32), [])
    else:
        emit_call(b, "sched_yield", ir.IntType(32), [])


@kernel
def barrier(words, n_threads):
    """Wait until all `n_threads` are here. `words`: address of two zeroed lines (arrivals, generation)."""
    if n_threads == 1:
        return
    generation = atomic_load(words + LINE)
    if fetch_add(words, 1) == n_threads - 1:
        atomic_store(words, 0)
        atomic_store(words + LINE, generation + 1)
        return
    spins = 0
    while atomic_load(words + LINE) == generation:
        spins += 1
        if spins < SPINS_BEFORE_YIELD:
            pause()
        else:
            give_way()
