"""The receipt and the golden vectors: measured and kept in the file, shown by `info`, checked by `verify`."""

import copy
import json

import numpy as np
import pytest

from checkpoints import make_checkpoint, random_weights, write_safetensors
from edgellama import golden
from edgellama.cli import main
from edgellama.errors import EdgellamaError, FormatError
from edgellama.format import append_metadata, open_model
from edgellama.logprob import log_softmax
from edgellama.model import load
from edgellama_convert import convert
from edgellama_convert.comparison import compare
from edgellama_convert.receipt import MAX_WINDOWS, MAX_WORK, _sample, heldout_text, working_bytes

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}<|assistant|>"


@pytest.fixture(scope="module")
def source(tiny_checkpoint, tmp_path_factory):
    """`tiny_checkpoint` with a chat template."""
    folder = tmp_path_factory.mktemp("receipt") / "source"
    make_checkpoint(folder, eos_token_id=2)
    (folder / "tokenizer.json").write_bytes((tiny_checkpoint / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "</s>"}))
    return folder


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """(the file, its report). Do not change it."""
    out = tmp_path_factory.mktemp("receipt") / "m.edgellama"
    return out, convert(source, out, method="search")


@pytest.fixture
def changed(made, tmp_path):
    """A copy of the file whose receipt a function has changed."""

    def change(edit):
        path = tmp_path / "changed.edgellama"
        path.write_bytes(made[0].read_bytes())
        with open_model(path) as file:
            receipt = copy.deepcopy(file.receipt)
        edit(receipt)
        append_metadata(path, receipt=receipt)
        return path

    return change


def receipt_of(path):
    with open_model(path) as file:
        return file.receipt


def test_the_figures_are_those_of_compare(made, source):
    path, report = made
    receipt = receipt_of(path)
    quality = receipt["quality"]
    assert report.quality == quality
    assert {key: receipt[key] for key in ("method", "calibration", "source", "commit")} == {
        "method": "search",
        "calibration": None,
        "source": "source",
        "commit": None,
    }
    result = compare(path, source, heldout_text(), ctx=128)  # the model's positions; 68 windows
    assert (quality["windows"], quality["ctx"], quality["tokens"]) == (8, 128, 8 * 63)
    assert 0 < quality["kl_mean"] < 2 * result.kl_mean and quality["kl_mean"] > result.kl_mean / 2
    assert quality["kl_p99"] > quality["kl_mean"] and 0.3 < quality["top1"] < 1
    for key in ("perplexity", "source_perplexity"):
        assert quality[key] == pytest.approx(result.to_dict()[key], rel=0.25)


def test_the_figures_tell_methods_apart(source, made, tmp_path):
    rtn = convert(source, tmp_path / "m.edgellama", method="rtn").quality
    assert rtn["kl_mean"] > made[1].quality["kl_mean"]
    assert rtn["source_perplexity"] == made[1].quality["source_perplexity"]
    assert receipt_of(tmp_path / "m.edgellama")["method"] == "rtn"


def test_the_same_bytes_for_any_threads_and_memory(source, made, tmp_path, monkeypatch):
    want = made[0].read_bytes()
    for options in ({"n_threads": 1}, {"n_threads": 3}, {"max_ram": 2**32}):
        assert convert(source, tmp_path / "m.edgellama", method="search", **options).out.read_bytes() == want
    monkeypatch.setattr("edgellama_convert.walk._CHUNK_ROWS", 16)
    assert convert(source, tmp_path / "m.edgellama", method="search").out.read_bytes() == want


def test_without_a_receipt(source, made, tmp_path, capsys):
    report = convert(source, tmp_path / "m.edgellama", receipt=False, method="search")
    assert report.quality is None and receipt_of(report.out) is None
    with open_model(report.out) as ours, open_model(made[0]) as full:
        assert ours.header == full.header
    assert main(["verify", str(report.out)]) == 0
    assert "golden" not in capsys.readouterr().out
    assert (
        main(["convert", str(source), "-o", str(tmp_path / "n.edgellama"), "--no-receipt", "-q", "--method", "search"])
        == 0
    )
    assert (tmp_path / "n.edgellama").read_bytes() == report.out.read_bytes()
    with load(report.out) as llm, pytest.raises(EdgellamaError, match="no golden vectors"):
        golden.check(llm)


def test_a_model_without_a_tokenizer_has_golden_logits_only(tmp_path, capsys):
    make_checkpoint(tmp_path / "model")
    report = convert(tmp_path / "model", tmp_path / "m.edgellama", method="search")
    receipt = receipt_of(report.out)
    assert receipt["quality"] is None and set(receipt["golden"]) == {"prompt", "top", "logprobs"}
    assert any("no quality figures" in warning for warning in report.warnings)
    assert main(["verify", str(report.out)]) == 0
    assert "logits of 16 tokens agree on cpu" in capsys.readouterr().out


