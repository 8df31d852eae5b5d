"""How kernels are compiled: nogil, IEEE arithmetic, once per user and machine (see `code_cache`)."""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numba
from numba import types
from numba.core import compiler, event
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from ...errors import EdgellamaError
from . import native
from .numba_cache import new_cache
from .target import TARGET, choose

_OPTIONS: dict[str, Any] = {"nopython": True, "error_model": "numpy", "boundscheck": False}
_NATIVE = "edgellama:native"
_FROM_C = {"erf", "sqrtf", "memcpy", "memmove", "memset", "sched_yield", "SwitchToThread"}

_kernels: list[Any] = []


def kernel(function: Callable) -> Any:
    """Decorator of a function that is compiled into those which call it. Python cannot call it: that would need
    wrappers, which take a fifth of the time to compile."""
    options: dict[str, Any] = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    dispatcher = numba.jit(**options)(function)
    _kernels.append(dispatcher)
    return dispatcher


compiled: Any = functools.partial(numba.jit, nogil=True, **_OPTIONS)
"""Decorator of a kernel that Python calls, compiled in each process."""


def entry_point(function: Callable) -> Any:
    """Decorator of a kernel that Python calls with arrays: compiled code is cached on disk, with all that it calls."""
    dispatcher = compiled(function)
    dispatcher._cache = new_cache(function)
    return dispatcher


class Native:
    """Decorator of a kernel that is called by its address (see `native`): compiled on its own, when first needed.

    Its code is optimized once, not again in each caller, and only the variants that a model needs exist at all. All
    arguments are int64, and so is the result, if there is one. `steps`: how long it takes to optimize, in functions
    of average size.
    """

    def __init__(self, function: Callable, result: Any = types.void, steps: int = 4):
        self.py_func, self._result, self.steps = function, result, steps
        self.__doc__ = function.__doc__
        self.name = f"{function.__module__.rsplit('.', 1)[-1]}.{function.__name__}"

    @property
    def address(self) -> int:
        """Where the machine code is; valid as long as the process."""
        return native.address(self.name)

    def compile(self) -> bytes:
        """Its machine code, for `native.link`."""
        _check_target()
        arguments = (types.int64,) * self.py_func.__code__.co_argcount
        flags: Any = compiler.Flags()
        cpu_target.options.parse_as_flags(flags, _OPTIONS)
        flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        flags.no_compile = True  # not before the object is asked for
        flags.nrt = False
        contexts = cpu_target.typing_context, cpu_target.target_context
        with global_compiler_lock, event.trigger_event(_NATIVE, {"steps": self.steps}):
            compiled = compiler.compile_extra(*contexts, self.py_func, arguments, self._result, flags, {})
            library = compiled.library
            library.enable_object_caching()
            library.finalize()
            wanted = {each.name for each in library._final_module.functions if each.is_declaration}
            strange = {name for name in wanted if not name.startswith("llvm.")} - _FROM_C
            assert not strange, f"{self.name} calls {strange}, which is not there without Numba"
            return native.pack(compiled.fndesc.llvm_func_name, library._get_compiled_object())


@contextlib.contextmanager
def telling(natives: Iterable[Native], progress: Callable[[int, int], None]) -> Iterator[None]:
    """While these are compiled, `progress(done, total)` in functions; a few may turn out not to be needed."""
    total = sum(native.steps for native in natives) + sum(not each.overloads for each in _kernels)

    class Count(event.Listener):
        done = 0

        def on_start(self, event: event.Event) -> None:
            """Nothing: what counts is what is done."""

        def on_end(self, event: event.Event) -> None:
            self.done = min(self.done + event.data.get("steps", 1), total)
            progress(self.done, total)

    count = Count()
    with event.install_listener("numba:compile", count), event.install_listener(_NATIVE, count):
        yield
    progress(total, total)


def _check_target() -> None:
    """Numba must compile for what `target` chose the kernels for; it also reads a file of settings."""
    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    theirs = choose(platform.machine().lower(), name, features)
    if theirs._replace(amx=TARGET.amx) != TARGET:
        raise EdgellamaError(
            f"Numba is set to compile for {name!r}, but not by its environment: remove cpu_name and cpu_features from "
            ".numba_config.yaml, or set NUMBA_CPU_NAME and NUMBA_CPU_FEATURES"
        )
