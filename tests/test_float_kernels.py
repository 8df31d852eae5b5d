"""The float32 kernels of the converter's forward pass: right, and the same bits however the work is divided."""

import numpy as np
import pytest

from edgellama import quant
from edgellama_convert.float_kernels import PANEL, Panels, exp, matmul, row_buffer, unpack


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (6, 1024, PANEL), (50, 1300, 2 * PANEL + 3), (13, 2500, 17)])
def test_a_product_is_one_chain_of_fma_for_each_element(shape):
    rows, depth, tokens = shape
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((rows, depth), np.float32), rng.standard_normal((depth, tokens), np.float32)
    want = np.zeros((rows, tokens), np.float32)
    for k in range(depth):  # a product of two float32 is exact in float64, and their sum is rounded to float32 once or
        want = (w[:, k : k + 1].astype(np.float64) * x[k].astype(np.float64) + want).astype(np.float32)  # nearly so
    got = matmul(w, x)
    exact = w.astype(np.float64) @ x.astype(np.float64)
    assert np.abs(got - exact).max() <= 1e-6 * np.sqrt(depth) * max(1.0, np.abs(exact).max())
    assert (got == want).mean() > 0.999  # two roundings of the float64 sum differ from fma's one very rarely


def test_bits_do_not_depend_on_the_division_nor_on_neighbours():
    rng = np.random.default_rng(1)
    w, x = rng.standard_normal((37, 1500), np.float32), rng.standard_normal((1500, 150), np.float32)
    whole = matmul(w, x)
    panels = Panels(x)
    assert (np.concatenate([panels.product(w[i : i + 5]) for i in range(0, 37, 5)]) == whole).all()
    assert (np.concatenate([matmul(w, x[:, i : i + 11]) for i in range(0, 150, 11)], axis=1) == whole).all()
    padded = row_buffer(37, 1500)
    padded[...] = w
    assert not padded.flags.c_contiguous and (panels.product(padded) == whole).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_is_the_oracles(bits):
    weights = np.random.default_rng(2).standard_normal((50, 300)).astype(np.float32)
    codes, scales = quant.quantize_rtn(weights, bits)
    packed = (quant.pack_int4 if bits == 4 else quant.pack_int8)(codes)
    out = row_buffer(64, 384)
    unpack(packed, quant.pack_scales(scales), out)
    np.testing.assert_array_equal(out[:50, :300], quant.dequantize(codes, scales, bits))
    assert (out[50:] == 0).all() and (out[:, 300:] == 0).all()


def test_exp():
    x = np.concatenate([np.linspace(-87, 88, 5001), [0.0, -np.inf, -100, 1000]]).astype(np.float32).reshape(5, -1)
    got, want = exp(x), np.exp(np.minimum(x, np.float32(88)).astype(np.float64))
    assert got.shape == x.shape and got[-1, -4] == 1 and (got[-1, -3:-1] == 0).all()
    assert (np.abs(got - want) <= 3e-7 * want + 1e-38).all()