def test_weights_that_overflow_are_converted_without_a_receipt(source, tmp_path):
    config = make_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    weights = random_weights(config, 0)
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name] *= np.float32(1e25)
    write_safetensors(tmp_path / "model" / "model.safetensors", weights, "float32")
    for tokenizer in (False, True):
        if tokenizer:
            (tmp_path / "model" / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
        report = convert(tmp_path / "model", tmp_path / "m.edgellama", method="search")
        assert receipt_of(report.out) is None
        assert any("no receipt is stored: the logits are not all finite" in each for each in report.warnings)


def test_too_little_memory_leaves_the_receipt_out_and_says_so(source, tmp_path, monkeypatch):
    monkeypatch.setattr("edgellama_convert.receipt.private_bytes", lambda: 5 << 30)
    report = convert(source, tmp_path / "m.edgellama", max_ram=4 << 30, method="search")
    assert receipt_of(report.out) is None and report.quality is None
    assert any("no receipt is stored" in warning and "--max-ram" in warning for warning in report.warnings)


def test_memory_measured_above_the_limit_ends_the_measuring_not_the_conversion(source, tmp_path, monkeypatch):
    held = iter([100 << 20])
    monkeypatch.setattr("edgellama_convert.receipt.private_bytes", lambda: next(held, 5 << 30))
    report = convert(source, tmp_path / "m.edgellama", max_ram=4 << 30, method="search")
    assert receipt_of(report.out) is None and any("no receipt" in warning for warning in report.warnings)


def test_the_sample_shrinks_as_the_model_grows():
    from edgellama.perplexity import Window

    windows = [Window(np.full(256, i, np.int32), 129) for i in range(10)]
    sizes = [len(_sample(windows, weights)) for weights in (10**6, 10**9, 2 * 10**9, 7 * 10**9, 70 * 10**9)]
    assert sizes[0] == MAX_WINDOWS and sizes == sorted(sizes, reverse=True) and sizes[-1] == 1
    assert all(
        n == 1 or n * 256 * weights <= MAX_WORK
        for n, weights in zip(sizes[1:4], (10**9, 2 * 10**9, 7 * 10**9), strict=True)
    )
    assert [int(window.tokens[0]) for window in _sample(windows, 10**6)] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert [int(window.tokens[0]) for window in _sample(windows[:3], 10**6)] == [0, 1, 2]


def test_memory_is_within_its_bound(tmp_path):
    """Activations of a model wide enough to matter, traced as NumPy allocates them."""
    import tracemalloc

    from edgellama.perplexity import chunks
    from edgellama_convert.checkpoint import Checkpoint
    from edgellama_convert.comparison import measure
    from edgellama_convert.files import read_config
    from edgellama_convert.weights import CheckpointWeights

    make_checkpoint(
        tmp_path / "model",
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=8,
        num_hidden_layers=1,
        vocab_size=3000,
        max_position_embeddings=512,
    )
    _, config = read_config(tmp_path / "model")
    with Checkpoint(tmp_path / "model") as checkpoint:
        weights = CheckpointWeights(config, checkpoint)
        windows = chunks((np.arange(1024) * 7 % 3000).tolist(), None, 256)
        measure(weights, weights, windows[:1], 2)
        tracemalloc.start()
        try:
            measure(weights, weights, windows, 2)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    bound = working_bytes(config, 1024)
    assert 0.3 * bound < peak < bound


# -- golden vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_verify_agrees(made, device, capsys):
    assert main(["verify", str(made[0]), "--device", device]) == 0
    out = capsys.readouterr().out
    assert f"21 texts, a chat and the logits of 16 tokens agree on {device}" in out
    assert main(["verify", str(made[0]), "--device", device, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["device"] == device and facts["golden"]["kl"] <= facts["golden"]["max_kl"]
    assert main(["verify", str(made[0]), "--hashes-only", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["golden"] is None


def test_what_is_stored(made):
    vectors = receipt_of(made[0])["golden"]
    prompt = np.array(vectors["prompt"])
    assert [item["text"] for item in vectors["texts"]] == list(golden.TEXTS)
    assert vectors["texts"][0]["ids"] == [1, *(3 + byte for byte in b"Hello, world!")]
    assert vectors["chat"]["text"] == (
        "<|user|>What is the capital of France?</s><|assistant|>Paris.</s><|user|>  And of Peru? </s><|assistant|>"
    )
    with load(made[0], "reference") as llm:
        logprobs = log_softmax(llm.forward(prompt))[-16:]
    top = np.array(vectors["top"])
    np.testing.assert_array_equal(top[:, 0], logprobs.argmax(axis=1))
    np.testing.assert_allclose(np.take_along_axis(logprobs, top, axis=1), vectors["logprobs"], atol=1e-4)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda g: g["texts"][3]["ids"].append(5), r"becomes other token ids than when it was converted"),
        (lambda g: g["chat"].update(text="x"), r"its chat template gives another text"),
        (lambda g: g["prompt"].reverse(), r"computes other logits than when it was converted: KL divergence"),
        (lambda g: g["logprobs"].reverse(), r"computes other logits"),
    ],
)
def test_what_differs_is_told(changed, edit, problem, capsys):
    path = changed(lambda receipt: edit(receipt["golden"]))
    assert main(["verify", str(path)]) == 1
    err = capsys.readouterr().err
    assert problem in err and str(path) in err and err.count("\n") == 1
    assert main(["verify", str(path), "--hashes-only"]) == 0


def test_a_wrong_kernel_is_found(made, monkeypatch):
    """A rotation by slightly other angles: the file is whole, the device is wrong."""
    from edgellama.backends import reference

    right = reference.rope.cos_sin
    monkeypatch.setattr(reference.rope, "cos_sin", lambda config, at, n: right(config, at + 1 + at // 9, n))
    with load(made[0], "reference", 64) as llm, pytest.raises(EdgellamaError, match="other logits"):
        golden.check(llm)


@pytest.mark.parametrize(
    "edit",
    [
        lambda g: g.update(prompt=[]),
        lambda g: g.update(prompt=[277]),
        lambda g: g.update(prompt=[1.0]),
        lambda g: g.update(prompt=[1] * 5000),
        lambda g: g.update(prompt="abc"),
        lambda g: g.update(top=[]),
        lambda g: g.update(top=[[1], [2]]),
        lambda g: g["top"][0].pop(),
        lambda g: g["top"][0].__setitem__(0, -1),
        lambda g: g["top"][0].__setitem__(0, g["top"][0][1]),
        lambda g: g["logprobs"][0].__setitem__(0, 0.5),
        lambda g: g["logprobs"][0].__setitem__(0, "x"),
        lambda g: g.update(texts={}),
        lambda g: g["texts"].append(7),
        lambda g: g["texts"][0].pop("ids"),
        lambda g: g["chat"].pop("text"),
        lambda g: g["chat"].update(messages=[7]),
        lambda g: g["chat"].update(messages=[]),
    ],
)
def test_vectors_that_are_none_are_refused(changed, edit, capsys):
    path = changed(lambda receipt: edit(receipt["golden"]))
    with pytest.raises(FormatError, match=r"receipt\.golden"), load(path, n_ctx=128) as llm:
        golden.check(llm)
    assert main(["verify", str(path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_edited_template_is_not_compared(made, tmp_path, capsys):
    path = tmp_path / "m.edgellama"
    path.write_bytes(made[0].read_bytes())
    append_metadata(path, {"chat_template.jinja": b"{{ messages[0].content }}"})
    assert main(["verify", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["golden"]["chats"] == 0


def test_a_template_that_tells_the_date_is_rendered_for_a_fixed_one(source, tmp_path):
    texts = []
    for name, template in (
        ("dated", "{{ date_string or strftime_now('%d') }}"),
        ("clock", "{{ strftime_now('%Y') }}"),
        ("refuses", "{{ raise_exception('no') }}"),
    ):
        make_checkpoint(tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name / file).write_bytes((source / file).read_bytes())
        (tmp_path / name / "chat_template.jinja").write_text(template)
        receipt = receipt_of(convert(tmp_path / name, tmp_path / f"{name}.edgellama", method="search").out)
        texts.append(receipt["golden"].get("chat", {}).get("text"))
    assert texts == ["01 Jan 2026", None, None]


def test_coarse_kl_is_at_most_the_whole_one():
    rng = np.random.default_rng(0)
    p, q = (log_softmax(rng.standard_normal((20, 200)) * scale) for scale in (3.0, 3.0))
    whole = (np.exp(p) * (p - q)).sum(axis=1)
    top = np.argsort(-p, axis=1)[:, :16]
    coarse = golden.coarse_kl(np.take_along_axis(p, top, 1), np.take_along_axis(q, top, 1))
    assert (coarse <= whole).all() and (coarse > 0.2 * whole).all()
    assert golden.coarse_kl(p[:, :16], p[:, :16]) == pytest.approx(0)


def test_info_prints_the_receipt(made, changed, capsys):
    assert main(["info", str(made[0])]) == 0
    out = capsys.readouterr().out
    quality = made[1].quality
    assert f"KL {quality['kl_mean']:.4g} to the source" in out
    assert f"perplexity {quality['perplexity']:.4g} (source {quality['source_perplexity']:.4g})" in out
    assert f"{quality['tokens']} tokens, windows of 128" in out and "calibration" not in out
    path = changed(lambda receipt: receipt.update(calibration="builtin, 128 sequences"))
    assert main(["info", str(path)]) == 0
    assert "builtin, 128 sequences" in capsys.readouterr().out
    for odd in ({}, {"kl_mean": "x" * 500, "top1": None, "tokens": ["\x1b[2J"]}, 7):
        path = changed(lambda receipt, odd=odd: receipt.update(quality=odd))
        assert main(["info", str(path)]) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) < 200


@pytest.mark.models
def test_on_a_real_model(minimind_dir, tmp_path):
    report = convert(minimind_dir, tmp_path / "m.edgellama", method="search")
    assert 0.1 < report.quality["kl_mean"] < 1 and report.quality["tokens"] == 8 * 127
    vectors = receipt_of(report.out)["golden"]
    assert "What is the capital of France?" in vectors["chat"]["text"]
    for device in ("cpu", "reference"):
        with load(report.out, device, 64, n_slots=1) as llm:
            checked = golden.check(llm, exact=device == "reference")
        assert (checked.texts, checked.chats) == (21, 1)
