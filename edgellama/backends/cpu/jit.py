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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numba
import platformdirs
from numba import types
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


_OPTIONS: dict[str, Any] = {"nopython": True, "nogil": True, "error_model": "numpy", "boundscheck": False}

kernel: Any = functools.partial(numba.jit, **_OPTIONS)
"""Decorator of a function that is compiled into those which call it."""


@contextmanager
def _our_cache() -> Iterator[None]:
    """Numba reads its setting when a function is decorated; ours alone must move, not other packages'."""
    name = "CACHE_DIR"
    before = getattr(config, name)
    setattr(config, name, str(cache_folder()))
    try:
        yield
    finally:
        setattr(config, name, before)


def entry_point(function: Callable) -> Any:
    """Decorator of a kernel that Python calls: compiled code is cached on disk, with all that it calls."""
    try:
        with _our_cache():
            return kernel(cache=True)(function)
    except (RuntimeError, OSError):  # Numba: "no locator available"
        return kernel(function)


class Native:
    """Decorator of a kernel that other kernels call by its address: compiled and cached on its own, when first needed.

    Its code is optimized once, not again in each caller, and only the variants that a model needs exist at all. All
    arguments are int64.
    """

    def __init__(self, function: Callable):
        self.py_func = function
        self.__doc__ = function.__doc__

    @functools.cached_property
    def address(self) -> int:
        """Where the machine code is; valid as long as the process."""
        signature = types.void(*[types.int64] * self.py_func.__code__.co_argcount)
        options = {key: value for key, value in _OPTIONS.items() if key != "nogil"}
        try:
            with _our_cache():
                self._code = numba.cfunc(signature, cache=True, **options)(self.py_func)
        except (RuntimeError, OSError):
            self._code = numba.cfunc(signature, **options)(self.py_func)
        return int(self._code.address or 0)
