"""Comparing a model with its source: the figures against brute force, whatever the groups; the verb and its plot."""

import json

import numpy as np
import pytest

from checkpoints import make_checkpoint
from closeness import all_logits, greedy_agreement, kl_divergence
from edgellama.backends.reference import ReferenceBackend
from edgellama.cli import main
from edgellama.errors import ConvertError, EdgellamaError
from edgellama.format import open_model
from edgellama.logprob import log_softmax, token_logprobs
from edgellama.perplexity import chunks, encode_text
from edgellama.tokenizer import load_tokenizer
from edgellama_convert import comparison as module
from edgellama_convert import convert
from edgellama_convert.comparison import Divergence, compare
from edgellama_convert.plot import weights_by_kind

TEXT = "The quick brown fox jumps over the lazy dog. " * 12


def test_divergence_is_that_of_brute_force_for_any_slabs():
    rng = np.random.default_rng(0)
    source = rng.standard_normal((500, 300), np.float32) * 4  # [ids, tokens]
    model = source + rng.standard_normal((500, 300), np.float32) * np.float32(0.3)
    targets = rng.integers(0, 500, 300)
    p, q = log_softmax(source.T), log_softmax(model.T)
    for slab in (500, 64, 1):
        divergence = Divergence(targets)
        for first in range(0, 500, slab):
            divergence.add(first, source[first : first + slab], model[first : first + slab])
        kl, same, source_nll, nll = divergence.figures()
        np.testing.assert_allclose(kl, (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-9)
        np.testing.assert_array_equal(same, source.argmax(axis=0) == model.argmax(axis=0))
        np.testing.assert_allclose(source_nll, -token_logprobs(source.T, targets), rtol=1e-12)
        np.testing.assert_allclose(nll, -token_logprobs(model.T, targets), rtol=1e-12)


@pytest.fixture(scope="module")
def other(tiny_checkpoint, tmp_path_factory):
    """`tiny_checkpoint` with 16-bit output and `rtn`: near `tiny_model`, not equal."""
    return convert(
        tiny_checkpoint, tmp_path_factory.mktemp("other") / "o.edgellama", method="rtn", lm_head_bits=16, receipt=False
    ).out


def test_figures_are_those_of_the_reference_backend(tiny_model, other):
    result = compare(tiny_model, other, TEXT, ctx=64)
    with open_model(tiny_model) as a, open_model(other) as b:
        ids, bos = encode_text(load_tokenizer(a.files, a.config), TEXT, a.config.vocab_size)
        windows = chunks(ids, bos, 64)
        ours, theirs = (
            np.concatenate([all_logits(ReferenceBackend(file, 64), window.tokens)[32:63] for window in windows])
            for file in (a, b)
        )
    targets = np.concatenate([window.tokens[33:] for window in windows])
    assert result.tokens == len(targets) == 31 * result.windows and result.windows == 8
    assert result.kl_mean == pytest.approx(kl_divergence(theirs, ours), rel=1e-3)
    assert result.top1 == pytest.approx(greedy_agreement(theirs, ours), abs=0.01)
    assert result.perplexity == pytest.approx(np.exp(-token_logprobs(ours, targets).mean()), rel=1e-4)
    assert result.source_perplexity == pytest.approx(np.exp(-token_logprobs(theirs, targets).mean()), rel=1e-4)
    assert result.kl_p99 > result.kl_mean > 0


def test_groups_of_windows_do_not_show(tiny_model, tiny_checkpoint, monkeypatch):
    whole = compare(tiny_model, tiny_checkpoint, TEXT, ctx=64, n_threads=1)
    monkeypatch.setattr(module, "GROUP_TOKENS", 130)
    calls = []
    grouped = compare(tiny_model, tiny_checkpoint, TEXT, ctx=64, n_threads=2, progress=lambda *args: calls.append(args))
    assert {**whole.to_dict(), "layer_errors": None} == {**grouped.to_dict(), "layer_errors": None}
    np.testing.assert_allclose(grouped.layer_errors, whole.layer_errors, rtol=1e-9)
    assert calls[-1][0] == calls[-1][1] and calls == sorted(calls)


def test_the_weights_errors_are_the_converters(tiny_checkpoint, tmp_path):
    report = convert(tiny_checkpoint, tmp_path / "m.edgellama", receipt=False, method="search")
    result = compare(report.out, tiny_checkpoint, TEXT, ctx=64, max_windows=1)
    assert result.windows == 1
    want = {name.removesuffix(".weight"): error for name, error in report.errors.items() if "embed" not in name}
    assert result.tensor_errors == pytest.approx(want, rel=1e-5)
    kinds = weights_by_kind(result)
    assert set(kinds) == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert kinds["down_proj"][1] == result.tensor_errors["model.layers.1.mlp.down_proj"]


def test_a_model_is_no_distance_from_itself(tiny_model):
    result = compare(tiny_model, tiny_model, TEXT, ctx=64)
    assert (result.kl_mean, result.kl_p99, result.top1) == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12), 1)
    assert result.perplexity == result.source_perplexity
    assert set(result.tensor_errors.values()) == {0.0} and result.layer_errors == [0.0, 0.0]


def test_what_cannot_be_compared(tiny_model, tiny_checkpoint, tmp_path):
    make_checkpoint(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(ConvertError, match="not the same model: num_hidden_layers is 3 and 2"):
        compare(tiny_model, tmp_path / "deeper", TEXT)
    make_checkpoint(tmp_path / "other", eos_token_id=2)
    tokenizer = json.loads((tiny_checkpoint / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConvertError, match="read the text differently"):
        compare(tiny_model, tmp_path / "other", TEXT, ctx=64)
    with pytest.raises(EdgellamaError, match=r"has 6 tokens, fewer than one window of 64; choose a smaller --ctx"):
        compare(tiny_model, tiny_checkpoint, "short", ctx=64)
    with pytest.raises(ConvertError, match=r"no such folder|neither a folder"):
        compare(tiny_model, "nowhere", TEXT)


def test_the_verb(tiny_model, tiny_checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    argv = ["compare", str(tiny_model), str(tiny_checkpoint), str(text), "--ctx", "64"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert f"{result['kl_mean']:.4g}" in shown and f"{result['perplexity']:.4f}" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert main([*argv, "--chunks", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["windows"] == 1
    text.write_bytes(b"\xff\xfe")
    assert main(argv) == 1
    assert "is not UTF-8 text: byte 0 is 0xff" in capsys.readouterr().err


def test_the_plot(tiny_model, tiny_checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    argv = ["compare", str(tiny_model), str(tiny_checkpoint), str(text), "--ctx", "64", "--plot"]
    assert main([*argv, str(tmp_path / "error.png")]) == 0
    data = (tmp_path / "error.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000
    assert main([*argv, str(tmp_path / "no" / "where.png")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_the_work(tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["compare", str(tiny_model), "nowhere", str(tmp_path / "text.txt"), "--plot", "x.png"]) == 1
    assert "pip install 'edgellama[plot]'" in capsys.readouterr().err
