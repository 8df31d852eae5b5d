"""Bits where they help most: gradients, what rounding a unit costs, the choice under a budget, `convert --bpw`."""

from pathlib import Path

import numpy as np
import pytest

import edgellama_convert
from checkpoints import make_checkpoint
from conftest import byte_tokenizer
from edgellama.backends.reference import ReferenceBackend
from edgellama.cli import main
from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.format import model_tensors, open_model, unit_names
from edgellama.format.schema import UNITS
from edgellama.quant import load_matrix
from edgellama_convert import convert, files, sensitivity
from edgellama_convert.budget import Budget, linear_bits, unit_matrices
from edgellama_convert.checkpoint import Checkpoint
from edgellama_convert.gptq import CalibratedLayers, WorkFolder
from edgellama_convert.gptq.layer import LayerMath, Linear
from edgellama_convert.gptq.parts import threads
from edgellama_convert.gradients import Layer

SMALL = {"hidden_size": 96, "intermediate_size": 144, "num_hidden_layers": 3, "max_position_embeddings": 64}
PROSE = Path(edgellama_convert.__file__).parent / "calibration_text" / "prose.txt"
GPTQ = {"method": "gptq", "calibration": PROSE, "calibration_tokens": 256, "receipt": False}
PLAIN = {"method": "search", "receipt": False}
BPW = 7.5  # the matrices of 96 and 144 inputs pad to 128 and 256: from 5.89 to 11.58


