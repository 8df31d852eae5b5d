"""Calibrated conversions in torch: each part against NumPy's or float64, whole files, and how unfinished ones go on.

On the CPU where torch is, and the same tests on a GPU where there is one (`benchmarks/gpu.py` runs those).
"""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")
import torch

from checkpoints import random_weights, write_safetensors
from closeness import ORACLE_TOLERANCE
from conftest import REPOSITORY
from edgellama.cli import main
from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.format import open_model
from edgellama.quant import ZERO_POINT, dequantize, unpack_int4
from edgellama_convert import convert
from edgellama_convert.comparison import compare
from edgellama_convert.gptq import CalibratedLayers, solve, torch_layer, torch_solve
from edgellama_convert.gptq.arithmetic import NumpyArithmetic, arithmetic_on
from edgellama_convert.gptq.kernels import quantize_group
from edgellama_convert.gptq.layer import Linear
from edgellama_convert.gptq.solve import DAMPING
from edgellama_convert.receipt import heldout_text
from test_gptq import OPTIONS, PROSE, SMALL, check_streams, interrupted, make_source, only, work_folder
from test_gptq_solve import best_objectives, hessian_of, inputs, objective, weights

pytestmark = pytest.mark.torch
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
OURS = {**OPTIONS, "n_threads": 1}
REAL = {"method": "gptq", "calibration_tokens": 2048, "receipt": False}
UNIT = 2.0**-24  # the relative error of one float32 rounding


@pytest.fixture(params=["torch-cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    """torch's threads spin while they wait: see `conftest`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def place(device):
    return torch.device("cuda" if device == "cuda" else "cpu")


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "source")


def config_of(**changes):
    raw = {"model_type": "llama", "vocab_size": 99, "num_attention_heads": 6, "num_key_value_heads": 2,
           "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, **SMALL, **changes}  # fmt: skip
    return LlamaConfig.from_dict(raw)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact_hessian(x):
    """float64, damped as `Factor` does."""
    exact = x.astype(np.float64)
    hessian = exact.T @ exact
    hessian[np.diag_indices(len(hessian))] += DAMPING * np.diagonal(hessian).mean()
    return hessian


# -- the forward pass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias, device):
    """n products and sums of each number are off by n roundings of what they add up to, in both."""
    x, w, b = random(130, 96), random(70, 96, seed=1), random(70, seed=2) if bias else None
    with arithmetic_on(device, config_of(), 65, 2) as math:
        linear = Linear(math.array(w), None if b is None else math.array(b))
        got = math.numpy(math.linear(linear, math.array(x)))
    exact = x.astype(np.float64) @ w.T.astype(np.float64) + (0 if b is None else b)
    bound = np.abs(x) @ np.abs(w.T) + (0 if b is None else np.abs(b))
    assert (np.abs(got - exact) <= 97 * UNIT * bound).all()


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_norm_and_gated_are_numpys(act, device):
    x, up, weight = 3 * random(128, 96), random(128, 96, seed=1), 1 + random(96, seed=2)
    config, found = config_of(hidden_act=act), []
    for each in ("cpu", device):
        with arithmetic_on(each, config, 64, 1) as math:
            a, b, w = (math.array(values.copy()) for values in (x, up, weight))
            found += [math.numpy(math.norm(a, w)), math.numpy(math.gated(a, b))]
    # A mean of 96 squares, a root and two products; tanh and exp are good to a few roundings of numbers around 1.
    np.testing.assert_allclose(found[2], found[0], rtol=20 * UNIT, atol=0)
    np.testing.assert_allclose(found[3], found[1], rtol=20 * UNIT, atol=20 * UNIT * np.abs(x * up).max())


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 6}, {"num_key_value_heads": 1, "head_dim": 24}], ids=str
)
@pytest.mark.parametrize("scores", [1, 1 << 24])  # a sequence at a time, and all
def test_attention_is_numpys(changes, scores, device, monkeypatch):
    monkeypatch.setattr(torch_layer, "_SCORES", scores)
    config, found = config_of(**changes), []
    heads, kv_heads = (config.head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads))
    q, k, v = 2 * random(3 * 40, heads), 2 * random(3 * 40, kv_heads, seed=1), random(3 * 40, kv_heads, seed=2)
    for each in ("cpu", device):
        with arithmetic_on(each, config, 40, 1) as math:
            found.append(math.numpy(math.attention(*map(math.array, (q, k, v)))))
    # A score is off by the roundings of head_dim products, in proportion to the numbers' sizes, and so is e**score;
    # then means of 40 values are taken.
    norms = np.sqrt(np.square(q).sum(axis=1).max() * np.square(k).sum(axis=1).max())
    tolerance = (config.head_dim * norms / config.head_dim**0.5 + 40) * UNIT * np.abs(v).max()
    assert np.abs(found[0] - found[1]).max() < tolerance < 2e-3
    assert np.abs(found[0] - found[1]).max() < ORACLE_TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 1, "mlp_bias": True, "tie_word_embeddings": True},
        {"hidden_size": 132, "intermediate_size": 150, "hidden_act": "gelu", "attention_bias": True},
    ],
    ids=str,
)
def test_both_streams_are_the_reference_backends(changes, device, tmp_path, monkeypatch):
    check_streams(changes, device, tmp_path, monkeypatch)


