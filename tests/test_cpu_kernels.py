"""Each kernel twice, compiled and as plain Python (`simd_emulation`), against a few lines of NumPy."""

import math

import numpy as np
import pytest

pytest.importorskip("numba")
from edgellama import quant
from edgellama.backends.cpu import shapes, vector_ops
from edgellama.backends.cpu.plan import MATRIX, PACK
from edgellama.backends.cpu.target import TARGET
from simd_emulation import VOCABULARY, WAYS

both_ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
# Sums of n float32 terms in another order differ by up to n * 2**-24 of the terms' sizes.
EPS = 2.0**-24


def address(a: np.ndarray) -> int:
    return a.ctypes.data


def floats(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


@both_ways
def test_rms_norm(way):
    n, padded = 150, 256
    x, weight, out = np.zeros(padded, np.float32), np.zeros(padded, np.float32), np.empty(padded, np.float32)
    x[:n], weight[:n] = floats(n), floats(n, 1)
    way(vector_ops.rms_norm)(address(x), address(weight), n, padded, np.float32(1e-5), address(out))
    exact = weight * x / np.sqrt((x[:n].astype(np.float64) ** 2).mean() + 1e-5)
    np.testing.assert_allclose(out, exact, rtol=n * EPS)
    assert (out[n:] == 0).all()


@both_ways
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("ceiling", [0.0, 3.0, 1e9])
@pytest.mark.parametrize("tile", sorted({1, TARGET.few_columns, TARGET.many_columns}))
def test_pack_row(way, tile, ceiling, by_token):
    """What is packed, read back through the documented layout, is x within half a step of the stated size."""
    groups, tiles = 3, 2
    rows = floats(tile * tiles * groups * 128).reshape(tile * tiles, -1)
    rows[1] *= 1000
    rows[0, 128:256] = 0
    rows[:, 300] *= 30
    rows[-1, [301, 20]] = -2000, 50
    codes, highs = (np.full((tiles, groups, 32, tile, 4), 77, np.int8) for _ in range(2))
    masks = np.full((tiles, groups), -1, np.int64)
    scales = np.zeros((tiles, groups, tile), np.float32)
    sums = np.zeros((tiles, groups, tile), np.int32)
    pack = np.zeros(1, PACK)
    pack["tile"], pack["by_token"] = tile, by_token
    for name, array in {"codes": codes, "highs": highs, "masks": masks, "scales": scales, "sums": sums}.items():
        pack[name] = address(array)
    record = pack.view(np.recarray)[0]
    for token, row in enumerate(rows):
        way(vector_ops.pack_row)(address(row), groups, np.float32(ceiling), record, token // tile, token % tile)
    for index in range(tiles):
        way(vector_ops.finish_tile)(groups, record, index)
    valid = (masks[:, :, None] >> np.arange(32) & 1)[..., None, None]
    if by_token:  # [tiles][groups][tile][128], and a group's high parts count as a whole
        codes, highs = (a.reshape(tiles, groups, tile, 32, 4).transpose(0, 1, 3, 2, 4) for a in (codes, highs))
        valid = (masks != 0)[..., None, None, None]
    highs = highs * valid
    q = (codes + 128 * highs.astype(np.int64)).transpose(0, 3, 1, 2, 4).reshape(tile * tiles, groups, 128)
    steps = scales.transpose(0, 2, 1).reshape(-1, groups, 1).astype(np.float64)
    x = rows.reshape(-1, groups, 128)
    # Half a step, and the rounding of x * (127 / top) before it is rounded to a whole number.
    assert (np.abs(q * steps - x) <= steps * (0.5 + 127 * 128 * 4 * EPS)).all()
    assert (q.sum(axis=2) == sums.transpose(0, 2, 1).reshape(-1, groups)).all()
    absmax = np.abs(x).max(axis=2, keepdims=True)
    top = np.clip(ceiling * np.abs(rows.astype(np.float64)).mean(axis=1)[:, None, None], absmax / 128, absmax)
    np.testing.assert_allclose(steps, top / 127, rtol=1e-5)
    assert (np.abs(q) > 127).any() == (ceiling < 1e9) and np.abs(q).max() <= 127 * 128


def test_parts_of_a_code():
    """Towards zero: what fits into 8 bits has no high part, and both parts stay within -127..127."""
    q = np.arange(-127 * 128, 127 * 128 + 1)
    high = VOCABULARY["vhigh_part"](q)
    low = VOCABULARY["vlow_part"](q, high)
    assert (128 * high + low == q).all() and ((high == 0) == (np.abs(q) <= 127)).all()
    assert np.abs(high).max() == 127 and np.abs(low).max() == 127


@both_ways
@pytest.mark.parametrize("bits", [0, 4, 8, 16])
def test_embed(way, bits):
    vocab, n, token = 37, 150, 21
    rng = np.random.default_rng(0)
    table = np.zeros(1, MATRIX)
    table["bits"], table["groups"] = bits, 2
    scales = rng.standard_normal((vocab, 2)).astype(np.float16)
    if bits in (4, 8):
        codes = rng.integers(0, 2**bits, (vocab, n), dtype=np.uint8)
        stored = (quant.pack_int4 if bits == 4 else quant.pack_int8)(codes)
        expected = quant.dequantize(codes, scales, bits)[token]
    else:
        weights = rng.standard_normal((vocab, n)).astype(np.float16)
        stored = quant.pack_f16(weights) if bits == 16 else weights
        expected = weights[token].astype(np.float32)
    packed_scales = quant.pack_scales(scales)
    table["weights"], table["scales"] = address(stored), address(packed_scales)
    out = np.zeros(n, np.float32)
    way(vector_ops.embed)(table.view(np.recarray)[0], token, n, address(out))
    assert (out == expected).all()


ACTIVATIONS = {
    shapes.SILU: lambda v: v / (1 + np.exp(-v)),
    shapes.GELU: lambda v: v * 0.5 * (1 + np.vectorize(math.erf)(v / math.sqrt(2))),
    shapes.GELU_TANH: lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    shapes.RELU: lambda v: np.maximum(v, 0),
}


@both_ways
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate(way, activation):
    h, up = floats(64) * 4, floats(64, 1)
    h[:4] = [-200, 200, 0, -20]
    exact = ACTIVATIONS[activation](h.astype(np.float64)) * up
    with np.errstate(over="ignore"):
        way(vector_ops.gate)(address(h), address(up), 64, activation)
    np.testing.assert_allclose(h, exact, rtol=16 * EPS, atol=1e-6)
