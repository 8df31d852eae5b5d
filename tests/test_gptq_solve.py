"""One matrix of a calibrated conversion: moments, factor, codes and scales against float64 oracles; kernels' bits."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from edgellama.quant import ZERO_POINT, dequantize, quantize_rtn
from edgellama_convert.gptq import kernels, solve
from edgellama_convert.gptq.solve import DAMPING, FEEDBACK, Factor, Moments, quantize_matrix, shift
from edgellama_convert.scale_search import FIRST_4, LAST_4, N_CANDIDATES
from simd_emulation import interpret_scale_search


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def unrefined(monkeypatch):
    monkeypatch.setattr(solve, "REFINEMENTS", 0)


def inputs(tokens, features, seed=0):
    """float32[tokens, features] whose features are correlated and of different sizes, as in a model."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((features // 3 + 1, features)) * np.exp(rng.standard_normal(features) / 2)
    x = rng.standard_normal((tokens, len(mixing))) @ mixing / len(mixing) ** 0.5
    return (x + 0.3 * rng.standard_normal((tokens, features))).astype(np.float32)


def hessian_of(x):
    return np.ascontiguousarray(x.T @ x)


def weights(rows, features, seed=1):
    return (0.02 * np.random.default_rng(seed).standard_t(5, (rows, features))).astype(np.float32)


def objective(errors, hessian):
    """float64[rows]: each row's part of tr(E H E^T)."""
    e, h = errors.astype(np.float64), hessian.astype(np.float64)
    return ((e @ h) * e).sum(axis=1)


# -- moments and factor --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("panel", [64, 1024])
def test_moments_are_sums_over_tokens(panel, monkeypatch):
    monkeypatch.setattr(solve, "PANEL", panel)
    x, lacks = inputs(90, 300), inputs(90, 40, seed=2)
    moments = Moments.zeros(300, 40)
    for first in (0, 50):  # in parts
        moments.add(x[first : first + 50], lacks[first : first + 50])
    moments.complete()
    exact = x.astype(np.float64)
    for got, want in ((moments.hessian, exact.T @ exact), (moments.lack, lacks.T.astype(np.float64) @ exact)):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("features", [1, 128, 300])
def test_the_factor_gives_the_hessian_back_and_solves(features):
    hessian = hessian_of(inputs(200, features))
    want = hessian.astype(np.float64)
    want[np.diag_indices(features)] += DAMPING * np.diagonal(want).mean()
    factor = Factor(hessian)
    largest = np.abs(want).max()
    np.testing.assert_allclose(factor.hessian, want, rtol=1e-6, atol=1e-6 * largest)
    assert (np.tril(factor.r, -1) == 0).all() and (np.diagonal(factor.r) > 0).all()
    r = factor.r.astype(np.float64)
    np.testing.assert_allclose(r @ r.T, want, rtol=1e-5, atol=1e-5 * largest)
    b = weights(7, features)
    solved = b.copy()
    factor.solve(solved)
    # Damped by 5 % of the mean, the condition is below features / 0.05: it multiplies float32's 6e-8.
    exact = np.linalg.solve(want, b.T.astype(np.float64)).T
    np.testing.assert_allclose(solved, exact, rtol=0, atol=6e-8 * 20 * features * np.abs(exact).max())


def test_damping_rises_only_as_far_as_needed():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((200, 200)))[0]
    hessian = ((basis * np.r_[-0.1, np.linspace(0.5, 1.5, 199)]) @ basis.T).astype(np.float32)
    mean = np.diagonal(hessian).mean(dtype=np.float64)
    before = np.diagonal(hessian).copy()
    factor = Factor(hessian)  # 0.05 of the mean does not make it positive, 0.2 does
    np.testing.assert_allclose(np.diagonal(factor.hessian) - before, 4 * DAMPING * mean, rtol=1e-4)


