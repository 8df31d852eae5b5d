"""The SIMD vocabulary against NumPy, lane by lane."""

import numpy as np
import pytest

pytest.importorskip("numba")
from edgellama.backends.cpu import simd
from edgellama.backends.cpu.jit import compiled


@compiled
def run_exp(x, out, n):
    for i in range(0, n, 16):
        simd.vstore(out + 4 * i, simd.vexp(simd.vload(x + 4 * i)))


@compiled
def run_exp2(x, out, n):
    for i in range(0, n, 16):
        simd.vstore(out + 4 * i, simd.vexp2(simd.vload(x + 4 * i)))


@compiled
def run_folds(x):
    v = simd.vload(x)
    return simd.hsum(v), simd.hmax(v), simd.hsum_i32(simd.round_i32(v))


@compiled
def run_keep_below(x, n, out):
    simd.vstore(out, simd.keep_below(simd.vload(x), n))


@compiled
def run_f16(x, one, sixteen, n):
    for i in range(n):
        simd.store_f16(one + 2 * i, simd.load_f32(x + 4 * i))
    for i in range(0, n, 16):
        simd.vstore_f16(sixteen + 2 * i, simd.vload(x + 4 * i))


def exp(x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    out = np.empty_like(x)
    run_exp(x.ctypes.data, out.ctypes.data, x.size)
    return out


def test_exp_is_within_three_ulp():
    x = np.linspace(-87.2, 88.0, 1 << 16).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(exp(x) - exact) <= 3 * np.spacing(exact.astype(np.float32))).all()


def test_exp_at_its_special_points():
    assert (exp(np.zeros(16)) == 1).all()
    assert (exp(np.full(16, -np.inf)) == 0).all()
    assert (exp(np.full(16, -100.0)) == 0).all()


def exp2(x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    out = np.empty_like(x)
    run_exp2(x.ctypes.data, out.ctypes.data, x.size)
    return out


def test_exp2_is_within_three_ulp():
    x = -np.concatenate([np.linspace(0, 126, 1 << 16), np.geomspace(1e-30, 1, 1 << 12)]).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert (np.abs(exp2(x) - exact) <= 3 * np.spacing(exact.astype(np.float32))).all()


def test_exp2_at_its_special_points():
    whole = np.arange(-126, 2)[:128]
    assert (exp2(whole) == 2.0**whole).all()
    assert (exp2(np.array([-126.01, -1e4, -1e30, -np.inf] * 4)) == 0).all()


@compiled
def run_moves(x, square, half, byte, stride):
    simd.transpose(x, 80, square)
    simd.vscatter_f16(half, stride, simd.vload(x))
    simd.vscatter_i8(byte, stride, simd.round_i32(simd.vload(x)))


def test_transpose_and_scatter():
    x = np.random.default_rng(0).uniform(-127, 127, (16, 20)).astype(np.float32)
    square, half, byte = np.zeros((16, 16), np.float32), np.zeros((16, 4), np.float16), np.zeros((16, 8), np.int8)
    run_moves(x.ctypes.data, square.ctypes.data, half.ctypes.data, byte.ctypes.data, 8)
    assert (square == x[:, :16].T).all()
    assert (half[:, 0] == x[0, :16].astype(np.float16)).all() and (half[:, 1:] == 0).all()
    assert (byte[:, 0] == np.rint(x[0, :16])).all() and (byte[:, 1:] == 0).all()


def test_folds_and_rounding():
    x = (np.arange(16) * 1.5 - 7).astype(np.float32)  # halves, exact in float32, some of them ties
    total, top, rounded = run_folds(x.ctypes.data)
    assert total == x.sum() and top == x.max() and rounded == np.rint(x).sum()


@pytest.mark.parametrize("n", [-5, 0, 1, 15, 16, 70])
def test_keep_below(n):
    x, out = np.arange(16, dtype=np.float32), np.empty(16, np.float32)
    run_keep_below(x.ctypes.data, n, out.ctypes.data)
    assert (out == np.where(np.arange(16) < n, x, -np.inf)).all()


def test_float16_rounds_like_numpy_and_saturates():
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(4092) * 10.0 ** rng.uniform(-9, 5, 4092)
    x = np.concatenate([spread, [2.0**-25, 7e4, -7e4, np.inf]]).astype(np.float32)
    one, sixteen = np.empty(x.size, np.float16), np.empty(x.size, np.float16)
    run_f16(x.ctypes.data, one.ctypes.data, sixteen.ctypes.data, x.size)
    expected = np.clip(x, -65504, 65504).astype(np.float16)
    assert (one == expected).all() and (sixteen == expected).all()


@compiled
def run_from_f16(h, one, sixteen, n):
    for i in range(n):
        simd.store_f32(one + 4 * i, simd.load_f16(h + 2 * i))
    for i in range(0, n, 16):
        simd.vstore(sixteen + 4 * i, simd.vload_f16(h + 2 * i))


def test_every_finite_float16_reads_exactly():
    h = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    h = np.concatenate([h[np.isfinite(h)], np.zeros(16, np.float16)])
    h = h[: h.size // 16 * 16]
    one, sixteen = np.empty(h.size, np.float32), np.empty(h.size, np.float32)
    run_from_f16(h.ctypes.data, one.ctypes.data, sixteen.ctypes.data, h.size)
    assert (one == h).all() and (sixteen == h).all()
