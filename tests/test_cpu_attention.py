"""RoPE, the cache and attention on a made-up layer: compiled and interpreted, against NumPy, and bit against bit.

`python test_cpu_attention.py` prints which instructions it was compiled for and a hash of all outputs' bits, so that
another process, compiled for another CPU, can be compared (`test_cpu_targets`).
"""

import hashlib
import threading
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("numba")
from edgellama.backends.cpu import attention, cache_store, native, shapes
from edgellama.backends.cpu.jit import compiled
from edgellama.backends.cpu.plan import LAYER, PLAN
from edgellama.backends.cpu.shapes import ATTENTION_KERNELS, SPLIT
from edgellama.backends.cpu.target import TARGET
from edgellama.kv_cache import KVCache, aligned_zeros
from edgellama.quant import round_up
from simd_emulation import WAYS, interpreted

both_ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
both_kinds = pytest.mark.parametrize("kind", ["float16", "int8"])
EPS = 2.0**-24


@compiled
def compiled_store(plans, layers, counter, scratch):
    attention.store_all(plans[0], counter, layers[0], scratch)


@compiled
def compiled_attend(plans, layers, counter, scratch):
    attention.attend_all(plans[0], counter, layers[0], attention.bring_their_own(plans[0]), scratch)


def interpreted_store(plans, layers, counter, scratch):
    interpreted(attention.store_all)(plans.view(np.recarray)[0], counter, layers.view(np.recarray)[0], scratch)


def interpreted_attend(plans, layers, counter, scratch):
    plan, layer = plans.view(np.recarray)[0], layers.view(np.recarray)[0]
    interpreted(attention.attend_all)(plan, counter, layer, interpreted(attention.bring_their_own)(plan), scratch)


