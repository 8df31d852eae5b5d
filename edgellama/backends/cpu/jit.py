"""The decorators of every kernel: nogil, IEEE arithmetic, compiled once per user and machine (see `code_cache`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
from numba import types
from numba.core.ccallback import CFunc

from .code_cache import new_cache

_OPTIONS: dict[str, Any] = {"nopython": True, "error_model": "numpy", "boundscheck": False}

kernel: Any = functools.partial(numba.jit, nogil=True, **_OPTIONS)
"""Decorator of a function that is compiled into those which call it."""


def entry_point(function: Callable) -> Any:
    """Decorator of a kernel that Python calls: compiled code is cached on disk, with all that it calls."""
    dispatcher = kernel(function)
    dispatcher._cache = new_cache(function)
    return dispatcher


def prepare(dispatcher: Any, *args: Any) -> None:
    """Compile, or load from the cache, what a call with arguments like these needs; it is not called.

    Done before a team runs it: an error in one thread of a team would leave the others waiting.
    """
    dispatcher.compile(tuple(numba.typeof(arg) for arg in args))


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
        code: Any = CFunc(self.py_func, (signature.args, signature.return_type), locals={}, options=_OPTIONS)
        code._cache = new_cache(self.py_func)
        code.compile()
        self._code = code  # the machine code lives as long as this
        return code.address
