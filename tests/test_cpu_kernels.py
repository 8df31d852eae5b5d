"""Each kernel twice, compiled and as plain Python (`simd_emulation`), against a few lines of NumPy."""

import math

import numpy as np
import pytest

pytest.importorskip("numba")
from edgellama import quant
from edgellama.backends.cpu import attention, vector_ops
from edgellama.backends.cpu.plan import MATRIX, PACK, PLAN
from edgellama.kv_cache import ELEMENT_BYTES, aligned_zeros
from simd_emulation import attention_addresses, interpreted

WAYS = {"compiled": lambda kernel: kernel, "interpreted": interpreted}
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
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("tile", [1, 3])
def test_pack_row(way, parts, tile):
    """What is packed, read back through the documented layout, is x within half a step."""
    groups, tiles = 2, 2
    rows = floats(tile * tiles * groups * 128).reshape(tile * tiles, -1)
    rows[1] *= 1000
    rows[0, 128:] = 0
    codes = np.zeros((tiles, groups, 32, parts, tile, 4), np.int8)
    scales = np.zeros((tiles, groups, tile), np.float32)
    sums = np.zeros((tiles, groups, parts, tile), np.int32)
    pack = np.zeros(1, PACK)
    pack["tile"], pack["parts"] = tile, parts
    pack["codes"], pack["scales"], pack["sums"] = address(codes), address(scales), address(sums)
    scratch = np.zeros(256, np.uint8)
    for token, row in enumerate(rows):
        record = pack.view(np.recarray)[0]
        way(vector_ops.pack_row)(address(row), groups, record, token // tile, token % tile, address(scratch))
    by_token = codes.transpose(0, 4, 1, 3, 2, 5).reshape(tile * tiles, groups, parts, 128).astype(np.int64)
    q = by_token[:, :, 0] if parts == 1 else by_token[:, :, 0] * 128 + by_token[:, :, 1]
    steps = scales.transpose(0, 2, 1).reshape(-1, groups, 1)
    error = np.abs(q * steps.astype(np.float64) - rows.reshape(-1, groups, 128))
    # Half a step, and the rounding of x * (top / absmax) before it is rounded to a whole number.
    assert (error <= steps * (0.5 + 127 * 128 * 4 * EPS)).all()
    assert (by_token.sum(axis=3) == sums.transpose(0, 3, 1, 2).reshape(-1, groups, parts)).all()
    assert np.abs(q).max() == (127 if parts == 1 else 127 * 128)


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


@both_ways
def test_rotate(way):
    """Every pair (x[i], x[i + half]) turns by its angle: half-split, as in Hugging Face's Llama."""
    x, angle = floats(40), floats(20, 1)
    pairs = (x[:20] + 1j * x[20:]) * np.exp(1j * angle.astype(np.float64)) * 0.25
    cos, sin = np.cos(angle), np.sin(angle)
    way(vector_ops.rotate)(address(x), address(cos), address(sin), 40, np.float32(0.25))
    np.testing.assert_allclose(x, np.concatenate([pairs.real, pairs.imag]), atol=8 * EPS)


ACTIVATIONS = {
    vector_ops.SILU: lambda v: v / (1 + np.exp(-v)),
    vector_ops.GELU: lambda v: v * 0.5 * (1 + np.vectorize(math.erf)(v / math.sqrt(2))),
    vector_ops.GELU_TANH: lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    vector_ops.RELU: lambda v: np.maximum(v, 0),
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


class Head:
    """The cache of one KV head, written by the kernels' own store functions, and attention over it."""

    def __init__(self, positions: int, head_dim: int, kind: str, way):
        self.head_dim, self.stride, self.way = head_dim, quant.round_up(head_dim, 16), way
        room, nbytes = quant.round_up(positions, 64), ELEMENT_BYTES[kind]
        k, v = (floats(positions * head_dim, seed).reshape(positions, head_dim) for seed in (1, 2))
        self.keys, self.values = aligned_zeros(room * head_dim * nbytes), aligned_zeros(room * self.stride * nbytes)
        self.key_scales, self.value_scales = np.zeros(room, np.float32), np.zeros(room, np.float32)
        for p in range(positions):
            if kind == "float16":
                way(vector_ops.store_key)(address(k[p]), address(self.keys), p, head_dim)
                way(vector_ops.store_value)(address(v[p]), address(self.values), p, head_dim, self.stride)
            else:
                scales = address(self.key_scales), address(self.value_scales)
                way(vector_ops.store_key_int8)(address(k[p]), address(self.keys), scales[0], p, head_dim)
                way(vector_ops.store_value_int8)(
                    address(v[p]), address(self.values), scales[1], p, head_dim, self.stride
                )
        self.k, self.v = (a.astype(np.float16) if kind == "float16" else self.rounded(a) for a in (k, v))
        self.plan = np.zeros(1, PLAN)
        self.plan["kv_bytes"], self.plan["head_dim"], self.plan["value_stride"] = nbytes, head_dim, self.stride
        addresses = [native.address for native in attention.KERNELS[kind]]
        if way is interpreted:
            addresses = attention_addresses(kind)
        for field, where in zip(attention.KERNEL_FIELDS, addresses, strict=True):
            self.plan[field] = where

    @staticmethod
    def rounded(a: np.ndarray) -> np.ndarray:
        """What int8 with absmax / 127 makes of each position."""
        top = np.abs(a).max(axis=1, keepdims=True)
        return np.rint(a * (np.float32(127) / top)) * (top / np.float32(127))

    def attend(self, q: np.ndarray, lengths: list[int]) -> np.ndarray:
        out = np.zeros_like(q)
        outs = np.array([address(out) + 4 * self.head_dim * i for i in range(len(q))], np.int64)
        seen, scratch = np.array(lengths, np.int64), aligned_zeros(attention.scratch_bytes(self.stride))
        cache = [address(a) for a in (self.keys, self.values, self.key_scales, self.value_scales)]
        plan = self.plan.view(np.recarray)[0]
        arguments = len(q), address(q), 4 * self.head_dim, address(seen), *cache, address(outs), address(scratch)
        self.way(attention.attend)(plan, *arguments)
        return out

    def expected(self, q: np.ndarray, lengths: list[int]) -> np.ndarray:
        out = np.zeros(q.shape)
        for i, n in enumerate(lengths):
            scores = self.k[:n].astype(np.float64) @ q[i]
            weights = np.exp(scores - scores.max())
            out[i] = weights / weights.sum() @ self.v[:n].astype(np.float64)
        return out


@pytest.mark.parametrize("kind", ["float16", "int8"])
@pytest.mark.parametrize("head_dim", [20, 64])
@pytest.mark.parametrize(("way", "positions"), [("compiled", 2100), ("interpreted", 150)])
def test_attention(way, positions, head_dim, kind):
    head = Head(positions, head_dim, kind, WAYS[way])
    q = (floats(4 * head_dim, 3) / math.sqrt(head_dim)).reshape(4, head_dim)
    lengths = [positions, positions - 1, positions // 2, 1]
    four = head.attend(q, lengths)
    np.testing.assert_allclose(four, head.expected(q, lengths), atol=positions * EPS)
    for i in range(4):
        assert (head.attend(q[i : i + 1], lengths[i : i + 1]) == four[i]).all(), "a query alone has the same bits"