# -- one matrix ----------------------------------------------------------------------------------------------------


def factor_of(x, place):
    return torch_solve.Factor(torch.from_numpy(hessian_of(x)).to(place))


def quantized(target, x, place, bits=4):
    """(codes, scales, errors) in NumPy, and the damped Hessian."""
    factor = factor_of(x, place)
    result = torch_solve.quantize_matrix(torch.from_numpy(target).to(place), factor, bits)
    return *(each.cpu().numpy() for each in (result.codes, result.scales, result.errors)), factor.hessian.cpu().numpy()


@pytest.mark.parametrize("panel", [64, 1024])
def test_moments_are_sums_over_tokens(panel, place, monkeypatch):
    monkeypatch.setattr(torch_solve, "_PANEL", panel)
    x, lacks = inputs(90, 300), inputs(90, 40, seed=2)
    moments = torch_solve.Moments.zeros(300, 40, place)
    for first in (0, 50):
        moments.add(*(torch.from_numpy(each[first : first + 50]).to(place) for each in (x, lacks)))
    moments.complete()
    for got, left in ((moments.hessian, x), (moments.lack, lacks)):
        exact = left.T.astype(np.float64) @ x
        assert (np.abs(got.cpu().numpy() - exact) <= 91 * UNIT * (np.abs(left).T @ np.abs(x))).all()


@pytest.mark.parametrize("features", [1, 128, 300])
def test_the_factor_gives_the_hessian_back_and_solves(features, place):
    x = inputs(200, features)
    want, factor = exact_hessian(x), factor_of(x, place)
    r, largest = factor.r.cpu().numpy(), np.abs(want).max()
    assert (np.tril(r, -1) == 0).all() and (np.diagonal(r) > 0).all()
    np.testing.assert_allclose(r.astype(np.float64) @ r.T, want, rtol=1e-5, atol=1e-5 * largest)
    b = weights(7, features)
    solved = torch.from_numpy(b.copy()).to(place)
    factor.solve(solved)
    # Damped by 5 % of the mean, the condition is below features / 0.05: it multiplies float32's 6e-8.
    exact = np.linalg.solve(want, b.T.astype(np.float64)).T
    np.testing.assert_allclose(solved.cpu(), exact, rtol=0, atol=6e-8 * 20 * features * np.abs(exact).max())


def test_damping_rises_only_as_far_as_needed(place):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((200, 200)))[0]
    hessian = torch.from_numpy(((basis * np.r_[-0.1, np.linspace(0.5, 1.5, 199)]) @ basis.T).astype(np.float32))
    before = hessian.diagonal().clone()
    after = torch_solve.Factor(hessian.to(place)).hessian.diagonal().cpu()
    np.testing.assert_allclose(after - before, 4 * DAMPING * before.mean(), rtol=1e-4)


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_hessian_of_few_tokens_or_none_at_all(tokens, place):
    target = weights(20, 300)
    errors = quantized(target, inputs(300, 300)[:tokens], place)[2]
    assert np.square(errors).sum() < 0.05 * np.square(target).sum()


@pytest.mark.parametrize("of_output", [False, True])
def test_shift_is_numpys(of_output, place):
    w, lack = weights(20, 90), random(20 if of_output else 90, 90)
    got = torch_solve.shift(torch.from_numpy(w).to(place), torch.from_numpy(lack).to(place), of_output)
    np.testing.assert_allclose(got.cpu(), solve.shift(w, lack, of_output), rtol=0, atol=90 * UNIT * 0.5)