def make_source(folder, tokenizer=True, **changes):
    make_checkpoint(folder, **{**SMALL, **changes})
    if tokenizer:
        (folder / "tokenizer.json").write_text(byte_tokenizer(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("bpw") / "source")


@pytest.fixture
def measured(monkeypatch):
    """How often sensitivities were measured since."""
    calls = []
    original = sensitivity.measure

    def measure(*args, **kwargs):
        calls.append(kwargs["method"])
        return original(*args, **kwargs)

    monkeypatch.setattr(sensitivity, "measure", measure)
    return calls


# -- gradients -----------------------------------------------------------------------------------------------------

SHAPES = {
    "gqa": {},
    "mqa_biases_gelu": {
        "num_key_value_heads": 1, "head_dim": 10, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"
    },
    "yarn_tanh": {
        "hidden_act": "gelu_pytorch_tanh",
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 24},
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_differences(shape):
    """A step in any direction changes the loss as the gradient says; a changed unit, as `backward` says."""
    raw = {"vocab_size": 37, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 0.1}
    config = LlamaConfig.from_dict({**SMALL_CONFIG, **raw, **SHAPES[shape]})
    rng = np.random.default_rng(0)

    def random(*dims):
        return (rng.standard_normal(dims) / np.sqrt(dims[-1])).astype(np.float32)

    matrices = {}
    for spec in model_tensors(config, 16):
        name = spec.name.removeprefix("model.layers.0.")
        if name.endswith(".qweight"):
            bias = config.mlp_bias if "mlp" in name else config.attention_bias
            matrices[name.removesuffix(".qweight")] = Linear(
                random(*spec.shape), random(spec.shape[0]) if bias else None
            )
    norms = [1 + random(48), 1 + random(48)]
    x, gradient, way = 4 * random(2 * 16, 48), random(2 * 16, 48), np.float32(0.01) * random(2 * 16, 48)
    changes = {name: np.float32(0.01) * random(*linear.weight.shape) for name, linear in matrices.items()}
    with threads(2) as pool:
        math = LayerMath(config, 16, pool)
        layer = Layer(math, matrices, norms, pool)
        found, moved = layer.backward(x, gradient, lambda name, x: x @ changes[name].T)

        def loss(matrices, x):
            return float((Layer(math, matrices, norms, pool).forward(x).astype(np.float64) * gradient).sum())

        step = (loss(matrices, x + way) - loss(matrices, x - way)) / 2
        assert (found * way).sum() == pytest.approx(step, rel=2e-3, abs=2e-5)
        for unit, names in UNITS.items():
            ahead, back = (
                {
                    name: Linear(each.weight + sign * changes[name], each.bias) if name in names else each
                    for name, each in matrices.items()
                }
                for sign in (1, -1)
            )
            step = (loss(ahead, x) - loss(back, x)) / 2
            # q, k and v go through a softmax, whose curve counts: their change is taken in one direction.
            assert moved[unit].sum() == pytest.approx(step, rel=0.05 if "qkv" in unit else 2e-3, abs=1e-4), unit


SMALL_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "intermediate_size": 72, "num_hidden_layers": 1,
    "hidden_act": "silu", "max_position_embeddings": 64, "rope_theta": 1e4, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


# -- what rounding costs -------------------------------------------------------------------------------------------


def gains_of(source, folder, ids, method="rtn", n_threads=2):
    _, config = files.read_config(source)
    with Checkpoint(source) as checkpoint, WorkFolder(folder / "m", {}) as work:
        return sensitivity.measure(
            checkpoint, config, ids, work, method=method, n_threads=n_threads, on_weights=lambda n: None
        )


def test_gains_are_the_divergence_that_rounding_a_unit_causes(tmp_path):
    """Against brute force: the source with one unit rounded, its distribution against the source's, by `reference`."""
    source = make_source(tmp_path / "source", num_hidden_layers=2, dtype="float32")
    convert(source, tmp_path / "m.edgellama", method="rtn", receipt=False)
    ids = np.random.default_rng(0).integers(0, 277, (16, 64)).astype(np.int32)
    gains = gains_of(source, tmp_path, ids)
    with open_model(tmp_path / "m.edgellama") as file, Checkpoint(source) as checkpoint:
        exact = log_probabilities(Rounded(file, checkpoint, ()), ids)
        want = {}
        for unit in unit_names(file.config):
            other = log_probabilities(Rounded(file, checkpoint, unit_matrices(unit)), ids)
            want[unit] = float((np.exp(exact) * (exact - other)).sum(axis=-1).mean())
    assert list(gains) == list(want)
    ratios = np.array([gains[unit] / want[unit] for unit in want])
    assert (np.abs(np.log(ratios)) < np.log(1.35)).all(), dict(zip(want, ratios, strict=True))


class Rounded:
    """Stands in for a ModelFile: a checkpoint's weights as float32, but for the file's in `matrices`."""

    def __init__(self, file, checkpoint, matrices):
        self.config, self._file, self._checkpoint, self._matrices = file.config, file, checkpoint, matrices
        self.tensors = {
            name: type("Entry", (), {"layout": "f32", "shape": tensor.shape})
            for name, tensor in checkpoint.tensors.items()
        }

    def array(self, name):
        matrix = name.removesuffix(".weight")
        if matrix in self._matrices:
            return load_matrix(self._file, matrix)
        return self._checkpoint.read(self._checkpoint.tensors[name])


def log_probabilities(file, ids):
    """float64 [all tokens, vocab]"""
    backend, n = ReferenceBackend(file, ids.shape[1]), ids.shape[1]
    logits = [backend.forward(row, np.arange(n), np.zeros(n, np.int32), np.arange(n)) for row in ids]
    x = np.concatenate(logits).astype(np.float64)
    return (
        x
        - np.log(np.exp(x - x.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True))
        - x.max(axis=-1, keepdims=True)
    )


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_gains_do_not_depend_on_threads_or_chunks(method, source, tmp_path, monkeypatch):
    ids = np.random.default_rng(0).integers(0, 277, (9, 64)).astype(np.int32)
    want = gains_of(source, tmp_path, ids, method, n_threads=1)
    assert gains_of(source, tmp_path, ids, method, n_threads=3) == want
    monkeypatch.setattr(sensitivity, "_CHUNK_BYTES", 2 * 64 * 4 * 144)  # 2 sequences at a time
    chunked = gains_of(source, tmp_path, ids, method)
    assert chunked == pytest.approx(want, rel=1e-4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"architectures": ["LlamaForSequenceClassification"]}]
)
def test_tied_models_and_classifiers_are_measured(changes, tmp_path):
    source = make_source(tmp_path / "source", num_hidden_layers=1, **changes)
    gains = gains_of(source, tmp_path, np.random.default_rng(0).integers(0, 277, (4, 64)).astype(np.int32))
    assert len(gains) == 4 and all(gain > 1e-6 for gain in gains.values())


# -- the choice ----------------------------------------------------------------------------------------------------


