"""The decorators of every kernel: nogil, IEEE arithmetic, compiled once per user and machine.

Compiled code is cached under the user's cache folder (`EDGELLAMA_HOME` moves it), in a folder named after
a hash of these sources and of the versions of Numba and Python: Numba's own index notices a change in the
file of a kernel, but not in a helper that was compiled into it. Where there is nowhere to cache (no source
files in a frozen app, no writable folder), kernels are compiled at each start.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numba
import platformdirs
from numba.core import config


@functools.cache
def cache_folder() -> Path:
    """Where compiled kernels of exactly these sources and versions go."""
    home = os.environ.get("EDGELLAMA_HOME")
    base = Path(home) / "cache" if home else platformdirs.user_cache_path("edgellama", appauthor=False)
    state = hashlib.sha256(f"{sys.version}|{numba.__version__}|{version('llvmlite')}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        state.update(source.read_bytes())
    return base / "kernels" / state.hexdigest()[:16]


_OPTIONS = {"nopython": True, "nogil": True, "error_model": "numpy", "boundscheck": False}
_CACHE_DIR = "CACHE_DIR"
"""Numba's setting, read when a function is decorated; ours alone must move, not those of other packages."""

kernel = functools.partial(numba.jit, **_OPTIONS)
"""Decorator of a function that is compiled into those which call it."""


def entry_point(function: Callable) -> Callable:
    """Decorator of a kernel that Python calls: compiled code is cached on disk, with all that it calls."""
    before = getattr(config, _CACHE_DIR)
    try:
        setattr(config, _CACHE_DIR, str(cache_folder()))
        return kernel(cache=True)(function)
    except (RuntimeError, OSError):  # Numba: "no locator available"
        return kernel(function)
    finally:
        setattr(config, _CACHE_DIR, before)
