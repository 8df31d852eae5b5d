"""The Numba quantizers against the NumPy oracle, against each other, and on awkward groups."""

import hashlib

import numpy as np
import pytest

from edgellama.quant import (
    dequantize,
    pack_int4,
    pack_int8,
    pack_scales,
    quantize_rtn,
    unpack_int4,
    unpack_int8,
    unpack_scales,
)
from edgellama_convert import quantizers
from edgellama_convert.quantizers import METHODS, quantize, quantize_blocks
from simd_emulation import callable_kernel, interpret_scale_search

PACK = {4: pack_int4, 8: pack_int8}
UNPACK = {4: unpack_int4, 8: unpack_int8}
BITS = (4, 8)


def dequantized(weights, bits, method):
    result = quantize(weights, bits, method)
    codes = UNPACK[bits](result.packed, *weights.shape)
    return dequantize(codes, unpack_scales(result.scales, len(weights)), bits)


def in_groups(values):
    """float64[out, groups, 128], with zeros where it pads."""
    out, k = values.shape
    padded = np.zeros((out, -(-k // 128) * 128))
    padded[:, :k] = values
    return padded.reshape(out, -1, 128)


def group_errors(weights, bits, method):
    """float64[out, groups]: squared error of each group."""
    return np.square(in_groups(weights.astype(np.float64) - dequantized(weights, bits, method))).sum(axis=2)


def felt_errors(weights, bits, method):
    """The same, each error counted by the weight's size, as `search` counts it."""
    x = in_groups(weights)
    importance = np.abs(x) + np.sqrt(np.square(x).mean(axis=2, keepdims=True))
    return (importance * np.square(in_groups(weights - dequantized(weights, bits, method).astype(np.float64)))).sum(2)


def sample(distribution, shape, seed=0):
    rng = np.random.default_rng(seed)
    values = {
        "normal": lambda: rng.standard_normal(shape) * 0.02,
        "laplace": lambda: rng.laplace(size=shape),
        "uniform": lambda: rng.uniform(-1, 1, shape),
        "outliers": lambda: rng.standard_t(2, size=shape),
        "one_sided": lambda: rng.exponential(size=shape),
        "few_values": lambda: rng.choice([-1.0, 0.0, 0.5], size=shape),
        "float16_steps": lambda: (rng.standard_normal(shape) * 0.02).astype(np.float16),
        "subnormal_scales": lambda: rng.standard_normal(shape) * 1e-6,
        "vanishing": lambda: rng.standard_normal(shape) * 1e-8,
        "large": lambda: rng.uniform(-4e5, 4e5, shape),
    }[distribution]()
    return values.astype(np.float32)


DISTRIBUTIONS = (
    "normal laplace uniform outliers one_sided few_values float16_steps subnormal_scales vanishing large".split()
)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_rtn_is_the_numpy_oracle_bit_for_bit(distribution, bits):
    weights = sample(distribution, (37, 300))
    weights[3, :140] = 0
    codes, scales = quantize_rtn(weights, bits)
    result = quantize(weights, bits, "rtn")
    np.testing.assert_array_equal(result.scales.view(np.uint16), pack_scales(scales).view(np.uint16))
    np.testing.assert_array_equal(result.packed, PACK[bits](codes))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_search_is_never_worse_than_rtn_in_any_group(distribution, bits):
    weights = sample(distribution, (48, 640))
    rtn, search = felt_errors(weights, bits, "rtn"), felt_errors(weights, bits, "search")
    assert (search <= rtn * (1 + 1e-6)).all()  # importances are float32


def test_search_takes_a_third_off_rtns_error_on_normal_weights():
    weights = sample("normal", (64, 1024))
    assert group_errors(weights, 4, "search").sum() < 0.72 * group_errors(weights, 4, "rtn").sum()
    assert felt_errors(weights, 4, "search").sum() < 0.72 * felt_errors(weights, 4, "rtn").sum()


def test_search_comes_near_the_best_scale_there_is():
    """Against 2,000 scales of each sign, each refitted by least squares; errors counted by the weight's size."""
    weights = sample("normal", (16, 128), seed=3).astype(np.float64)
    best = np.full(16, np.inf)
    absmax = np.abs(weights).max(axis=1, keepdims=True)
    importance = np.abs(weights) + np.sqrt(np.square(weights).mean(axis=1, keepdims=True))
    for end in np.linspace(4, 20, 2000):
        for sign in (1, -1):
            codes = np.clip(np.rint(weights * (sign * end / absmax)), -8, 7)
            weighted = importance * codes
            scale = (weighted * weights).sum(axis=1, keepdims=True) / (weighted * codes).sum(axis=1, keepdims=True)
            best = np.minimum(best, (importance * np.square(weights - codes * scale)).sum(axis=1))
    found = felt_errors(weights.astype(np.float32), 4, "search")[:, 0]
    assert found.sum() < 1.005 * best.sum()
    assert (found < 1.03 * best).all()


def test_search_uses_both_signs():
    scales = quantize(sample("normal", (64, 512)), 4, "search").scales
    assert (scales > 0).any() and (scales < 0).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", BITS)
def test_reported_error_is_the_error_of_what_is_stored(bits, method):
    weights = sample("laplace", (20, 200))
    result = quantize(weights, bits, method)
    exact = np.square(weights.astype(np.float64) - dequantized(weights, bits, method)).sum()
    assert result.squared_error == pytest.approx(exact, rel=1e-9)
    assert result.squared_sum == pytest.approx(np.square(weights.astype(np.float64)).sum(), rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", BITS)
def test_zero_groups_padding_and_tiny_weights_are_exactly_zero(bits, method):
    weights = np.zeros((17, 130), np.float32)
    weights[0, 0] = 1.0
    weights[1, :] = 1e-9  # below the smallest float16 scale
    weights[2, :] = np.float32(1e-42)  # subnormal
    result = quantize(weights, bits, method)
    values = dequantized(weights, bits, method)
    assert values[0, 0] == pytest.approx(1.0, rel=1e-3)
    assert np.count_nonzero(values) == 1
    codes = UNPACK[bits](result.packed, 32, 256)
    padding = np.ones((32, 256), bool)
    padding[:17, :130] = False
    assert (codes[padding] == 2 ** (bits - 1)).all()
    assert (unpack_scales(result.scales, 32)[17:] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_what_the_codes_can_say_exactly_is_kept_exactly(method):
    rng = np.random.default_rng(5)
    codes = rng.integers(-7, 8, (16, 128))
    codes[:, 0] = 7
    weights = (codes * 2.0**-6).astype(np.float32)
    np.testing.assert_array_equal(dequantized(weights, 4, method), weights)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e7 * 127])
def test_weights_that_cannot_be_quantized_are_located(bad, bits, method):
    weights = np.ones((40, 300), np.float32)
    weights[33, 257] = bad
    with pytest.raises(ValueError, match=r"weights\[33, 257\]"):
        quantize(weights, bits, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", BITS)
def test_the_largest_possible_scale_is_still_fine(bits, method):
    weights = np.full((16, 128), 65504.0 * (2 ** (bits - 1) - 1), np.float32)
    np.testing.assert_array_equal(dequantized(weights, bits, method), weights)


def test_blocks_do_not_depend_on_their_neighbours():
    weights = sample("outliers", (64, 384))
    whole = quantize(weights, 4, "search")
    for block in range(4):
        part = quantize(weights[16 * block : 16 * block + 16], 4, "search")
        np.testing.assert_array_equal(part.packed[0], whole.packed[block])
        np.testing.assert_array_equal(part.scales[0].view(np.uint16), whole.scales[block].view(np.uint16))


def test_search_gives_the_same_bits_on_every_machine():
    """A hash from the first machine; sums in a fixed order leave nothing to the compiler's choice of vector width."""
    words = np.random.PCG64(7).random_raw(32 * 256)
    weights = ((words >> 40).astype(np.float32) / np.float32(2**23) - 1).reshape(32, 256)
    digests = []
    for bits in BITS:
        result = quantize(weights, bits, "search")
        digests.append(hashlib.sha256(result.packed.tobytes() + result.scales.tobytes()).hexdigest()[:16])
    assert digests == GOLDEN_SEARCH


GOLDEN_SEARCH = ["d42a9d3612a97eb8", "4a17011af7e761ff"]


@pytest.mark.parametrize("bits", BITS)
def test_the_kernel_is_right_before_it_is_compiled(bits, monkeypatch):
    """The same functions run by Python, on a little: a failure here is the algorithm's, not the compiler's."""
    interpret_scale_search(monkeypatch, quantizers)
    for name in (
        "to_half from_half _absmax_bits _sum_of_squares _set_errors _felt _set_importance _encode _pack"
    ).split():
        monkeypatch.setattr(quantizers, name, getattr(quantizers, name).py_func)
    weights = np.zeros((16, 128), np.float32)
    weights[:2] = sample("normal", (2, 128))
    packed = np.empty((1, 1, 1024 if bits == 4 else 2048), np.uint8)
    scales, sums = np.empty((1, 1, 16), np.uint16), np.empty((1, 2))
    zero = np.int32(2 ** (bits - 1))
    assert quantize_blocks.py_func(weights, weights.view(np.int32), zero, True, packed, scales, sums) == -1
    compiled = quantize(weights, bits, "search")
    np.testing.assert_array_equal(scales, compiled.scales.view(np.uint16))
    np.testing.assert_array_equal(packed, compiled.packed)


def test_half_conversion_is_ieee():
    """Every float16 and its neighbourhood, both ways, against NumPy."""
    from_half, to_half = callable_kernel(quantizers.from_half), callable_kernel(quantizers.to_half)
    halves = np.arange(0x7C00, dtype=np.uint16)
    values = halves.view(np.float16).astype(np.float32)
    ours = np.array([from_half(h) for h in halves[::7]], np.float32)
    np.testing.assert_array_equal(ours, values[::7])
    between = ((values[:-1].astype(np.float64) + values[1:]) / 2).astype(np.float32)
    for probe in (values, between, np.nextafter(between, np.float32(0)), -np.nextafter(between, np.float32(1e9))):
        part = probe[::13]
        want = part.astype(np.float16).view(np.uint16)
        np.testing.assert_array_equal(np.array([to_half(x) for x in part], np.uint16), want)
    for x in (65519.0, 65520.0, 1e30):
        with np.errstate(over="ignore"):
            assert to_half(np.float32(x)) == np.float32(x).astype(np.float16).view(np.uint16)