def test_a_budget_is_kept_and_used_up():
    config = LlamaConfig.from_dict({**SMALL_CONFIG, **SMALL, "vocab_size": 37, "num_attention_heads": 6})
    units, rng = list(unit_names(config)), np.random.default_rng(0)
    smallest = min(linear_bits(model_tensors(config, 16, [unit])) for unit in units) - linear_bits(
        model_tensors(config, 16)
    )
    least, most = (linear_bits(model_tensors(config, 16, some)) for some in ((), units))
    for bpw in np.linspace(least, most, 20):
        chosen = Budget(config, float(bpw)).choose(dict(zip(units, rng.random(len(units)), strict=True)))
        assert chosen == [unit for unit in units if unit in chosen]
        took = linear_bits(model_tensors(config, 16, chosen))
        assert took <= bpw + 1e-9 and (chosen == units or took > bpw - smallest - 0.7)
    assert Budget(config, least).choose(dict.fromkeys(units, 1.0)) == []
    assert Budget(config, most).choose(dict.fromkeys(units, 0.0)) == units


def test_what_gains_most_for_a_byte_comes_first():
    config = LlamaConfig.from_dict({**SMALL_CONFIG, **SMALL, "vocab_size": 37, "num_attention_heads": 6})
    units = list(unit_names(config))
    o = "model.layers.1.self_attn.o_proj"
    gains = {**dict.fromkeys(units, 0.001), o: 0.01, "model.layers.2.mlp.gate_up_proj": 0.011}  # three times as large
    for bpw, want in ((6.5, [o]), (9.0, [o, "model.layers.2.mlp.gate_up_proj"])):
        assert set(want) <= set(Budget(config, bpw).choose(gains))
    assert "model.layers.2.mlp.gate_up_proj" not in Budget(config, 6.5).choose(gains)


# -- conversions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [GPTQ, PLAIN, {**PLAIN, "method": "rtn"}], ids=lambda options: options["method"])
def test_a_conversion_keeps_its_budget_and_tells(options, source, tmp_path, measured):
    seen = []
    report = convert(
        source, tmp_path / "m.edgellama", **{**options, "receipt": True}, bpw=BPW, progress=lambda *at: seen.append(at)
    )
    with open_model(report.out) as file:
        file.verify()
        units = file.int8_units
        assert 0 < len(units) < 12 and file.header["required_features"] == ["mixed_bits"]
        assert file.quantization["bpw"] == file.receipt["bpw"] == report.bpw == BPW
        assert file.quantization["method"] == options["method"]
        specs = model_tensors(file.config, 8, units)
    assert BPW - 0.8 < report.linear_bits_per_weight <= BPW
    assert report.linear_bits_per_weight == linear_bits(specs)
    eight = {f"{name}.weight" for unit in units for name in unit_matrices(unit)}
    assert report.int8_matrices == len(eight) and report.layer_matrices == 21
    for name, error in report.errors.items():
        if ".layers." in name:
            assert error < 0.02 if name in eight else error > 0.05
    assert measured == [options["method"]]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1][0] == seen[-1][1]
    assert [path.name for path in tmp_path.iterdir()] == ["m.edgellama"]


@pytest.mark.parametrize("options", [GPTQ, PLAIN], ids=lambda options: options["method"])
def test_further_bits_bring_it_nearer_to_the_source(options, source, tmp_path):
    quality = []
    for bpw in (None, 7.5, 10.0):
        report = convert(source, tmp_path / "m.edgellama", **{**options, "receipt": True}, bpw=bpw)
        quality.append(report.quality["kl_mean"])
    assert quality[2] < 0.6 * quality[1] < 0.6 * quality[0]


def test_the_ends_of_the_range(source, tmp_path):
    with pytest.raises(ConvertError, match=r"bpw 4\.5 is not possible for this model: from 5\.89 .* to 11\.58") as info:
        convert(source, tmp_path / "m.edgellama", **PLAIN, bpw=4.5)
    least, most = (float(part.split()[0]) for part in str(info.value).replace(" to ", " from ").split(" from ")[1:])
    plain = convert(source, tmp_path / "p.edgellama", **PLAIN)
    assert plain.bpw is None and plain.int8_matrices == 0
    low = convert(source, tmp_path / "l.edgellama", **PLAIN, bpw=least)
    assert low.int8_matrices == 0 and low.linear_bits_per_weight == plain.linear_bits_per_weight
    with open_model(low.out) as file:
        assert file.header["required_features"] == [] and file.int8_units == ()
    high = convert(source, tmp_path / "h.edgellama", **PLAIN, bpw=most)
    assert high.int8_matrices in (20, 21, 18)
    for bpw in (0, -1, float("nan"), float("inf"), 1e9):
        with pytest.raises(ConvertError, match=r"bpw .* is not possible"):
            convert(source, tmp_path / "m.edgellama", **PLAIN, bpw=bpw)
    assert not (tmp_path / "m.edgellama").exists()