def test_scales_of_4_bits_are_the_kernels(place):
    x, importance = weights(200, 128), np.exp(random(128)) ** 2
    x[3], x[4], x[5] = 0, 1e-9, 65504 * 9 * np.sign(x[5])
    codes, scales, errors = np.empty((200, 128), np.uint8), np.empty(200, np.uint16), np.empty((200, 128), np.float32)
    quantize_group(x, x, np.eye(128, dtype=np.float32), importance, ZERO_POINT[4], codes, scales, errors)
    got = torch_solve.choose_scales(*(torch.from_numpy(each).to(place) for each in (x.T.copy(), importance)), 4)
    got, want = got.cpu().numpy(), scales.view(np.float16).astype(np.float32)
    assert np.mean(got == want) > 0.98  # else there were two candidates as good as each other
    for row in (3, 4, 5):
        assert got[row] == want[row]

    def cost(scale):
        scale = np.where(scale == 0, 1, scale)[:, None].astype(np.float64)
        return (importance * (x - np.clip(np.rint(x / scale), -8, 7) * scale) ** 2).sum(axis=1)

    np.testing.assert_allclose(cost(got), cost(want), rtol=2e-3)


def test_scales_of_8_bits_come_near_the_best_there_are(place):
    x, importance = weights(16, 128, seed=3).astype(np.float64), np.exp(random(128)).astype(np.float64)
    best = best_objectives(x, importance, np.linspace(100, 140, 2000), bits=8)
    scales = torch_solve.choose_scales(torch.from_numpy(x.T.astype(np.float32)).to(place),
                                       torch.from_numpy(importance.astype(np.float32)).to(place), 8)  # fmt: skip
    scales = scales.cpu().numpy().astype(np.float64)[:, None]
    found = (importance * (x - np.clip(np.rint(x / scales), -128, 127) * scales) ** 2).sum(axis=1)
    # 32 candidates where the oracle has 4,000, and float16, which rounds a scale by up to 1/16 of a step of 128 codes.
    assert found.sum() < 1.1 * best.sum()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("features", [128, 300])
