"""Calibration text: where it comes from, what it is cut into, and what is wrong with it in one line."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from checkpoints import make_checkpoint, random_weights, write_safetensors
from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.tokenizer import load_tokenizer
from edgellama_convert import calibration, convert, self_text
from edgellama_convert import calibration as module
from edgellama_convert.calibration import (
    BUILTIN,
    DEFAULT_TOKENS,
    SELF,
    SEQUENCE_TOKENS,
    SMALL_MODEL_TOKENS,
    CalibrationText,
)
from edgellama_convert.receipt import heldout_text


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    """The config and the tokenizer (id: 3 + byte, BOS 1) of a model of 128 positions."""
    config = LlamaConfig.from_dict(json.loads((tiny_checkpoint / "config.json").read_text()))
    files = {"tokenizer.json": (tiny_checkpoint / "tokenizer.json").read_bytes()}
    return SimpleNamespace(config=config, tokenizer=load_tokenizer(files, config))


def no_sample(sequences, length):
    raise AssertionError("not the model's own text")


def ids_of(model, sources, tokens=None, sample=no_sample, **changes):
    config = dataclasses.replace(model.config, **changes)
    return CalibrationText(sources, tokens).ids(config, model.tokenizer, sample)


def numbered(n):
    """Text of 4 n bytes in which every 4 bytes are different: a token's place can be told."""
    return "".join(f"{i:03x}." for i in range(n))


def places(ids, text):
    """Where each sequence of the byte tokenizer lies in the text, its BOS left out."""
    found = []
    for row in ids:
        assert row[0] == 1
        piece = bytes(int(token) - 3 for token in row[1:]).decode()
        assert text.count(piece) == 1
        found.append(text.index(piece))
    return np.array(found)


