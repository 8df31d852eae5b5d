"""Each filter against its definition: by hand on small lists, by a full sort on random ones, large ones included."""

import math

import numpy as np
import pytest

from edgellama.sampling import filters
from edgellama.sampling.filters import draw, min_p, top_k, top_n_sigma, top_p, typical_p, xtc

# Probabilities by id: 0.5, 0.25, 0.125, 0.0625, 0.0625, shuffled.
HALVES = {3: 0.5, 0: 0.25, 4: 0.125, 1: 0.0625, 2: 0.0625}
LOGITS = np.log(np.array([HALVES[index] for index in range(5)]))
IDS = np.arange(5)


def ids_of(filtered):
    return filtered[0].tolist()


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("mass", "expected"),
    [
        # Entropy 1.875 bits. Surprises 2, 4, 4, 1, 3 bits: id 0 is nearest (0.125 off), then 3 (0.875), 4 (1.125).
        (0.2, [0]),
        (0.26, [0, 3]),
        (0.74, [0, 3]),
        (0.76, [0, 3, 4]),
        (0.88, [0, 1, 2, 3, 4]),  # the last two are equally typical: both stay
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_typical_p_takes_what_is_nearest_to_the_entropy(mass, expected):
    assert ids_of(typical_p(IDS, LOGITS, mass)) == expected


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.06, [2]),  # all reach it: the last stays, the higher id of the two equal ones
        (0.1, [1, 2, 4]),
        (0.2, [0, 1, 2, 4]),
        (0.3, [0, 1, 2, 3, 4]),  # one alone is no choice to exclude
        (0.6, [0, 1, 2, 3, 4]),
    ],
)
def test_xtc_leaves_the_last_of_the_likely(threshold, expected):
    assert ids_of(xtc(IDS, LOGITS, threshold)) == expected


@pytest.mark.parametrize(
    ("n", "expected"), [(0.5, [3]), (1.0, [0, 3]), (2.0, [0, 3, 4]), (2.6, [0, 1, 2, 3, 4]), (-1.0, [0, 1, 2, 3, 4])]
)
def test_top_n_sigma_counts_standard_deviations(n, expected):
    # Logits in bits: -1, -2, -3, -4, -4: mean -2.8, variance 1.36, sigma 1.166.
    assert ids_of(top_n_sigma(IDS, LOGITS, n)) == expected


def test_top_n_sigma_leaves_out_what_is_masked():
    logits = np.concatenate([LOGITS, np.full(100, -np.inf)])
    assert ids_of(top_n_sigma(np.arange(105), logits, 1.0)) == [0, 3]


@pytest.mark.parametrize("name", ["top_p", "min_p", "typical_p", "xtc", "top_n_sigma"])
def test_filters_keep_the_order_of_the_candidates(name):
    ids, kept = top_k(LOGITS, 0)
    shuffled = np.random.default_rng(0).permutation(5)
    value = {"top_p": 0.8, "min_p": 0.2, "typical_p": 0.8, "xtc": 0.1, "top_n_sigma": 1.5}[name]
    by_logit = getattr(filters, name)(ids, kept, value)
    mixed = getattr(filters, name)(ids[shuffled], kept[shuffled], value)
    assert sorted(ids_of(by_logit)) == sorted(ids_of(mixed))
    assert ids_of(mixed) == [index for index in ids[shuffled] if index in mixed[0]]
    np.testing.assert_array_equal(mixed[1], LOGITS[mixed[0]])


def shapes(size):
    """Kinds of distributions, the hard ones: noise, a steep head, ties everywhere, nothing but ties, masked ones."""
    rng = np.random.default_rng(size)
    noise = rng.normal(0, 1, size)
    head = rng.normal(0, 2, size)
    head[rng.choice(size, 30)] += 12
    masked = np.where(rng.random(size) < 0.99, -np.inf, noise)
    masked[1] = 0.5
    heavy = rng.standard_cauchy(size).clip(-80, 15)
    each = {"noise": noise, "head": head, "ties": rng.integers(-3, 3, size), "equal": np.zeros(size)}
    each |= {"masked": masked, "wide": noise * 20, "heavy": heavy, "rising": np.linspace(-5, 5, size)}
    return {name: logits.astype(np.float32) for name, logits in each.items()}


