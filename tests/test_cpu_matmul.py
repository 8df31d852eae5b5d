"""The tile kernels against NumPy: integers exactly, floats in the stated order, and the same bits for every tile.

The file also runs as a program, which prints a hash of every product: `test_cpu_targets` runs it in a
process of its own for each instruction set and compares.
"""

import hashlib

import numpy as np
import pytest

pytest.importorskip("numba")
from edgellama import quant
from edgellama.backends.cpu import matmul, native
from edgellama.backends.cpu.jit import compiled
from edgellama.backends.cpu.plan import MATRIX, PACK
from edgellama.backends.cpu.shapes import BY_TOKEN, SIZES, STEP, TILE_KERNELS
from edgellama.backends.cpu.vector_ops import finish_tile, pack_row, pack_row_f32
from edgellama.kv_cache import aligned_zeros

SHAPES = [(16, 128), (40, 300), (300, 576)]
ALL, SOME, NONE = 0.0, 3.0, 1e9
"""Ceilings with which nearly every value is an outlier (codes of 15 bits), some are, and none (8 bits)."""


@compiled
def run_pack(x, groups, ceiling, pack, tokens, finish):
    p = pack[0]
    for token in range(tokens):
        pack_row(x + token * groups * 512, groups, ceiling, p, token // p.tile, token % p.tile)
        if p.values != 0:
            pack_row_f32(x + token * groups * 512, groups, p, token // p.tile, token % p.tile)
    if finish:
        for index in range((tokens + p.tile - 1) // p.tile):
            finish_tile(groups, p, index)


@compiled
def run_multiply(counter, matrix, pack, n_tokens, out, stride, add):
    matmul.multiply(counter, 1, 0, matrix[0], pack[0], n_tokens, out, stride, add)


def mean_size(row: np.ndarray) -> np.float32:
    """The mean absolute value, added in the order of `vector_ops.mean_size`."""
    sums = np.zeros((4, 16), np.float32)
    for terms in np.abs(row).reshape(-1, 4, 16):
        sums += terms
    lanes = (sums[0] + sums[1]) + (sums[2] + sums[3])
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return lanes[0] / np.float32(row.size)


class Product:
    """One matrix of random codes, its activations, and the buffers that a kernel wants."""

    def __init__(self, bits: int, shape: tuple[int, int], tokens: int, ceiling: float = SOME, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.bits, self.shape, self.tokens, self.ceiling = bits, shape, tokens, np.float32(ceiling)
        self.n, self.k = quant.padded_shape(*shape)
        self.codes = rng.integers(0, 256 if bits == 8 else 16, shape, dtype=np.uint8)
        self.scales = rng.standard_normal((shape[0], self.k // 128)).astype(np.float16)
        self.f16 = rng.standard_normal(shape).astype(np.float16)
        packed = {4: quant.pack_int4, 8: quant.pack_int8}.get(bits, lambda _: quant.pack_f16(self.f16))(self.codes)
        self.weights = aligned_zeros(packed.nbytes)
        self.weights[:] = packed.reshape(-1).view(np.uint8)
        self.packed_scales = quant.pack_scales(self.scales)
        self.bias = np.zeros(self.n, np.float32)
        self.bias[: shape[0]] = rng.standard_normal(shape[0])
        self.x = np.zeros((tokens, self.k), np.float32)
        self.x[:, : shape[1]] = rng.standard_normal((tokens, shape[1])) * rng.uniform(0.01, 30, (tokens, 1))
        self.x[:, : shape[1]] *= np.where(rng.random((tokens, shape[1])) < 0.01, 40, 1)

    def matrix(self, bias: bool) -> np.ndarray:
        m = np.zeros(1, MATRIX)
        m["bits"], m["weights"], m["scales"] = self.bits, self.weights.ctypes.data, self.packed_scales.ctypes.data
        m["bias"], m["blocks"], m["groups"] = self.bias.ctypes.data if bias else 0, self.n // 16, self.k // 128
        m["inputs"] = -(-self.shape[1] // STEP) * STEP
        m["kernel_one"], m["kernel_few"], m["kernel_many"] = map(native.address, TILE_KERNELS[self.bits])
        return m

    def pack(self, tile: int, by_token: bool = False) -> dict[str, np.ndarray]:
        """The activations packed in tiles of `tile` tokens: the arrays of a PACK by name."""
        rows, groups = -(-self.tokens // tile) * tile, self.k // 128
        arrays = {
            "codes": np.zeros(rows * self.k, np.int8),
            "masks": np.full(rows // tile * groups, -1, np.int64),
            "highs": np.full(rows * self.k, 99, np.int8),  # left from before, as between calls
            "scales": np.zeros(rows * groups, np.float32),
            "sums": np.zeros(rows * groups, np.int32),
            "values": np.zeros(rows * self.k, np.float32),
        }
        pack = self._record(arrays, tile, by_token)
        known = by_token or tile in SIZES
        run_pack(self.x.ctypes.data, groups, self.ceiling, pack, self.tokens, known)
        for name in () if known else ("codes", "highs"):  # tiles of another target
            words = arrays[name].view(np.int32).reshape(-1, tile, 32)
            words[:] = words.transpose(0, 2, 1).reshape(words.shape)
        return arrays

    def _record(self, arrays: dict[str, np.ndarray], tile: int, by_token: bool) -> np.ndarray:
        pack = np.zeros(1, PACK)
        pack["tile"], pack["by_token"] = tile, by_token
        for name, array in arrays.items():
            pack[name] = array.ctypes.data if name != "values" or self.bits == 16 else 0
        return pack

    def run(self, size: int, bias: bool = False, add: np.ndarray | None = None) -> np.ndarray:
        """float32 [tokens, out_features] by the kernels for tiles of that size (0 one token, 1 a few, 2 many)."""
        tile = SIZES[size]
        arrays = self.pack(tile, BY_TOKEN[size])
        pack = self._record(arrays, tile, BY_TOKEN[size])
        pack["size"] = size
        out = np.zeros((-(-self.tokens // tile) * tile, self.n), np.float32)
        if add is not None:
            out[: self.tokens, : self.shape[0]] = add
        counter, matrix, adds = np.zeros(1, np.int64), self.matrix(bias), 0 if add is None else 1
        run_multiply(counter.ctypes.data, matrix, pack, self.tokens, out.ctypes.data, out.strides[0], adds)
        assert (out[: self.tokens, self.shape[0] :] == 0).all(), "rows that pad must give zero"
        return out[: self.tokens, : self.shape[0]]

    def quantized_x(self) -> tuple[np.ndarray, np.ndarray]:
        """Activations as the kernels must quantize them: codes [tokens, groups, 128], scales [tokens, groups]."""
        x = self.x.reshape(self.tokens, -1, 128)
        absmax = np.abs(x).max(axis=2)
        limit = self.ceiling * np.array([mean_size(row) for row in self.x], np.float32)[:, None]
        top = np.maximum(np.minimum(absmax, limit), absmax / np.float32(128))
        inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 1e-30)
        return np.rint(x * inverse[:, :, None]).astype(np.int64), top / np.float32(127)

    def terms(self) -> np.ndarray:
        """The terms that a kernel adds in float32, in float64: [tokens, out, groups], or inputs for 16 bits."""
        if self.bits == 16:
            return np.einsum("ti,oi->toi", self.x[:, : self.shape[1]], self.f16.astype(np.float64))
        q, xs = self.quantized_x()
        w = np.zeros((self.shape[0], self.k), np.int64)
        w[:, : self.shape[1]] = self.codes.astype(np.int64) - quant.ZERO_POINT[self.bits]
        sums = np.einsum("tgi,ogi->tog", q, w.reshape(self.shape[0], -1, 128))
        return np.einsum("tog,og,tg->tog", sums, self.scales.astype(np.float64), xs.astype(np.float64))

    def check(self, got: np.ndarray) -> None:
        """Float32 sums of n terms, two roundings a term: off by at most (n + 2) * 2**-24 of the terms' sizes."""
        terms = self.terms()
        tolerance = np.abs(terms).sum(axis=2) * (terms.shape[2] + 2) * 2.0**-24
        assert (np.abs(got - terms.sum(axis=2)) <= tolerance).all()


kinds = pytest.mark.parametrize("ceiling", [ALL, SOME, NONE], ids=["all", "some", "none"])
all_bits = pytest.mark.parametrize("bits", [4, 8, 16])


@kinds
@all_bits
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_right(bits, shape, ceiling):
    product = Product(bits, shape, SIZES[-1] + 2, ceiling)
    for size in range(3):
        product.check(product.run(size))


@kinds
@all_bits
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tile_gives_the_same_bits(bits, shape, ceiling):
    product = Product(bits, shape, 2 * SIZES[-1] + 1, ceiling)
    add = np.random.default_rng(5).standard_normal((product.tokens, shape[0])).astype(np.float32)
    one, few, many = (product.run(size, bias=True, add=add) for size in range(3))
    assert (one == few).all()
    assert (one == many).all()


@kinds
@pytest.mark.parametrize("bits", [4, 8])
def test_one_group_is_exact(bits, ceiling):
    """With one group there is one multiplication and one fma from zero: every bit is known."""
    product = Product(bits, (33, 100), 3, ceiling)
    q, xs = product.quantized_x()
    w = product.codes.astype(np.int64) - quant.ZERO_POINT[bits]
    sums = (q[:, 0, :100] @ w.T).astype(np.float32)
    expected = sums * (product.scales[:, 0].astype(np.float32) * xs)
    assert (product.run(0) == expected).all()
    assert (product.run(0, bias=True) == expected + product.bias[:33]).all()


@kinds
@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_codes_do_not_saturate(bits, ceiling):
    """The largest products of every sign: AVX2's pairs of products go through a saturating int16."""
    product = Product(bits, (16, 128), 2, ceiling)
    product.x[0], product.x[1] = 1.0, -1.0
    for code in (0, 2**bits - 1):
        product.codes[:] = code
        packed = (quant.pack_int4 if bits == 4 else quant.pack_int8)(product.codes)
        product.weights[:] = packed.reshape(-1)
        product.check(product.run(0))


@compiled
def run_claim(counter, n_threads, rank, total, out):
    for i in range(len(out)):
        out[i, 0], out[i, 1] = matmul.claim(counter, n_threads, rank, total)


def claims(counter: np.ndarray, n_threads: int, rank: int, total: int, most: int) -> np.ndarray:
    """The next `most` pieces that one thread gets, those that are not empty."""
    pieces = np.zeros((most, 2), np.int64)
    run_claim(counter.ctypes.data, n_threads, rank, total, pieces)
    return pieces[pieces[:, 0] < pieces[:, 1]]


@pytest.mark.parametrize("n_threads", [1, 2, 3, 16, 200])
@pytest.mark.parametrize("total", [1, 2, 36, 100, 8000])
def test_claims_share_out_everything_once(n_threads, total):
    """One thread alone gets its own range, one stretch, and then everybody else's; after that nothing."""
    counter = np.zeros(8 * n_threads, np.int64)
    rank = n_threads // 2
    pieces = claims(counter, n_threads, rank, total, total + 3)
    covered = np.concatenate([np.arange(first, end) for first, end in pieces])
    assert sorted(covered) == list(range(total))
    own = range(total * rank // n_threads, total * (rank + 1) // n_threads)
    assert list(covered[: len(own)]) == list(own)
    assert len(pieces) <= n_threads * 2 * matmul.PIECES
    assert len(claims(counter, n_threads, 0, total, 3)) == 0


def test_claims_in_turn_never_overlap():
    """Threads of unequal speed: each piece is given out once, and the fast thread takes most of them."""
    total, n_threads = 1000, 3
    counter, taken = np.zeros(8 * n_threads, np.int64), []
    while True:
        round_taken = [claims(counter, n_threads, rank, total, count) for rank, count in enumerate((5, 1, 1))]
        taken += [np.arange(first, end) for pieces in round_taken for first, end in pieces]
        if not any(len(pieces) for pieces in round_taken):
            break
    assert sorted(np.concatenate(taken)) == list(range(total))


def digest() -> str:
    """A hash over products of all kinds; equal on every target."""
    state = hashlib.sha256()
    for bits, ceiling in ((4, NONE), (4, SOME), (4, ALL), (8, NONE), (8, SOME), (8, ALL), (16, NONE)):
        for shape in SHAPES:
            state.update(Product(bits, shape, 5, ceiling).run(0, bias=True).tobytes())
            state.update(Product(bits, shape, 7, ceiling).run(1).tobytes())
            state.update(Product(bits, shape, 19, ceiling).run(2).tobytes())
    return state.hexdigest()


if __name__ == "__main__":
    from edgellama.backends.cpu.target import TARGET

    print(TARGET.dot4, digest())
