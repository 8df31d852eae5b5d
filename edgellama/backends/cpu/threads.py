"""How many threads this process should compute with: the physical cores that it is really given."""

from __future__ import annotations

import os
from pathlib import Path


def default_threads() -> int:
    """Physical cores within the process's affinity and the container's CPU quota; at least 1."""
    cpus = _allowed_cpus()
    cores = len({_core_of(cpu) for cpu in cpus}) if cpus else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(cores, quota) if quota else cores)


def _allowed_cpus() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # macOS and Windows have no affinity in Python
        return set()


def _core_of(cpu: int) -> str:
    """Hyper-threads of one core share this string."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _cgroup_quota() -> int | None:
    """Whole CPUs of the container's quota (cgroup v2, then v1), rounded up; None if unlimited."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError):
        pass
    try:
        base = Path("/sys/fs/cgroup/cpu")
        microseconds, of = (int((base / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return None if microseconds <= 0 else -(-microseconds // of)
    except (OSError, ValueError):
        return None
