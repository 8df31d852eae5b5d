"""The SIMD vocabulary in plain NumPy, so that a kernel's Python source can run without a compiler.

`interpreted(dispatcher)` rebuilds a jitted function from its source with every vocabulary word, and every
jitted function that it calls, replaced by its emulation. A test that fails compiled and passes interpreted
blames the compiler or the vocabulary; one that fails both ways, the algorithm.
"""

from __future__ import annotations

import ctypes
import types

import numpy as np
from numba.core.dispatcher import Dispatcher

_f32, _i32 = np.float32, np.int32


def _view(address: int, dtype, count: int) -> np.ndarray:
    nbytes = np.dtype(dtype).itemsize * count
    return np.frombuffer((ctypes.c_char * nbytes).from_address(int(address)), dtype)


def _loader(dtype, count, to):
    def load(address):
        values = _view(address, dtype, count).astype(to)
        return values if count > 1 else values[0]

    return load


def _storer(dtype, count):
    def store(address, value):
        if dtype == np.float16:
            value = np.clip(value, -65504, 65504)
        _view(address, dtype, count)[:] = np.asarray(value).astype(dtype)

    return store


def _fold(v, combine):
    for half in (8, 4, 2, 1):
        v = combine(v[:half], v[half : 2 * half])
    return v[0]


def _exp(x):
    """The vocabulary's exp up to its last two bits; exact where it is exact."""
    return np.where(x < -87.3, _f32(0), np.exp(np.clip(x, -87.3, 88.3).astype(np.float64)).astype(_f32))


def _fma(x, y, z):
    """One rounding: products of float32 are exact in float64, and the sum's double rounding is rare."""
    return (x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)).astype(_f32)


VOCABULARY = {
    "load_f32": _loader(_f32, 1, _f32),
    "load_i32": _loader(_i32, 1, _i32),
    "load_i64": _loader(np.int64, 1, np.int64),
    "load_u8": _loader(np.uint8, 1, np.uint8),
    "load_f16": _loader(np.float16, 1, _f32),
    "vload": _loader(_f32, 16, _f32),
    "vload_f16": _loader(np.float16, 16, _f32),
    "store_f32": _storer(_f32, 1),
    "store_i32": _storer(_i32, 1),
    "store_i64": _storer(np.int64, 1),
    "store_f16": _storer(np.float16, 1),
    "store_i8": lambda address, value: _storer(np.int8, 1)(address, np.rint(value)),
    "vstore": _storer(_f32, 16),
    "vstore_f16": _storer(np.float16, 16),
    "vstore_i8": _storer(np.int8, 16),
    "splat": lambda x: np.full(16, x, _f32),
    "zero_i32": lambda: np.zeros(16, _i32),
    "vadd": np.add,
    "vsub": np.subtract,
    "vmul": np.multiply,
    "vdiv": np.divide,
    "vadd_i32": np.add,
    "vmax": np.maximum,
    "vabs": np.abs,
    "vfma": _fma,
    "vexp": _exp,
    "hsum": lambda v: _fold(v, np.add),
    "hmax": lambda v: _fold(v, np.maximum),
    "hsum_i32": lambda v: _fold(v, np.add),
    "round_i32": lambda v: np.rint(v).astype(_i32),
    "vhigh_part": lambda q: (q + 64) >> 7,
    "vlow_part": lambda q, high: q - (high << 7),
    "keep_below": lambda v, n: np.where(np.arange(16) < n, v, _f32(-np.inf)),
}


def _scores(dtype, queries, parts):
    def scores(q, q_stride, keys, head_dim, out):
        nbytes = np.dtype(dtype).itemsize
        for i in range(queries):
            x = _view(q + i * q_stride, _f32, head_dim)
            for part in range(parts):
                lines = _view(keys + part * head_dim * 16 * nbytes, dtype, head_dim * 16).astype(_f32)
                acc = np.zeros(16, _f32)
                for d in range(head_dim):
                    acc = _fma(lines[16 * d : 16 * d + 16], np.full(16, x[d]), acc)
                _view(out + i * 256 + part * 64, _f32, 16)[:] = acc

    return scores


def _mix(dtype, queries, chunks):
    def mix(weights, values, value_stride, positions, out, out_stride):
        for i in range(queries):
            target = _view(out + i * out_stride, _f32, 16 * chunks)
            for p in range(positions):
                row = _view(values + p * value_stride * np.dtype(dtype).itemsize, dtype, 16 * chunks).astype(_f32)
                target[:] = _fma(row, np.full(16 * chunks, _view(weights + i * 256 + 4 * p, _f32, 1)[0]), target)

    return mix


ATTENTION = {
    kind: (_scores(t, 1, 4), _scores(t, 4, 2), _mix(t, 1, 4), _mix(t, 1, 1), _mix(t, 4, 2), _mix(t, 4, 1))
    for kind, t in (("float16", np.float16), ("int8", np.int8))
}
"""The kernels that attention calls by address, in the order of its KERNEL_FIELDS."""

_BY_ADDRESS = [function for functions in ATTENTION.values() for function in functions]


def attention_addresses(kind: str) -> list[int]:
    """Stand-ins for addresses, which the emulated calls understand."""
    return [_BY_ADDRESS.index(function) for function in ATTENTION[kind]]


TILES = {
    "call_scores": lambda address, *args: _BY_ADDRESS[address](*args),
    "call_mix": lambda address, *args: _BY_ADDRESS[address](*args),
}


def interpreted(dispatcher: Dispatcher) -> types.FunctionType:
    """The jitted function as plain Python over the emulated vocabulary."""
    source = dispatcher.py_func
    scope = dict(source.__globals__)
    for name in source.__code__.co_names:
        if name in VOCABULARY:
            scope[name] = VOCABULARY[name]
        elif name in TILES:
            scope[name] = TILES[name]
        elif isinstance(scope.get(name), Dispatcher):
            scope[name] = interpreted(scope[name])
    return types.FunctionType(source.__code__, scope, source.__name__, source.__defaults__)
