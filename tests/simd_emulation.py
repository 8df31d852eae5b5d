"""The SIMD vocabulary in plain NumPy, so that a kernel's Python source can run without a compiler.

`interpreted(dispatcher)` rebuilds a jitted function from its source with every vocabulary word, and every
jitted function that it calls, replaced by its emulation. A test that fails compiled and passes interpreted
blames the compiler or the vocabulary; one that fails both ways, the algorithm.
"""

from __future__ import annotations

import ctypes
import functools
import types

import numpy as np
from numba.core.dispatcher import Dispatcher

from edgellama.backends.cpu import attention, cache_store
from edgellama.backends.cpu.jit import Native, compiled
from edgellama.backends.cpu.shapes import LARGEST, QUERIES, SPLIT
from edgellama.backends.cpu.softmax import LOWEST
from edgellama.backends.cpu.target import TARGET
from edgellama_convert import scale_search
from edgellama_convert.scale_search import ROUND

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


def _exp2(x):
    """The vocabulary's exp2 up to its last two bits; exact where it is exact."""
    return np.where(x >= -126, np.exp2(np.maximum(x, _f32(-126)).astype(np.float64)).astype(_f32), _f32(0))


def _fma(x, y, z):
    """One rounding: products of float32 are exact in float64, and the sum's double rounding is rare."""
    return (x.astype(np.float64) * np.float64(y) + z.astype(np.float64)).astype(_f32)


_NATIVES = (attention.pass_one, attention.pass_few, attention.pass_many, cache_store.store)
"""In the order of `shapes.ATTENTION_KERNELS`: an address is an index."""

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
    "vhigh_part": lambda q: np.sign(q) * (np.abs(q) >> 7),
    "vlow_part": lambda q, high: q - (high << 7),
    "words_of_i8": lambda v: sum(int(word.any()) << i for i, word in enumerate(v.astype(np.int8).reshape(4, 4))),
    "keep_below": lambda v, n: np.where(np.arange(16) < n, v, _f32(-np.inf)),
}


def _scores(dtype, queries):
    def scores(q, keys, head_dim, lines, out):
        for i in range(queries):
            x = _view(q + 4 * i * head_dim, _f32, head_dim)
            for line in range(lines):
                at = keys + line * head_dim * 16 * np.dtype(dtype).itemsize
                rows = _view(at, dtype, head_dim * 16).astype(_f32).reshape(head_dim, 16)
                acc = np.zeros(16, _f32)
                for d in range(head_dim):
                    acc = _fma(rows[d], x[d], acc)
                _view(out + 4 * i * SPLIT + line * 64, _f32, 16)[:] = acc

    return scores


def _mix(dtype, queries):
    def mix(weights, values, value_stride, positions, out, out_stride):
        rows = _view(values, dtype, positions * value_stride).astype(_f32).reshape(positions, value_stride)
        for i in range(queries):
            target, w = _view(out + i * out_stride, _f32, value_stride), _view(weights + 4 * i * SPLIT, _f32, positions)
            for p in range(positions):
                target[:] = _fma(rows[p], w[p], target)

    return mix


def _widen(dtype):
    def widen(source, count, to):
        _view(to, _f32, count)[:] = _view(source, dtype, count)

    return widen


def _tops(queries):
    def tops(scores, lines, states, stride):
        for i in range(queries):
            rows = _view(scores + 4 * i * SPLIT, _f32, 16 * max(lines, 0)).reshape(-1, 16)
            _view(states + i * stride + LARGEST, _f32, 16)[:] = rows.max(axis=0, initial=-np.inf)

    return tops


def _weights(queries):
    def weights(scores, lines, states, stride):
        for i in range(queries):
            shift = np.maximum(_view(states + i * stride + LARGEST, _f32, 16), _f32(LOWEST))
            sums = np.zeros(16, _f32)
            for line in range(lines):
                score = _view(scores + 4 * i * SPLIT + 64 * line, _f32, 16)
                score[:] = _exp2(score - shift)
                sums += score
            _view(states + i * stride, _f32, 16)[:] = sums

    return weights


