"""LlamaForSequenceClassification: convert, load, pool, lose, tell, export; and that it is no model that writes."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file

import edgellama
from checkpoints import make_checkpoint, random_weights, write_safetensors
from conftest import byte_tokenizer
from edgellama.cli import main
from edgellama.config import LlamaConfig
from edgellama.errors import ConfigError, ConvertError, EdgellamaError, FormatError
from edgellama.format import open_model
from edgellama_convert import convert, export_hf
from edgellama_convert.comparison import compare
from format_builder import Parts

LABELS = {"0": "sad", "1": "glad", "2": "neither"}
KEYS = {"architectures": ["LlamaForSequenceClassification"], "id2label": LABELS, "pad_token_id": 0}
IDS = [[5, 9, 2, 60], [33, 120, 7, 250]]


def make(folder, **keys):
    make_checkpoint(folder / "source", **{**KEYS, **keys})
    (folder / "source" / "tokenizer.json").write_text(byte_tokenizer(), encoding="utf-8")
    return convert(folder / "source", folder / "m.edgellama", method="search").out


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module", params=["reference", "cpu"])
def llm(request, path):
    with edgellama.load(path, device=request.param, n_ctx=32, n_slots=2, n_threads=2) as model:
        yield model


def score_weights(path):
    with open_model(path) as file:
        from edgellama.quant import load_matrix

        return load_matrix(file, "score")


def test_scores_are_the_head_times_the_last_state(llm, path):
    out = llm.forward(IDS, output_hidden_states=True)
    assert out.logits.shape == (2, 3) and out.keys() == ["logits", "hidden_states"]
    want = out.hidden_states[-1][:, -1] @ score_weights(path).T
    np.testing.assert_allclose(out.logits, want, atol=0.05 if llm._backend.batch_invariant else 1e-5)
    plain = llm.forward(IDS).logits
    np.testing.assert_allclose(plain, out.logits, atol=1e-5)
    texts = llm.classify(IDS).logits
    np.testing.assert_allclose(texts, plain, atol=1e-5)


def test_cpu_agrees_with_reference(path):
    scores = []
    for device in ("reference", "cpu"):
        with edgellama.load(path, device=device, n_ctx=32, n_threads=2) as model:
            scores.append(model.classify(["one text", "another", "and a third one"]).logits)
    assert np.abs(scores[0] - scores[1]).max() < 0.05 * np.ptp(scores[0])


def test_pooling_is_at_the_last_id_that_is_no_padding(llm):
    want = llm.classify([[5, 9, 2]]).logits[0]
    right = llm.forward([[5, 9, 2, 0, 0], [33, 120, 7, 250, 4]]).logits
    np.testing.assert_allclose(right[0], want, atol=1e-5)
    masked = llm.forward([[0, 0, 5, 9, 2], [33, 120, 7, 250, 4]], attention_mask=[[0, 0, 1, 1, 1], [1] * 5]).logits
    np.testing.assert_allclose(masked[0], want, atol=0.02)
    np.testing.assert_allclose(masked[1], right[1], atol=0.02)
    with pytest.raises(ValueError, match="leaves out"):
        llm.forward([[5, 9, 2]], attention_mask=[[1, 1, 0]])


def test_without_a_pad_token(tmp_path):
    with edgellama.load(make(tmp_path, pad_token_id=None), device="reference", n_ctx=32) as llm:
        with pytest.raises(ValueError, match="no pad_token_id"):
            llm.forward(IDS)
        one = llm.forward(IDS[:1]).logits
        np.testing.assert_allclose(one[0], llm.classify(IDS).logits[0], atol=1e-5)
        assert np.abs(llm.forward([[*IDS[0], 0]]).logits - one).max() > 1e-3  # 0 is a token like any other


def test_losses(llm):
    y = llm.classify(IDS).logits.astype(np.float64)
    log_p = y - np.log(np.exp(y).sum(axis=1, keepdims=True))
    single = -(log_p[0, 2] + log_p[1, 0]) / 2
    assert math.isclose(llm.classify(IDS, labels=[2, 0]).loss, single, rel_tol=1e-6)
    assert math.isclose(llm.forward(IDS, labels=np.array([2, 0])).loss, single, rel_tol=1e-4)
    several = np.array([[1.0, 0, 1], [0, 0, 1]])
    p = 1 / (1 + np.exp(-y))
    want = -(several * np.log(p) + (1 - several) * np.log(1 - p)).mean()
    assert math.isclose(llm.classify(IDS, labels=several).loss, want, rel_tol=1e-6)
    for bad in ([1], [3, 0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="labels must"):
            llm.classify(IDS, labels=bad)


@pytest.mark.parametrize(("n_labels", "labels"), [(1, [0.5, -1.0]), (3, [[0.1, 0.2, 0.3], [1, 2, 3]])])
def test_regression(tmp_path, n_labels, labels):
    path = make(tmp_path, id2label=None, num_labels=n_labels, problem_type="regression" if n_labels > 1 else None)
    with edgellama.load(path, device="reference", n_ctx=32) as llm:
        assert llm.config.id2label == tuple(f"LABEL_{i}" for i in range(n_labels))
        out = llm.classify(IDS, labels=labels)
        want = np.square(out.logits.astype(np.float64) - np.reshape(labels, out.logits.shape)).mean()
        assert math.isclose(out.loss, want, rel_tol=1e-6)


def test_it_cannot_write_and_a_writer_cannot_classify(llm, tiny_model):
    for call in (lambda: llm.generate("a"), lambda: llm.score("a", ["b"])):
        with pytest.raises(EdgellamaError, match="labels texts"):
            call()
    assert llm.embed(["a"]).shape == (1, 192)
    with (
        edgellama.load(tiny_model, device="reference", n_ctx=16) as writer,
        pytest.raises(EdgellamaError, match="no labels"),
    ):
        writer.classify("a")


def test_info_tells_and_perplexity_refuses(path, tmp_path, capsys):
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "LlamaForSequenceClassification" in out and "3: sad, glad, neither" in out and "score for each label" in out
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "LlamaForSequenceClassification" and facts["id2label"] == LABELS
    (tmp_path / "text.txt").write_text("some words " * 300)
    assert main(["perplexity", str(path), str(tmp_path / "text.txt")]) == 1
    assert "classifier" in capsys.readouterr().err
    with pytest.raises(ConvertError, match="is a classifier"):
        compare(path, path, "some words")


def test_a_tied_classifier_has_a_plain_embedding(tmp_path):
    path = make(tmp_path, tie_word_embeddings=True)
    with open_model(path) as file:
        assert next(iter(file.tensors)) == "model.embed_tokens.weight" and list(file.tensors)[-1] == "score.weight"
        assert not file.config.tie_word_embeddings and "tie_word_embeddings" in file.config.ignored


def test_export_gives_the_checkpoint_back(path, tmp_path, capsys):
    report = export_hf(path, tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert "lm_head.weight" not in weights and report.auto_class == "AutoModelForSequenceClassification"
    np.testing.assert_array_equal(weights["score.weight"], score_weights(path))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == KEYS["architectures"] and config["id2label"] == LABELS
    assert main(["export", str(path), "--to", "hf", str(tmp_path / "other")]) == 0
    assert "AutoModelForSequenceClassification" in capsys.readouterr().err
    again = convert(tmp_path / "hf", tmp_path / "again.edgellama", method="rtn").out
    np.testing.assert_array_equal(score_weights(again), score_weights(path))


def test_checkpoints_that_are_neither_are_refused(tmp_path):
    config = make_checkpoint(tmp_path / "writer")
    weights = random_weights({**config, **KEYS}, 0)
    write_safetensors(tmp_path / "writer" / "model.safetensors", weights, "float32")
    with pytest.raises(ConvertError, match=r"lm_head.weight is missing"):
        convert(tmp_path / "writer", tmp_path / "a.edgellama", method="search")
    both = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    write_safetensors(tmp_path / "writer" / "model.safetensors", both, "float32")
    with pytest.raises(ConvertError, match=r"score\.weight is a classifier's"):
        convert(tmp_path / "writer", tmp_path / "a.edgellama", method="search")
    config = make_checkpoint(tmp_path / "classifier", **KEYS)
    write_safetensors(tmp_path / "classifier" / "model.safetensors", both, "float32")
    with pytest.raises(ConvertError, match=r"lm_head\.weight is not part of a LlamaForSequenceClassification"):
        convert(tmp_path / "classifier", tmp_path / "a.edgellama", method="search")
    del weights["score.weight"]
    write_safetensors(tmp_path / "classifier" / "model.safetensors", weights, "float32")
    with pytest.raises(ConvertError, match=r"score\.weight is missing; a classifier has it"):
        convert(tmp_path / "classifier", tmp_path / "a.edgellama", method="search")
    (tmp_path / "classifier" / "config.json").write_text(json.dumps({**config, "id2label": {"0": "a", "1": "b"}}))
    write_safetensors(tmp_path / "classifier" / "model.safetensors", random_weights(config, 0), "float32")
    with pytest.raises(ConvertError, match=r"score.weight: config.json makes its shape \[2, 192\]"):
        convert(tmp_path / "classifier", tmp_path / "a.edgellama", method="search")


def test_labels_that_the_file_has_no_rows_for_are_refused(path, tmp_path):
    """More labels would be scores from beyond the tensor."""
    parts = Parts.take_apart(path.read_bytes())
    parts.header["config"]["id2label"] = {str(i): "x" for i in range(40)}
    (tmp_path / "bad.edgellama").write_bytes(parts.build())
    with pytest.raises(FormatError, match=r"tensors\[\d+\].shape"):
        open_model(tmp_path / "bad.edgellama")


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"id2label": {"0": "a", "1": None}}, "id2label"),
        ({"id2label": {"a": "a"}}, "id2label"),
        ({"id2label": "ab"}, "id2label"),
        ({"id2label": None, "num_labels": -1}, "num_labels"),
        ({"num_labels": 2}, "num_labels: 2 contradicts"),
        ({"problem_type": "x"}, "problem_type"),
        ({"id2label": {"0": "a"}, "problem_type": "single_label_classification"}, "more than one"),
    ],
)
def test_configs_that_are_refused(keys, words):
    from checkpoints import DEFAULTS

    with pytest.raises(ConfigError, match=words):
        LlamaConfig.from_dict({**DEFAULTS, **KEYS, **keys})


def test_a_writers_label_keys_change_nothing():
    from checkpoints import DEFAULTS

    assert LlamaConfig.from_dict({**DEFAULTS, "id2label": 5, "num_labels": "x", "problem_type": []}) == (
        LlamaConfig.from_dict(DEFAULTS)
    )
