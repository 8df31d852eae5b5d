"""How much memory this process may still take, as the system and the container's limits tell."""

import ctypes
import os
import sys
from pathlib import Path

_CGROUP_FILES = (  # limit, use: version 2, then version 1; as seen from inside a container
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def available_bytes() -> int | None:
    """Bytes that can be allocated without swapping (page cache counts as free); None where nobody tells."""
    known = [value for value in (_system_available(), _container_available()) if value is not None]
    return min(known, default=None)


def _system_available() -> int | None:
    try:
        if sys.platform == "linux":
            for line in Path("/proc/meminfo").read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        elif sys.platform == "win32":
            return _windows_available()
        # macOS tells its total only; a third of it is usually taken by the system and other programs.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 2 // 3
    except (OSError, ValueError, AttributeError, IndexError):
        return None


def _container_available() -> int | None:
    for limit_file, use_file, stat_file in _CGROUP_FILES:
        try:
            limit = Path(limit_file).read_text().strip()
            use = int(Path(use_file).read_text())
            stat = dict(line.split() for line in Path(stat_file).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit == "max":
            return None
        # File pages counted as "use" are given back on demand: a mapped model must not count against itself.
        cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
        return max(0, int(limit) - max(0, use - cached))
    return None


def _windows_available() -> int | None:
    class MemoryStatus(ctypes.Structure):
        _fields_ = [
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "available", "a", "b", "c", "d", "e")),
        ]

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined]
        return None
    return int(status.available)