class Layer:
    """One layer's queries, keys and values at all positions of a slot, its cache, and the tables of the program.

    q float32 [n_ctx][heads][head_dim]; k, v the same with KV heads. RoPE turns by 0: `test_rotate` turns.
    """

    def __init__(self, heads=(6, 2), head_dim=64, kind="float16", n_ctx=600, n_slots=1, way="compiled", filled=False):
        (self.heads, self.kv_heads), self.head_dim, self.kind, self.n_ctx = heads, head_dim, kind, n_ctx
        self.shared = self.heads // self.kv_heads
        rng = np.random.default_rng(0)
        self.q = rng.standard_normal((n_ctx, self.heads, head_dim), np.float32)
        self.k, self.v = rng.standard_normal((2, n_ctx, self.kv_heads, head_dim), np.float32)
        config = SimpleNamespace(head_dim=head_dim, num_hidden_layers=1, num_key_value_heads=self.kv_heads)
        self.cache = KVCache(config, n_ctx, n_slots, kind)
        self._owned: list[np.ndarray] = []
        self.plan, self.layer = np.zeros(1, PLAN), np.zeros(1, LAYER)
        self._store, self._attend = compiled_store, compiled_attend
        addresses = (
            {field: native.address(name) for field, name in ATTENTION_KERNELS.items()} if way == "compiled" else {}
        )
        if way == "interpreted":
            self._store, self._attend = interpreted_store, interpreted_attend
            addresses = {name: i for i, name in enumerate(ATTENTION_KERNELS)}
        p = self.plan[0]
        for name, value in addresses.items():
            p[name] = value
        p["n_heads"], p["n_kv_heads"], p["head_dim"] = self.heads, self.kv_heads, head_dim
        p["query_scale"] = np.log2(np.e) / np.sqrt(head_dim)
        p["kv_bytes"], p["value_stride"] = self.cache.element_bytes, self.cache.value_stride
        for name in "key_head_bytes value_head_bytes key_slot_bytes value_slot_bytes".split():
            p[name] = getattr(self.cache, name)
        p["scale_head_bytes"], p["scale_slot_bytes"] = self.cache.scale_head_bytes, self.cache.scale_slot_bytes
        for name, address in zip(
            ("keys", "values", "key_scales", "value_scales"), self.cache.addresses(0), strict=True
        ):
            self.layer[0][name] = address
        end = 0
        for name, nbytes in shapes.scratch_parts(self.shared, head_dim, self.cache.value_stride).items():
            p[name] = end
            end += round_up(nbytes, 64)
        self.scratch_bytes = end
        p["piece_tokens"] = shapes.piece_tokens(self.shared)
        p["few_states"] = self._zeros(
            shapes.few_states_bytes(self.kv_heads, self.shared, n_ctx, self.cache.value_stride)
        )
        p["splits_done"] = self._zeros(8 * shapes.FEW_TOKENS * self.kv_heads)
        if filled:
            self._fill()

    def _zeros(self, nbytes: int) -> int:
        self._owned.append(aligned_zeros(nbytes))
        return self._owned[-1].ctypes.data

    def _fill(self) -> None:
        """All positions into slot 0 at once, in NumPy, by the layout that `kv_cache` describes."""
        room, h, d, stride = round_up(self.n_ctx, 64), self.kv_heads, self.head_dim, self.cache.value_stride
        dtype = {"float16": np.float16, "int8": np.int8}[self.kind]
        scales = [np.ones((self.n_ctx, h, 1), np.float32)] * 2
        if self.kind == "int8":
            scales = [np.abs(a).max(axis=2, keepdims=True) / np.float32(127) for a in (self.k, self.v)]
        codes = np.zeros((2, h, room, d), dtype)
        for code, a, scale in zip(codes, (self.k, self.v), scales, strict=True):
            scaled = a if self.kind == "float16" else np.rint(a / scale)
            code[:, : self.n_ctx] = scaled.transpose(1, 0, 2).astype(dtype)
        keys, values = self.cache._keys.view(dtype), self.cache._values.view(dtype).reshape(h, room, stride)
        keys[:] = codes[0].reshape(h, room // 16, 16, d).transpose(0, 1, 3, 2).ravel()
        values[:, :, :d] = codes[1]
        if self.kind == "int8":
            for to, scale in zip((self.cache._key_scales, self.cache._value_scales), scales, strict=True):
                to.view(np.float32).reshape(h, room)[:, : self.n_ctx] = scale[:, :, 0].T

    def run(self, positions, slots=None, threads: int = 1, store: bool = True) -> np.ndarray:
        """The outputs of the tokens at `positions` as one batch: float32 [tokens][heads][head_dim]."""
        n, p = len(positions), self.plan[0]
        positions = np.array(positions, np.int64)
        slots = np.zeros(n, np.int64) if slots is None else np.array(slots, np.int64)
        cos, sin = np.ones((n, self.head_dim // 2), np.float32), np.zeros((n, self.head_dim // 2), np.float32)
        rows = [a[positions].reshape(n, -1) for a in (self.q, self.k, self.v)]
        qkv, out = np.ascontiguousarray(np.concatenate(rows, axis=1)), np.zeros_like(self.q[positions])
        p["qkv"], p["qkv_stride"] = qkv.ctypes.data, qkv.strides[0]
        p["k_column"] = 4 * rows[0].shape[1]
        p["v_column"] = 4 * (rows[0].shape[1] + rows[1].shape[1])
        p["attention"], p["attention_stride"] = out.ctypes.data, out.strides[0]
        p["n_tokens"], p["positions"], p["slots"] = n, positions.ctypes.data, slots.ctypes.data
        p["cos"], p["sin"] = cos.ctypes.data, sin.ctypes.data
        scratches = [aligned_zeros(self.scratch_bytes) for _ in range(threads)]
        for scratch in scratches:
            scratch[:] = 0x5A  # what lies there before matters to nobody
        counters = np.zeros(2, np.int64)
        alone = n <= shapes.FEW_TOKENS and len(set(slots)) == n  # such bring their own
        if store and not alone:
            self._store(self.plan, self.layer, counters.ctypes.data, scratches[0].ctypes.data)
        arguments = self.plan, self.layer, counters.ctypes.data + 8
        if threads == 1:
            self._attend(*arguments, scratches[0].ctypes.data)
        else:
            team = [threading.Thread(target=self._attend, args=(*arguments, s.ctypes.data)) for s in scratches]
            for thread in team:
                thread.start()
            for thread in team:
                thread.join()
        return out

    def expected(self, positions) -> np.ndarray:
        k, v = (self._rounded(a).astype(np.float64) for a in (self.k, self.v))
        out = np.zeros((len(positions), self.heads, self.head_dim))
        for i, position in enumerate(positions):
            for h in range(self.heads):
                kv = h // self.shared
                scores = k[: position + 1, kv] @ self.q[position, h] / np.sqrt(self.head_dim)
                weights = np.exp(scores - scores.max())
                out[i, h] = weights / weights.sum() @ v[: position + 1, kv]
        return out

    def _rounded(self, a: np.ndarray) -> np.ndarray:
        """What the cache makes of keys or values: float16, or int8 with absmax / 127."""
        if self.kind == "float16":
            return a.astype(np.float16)
        top = np.abs(a).max(axis=2, keepdims=True)
        return np.rint(a * (np.float32(127) / top)) * (top / np.float32(127))


@both_ways
@pytest.mark.parametrize("head_dim", [20, 40, 64])
def test_rotate(way, head_dim):
    """Every pair (x[i], x[i + half]) turns by its angle: half-split, as in Hugging Face's Llama."""
    half = head_dim // 2
    rng = np.random.default_rng(0)
    x, angle = rng.standard_normal(head_dim, np.float32), rng.standard_normal(half, np.float32)
    pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * angle.astype(np.float64)) * 0.25
    cos, sin, out = np.cos(angle), np.sin(angle), np.full(head_dim + 1, 7, np.float32)
    addresses = [a.ctypes.data for a in (x, cos, sin)]
    way(cache_store.rotate)(*addresses, head_dim, np.float32(0.25), out.ctypes.data)
    np.testing.assert_allclose(out[:head_dim], np.concatenate([pairs.real, pairs.imag]), atol=8 * EPS)
    assert out[head_dim] == 7


@both_kinds
@pytest.mark.parametrize("head_dim", [20, 64])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [[*range(40)], [*range(5, 30)], [3, 4, 16, 17, 18, 2]])
def test_what_is_stored(way, head_dim, kind, tokens):
    """All of it, where the layout says, in whole lines of positions and in parts of them; and nothing else."""
    stored, filled = (Layer((2, 2), head_dim, kind, 60, way=way, filled=f) for f in (False, True))
    stored.run(tokens)
    h, room, stride = 2, 64, stored.cache.value_stride
    dtype = {"float16": np.float16, "int8": np.int8}[kind]
    views = []
    for layer in (stored, filled):
        keys = layer.cache._keys.view(dtype).reshape(h, room // 16, head_dim, 16).transpose(0, 1, 3, 2)
        values = layer.cache._values.view(dtype).reshape(h, room, stride)
        scales = [a.view(np.float32).reshape(h, -1, 1) for a in (layer.cache._key_scales, layer.cache._value_scales)]
        views.append([keys.reshape(h, room, head_dim), values, *(scales if kind == "int8" else [])])
    others = np.setdiff1d(np.arange(room), tokens)
    for got, expected in zip(*views, strict=True):
        # Codes may differ by one where x / scale and x * (1 / scale) are rounded to either side.
        error = np.abs(got[:, tokens].astype(np.float32) - expected[:, tokens])
        assert error.max() <= (dtype == np.int8) and (error > 0).mean() < 0.01
        assert (got[:, others] == 0).all()


@both_kinds
@pytest.mark.parametrize(("heads", "head_dim"), [((2, 2), 20), ((6, 2), 64), ((9, 1), 80)])
@pytest.mark.parametrize(("way", "n"), [("compiled", 600), ("interpreted", 70)])
def test_attention_equals_numpy(way, n, heads, head_dim, kind):
    layer = Layer(heads, head_dim, kind, n, way=way, filled=True)
    prefilled = layer.run(range(n))
    np.testing.assert_allclose(prefilled, layer.expected(range(n)), atol=n * EPS)
    last = [n - 1]
    np.testing.assert_allclose(layer.run(last), layer.expected(last), atol=n * EPS)


@both_kinds
@pytest.mark.parametrize(("heads", "head_dim"), [((2, 2), 128), ((6, 2), 64), ((9, 1), 40), ((16, 2), 20)])
def test_bits_do_not_depend_on_what_shares_a_pass(heads, head_dim, kind):
    """One by one, a few at once and many at once, at the borders of vectors, blocks and splits."""
    n = 2 * SPLIT + 70
    expected = Layer(heads, head_dim, kind, n).run(range(n))
    layer = Layer(heads, head_dim, kind, n, filled=False)
    layer.run(range(n))
    borders = [0, 1, 14, 15, 16, 62, 63, 64, 65, 254, 255, 256, 257, 510, 511, 512, 513, n - 1]
    for position in borders:
        assert (layer.run([position]) == expected[position]).all(), position
    for first, tokens in [(0, 2), (60, 8), (250, 8), (509, 5), (5, 9), (240, 33), (450, 132)]:
        got = layer.run(range(first, first + tokens))
        assert (got == expected[first : first + tokens]).all(), (first, tokens)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
def test_bits_do_not_depend_on_slots_that_share_the_batch(heads):
    n = 300
    expected = Layer(heads, 32, n_ctx=n).run(range(n))
    layer = Layer(heads, 32, n_ctx=n, n_slots=3)
    for slot in range(3):
        layer.run(range(n), [slot] * n)
    for positions, slots in [([255, 256, 3], [2, 0, 1]), ([10, 11, 299, 12], [0, 0, 1, 2]), ([9, 298], [1, 1])]:
        assert (layer.run(positions, slots) == expected[positions]).all()
    positions, slots = np.tile(np.arange(280, 290), 3), np.repeat([1, 0, 2], 10)
    assert (layer.run(positions, slots) == expected[positions]).all()
    mixed = np.argsort(positions, kind="stable")
    assert (layer.run(positions[mixed], slots[mixed]) == expected[positions[mixed]]).all()


@both_kinds
@pytest.mark.parametrize("threads", [1, 3])
def test_tokens_of_different_sequences_bring_their_own_keys(kind, threads):
    """Whatever lay at their places: to the first position, to a new line, to a new split, behind several of these."""
    positions, slots, n = [0, 16, SPLIT, 2 * SPLIT + 40], [2, 0, 3, 1], 2 * SPLIT + 41
    expected = Layer((6, 2), 32, kind, n).run(range(n))[positions]
    layer = Layer((6, 2), 32, kind, n, n_slots=4)
    for position, slot in zip(positions, slots, strict=True):
        if position:
            layer.run(range(position), [slot] * position)
    assert (layer.run(positions, slots, threads=threads) == expected).all()


@both_kinds
@pytest.mark.parametrize("heads", [(8, 1), (1, 1), (3, 3)])
def test_several_threads_share_the_splits_of_one_head(heads, kind):
    n = 9 * SPLIT + 5
    layer = Layer(heads, 32, kind, n, filled=True)
    for positions in ([n - 1], [n - 3, n - 2], range(n - 20, n)):
        expected = layer.run(positions)
        for threads in (2, 3, 16):
            for _ in range(5):
                assert (layer.run(positions, threads=threads) == expected).all(), (positions, threads)


def test_more_than_32768_positions():
    n = (1 << 15) + 200
    layer = Layer((4, 1), 16, n_ctx=n, filled=True)
    expected = layer.expected([n - 1])
    one = layer.run([n - 1])
    np.testing.assert_allclose(one, expected, atol=1e-5)
    assert (layer.run(range(n - 10, n))[-1:] == one).all()


@both_kinds
def test_what_is_not_yet_written_does_not_matter(kind):
    """Beyond a query's length the cache may hold anything that it can hold: an int8 cache even any scale."""
    expected = Layer(kind=kind).run(range(70))
    layer = Layer(kind=kind)
    for part in (layer.cache._keys, layer.cache._values):
        part.view(np.float16 if kind == "float16" else np.int8)[:] = 100
    for part in (layer.cache._key_scales, layer.cache._value_scales):
        part.view(np.float32)[:] = np.nan
    assert (layer.run(range(70)) == expected).all()


def digest() -> str:
    """Of the bits of prefill and decode."""
    state = hashlib.sha256()
    for heads, head_dim, kind in [((6, 2), 64, "float16"), ((2, 2), 40, "int8"), ((5, 1), 128, "int8")]:
        layer = Layer(heads, head_dim, kind, 300)
        state.update(layer.run(range(299)).tobytes())
        state.update(layer.run([299]).tobytes())
    return state.hexdigest()


if __name__ == "__main__":
    print(TARGET.dot4, digest())