def _transpose(a, stride, to):
    _view(to, _f32, 256)[:] = np.stack([_view(a + i * stride, _f32, 16) for i in range(16)], axis=1).ravel()


def _interleave(rows):
    def interleave(a):
        words = _view(a, _i32, 32 * rows)
        words[:] = words.reshape(rows, 32).T.ravel()

    return interleave


def _scatterer(dtype):
    def scatter(a, stride, v):
        for i in range(16):
            _storer(dtype, 1)(a + i * stride, v[i])

    return scatter


def _fetch_add(address, value):
    old = VOCABULARY["load_i64"](address)
    VOCABULARY["store_i64"](address, old + value)
    return old


VOCABULARY |= {
    "transpose": _transpose,
    "interleave_few": _interleave(TARGET.few_columns),
    "interleave_many": _interleave(TARGET.many_columns),
    "vscatter_f16": _scatterer(np.float16),
    "vscatter_i8": _scatterer(np.int8),
    "vexp2": _exp2,
    "widen_f16": _widen(np.float16),
    "widen_i8": _widen(np.int8),
    "scores_many": _scores(_f32, QUERIES),
    "mix_many": _mix(_f32, QUERIES),
    "tops_one": _tops(1),
    "tops_some": _tops(QUERIES),
    "weights_one": _weights(1),
    "weights_some": _weights(QUERIES),
    "fetch_add": _fetch_add,
    "atomic_store": _storer(np.int64, 1),
    # An interpreted kernel's address is its place among attention's kernels.
    "call_pass": lambda address, *args: interpreted(_NATIVES[address])(*args),
    "call_store": lambda address, *args: interpreted(_NATIVES[address])(*args),
}
for _count, _queries in (("one", 1), ("few", QUERIES)):
    for _kind, _dtype in (("f16", np.float16), ("i8", np.int8)):
        VOCABULARY[f"scores_{_count}_{_kind}"] = _scores(_dtype, _queries)
        VOCABULARY[f"mix_{_count}_{_kind}"] = _mix(_dtype, _queries)


def interpreted(dispatcher: Dispatcher | Native) -> types.FunctionType:
    """The jitted function as plain Python over the emulated vocabulary."""
    source = dispatcher.py_func
    scope = dict(source.__globals__)
    for name in source.__code__.co_names:
        if name in VOCABULARY:
            scope[name] = VOCABULARY[name]
        elif isinstance(scope.get(name), Dispatcher):
            scope[name] = interpreted(scope[name])
    return types.FunctionType(source.__code__, scope, source.__name__, source.__defaults__)


def scale_fit(candidates: int):
    """`scale_search`'s kernel of that many candidates."""

    def fit(x, importance, n, zero, inverses, sums):
        values, weights = (_view(at, _f32, 16 * n).reshape(n, 16) for at in (x, importance))
        scales = _view(inverses, _f32, 16 * candidates).reshape(candidates, 1, 16)
        codes = np.clip((values * scales + ROUND) - ROUND, _f32(-zero), _f32(zero - 1))
        out = _view(sums, _f32, 32 * candidates).reshape(candidates, 2, 16)
        out[:] = 0
        for j in range(n):
            weighted = weights[j] * codes[:, j]
            out[:, 0] = _fma(weighted, values[j], out[:, 0])
            out[:, 1] = _fma(weighted, codes[:, j], out[:, 1])

    return fit


def interpret_scale_search(monkeypatch, caller) -> None:
    """Make a module's `choose_scales` run without a compiler."""
    for name in ("to_half", "from_half"):
        monkeypatch.setattr(scale_search, name, getattr(scale_search, name).py_func)
    monkeypatch.setattr(scale_search, "fit_one", scale_fit(1))
    monkeypatch.setattr(scale_search, "fit_several", scale_fit(scale_search.TOGETHER))
    monkeypatch.setattr(caller, "choose_scales", scale_search.choose_scales.py_func)


@functools.cache
def callable_kernel(kernel: Dispatcher) -> Dispatcher:
    """A kernel that Python may call; as it is, only other kernels may."""
    return compiled(kernel.py_func)


WAYS = {"compiled": callable_kernel, "interpreted": interpreted}