def test_eight_bits_are_a_few_hundred_times_closer(pool):
    """And still beat rounding by themselves: the same machinery, with a finer scale."""
    target, factor = weights(40, 300), Factor(hessian_of(inputs(400, 300)))
    four, eight = (quantize_matrix(target, factor, bits, pool) for bits in (4, 8))
    assert (dequantize(eight.codes, eight.scales, 8) == target - eight.errors).mean() > 0.9  # to rounding, and rarely
    np.testing.assert_allclose(dequantize(eight.codes, eight.scales, 8), target - eight.errors, atol=1e-6)
    rounded = target - dequantize(*quantize_rtn(target, 8), 8)
    ours, theirs, of_four = (objective(each, factor.hessian).sum() for each in (eight.errors, rounded, four.errors))
    assert ours < 0.6 * theirs and ours < of_four / 150


def test_a_hessian_of_few_tokens_or_none_at_all(pool):
    target = weights(20, 300)
    for hessian in (hessian_of(inputs(3, 300)), np.zeros((300, 300), np.float32)):
        result = quantize_matrix(target, Factor(hessian), pool=pool)
        assert np.square(result.errors).sum() < 0.05 * np.square(target).sum()


@pytest.mark.parametrize("size", [1e-18, 1e-9, 1e9, 1e15])
def test_the_size_of_the_activations_does_not_matter(size, pool):
    target, x = weights(16, 200), inputs(300, 200)
    want = quantize_matrix(target, Factor(hessian_of(x)), pool=pool)
    got = quantize_matrix(target, Factor(hessian_of(x * np.float32(size))), pool=pool)
    assert (got.codes == want.codes).mean() > 0.98
    np.testing.assert_allclose(np.square(got.errors).sum(), np.square(want.errors).sum(), rtol=0.01)


def test_inputs_that_never_occur_keep_their_weights(pool):
    x = inputs(400, 300)
    dead = np.r_[5, 130:140, 299]
    x[:, dead] = 0
    target = weights(33, 300)
    change = shift(target, inputs(400, 300, seed=3).T @ x, of_output=False)
    factor = Factor(hessian_of(x))
    factor.solve(change)
    assert (change[:, dead] == 0).all() and np.abs(change).max() > 0
    result = quantize_matrix(target, factor, pool=pool)
    step = np.abs(np.repeat(result.scales.astype(np.float32), 128, axis=1)[:, :300])
    wide = np.abs(target) < 6 * step  # not clipped
    assert (np.abs(result.errors) <= 0.5001 * step)[:, dead][wide[:, dead]].all()  # nothing else to make up for


def test_a_shift_undoes_its_share_of_what_is_lacking():
    x, w = inputs(500, 150), weights(40, 150)
    lacks = x @ weights(150, 150, seed=3) + 0.02 * inputs(500, 150, seed=3)
    exact, damped = x.astype(np.float64), hessian_of(x).astype(np.float64)
    damped[np.diag_indices(150)] += DAMPING * np.diagonal(damped).mean()
    want = FEEDBACK * (w @ lacks.T.astype(np.float64) @ exact) @ np.linalg.inv(damped)  # least squares of (X + R) W^T
    factor = Factor(hessian_of(x))
    of_input, of_output = shift(w, lacks.T @ x, False), shift(w, (lacks @ w.T).T @ x, True)
    for got in (of_input, of_output):
        factor.solve(got)
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    output = lacks.astype(np.float64) @ w.T
    assert np.square(output - exact @ of_input.T).sum() < 0.3 * np.square(output).sum()


# -- codes and scales ----------------------------------------------------------------------------------------------


def best_scale(x, importance):
    """float64 oracle of a group's scale, rows of x[rows, n]: `search`'s candidates and refits, errors weighted."""

    def sums(inverse):
        q = np.clip(np.rint(x * inverse[:, None]), -8, 7)
        return (importance * q * x).sum(axis=1), (importance * q * q).sum(axis=1)

    best, scale = np.full(len(x), -1.0), np.zeros(len(x))
    for end in np.linspace(FIRST_4, LAST_4, N_CANDIDATES):
        for sign in (-1, 1):
            products, squares = sums(sign * end / np.abs(x).max(axis=1))
            gain = products**2 / squares
            scale = np.where(gain > best, products / squares, scale)
            best = np.maximum(best, gain)
    for _ in range(2):
        products, squares = sums(1 / scale.astype(np.float16).astype(np.float64))
        scale = products / squares
    return scale.astype(np.float16)