def test_codes_are_textbook_gptqs(features, bits, place, monkeypatch):
    """Frantar et al. 2022, algorithm 1, in float64, with the scales that were chosen."""
    monkeypatch.setattr(solve, "REFINEMENTS", 0)
    target = weights(64, features)
    codes, scales, _, hessian = quantized(target, inputs(600, features), place, bits)
    upper = np.linalg.cholesky(np.linalg.inv(hessian.astype(np.float64))).T
    w, zero = target.astype(np.float64), ZERO_POINT[bits]
    alike = np.ones(64, bool)  # rows that have not met a tie: after one, everything may differ
    for i in range(features):
        scale = scales[:, i // 128].astype(np.float64)
        wish = np.clip(w[:, i] / scale, -zero, zero - 1)
        code = np.rint(wish)
        different = alike & (code + zero != codes[:, i])
        assert (np.abs(np.abs(wish - np.floor(wish)) - 0.5)[different] < 1e-4 * zero).all()
        alike &= ~different
        w[:, i:] -= ((w[:, i] - code * scale) / upper[i, i])[:, None] * upper[i, i:]
    assert alike.sum() >= (60 if bits == 4 else 32)  # 16 times as many places to tie, with 16 times less between them


@pytest.mark.parametrize("rows, features", [(1, 1), (37, 300), (256, 640)])
@pytest.mark.parametrize("refinements", [0, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_numpys(bits, rows, features, refinements, place, monkeypatch):
    """Of 8 bits, where many scales do as well as each other, what comes of them."""
    monkeypatch.setattr(solve, "REFINEMENTS", refinements)
    target, x = weights(rows, features), inputs(1000, features)
    codes, scales, errors, hessian = quantized(target, x, place, bits)
    want = solve.quantize_matrix(target, solve.Factor(hessian_of(x)), bits)
    if bits == 4:
        assert np.mean(codes == want.codes) > 0.99 and np.mean(scales == want.scales) > 0.97
    ours, theirs = objective(errors, hessian).sum(), objective(want.errors, hessian).sum()
    assert ours == pytest.approx(theirs, rel=1e-3 if bits == 4 else 0.02)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (5, 128), (37, 300)])
def test_errors_are_exactly_those_of_what_is_stored(shape, bits, place):
    target, x = weights(*shape), inputs(400, shape[1])
    codes, scales, errors, _ = quantized(target, x, place, bits)
    assert (codes.dtype, codes.shape, codes.max() < 2**bits) == (np.uint8, shape, True)
    assert (scales.dtype, scales.shape) == (np.float16, (shape[0], -(-shape[1] // 128)))
    stored = dequantize(codes, scales, bits)
    assert (errors == target - stored).all()
    parts = (torch.from_numpy(each).to(place) for each in (codes, scales, errors))
    assert (torch_solve.dequantize(torch_solve.Codes(*parts), bits).cpu().numpy() == stored).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_refinements_only_lower_the_objective_row_by_row(bits, place, monkeypatch):
    target, x, found = weights(70, 300), inputs(600, 300), []
    for rounds in (0, 1, 2, 5):
        monkeypatch.setattr(solve, "REFINEMENTS", rounds)
        _, _, errors, hessian = quantized(target, x, place, bits)
        found.append(objective(errors, hessian))
    for before, after in pairwise(found):
        assert (after <= before * (1 + 1e-4)).all()
    assert found[1].sum() < 0.97 * found[0].sum()


def test_8_bits_are_16_times_as_exact(place):
    target, x = weights(64, 300), inputs(600, 300)
    four, eight = (objective(*quantized(target, x, place, bits)[2:]).sum() for bits in (4, 8))
    assert 1 / 300 < eight / four < 1 / 150  # squares: 1/289 for an even distribution of errors


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_tiny_and_huge_rows_and_their_neighbours(bits, place):
    target, x = weights(40, 300), inputs(400, 300)
    want = quantized(target, x, place, bits)
    odd = target.copy()
    odd[3] = 0
    odd[4] = 1e-9 if bits == 4 else 1e-10  # below the smallest float16 scale
    odd[5] = 1e-42
    odd[6] = 65504 * 7 * np.sign(target[6])
    odd[7] = 65504 * 9 * np.sign(target[7])
    odd[8, 128:256] = 0
    codes, scales, errors, _ = quantized(odd, x, place, bits)
    assert np.isfinite(scales).all() and np.isfinite(errors).all()
    for row in (3, 4, 5):
        assert (codes[row] == ZERO_POINT[bits]).all() and (scales[row].view(np.uint16) == 0).all()
    for row in (6, 7):
        assert np.square(errors[row]).sum() < 0.1 * np.square(odd[row]).sum()
    plain = np.r_[0:3, 9:40]
    assert (codes[plain] == want[0][plain]).all() and (scales[plain] == want[1][plain]).all()


def test_few_operations_an_input(place):
    """A GPU's time goes by their number: four for a code and five for each refinement, and what a group costs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += not any(name in str(func) for name in ("slice", "select", "unbind", "view", "aten.t."))
            return func(*args, **kwargs or {})

    factor, target = factor_of(inputs(600, 512), place), torch.from_numpy(weights(64, 512)).to(place)
    with Count() as count:
        torch_solve.quantize_matrix(target, factor)
    assert count.n < 512 * (4 + 2 * 5) + 3 * 4 * 80


# -- whole conversions ---------------------------------------------------------------------------------------------


def test_as_good_as_numpys_and_the_same_bytes_again(source, device, tmp_path):
    options = {**REAL, "n_threads": 1}
    torchs, again, numpys = (
        convert(source, tmp_path / f"{i}.edgellama", **options, device=each)
        for i, each in enumerate((device, device, "cpu"))
    )
    assert torchs.out.read_bytes() == again.out.read_bytes()
    with open_model(torchs.out) as file, open_model(numpys.out) as other:
        assert file.header["quantization"] == other.header["quantization"]  # which does not tell the machine
        assert set(file.tensors) == set(other.tensors)
        first = [name for name in file.tensors if ".layers.0." in name and name.endswith(".qweight")]
        codes = [[unpack_int4(each.array(name), 96, 96) for name in first] for each in (file, other)]
    assert len(first) == 7 and np.mean(np.concatenate(codes[0]) == np.concatenate(codes[1])) > 0.98
    ours, theirs = (compare(report.out, source, heldout_text(), ctx=64, max_windows=16) for report in (torchs, numpys))
    assert ours.kl_mean == pytest.approx(theirs.kl_mean, rel=0.05)
    assert torchs.errors == pytest.approx(numpys.errors, rel=0.02)


def test_units_of_8_bits_are_chosen_and_filled_as_by_numpy(source, device, tmp_path):
    """The choice is NumPy's on every device, the codes are torch's."""
    options = {**REAL, "n_threads": 1, "bpw": 8.0, "receipt": False}
    outs = [convert(source, tmp_path / f"{each}.edgellama", **options, device=each).out for each in (device, "cpu")]
    with open_model(outs[0]) as file, open_model(outs[1]) as other:
        assert file.int8_units == other.int8_units and 0 < len(file.int8_units) < 4 * file.config.num_hidden_layers
        assert file.header["quantization"] == other.header["quantization"]
    torchs, numpys = (compare(out, source, heldout_text(), ctx=64, max_windows=16).kl_mean for out in outs)
    plain = convert(source, tmp_path / "plain.edgellama", **{**options, "bpw": None}, device=device).out
    worse = compare(plain, source, heldout_text(), ctx=64, max_windows=16).kl_mean
    assert torchs == pytest.approx(numpys, rel=0.15) and torchs < 0.8 * worse  # the first tie parts their ways


@pytest.fixture(scope="module")
def real(minimind_dir, tmp_path_factory):
    """NumPy's conversion of a real model, and what it solved in its last layer."""
    solved, quantize = [], NumpyArithmetic.quantize

    def quantize_and_keep(self, target, factor, bits):
        codes = quantize(self, target, factor, bits)
        solved.append((target, factor.hessian, codes))
        return codes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NumpyArithmetic, "quantize", quantize_and_keep)
        out = tmp_path_factory.mktemp("real") / "m.edgellama"
        convert(minimind_dir, out, **REAL, device="cpu")
    return out, solved[-7:]


@pytest.mark.models
def test_matrices_of_a_real_model_get_numpys_codes(real, place, monkeypatch):
    """Given the same targets and Hessians. A tie that falls otherwise changes codes of its row from there on."""
    monkeypatch.setattr(torch_solve, "DAMPING", 0.0)  # they are damped
    same = []
    for target, hessian, want in real[1]:
        factor = torch_solve.Factor(torch.from_numpy(hessian.copy()).to(place))
        result = torch_solve.quantize_matrix(torch.from_numpy(target).to(place), factor, 4)
        ours, theirs = (objective(each, hessian) for each in (result.errors.cpu().numpy(), want.errors))
        assert ours.sum() == pytest.approx(theirs.sum(), rel=1e-3)
        same.append(np.mean(result.codes.cpu().numpy() == want.codes))
    assert len(same) == 7 and min(same) > 0.97, same


@pytest.mark.models
def test_a_real_model_is_as_good_as_numpys(real, minimind_dir, device, tmp_path):
    """Its codes are others behind the first ties: the next matrix gets other inputs."""
    outs = real[0], convert(minimind_dir, tmp_path / "m.edgellama", **REAL, device=device).out
    numpys, torchs = (compare(out, minimind_dir, heldout_text(), ctx=128, max_windows=8).kl_mean for out in outs)
    assert torchs == pytest.approx(numpys, rel=0.05), (torchs, numpys)


def test_settings_of_torch_are_put_back_and_do_not_matter(source, device, tmp_path, monkeypatch):
    def settings():
        return (
            torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.get_num_threads(),
            torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype(),
        )  # fmt: skip

    plain = convert(source, tmp_path / "m.edgellama", **OPTIONS, device=device, n_threads=2).out.read_bytes()
    before = settings()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.set_num_threads(3)
        changed = settings()
        again = convert(source, tmp_path / "m.edgellama", **OPTIONS, device=device, n_threads=2).out.read_bytes()
        assert settings() == changed
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.set_num_threads(before[2])
    assert again == plain and settings() == before
    interrupted(source, tmp_path / "other.edgellama", 3, device=device)
    assert settings() == before


@pytest.mark.parametrize("matrices", [3, 8, 15])
def test_an_interrupted_conversion_goes_on_and_gives_the_same_bytes(matrices, source, device, tmp_path):
    out = tmp_path / "out" / "m.edgellama"
    out.parent.mkdir()
    expected = convert(source, out, **OURS, device=device).out.read_bytes()
    out.unlink()
    interrupted(source, out, matrices, device=device, n_threads=1)
    assert work_folder(out).exists() == (matrices > 7)
    assert convert(source, out, **OURS, device=device).out.read_bytes() == expected and only(out)


def test_another_device_begins_anew(source, device, tmp_path, monkeypatch):
    layers, layer = [], CalibratedLayers._layer
    monkeypatch.setattr(CalibratedLayers, "_layer", lambda self, i, math: (layers.append(i), layer(self, i, math)))
    want = convert(source, tmp_path / "m.edgellama", **OURS, device="cpu").out.read_bytes()
    for before, after in ((device, "cpu"), ("cpu", device)):
        out = tmp_path / f"{before}.edgellama"
        interrupted(source, out, 15, device=before, n_threads=1)
        layers.clear()
        found = convert(source, out, **OURS, device=after).out.read_bytes()
        assert layers == [0, 1, 2] and (found == want or after != "cpu")


@pytest.mark.skipif(os.name == "nt", reason="kills processes the POSIX way")
def test_kill_9_and_again_gives_the_same_bytes(device, tmp_path):
    source = make_source(tmp_path / "source", num_hidden_layers=40)
    out = tmp_path / "out" / "m.edgellama"
    out.parent.mkdir()
    expected = convert(source, out, **OURS, device=device).out.read_bytes()
    out.unlink()
    command = ["convert", str(source), "-o", str(out), "--method", "gptq", "--calibration", str(PROSE)]
    command += ["--calibration-tokens", "256", "--no-receipt", "--device", device, "-t", "1", "-q"]
    child = subprocess.Popen([sys.executable, "-m", "edgellama", *command], cwd=REPOSITORY)
    deadline = time.monotonic() + 120
    while not (work_folder(out) / "layer-00001.npz").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not out.exists()
    assert main(command) == 0
    assert out.read_bytes() == expected and only(out)


def test_the_summary_tells_the_device(source, device, tmp_path, capsys):
    out = tmp_path / "m.edgellama"
    command = ["convert", str(source), "-o", str(out), "--method", "gptq", "--calibration", str(PROSE)]
    assert main([*command, "--calibration-tokens", "256", "--no-receipt", "--device", device]) == 0
    assert f"method gptq on {device}\n" in capsys.readouterr().err


def test_activations_that_overflow_are_an_error(device, tmp_path):
    source = make_source(tmp_path / "source", tie_word_embeddings=True, num_hidden_layers=1)
    config = json.loads((source / "config.json").read_text())
    tensors = random_weights(config, 0)
    tensors["model.layers.0.input_layernorm.weight"] *= np.float32(1e25)
    write_safetensors(source / "model.safetensors", tensors, "float32")
    with pytest.raises(ConvertError, match="layer 0: its activations are not finite"):
        convert(source, tmp_path / "m.edgellama", **OURS, device=device)


@pytest.mark.parametrize(
    "error, line",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            "not enough memory on the GPU for calibrating; free some",
        ),
        (RuntimeError("CUDA error: device-side assert\nmore"), r"the GPU failed \(CUDA error: device-side assert\)"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't"),
            "not enough memory for calibrating",
        ),
    ],
)
def test_what_torch_says_becomes_one_line_and_it_goes_on(error, line, source, device, tmp_path, monkeypatch):
    out = tmp_path / "m.edgellama"
    expected = convert(source, out, **OURS, device=device).out.read_bytes()
    out.unlink()
    calls, factor = [], torch_solve.Factor

    def fail(hessian):
        calls.append(1)
        if len(calls) == 6:  # in the second layer
            raise error
        return factor(hessian)

    monkeypatch.setattr(torch_solve, "Factor", fail)
    with pytest.raises(ConvertError, match=line) as caught:
        convert(source, out, **OURS, device=device)
    assert "\n" not in str(caught.value)
    assert convert(source, out, **OURS, device=device).out.read_bytes() == expected


def test_a_mistake_of_ours_stays_one(source, device, tmp_path, monkeypatch):
    def fail(hessian):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(torch_solve, "Factor", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        convert(source, tmp_path / "m.edgellama", **OURS, device=device)


@pytest.mark.cuda
@NO_GPU
def test_auto_takes_the_gpu_and_gives_its_memory_back(source, tmp_path):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    assert convert(source, tmp_path / "m.edgellama", **OPTIONS).device == "cuda"
    assert torch.cuda.memory_reserved() <= before
