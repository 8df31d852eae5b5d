"""Which dot-product instruction the code that Numba compiles may use, and the loops that suit it.

Numba compiles for the host, or for what `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` say; so does this module, without
Numba (`jit` sees to it that they agree), so a test can run every x86 path on one machine. It knows nothing of kernels.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from typing import NamedTuple

import llvmlite.binding as llvm

# A CPU name given by hand comes without a feature list, so names that matter are listed here; LLVM knows
# what a name implies but offers no way to ask.
_VNNI_512 = (
    "cascadelake cooperlake cannonlake icelake-client icelake-server tigerlake rocketlake sapphirerapids "
    "emeraldrapids graniterapids diamondrapids znver4 znver5"
).split()
_AMX = "sapphirerapids emeraldrapids graniterapids diamondrapids".split()
_VNNI_256 = "alderlake raptorlake meteorlake gracemont arrowlake arrowlake-s lunarlake pantherlake sierraforest".split()
_AVX2 = (
    "haswell broadwell skylake skylake-avx512 skx x86-64-v3 x86-64-v4 core-avx2 znver1 znver2 znver3 bdver4"
).split()


class Target(NamedTuple):
    """What the kernels ask. Columns: how many sums of one row block are kept in registers (see `tiles`)."""

    dot4: str  # how four neighbouring int8 products are summed: avx512vnni | avxvnni | avx2 | neon | plain
    float16: bool  # instructions convert to and from float16; without them LLVM would call a missing library
    few_columns: int
    many_columns: int
    attention_lines: int  # vectors of 16 keys or values that four queries share in registers (see `attention_loops`)
    amx: bool = False  # matrix instructions for int8 (see `amx`)


def choose(arch: str, cpu_name: str, features: str) -> Target:
    """The target for an architecture, an LLVM CPU name and LLVM's feature string (`"+avx2,-avx512f"`).

    >>> choose("x86_64", "haswell", "").dot4
    'avx2'
    """
    has = {f[1:] for f in features.split(",") if f.startswith("+")}
    lacks = {f[1:] for f in features.split(",") if f.startswith("-")}

    def can(feature: str, names: list[str]) -> bool:
        return feature in has or (cpu_name in names and feature not in lacks)

    if arch in ("x86_64", "amd64"):
        if can("avx512vnni", _VNNI_512) and can("avx512bw", _VNNI_512):
            return Target("avx512vnni", True, 8, 16, 4, can("amx-int8", _AMX) and can("amx-tile", _AMX))
        if can("avxvnni", _VNNI_256) and can("f16c", _VNNI_256):
            return Target("avxvnni", True, 4, 4, 1)
        if can("avx2", _VNNI_512 + _VNNI_256 + _AVX2) and can("f16c", _VNNI_512 + _VNNI_256 + _AVX2):
            return Target("avx2", True, 4, 4, 1)
    if arch in ("aarch64", "arm64") and ("dotprod" in has or cpu_name.startswith("apple-")):
        return Target("neon", True, 4, 4, 1)
    return Target("plain", arch in ("aarch64", "arm64"), 4, 4, 1)


def host() -> tuple[str, str]:
    """The LLVM CPU name and feature string that Numba compiles for: this machine's, or what its settings say."""
    name = os.environ.get("NUMBA_CPU_NAME")
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None and name is not None and name.lower() == "generic":
        features = ""
    if features is None:
        try:
            of_host = llvm.get_host_cpu_features()
        except RuntimeError:
            of_host = llvm.FeatureMap()
        if os.environ.get("NUMBA_ENABLE_AVX") == "0":
            of_host.update({feature: False for feature in of_host if feature.startswith("avx")})
        features = of_host.flatten()
    return llvm.get_host_cpu_name() if name is None else name, features


def _of_this_process() -> Target:
    target = choose(platform.machine().lower(), *host())
    return target._replace(amx=target.amx and _amx_is_granted())


def _amx_is_granted() -> bool:
    """Ask Linux for the tile registers; it gives them to a process that asks (arch_prctl(2), ARCH_REQ_XCOMP_PERM)."""
    if sys.platform != "linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    try:
        return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0
    except (OSError, AttributeError):
        return False


TARGET = _of_this_process()