def weighted_error(x, scale, importance):
    scale = scale.astype(np.float64)[:, None]
    return (importance * (x - np.clip(np.rint(x / scale), -8, 7) * scale) ** 2).sum(axis=1)


@pytest.mark.parametrize("features", [128, 300])
def test_codes_are_textbook_gptqs(features, pool, unrefined):
    """Frantar et al. 2022, algorithm 1, in float64: column by column, with the Cholesky factor of the inverse."""
    target, factor = weights(64, features), Factor(hessian_of(inputs(600, features)))
    result = quantize_matrix(target, factor, pool=pool)
    hessian = factor.hessian.astype(np.float64)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    w = target.astype(np.float64)
    alike = np.ones(64, bool)  # rows that have not met a tie: after one, everything may differ
    same_scales = []
    for i in range(features):
        if i % 128 == 0:
            here = slice(i, min(i + 128, features))
            group = w[alike, here]
            importance = np.diagonal(hessian)[here]
            ours, want = result.scales[alike, i // 128], best_scale(group, importance)
            same_scales += (ours == want).tolist()
            error = weighted_error(group, ours, importance)
            assert (error <= 1.01 * weighted_error(group, want, importance)).all()
        scale = result.scales[:, i // 128].astype(np.float64)
        wish = np.clip(w[:, i] / scale, -8, 7)
        code = np.rint(wish)
        different = alike & (code + 8 != result.codes[:, i])
        assert (np.abs(np.abs(wish - np.floor(wish)) - 0.5)[different] < 1e-4).all()
        alike &= ~different
        error = (w[:, i] - code * scale) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
    assert alike.sum() >= 60
    assert np.mean(same_scales) > 0.9


def best_objectives(x, importance, ends, bits):
    """The least each row's error can be with a scale that puts its largest value at one of `ends`, of either sign, or
    at what least squares make of it; float64[rows]."""
    best, zero = np.full(len(x), np.inf), 2 ** (bits - 1)
    for end in ends:
        for sign in (1, -1):
            codes = np.clip(np.rint(x * (sign * end / np.abs(x).max(axis=1, keepdims=True))), -zero, zero - 1)
            products, squares = (importance * codes * x).sum(axis=1), (importance * codes**2).sum(axis=1)
            best = np.minimum(best, (importance * x * x).sum(axis=1) - products**2 / squares)
    return best


def test_scales_come_near_the_best_there_are(pool, unrefined):
    """Against 2,000 scales of each sign, each refitted by least squares."""
    target = weights(16, 128, seed=3)
    importance = np.exp(np.random.default_rng(4).standard_normal(128))
    factor = Factor(np.diag(importance).astype(np.float32))
    importance = np.diagonal(factor.hessian).astype(np.float64)
    x = target.astype(np.float64)
    best = best_objectives(x, importance, np.linspace(4, 20, 2000), bits=4)
    found = objective(quantize_matrix(target, factor, pool=pool).errors, factor.hessian)
    assert found.sum() < 1.005 * best.sum()
    assert (found < 1.03 * best).all()


@pytest.mark.parametrize("shape", [(1, 1), (5, 128), (37, 300), (130, 257)])
@pytest.mark.parametrize("refinements", [0, 2])
def test_errors_are_exactly_those_of_what_is_stored(shape, refinements, pool, monkeypatch):
    monkeypatch.setattr(solve, "REFINEMENTS", refinements)
    target = weights(*shape)
    result = quantize_matrix(target, Factor(hessian_of(inputs(400, shape[1]))), pool=pool)
    assert (result.codes.dtype, result.codes.shape) == (np.uint8, shape) and result.codes.max() <= 15
    assert (result.scales.dtype, result.scales.shape) == (np.float16, (shape[0], -(-shape[1] // 128)))
    assert (result.errors == target - dequantize(result.codes, result.scales, 4)).all()


def test_refinements_only_lower_the_objective_row_by_row(pool, monkeypatch):
    target, factor = weights(70, 300), Factor(hessian_of(inputs(600, 300)))
    found = []
    for rounds in (0, 1, 2, 5):
        monkeypatch.setattr(solve, "REFINEMENTS", rounds)
        found.append(objective(quantize_matrix(target, factor, pool=pool).errors, factor.hessian))
    for before, after in pairwise(found):
        assert (after <= before * (1 + 1e-5)).all()
    assert found[1].sum() < 0.97 * found[0].sum()


def test_the_output_is_kept_better_than_by_search(pool):
    from edgellama.quant import unpack_int4, unpack_scales
    from edgellama_convert.quantizers import quantize

    target, factor = weights(64, 300), Factor(hessian_of(inputs(600, 300)))
    plain = quantize(target, 4, "search")
    stored = dequantize(unpack_int4(plain.packed, *target.shape), unpack_scales(plain.scales, 64), 4)
    ours = objective(quantize_matrix(target, factor, pool=pool).errors, factor.hessian).sum()
    assert ours < 0.5 * objective(target - stored, factor.hessian).sum()


def test_zero_tiny_and_huge_rows_and_their_neighbours(pool):
    target = weights(40, 300)
    want = quantize_matrix(target, Factor(hessian_of(inputs(400, 300))), pool=pool)
    odd = target.copy()
    odd[3] = 0
    odd[4] = 1e-9  # below the smallest float16 scale
    odd[5] = 1e-42
    odd[6] = 65504 * 7 * np.sign(target[6])
    odd[7] = 65504 * 9 * np.sign(target[7])  # what is lacking may ask for it: clipped
    odd[8, 128:256] = 0
    result = quantize_matrix(odd, Factor(hessian_of(inputs(400, 300))), pool=pool)
    assert np.isfinite(result.scales).all() and np.isfinite(result.errors).all()
    for row in (3, 4, 5):
        assert (result.codes[row] == 8).all() and (result.scales[row] == 0).all()
    for row in (6, 7):
        assert np.square(result.errors[row]).sum() < 0.1 * np.square(odd[row]).sum()
    plain = np.r_[0:3, 9:40]
    assert (result.codes[plain] == want.codes[plain]).all() and (result.scales[plain] == want.scales[plain]).all()


@pytest.mark.parametrize("threads, rows_of_a_job", [(1, 128), (3, 128), (2, 32), (1, 1000)])
def test_bits_do_not_depend_on_threads_and_jobs(threads, rows_of_a_job, pool, monkeypatch):
    target, factor = weights(300, 260), Factor(hessian_of(inputs(300, 260)))
    want = quantize_matrix(target, factor, pool=pool)
    monkeypatch.setattr(solve, "_ROWS_OF_A_JOB", rows_of_a_job)
    with ThreadPoolExecutor(threads) as other:
        got = quantize_matrix(target, factor, pool=other)
    assert (got.codes == want.codes).all() and (got.errors == want.errors).all()
    assert (got.scales.view(np.uint16) == want.scales.view(np.uint16)).all()


def test_an_error_in_a_job_is_raised(pool, monkeypatch):
    def fail(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(solve, "quantize_group", fail)
    with pytest.raises(MemoryError, match="no room"):
        quantize_matrix(weights(300, 10), Factor(hessian_of(inputs(50, 10))), pool=pool)


# -- kernels -------------------------------------------------------------------------------------------------------


def run_group(rows, n, quantize=kernels.quantize_group, refine=kernels.refine_group, parts=None, seed=0, bits=4):
    """(codes, scales, errors) before refining and after it, rows divided into `parts`."""
    target = weights(rows, n, seed)
    target[rows // 2, : n // 2] = 0
    target[rows // 3] = 0
    factor = Factor(hessian_of(inputs(2 * n + 10, n)))
    unit = factor.r / np.diagonal(factor.r)
    importance = np.diagonal(factor.hessian) / np.diagonal(factor.hessian).mean()
    adjusted = target + np.float32(0.01) * weights(rows, n, seed + 5)
    codes, scales = np.empty((rows, n), np.uint8), np.empty(rows, np.uint16)
    errors = np.empty((rows, n), np.float32)
    parts, zero = parts or [(0, rows)], ZERO_POINT[bits]
    for i, j in parts:
        quantize(adjusted[i:j], target[i:j], unit, importance, zero, codes[i:j], scales[i:j], errors[i:j])
    before = codes.copy(), scales.copy(), errors.copy()
    gradient = (errors.astype(np.float64) @ factor.hessian).astype(np.float32)
    for i, j in parts:
        refine(gradient[i:j], target[i:j], factor.hessian, zero, codes[i:j], scales[i:j], errors[i:j])
    return *before, codes, scales, errors


def assert_equal_bits(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("n, bits", [(1, 4), (20, 4), (128, 4), (128, 8)])
def test_kernels_bits_do_not_depend_on_the_division_of_rows(n, bits):
    whole = run_group(77, n, bits=bits)
    assert n == 1 or (whole[0] != whole[3]).any()
    assert_equal_bits(run_group(77, n, parts=[(i, i + 1) for i in range(77)], bits=bits), whole)
    assert_equal_bits(run_group(77, n, parts=[(0, 32), (32, 37), (37, 77)], bits=bits), whole)


@pytest.mark.parametrize("rows, n, bits", [(3, 1, 4), (2, 23, 4), (33, 6, 4), (2, 23, 8)])
def test_the_kernels_are_right_before_they_are_compiled(rows, n, bits, monkeypatch):
    """The same functions run by Python, on a little: a failure here is the algorithm's, not the compiler's."""
    compiled = run_group(rows, n, bits=bits)
    interpret_scale_search(monkeypatch, kernels)
    for name in "to_half from_half _add".split():
        monkeypatch.setattr(kernels, name, getattr(kernels, name).py_func)
    plain = run_group(rows, n, kernels.quantize_group.py_func, kernels.refine_group.py_func, bits=bits)
    assert_equal_bits(plain, compiled)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-9, 1e-6, 1e5])
def test_kernels_at_the_ends_of_float16(scale, bits, monkeypatch):
    zero, ones = ZERO_POINT[bits], np.ones(9, np.float32)
    target = (np.random.default_rng(0).standard_normal((2, 9)) * scale).astype(np.float32)
    outcomes = []
    for compiled in (True, False):
        if not compiled:
            interpret_scale_search(monkeypatch, kernels)
            for name in "to_half from_half".split():
                monkeypatch.setattr(kernels, name, getattr(kernels, name).py_func)
        codes, scales, errors = np.empty((2, 9), np.uint8), np.empty(2, np.uint16), np.empty((2, 9), np.float32)
        group = kernels.quantize_group if compiled else kernels.quantize_group.py_func
        with np.errstate(all="ignore"):
            group(target, target, np.eye(9, dtype=np.float32), ones, zero, codes, scales, errors)
        assert np.isfinite(scales.view(np.float16)).all() and codes.max() <= 2 * zero - 1
        assert (errors == target - dequantize(codes, scales.view(np.float16)[:, None], bits)).all()
        outcomes.append((codes, scales, errors))
    assert_equal_bits(*outcomes)
    held = (1e-6, 1e5) if bits == 4 else (1e5,)  # the smallest float16 is 6e-8: no scale for 1e-6 / 128
    assert scale not in held or np.square(errors).sum() < 0.2 * np.square(target).sum()