@pytest.mark.parametrize("tokens, n", [(1, 1), (300, 2), (128 * 9, 9), (10**6, 63)])
def test_sequences_lie_apart_and_spread_over_the_text(model, tmp_path, tokens, n):
    text = numbered(2000)
    (tmp_path / "t.txt").write_text(text)
    ids = ids_of(model, [tmp_path / "t.txt"], tokens).ids
    assert (ids.shape, ids.dtype) == ((min(n, 8000 // 127), 128), np.int32)
    found = places(ids, text)
    gaps = np.diff(found)
    assert found[0] == 0 and (n == 1 or found[-1] == len(text) - 127)
    assert (gaps >= 127).all() and (n == 1 or gaps.max() - gaps.min() <= 1)


def test_length_and_number_by_default(model, monkeypatch):
    monkeypatch.setattr(calibration, "SMALL_MODEL_TOKENS", SMALL_MODEL_TOKENS)  # whatever other tests get
    long = ids_of(model, [BUILTIN], max_position_embeddings=4096).ids
    assert long.shape == (SMALL_MODEL_TOKENS // SEQUENCE_TOKENS, SEQUENCE_TOKENS)
    assert ids_of(model, [BUILTIN]).ids.shape == (SMALL_MODEL_TOKENS // 128, 128)
    wide = ids_of(model, [BUILTIN], intermediate_size=200_000).ids  # 230 million weights
    assert wide.shape == (DEFAULT_TOKENS // 128, 128)


def test_without_a_bos_sequences_are_all_text(model, tmp_path):
    (tmp_path / "t.txt").write_text("abc" * 1000)
    tokenizer = SimpleNamespace(bos_id=None, encode=model.tokenizer.encode)
    ids = CalibrationText([tmp_path / "t.txt"], 256).ids(model.config, tokenizer, no_sample).ids
    assert ids.shape == (2, 128) and set(ids.flat) == {3 + ord(c) for c in "abc"}


def test_tokens_that_the_model_does_not_have_are_left_out(model, tmp_path):
    (tmp_path / "t.txt").write_text("a~b" * 1000)  # ~ is 3 + 126
    ids = ids_of(model, [tmp_path / "t.txt"], vocab_size=120, bos_token_id=None).ids
    assert set(ids.flat) == {1, 3 + ord("a"), 3 + ord("b")}


def test_several_sources_share_the_tokens(model, tmp_path):
    (tmp_path / "a.txt").write_text("a" * 2000)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b.txt").write_text("b" * 2000)
    sources = [str(tmp_path / "a.txt"), tmp_path / "b", SELF]
    result = ids_of(model, sources, 12 * 128, lambda sequences, length: np.full((sequences, length), 7))
    assert result.sources == ("a.txt", "b", "self")
    assert result.ids[:, 1].tolist() == 4 * [3 + ord("a")] + 4 * [3 + ord("b")] + 4 * [7]
    assert result.ids.dtype == np.int32 and result.ids.flags.c_contiguous


def test_a_short_text_shortens_sequences_but_not_the_number_of_tokens(model, tmp_path):
    (tmp_path / "short.txt").write_text("s" * 70)
    result = ids_of(model, [BUILTIN, tmp_path / "short.txt", SELF], 3000, lambda n, length: np.zeros((n, length)))
    share = round(1000 / 71)
    assert result.ids.shape == (share + 1 + share, 71)
    assert (result.ids[share, 1:] == 3 + ord("s")).all()


def test_a_folder_is_its_text_files_in_the_order_of_their_names(model, tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in (("b.md", "B"), ("a.txt", "A"), ("sub/c", "C"), (".hidden", "H"), (".git", "G")):
        (tmp_path / name).write_text(text * 100)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    text = CalibrationText([tmp_path], 10**6)
    (label, read), *others = text._texts
    assert (label, others) == (tmp_path.name, []) and read == f"{'A' * 100}\n\n{'B' * 100}\n\n{'C' * 100}"


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "t.txt").write_text("abc", encoding="utf-8-sig")
    assert CalibrationText([tmp_path / "t.txt"], None)._texts == [("t.txt", "abc")]
    assert CalibrationText([tmp_path], None)._texts == [(tmp_path.name, "abc")]


def test_names_are_labels_without_their_folders(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("abc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    texts = CalibrationText([".", "./t.txt", "~/t.txt", BUILTIN, SELF], None)._texts
    assert [label for label, _ in texts] == [tmp_path.name, "t.txt", "t.txt", "builtin", "self"]


def test_the_summary_tells_texts_apart_and_says_where_from(model, tmp_path):
    summaries = []
    for text in ("abcd", "abce"):
        (tmp_path / "t.txt").write_text(text * 100)
        summaries.append(ids_of(model, [tmp_path / "t.txt"], 256).summary())
    first, second = summaries
    assert first == {"sources": ["t.txt"], "sequences": 2, "sequence_tokens": 128, "xxh3_128": first["xxh3_128"]}
    assert first["xxh3_128"] != second["xxh3_128"] and str(tmp_path) not in str(first)


def test_state_changes_with_the_text_the_order_and_the_tokens(tmp_path):
    (tmp_path / "a").write_text("abcd")
    (tmp_path / "b").write_text("efgh")

    def state(*names, tokens=None):
        return CalibrationText([name if name == SELF else tmp_path / name for name in names], tokens).state()

    states = [state("a"), state("b"), state("a", "b"), state("b", "a"), state("a", tokens=5), state("a", SELF)]
    (tmp_path / "a").write_text("abcx")
    states.append(state("a"))
    assert all(a != b for i, a in enumerate(states) for b in states[:i])
    assert state("a") == states[-1]


def test_the_builtin_text_is_not_what_receipts_are_measured_on():
    (_, text), *_ = CalibrationText([BUILTIN], None)._texts
    lines = {line.strip() for line in text.splitlines() if len(line.strip()) > 30}
    assert len(text.encode()) > 3 * 32_768
    assert not [line for line in heldout_text().splitlines() if line.strip() in lines]


# -- what is wrong with it -----------------------------------------------------------------------------------------


def test_texts_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "latin.txt").write_bytes("abc é".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "x").write_bytes(b"\xff\xfe\xfd")
    monkeypatch.setattr(module, "_MAX_TEXT_BYTES", 1000)
    (tmp_path / "large.txt").write_text("a" * 1001)
    (tmp_path / "large").mkdir()
    for name in "abc":
        (tmp_path / "large" / name).write_text("a" * 400)
    for name, problem in (
        ("latin.txt", "not UTF-8, byte 4 is wrong"),
        ("missing.txt", "no such file; give builtin, self, a text file or a folder"),
        ("empty", "no text files in this folder"),
        ("binary", "no text files in this folder"),
        ("large.txt", "1001 bytes, more than the 1000"),
        ("large", "more than"),
    ):
        with pytest.raises(ConvertError) as error:
            CalibrationText([tmp_path / name], None)
        assert problem in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "   ", "a" * 63])
def test_too_short_a_text(model, tmp_path, text):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(ConvertError, match=rf"t\.txt: {len(text)} tokens are too few; give at least 128"):
        ids_of(model, [BUILTIN, tmp_path / "t.txt"])


def test_models_of_few_positions(model, tmp_path):
    (tmp_path / "t.txt").write_text("abcd")
    assert ids_of(model, [tmp_path / "t.txt"], 8, max_position_embeddings=4).ids.shape == (1, 4)
    assert ids_of(model, [tmp_path / "t.txt"], 8, max_position_embeddings=1).ids.shape == (4, 1)


def test_no_sources_or_no_tokens():
    with pytest.raises(ConvertError, match="no calibration text is named"):
        CalibrationText([], None)
    for tokens in (0, -5):
        with pytest.raises(ConvertError, match=f"calibration_tokens {tokens} must be at least 1"):
            CalibrationText([BUILTIN], tokens)


def test_a_model_without_a_tokenizer_can_only_read_itself(tmp_path):
    make_checkpoint(tmp_path / "model", max_position_embeddings=16)
    with pytest.raises(ConvertError, match="no tokenizer to read calibration text with: use --calibration self"):
        convert(tmp_path / "model", tmp_path / "m.edgellama", method="gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    report = convert(
        tmp_path / "model", tmp_path / "m.edgellama", method="gptq", calibration=SELF, calibration_tokens=64
    )
    assert report.out.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["m.edgellama", "model"]


# -- the model's own text ------------------------------------------------------------------------------------------


def test_own_text_is_the_same_for_any_threads_and_in_the_vocabulary(tiny_model):
    ids = self_text.sample(tiny_model, 5, 24, 1, n_threads=1)
    assert (ids == self_text.sample(tiny_model, 5, 24, 1, n_threads=2)).all()
    assert (ids.shape, ids.dtype) == ((5, 24), np.int32) and (ids[:, 0] == 1).all()
    assert ids.min() >= 0 and ids.max() < 277 and len(np.unique(ids[:, 1:])) > 30
    assert len({row.tobytes() for row in ids}) == 5


def test_own_text_in_parts_and_without_a_bos(tiny_model, monkeypatch):
    monkeypatch.setattr(self_text, "_CACHE_BYTES", 1)  # one sequence at a time
    ids = self_text.sample(tiny_model, 3, 12, None, n_threads=1)
    assert ids.max() < 277 and len(np.unique(ids[:, 0])) == 3
    assert (ids == self_text.sample(tiny_model, 3, 12, None, n_threads=2)).all()


def test_own_text_follows_the_models_distribution():
    logits = np.log(np.array([[0.1, 0.6, 0.3]])).astype(np.float32)
    points = np.linspace(0, 1, 1001)[:-1]
    drawn = [int(self_text._draw(logits, np.array([point]))[0]) for point in points]
    assert drawn == sorted(drawn)
    np.testing.assert_allclose(np.bincount(drawn) / 1000, [0.1, 0.6, 0.3], atol=0.002)
    assert self_text._draw(logits, np.array([np.nextafter(1, 0)])).tolist() == [2]


def test_a_model_that_overflows_cannot_write(tmp_path):
    config = make_checkpoint(tmp_path / "model", max_position_embeddings=16)
    weights = random_weights(config, 0)
    weights["model.norm.weight"] *= np.float32(1e38)
    write_safetensors(tmp_path / "model" / "model.safetensors", weights, "float32")
    with pytest.raises(ConvertError, match="cannot write text to calibrate with"):
        convert(tmp_path / "model", tmp_path / "m.edgellama", method="gptq", calibration=SELF, calibration_tokens=64)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# -- chats -----------------------------------------------------------------------------------------------------------


def chats(model, template, wanted=3):
    tokenizer = SimpleNamespace(chat_template=template, special_tokens={}, encode=model.tokenizer.encode)
    rows = calibration._chats(tokenizer, model.config, 128, wanted)
    return [bytes(int(token) - 3 for token in row).decode("utf-8", "replace") for row in rows]


def test_a_sequence_begins_with_a_chat_as_the_models_template_writes_it(model):
    found = chats(model, "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    assert len(found) == 3 and all(text.startswith("[user]") for text in found)
    assert "[assistant]" in found[0] and len(set(found)) == 3


def test_chats_are_the_same_on_any_day(model):
    """A template that asks for the date is given one; without one that takes it, there are no chats."""
    dated = chats(model, "{{ date_string or strftime_now('%d %b %Y') }}: {{ messages[0].content }}")
    assert len(dated) == 3 and all(text.startswith("01 Jan 2026: ") for text in dated)
    assert chats(model, "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}") == []


@pytest.mark.parametrize("template", [None, "{% if %}", "{{ raise_exception('no') }}"])
def test_there_are_no_chats_without_a_template_that_works(model, template):
    assert chats(model, template) == []