def test_the_same_bytes_for_any_threads(source, tmp_path):
    found = {
        convert(source, tmp_path / "m.edgellama", **GPTQ, bpw=BPW, n_threads=n).out.read_bytes() for n in (1, 2, 3)
    }
    assert len(found) == 1


@pytest.mark.parametrize("matrices", [9, 24], ids=["after measuring", "after a layer"])
def test_an_interrupted_conversion_goes_on(matrices, source, tmp_path, measured, monkeypatch):
    expected = convert(source, tmp_path / "e.edgellama", **GPTQ, bpw=BPW).out.read_bytes()
    out, calls, layers = tmp_path / "m.edgellama", [], []
    original = CalibratedLayers._layer
    monkeypatch.setattr(CalibratedLayers, "_layer", lambda self, i, pool: (layers.append(i), original(self, i, pool)))

    def progress(done, total):
        calls.append(done)
        if len(calls) == matrices:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, **GPTQ, bpw=BPW, progress=progress)
    assert not out.exists() and out.with_name(f".{out.name}.gptq").is_dir()
    done_before, before = len(measured), set(layers)
    layers.clear()
    assert convert(source, out, **GPTQ, bpw=BPW).out.read_bytes() == expected
    assert len(measured) == done_before, "measured twice"
    assert layers == [i for i in range(3) if i not in before or i == max(before)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.edgellama", "m.edgellama"]


def test_another_budget_begins_anew(source, tmp_path, measured):
    out, calls = tmp_path / "m.edgellama", []

    def progress(done, total):
        calls.append(done)
        if len(calls) == 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, **GPTQ, bpw=BPW, progress=progress)
    found = convert(source, out, **GPTQ, bpw=9.0).out.read_bytes()
    assert len(measured) == 2
    assert convert(source, tmp_path / "f.edgellama", **GPTQ, bpw=9.0).out.read_bytes() == found


def test_without_a_tokenizer_there_is_nothing_to_measure_with(tmp_path):
    source = make_source(tmp_path / "source", tokenizer=False, num_hidden_layers=1)
    with pytest.raises(ConvertError, match="no tokenizer to read it: use --method gptq --calibration self"):
        convert(source, tmp_path / "m.edgellama", bpw=BPW)
    own = {"method": "gptq", "calibration": "self", "calibration_tokens": 128, "receipt": False}
    assert convert(source, tmp_path / "m.edgellama", **own, bpw=BPW).int8_matrices > 0


def test_weights_that_overflow_are_refused(tmp_path, monkeypatch):
    source = make_source(tmp_path / "source", num_hidden_layers=1)
    monkeypatch.setattr(Layer, "forward", lambda self, x, on_input=None: x * np.float32("nan"))
    with pytest.raises(ConvertError, match="not finite"):
        convert(source, tmp_path / "m.edgellama", **PLAIN, bpw=BPW)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_max_ram_is_checked_before_the_work(source, tmp_path):
    with pytest.raises(ConvertError, match=r"--max-ram .* is too little"):
        convert(source, tmp_path / "m.edgellama", **PLAIN, bpw=BPW, max_ram=400 << 20)


# -- the command line ----------------------------------------------------------------------------------------------


def test_the_command_tells_the_bits(source, tmp_path, capsys):
    out = tmp_path / "m.edgellama"
    assert main(["convert", str(source), "-o", str(out), "--method", "search", "--bpw", "7.5", "--no-receipt"]) == 0
    err = capsys.readouterr().err
    with open_model(out) as file:
        matrices = sum(len(unit_matrices(unit)) for unit in file.int8_units)
    assert f"mixed  {matrices} of 21 matrices in 8 bits" in err and "in the layers' matrices" in err
    assert main(["info", str(out)]) == 0
    assert f"{matrices} of 21 matrices in 8 bits" in capsys.readouterr().out


@pytest.mark.parametrize("bpw, names", [("4.5", "from 5."), ("20", "not possible"), ("nan", "not possible")])
def test_a_budget_that_cannot_be_is_one_clear_line(bpw, names, source, tmp_path, capsys):
    out = tmp_path / "m.edgellama"
    assert main(["convert", str(source), "-o", str(out), "--bpw", bpw]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"bpw {bpw}" in err and names in err and not out.exists()


def test_what_is_no_number_is_wrong_usage(source, capsys):
    assert main(["convert", str(source), "--bpw", "many"]) == 2
    assert "--bpw" in capsys.readouterr().err
