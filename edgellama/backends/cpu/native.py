"""Kernels as machine code, by name: from the disk, or compiled by Numba where it is not there yet; called by address.

A process that finds its kernels there imports no compiler: LLVM links the objects in some 20 ms, while Numba takes 400
to start and to load its own cache. Each object is linked by itself, and needs only what the C library offers.
Knows Numba's calling convention: status = kernel(&result, &error, arguments). Does not know what a kernel does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import threading
from collections.abc import Callable, Iterable
from typing import Any

import llvmlite.binding as llvm

from . import code_cache
from .target import host

_lock = threading.RLock()  # two models may be loaded at once
_engines: list[llvm.ExecutionEngine] = []  # machine code lives as long as these
_addresses: dict[str, int] = {}


def address(name: str) -> int:
    """Where the machine code of "module.kernel" is, a module of this package; valid as long as the process.

    It is compiled if need be: seconds.
    """
    if name not in _addresses:
        prepare([name])
    return _addresses[name]


def prepare(names: Iterable[str], progress: Callable[[int, int], None] | None = None) -> None:
    """Have these kernels ready. `progress(done, total)`, in functions, where some have to be compiled."""
    with _lock:
        kept = {name: code_cache.read(f"{name}.o") for name in names if name not in _addresses}
        codes = {name: code for name, code in kept.items() if code is not None}
        missing = {name: _source(name) for name in kept if name not in codes}
        with contextlib.ExitStack() as stack:
            if missing and progress is not None:
                from .jit import telling

                stack.enter_context(telling(missing.values(), progress))
            for name, source in missing.items():
                codes[name] = source.compile()
                code_cache.write(f"{name}.o", codes[name])
        for name, code in codes.items():
            _addresses[name] = link(code)


def function(name: str, arguments: int) -> Callable[..., int]:
    """A kernel as a Python function of so many int64; its result if it has one. Computes without the GIL."""
    call = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * arguments)(address(name))

    def run(*args: int) -> int:
        result, error = ctypes.c_int64(), ctypes.c_void_p()
        call(ctypes.addressof(result), ctypes.addressof(error), *args)
        return result.value

    return run


def _source(name: str) -> Any:
    """The `jit.Native` of that name."""
    module, kernel = name.split(".")
    return getattr(importlib.import_module(f".{module}", __package__), kernel)


def pack(symbol: str, code: bytes) -> bytes:
    """An object file and the name of its kernel, for `link`."""
    return symbol.encode() + b"\0" + code


def link(packed: bytes) -> int:
    """The address of the kernel in what `pack` made."""
    symbol, code = packed.split(b"\0", 1)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(symbol.decode())


@functools.cache
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _machine() -> llvm.TargetMachine:
    _initialize()
    cpu, features = host()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=cpu, features=features, codemodel="jitdefault", jit=True)