SHAPES = list(shapes(4))
SIZES = [3, 100, 4097, 50_000, 128_256]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_top_p_is_the_head_of_a_sort(size, shape):
    logits = shapes(size)[shape]
    probabilities = softmax(logits)
    order = np.argsort(-logits, kind="stable")
    cumulative = np.cumsum(probabilities[order])
    for p in (0.01, 0.3, 0.9, 0.95, 0.9999):
        kept = top_p(np.arange(size), logits, p)[0]
        assert (np.diff(kept) > 0).all()
        assert set(kept.tolist()) == set(order[: kept.size].tolist())
        # The fewest that reach p, up to what float32 weights can tell.
        assert cumulative[kept.size - 1] >= p - 2e-6
        assert kept.size == 1 or cumulative[kept.size - 2] < p + 2e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_typical_p_is_the_head_of_a_sort(size, shape):
    logits = shapes(size)[shape]
    probabilities = softmax(logits)
    with np.errstate(divide="ignore", invalid="ignore"):
        surprise = -np.log(probabilities)
        entropy = np.nansum(probabilities * surprise)
    distance = np.abs(surprise - entropy)
    for mass in (0.05, 0.5, 0.9, 0.999):
        kept = typical_p(np.arange(size), logits, mass)[0]
        farthest = distance[kept].max()
        assert probabilities[distance <= farthest + 1e-4].sum() >= mass - 1e-5
        assert probabilities[distance < farthest - 1e-4].sum() < mass + 1e-5
        # Nothing nearer than the farthest is left out.
        assert set(np.flatnonzero(distance < farthest - 1e-4).tolist()) <= set(kept.tolist())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [1, 40, 1000, 20_000])
def test_top_k_of_large_vocabularies(size, shape, k):
    logits = shapes(size)[shape]
    expected = np.argsort(-logits, kind="stable")[:k]
    ids, kept = top_k(logits, k)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(kept, logits[expected])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_min_p_and_top_n_sigma_compare_with_a_threshold(size, shape):
    logits = shapes(size)[shape]
    exact = logits.astype(np.float64)
    finite = exact[np.isfinite(exact)]
    for threshold, kept in [
        (exact.max() + math.log(0.05), min_p(np.arange(size), logits, 0.05)[0]),
        (exact.max() - 1.5 * finite.std(), top_n_sigma(np.arange(size), logits, 1.5)[0]),
    ]:
        assert set(np.flatnonzero(exact > threshold + 1e-4).tolist()) <= set(kept.tolist())
        assert (exact[kept] >= threshold - 1e-4).all()


@pytest.mark.parametrize("size", [5, 4096, 4097, 128_256])
@pytest.mark.parametrize("shape", SHAPES)
def test_draw_finds_the_quantile_in_any_number_of_candidates(size, shape):
    logits = shapes(size)[shape] if size > 5 else np.array([-np.inf, 1, 2, -np.inf, -np.inf], np.float32)
    probabilities = softmax(logits / np.float32(0.7))
    cumulative = np.cumsum(probabilities)
    for u in (0.0, 1e-12, 0.2, 0.5, 0.9, 1 - 2**-53):
        index = draw(np.arange(size), logits, 0.7, u)
        assert probabilities[index] > 0
        assert cumulative[index] >= u - 1e-5
        assert cumulative[index] - probabilities[index] <= u + 1e-5


@pytest.mark.parametrize("size", [50, 5000])
def test_draw_at_a_tiny_temperature_takes_the_best(size, recwarn):
    logits = np.random.default_rng(0).normal(0, 1000, size).astype(np.float32)
    assert draw(np.arange(size), logits, 1e-300, 0.999) == logits.argmax()
    assert not recwarn.list
