"""Hostile and broken tokenizer files: a TokenizerError of one line naming the file; no panic, abort or noise."""

import base64
import copy
import json
import random
import subprocess
import sys

import pytest

from edgellama.errors import TokenizerError
from edgellama.tokenizer import load_tokenizer, settings
from edgellama.tokenizer.guard import quiet_panics, refusing
from tokenizer_cases import DATA, GPT2

SPM = (DATA / "spm-model" / "tokenizer.model").read_bytes()
BYTE_LEVEL = json.loads((DATA / "bytelevel" / "tokenizer.json").read_bytes())
SPM_JSON = json.loads((DATA / "spm-json" / "tokenizer.json").read_bytes())
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}
PREFIX = b'"continuing_subword_prefix"'
PANIC = {"type": "Precompiled", "precompiled_charsmap": ""}


def changed(parsed: dict, **changes: object) -> dict[str, bytes]:
    return {"tokenizer.json": json.dumps({**parsed, **changes}).encode()}


def model(parsed: dict, **changes: object) -> dict[str, bytes]:
    return changed(parsed, model={**parsed["model"], **changes})


def charsmap(data: bytes) -> dict[str, bytes]:
    normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}
    return changed(SPM_JSON, normalizer=normalizer)


def with_config(text: bytes) -> dict[str, bytes]:
    return {"tokenizer.model": SPM, "tokenizer_config.json": text}


def field(number: int, data: bytes) -> bytes:
    """A short length-delimited protobuf field."""
    return bytes([number << 3 | 2, len(data)]) + data


def replacing(content: str, times: int) -> dict:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": content}
    return {"type": "Sequence", "normalizers": [step] * times}


BAD = {
    "none": ({}, "no tokenizer"),
    "other-files-only": ({"tokenizer_config.json": b"{}"}, "no tokenizer"),
    "json-empty": ({"tokenizer.json": b""}, "tokenizer.json"),
    "json-cut": ({"tokenizer.json": json.dumps(BYTE_LEVEL).encode()[:5000]}, "tokenizer.json"),
    "json-not-utf8": ({"tokenizer.json": b"\xff\xfe{}"}, "tokenizer.json"),
    "json-list": ({"tokenizer.json": b"[]"}, "tokenizer.json"),
    "json-deep": ({"tokenizer.json": b"[" * 200_000}, "tokenizer.json"),
    "json-no-model": ({"tokenizer.json": b'{"version": "1.0"}'}, "tokenizer.json"),
    "panic": (changed(BYTE_LEVEL, normalizer=PANIC), "tokenizer.json"),
    "charsmap-escaped": (
        {"tokenizer.json": charsmap(b"\xff" * 20)["tokenizer.json"].replace(b'"Precompiled"', b'"\\u0050recompiled"')},
        "a trie of 4294967295 bytes",
    ),
    "charsmap-4-gb": (charsmap(b"\xff" * 20), "a trie of 4294967295 bytes in a map of 20"),
    "charsmap-no-base64": (changed(SPM_JSON, normalizer={**PANIC, "precompiled_charsmap": "€"}), "Precompiled"),
    "abort-prefix": (model(SPM_JSON, continuing_subword_prefix="x"), "continuing_subword_prefix"),
    "abort-prefix-escaped": (
        {
            "tokenizer.json": model(SPM_JSON, continuing_subword_prefix="x")["tokenizer.json"].replace(
                PREFIX, b'"\\u0063ontinuing_subword_prefix"'
            )
        },
        "continuing_subword_prefix",
    ),
    "abort-prefix-twice": (
        {"tokenizer.json": changed(SPM_JSON)["tokenizer.json"].replace(PREFIX, PREFIX + b': "x", ' + PREFIX)},
        "continuing_subword_prefix",
    ),
    "merge-unknown": (model(BYTE_LEVEL, merges=["no such"]), "tokenizer.json"),
    "merge-one-part": (model(BYTE_LEVEL, merges=["a"]), "tokenizer.json"),
    "vocab-list": (model(BYTE_LEVEL, vocab=["a"]), "tokenizer.json"),
    "vocab-id-negative": (model(BYTE_LEVEL, vocab={"a": -1}, merges=[]), "tokenizer.json"),
    "vocab-id-huge": (model(BYTE_LEVEL, vocab={"a": 2**32}, merges=[]), "tokenizer.json"),
    "model-unknown": (model(BYTE_LEVEL, type="Transformer"), "tokenizer.json"),
    "unigram-empty": (changed(BYTE_LEVEL, model={"type": "Unigram", "unk_id": 5, "vocab": []}), "tokenizer.json"),
    "regex-broken": (
        changed(BYTE_LEVEL, pre_tokenizer={**SPLIT, "pattern": {"Regex": "("}}),
        "tokenizer.json",
    ),
    "regex-endless": (
        changed(BYTE_LEVEL, pre_tokenizer={**SPLIT, "pattern": {"Regex": "((a+)+)+b"}}),
        "retry-limit",
    ),
    "growth-normalizer": (changed(SPM_JSON, normalizer=replacing("aaaa", 30)), "times longer"),
    "growth-decoder": (
        changed(SPM_JSON, decoder={"type": "Sequence", "decoders": replacing("a" * 9, 9)["normalizers"]}),
        "times longer",
    ),
    "config-not-json": (with_config(b"{'a': 1}"), "tokenizer_config.json: not valid JSON"),
    "config-deep": (with_config(b'{"a":' * 100_000), "tokenizer_config.json: JSON nested too deeply"),
    "config-huge-integer": (with_config(b'{"a": ' + b"9" * 5000 + b"}"), "tokenizer_config.json"),
    "config-list": (with_config(b"[]"), "tokenizer_config.json: must be a JSON object"),
    "config-flag": (with_config(b'{"legacy": "yes"}'), "legacy must be bool"),
    "config-token": (with_config(b'{"bos_token": 5}'), "bos_token"),
    "config-token-null-content": (with_config(b'{"bos_token": {"content": null}}'), "bos_token"),
    "config-token-flag": (with_config(b'{"bos_token": {"content": "<s>", "lstrip": 1}}'), "lstrip"),
    "config-added-list": (with_config(b'{"added_tokens_decoder": []}'), "added_tokens_decoder"),
    "config-added-id": (with_config(b'{"added_tokens_decoder": {"-5": {"content": "a"}}}'), "not a token id"),
    "config-added-string": (with_config(b'{"added_tokens_decoder": {"5": "a"}}'), "must be an object"),
    "config-extra": (with_config(b'{"additional_special_tokens": "a"}'), "additional_special_tokens"),
    "config-template": (with_config(b'{"chat_template": [1]}'), "chat_template"),
    "added-id": ({"tokenizer.model": SPM, "added_tokens.json": b'{"a": "x"}'}, "added_tokens.json"),
    "map-list": ({"tokenizer.model": SPM, "special_tokens_map.json": b"[]"}, "special_tokens_map.json"),
    "template-not-utf8": ({"tokenizer.model": SPM, "chat_template.jinja": b"\xff"}, "chat_template.jinja"),
    "spm-empty": ({"tokenizer.model": b""}, "tokenizer.model: the file is empty"),
    "spm-garbage": ({"tokenizer.model": random.Random(0).randbytes(5000)}, "not a SentencePiece model"),
    "spm-cut": ({"tokenizer.model": SPM[:3000]}, "tokenizer.model: not a SentencePiece model"),
    "spm-text": ({"tokenizer.model": b"hello world\n" * 50}, "tokenizer.model"),
    "spm-tiktoken": ({"tokenizer.model": b"IQ== 0\nIg== 1\nIw== 2\n"}, "this is a tiktoken file"),
    "spm-no-pieces": ({"tokenizer.model": field(2, b"\x18\x02")}, "has no pieces"),
    "spm-word": ({"tokenizer.model": field(1, field(1, b"a")) + field(2, b"\x18\x03")}, "model type WORD"),
    "spm-unk": ({"tokenizer.model": field(1, field(1, b"a")) + field(2, b"\x18\x02\xc0\x02\x07")}, "unk_id 7"),
    "spm-twice": ({"tokenizer.model": field(1, field(1, b"a")) * 2 + field(2, b"\x18\x02")}, "occurs twice"),
    "spm-empty-piece": ({"tokenizer.model": field(1, b"") + field(2, b"\x18\x02")}, "is empty"),
    "spm-not-utf8": ({"tokenizer.model": field(1, field(1, b"\xff")) + field(2, b"\x18\x02")}, "not a SentencePiece"),
    "spm-nan": ({"tokenizer.model": field(1, field(1, b"a") + b"\x15\x00\x00\xc0\x7f")}, "NaN"),
    "spm-unigram-charsmap": (
        {"tokenizer.model": field(1, field(1, b"a")) + field(2, b"\x18\x01") + field(3, field(2, b"\xff" * 20))},
        "a trie of 4294967295 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_in_one_line_without_noise(name, capfd):
    files, message = BAD[name]
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(files)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_too_large_files_are_refused_unread(name, monkeypatch):
    monkeypatch.setattr(settings, "MAX_FILE_BYTES", 20_000)
    monkeypatch.setattr(settings, "MAX_SMALL_FILE_BYTES", 20_000)
    with pytest.raises(TokenizerError, match=rf"{name}: 20001 bytes; at most 20000 are accepted"):
        load_tokenizer({"tokenizer.model": SPM, name: b" " * 20_001})


def test_a_token_named_like_the_refused_key_is_harmless():
    parsed = copy.deepcopy(SPM_JSON)
    parsed["model"]["vocab"]["continuing_subword_prefix"] = 800
    assert load_tokenizer(changed(parsed)).vocab_size == 801


def test_mutated_sentencepiece_models_load_or_are_refused(capfd):
    rng = random.Random(5)
    for _ in range(300):
        data = bytearray(SPM)
        for _ in range(rng.randrange(1, 10)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            tokenizer = load_tokenizer({"tokenizer.model": bytes(data)})
            tokenizer.decode(tokenizer.encode("Hello  日本 \x00 </s>"))
        except TokenizerError:
            pass
    assert capfd.readouterr() == ("", "")


MUTANTS = [None, "", [], {}, 0, -1, 2**32, 1e300, True, "x", "▁", [[]], PANIC, {"type": "ByteLevel"}, {"type": "Fuse"}]


def test_mutated_tokenizer_json_loads_or_is_refused(capfd):
    """In a process of its own: an abort would otherwise take the test run with it."""
    code = "import test_tokenizer_hostile as t; t.mutate_tokenizer_json(int(t.sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "400"], cwd=DATA.parent.parent, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def mutate_tokenizer_json(times: int) -> None:
    rng = random.Random(6)
    for _ in range(times):
        parsed = copy.deepcopy(rng.choice([SPM_JSON, BYTE_LEVEL]))
        place, key = parsed, rng.choice([key for key in parsed if key != "version"])
        while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            key = rng.choice(list(place)[:30]) if isinstance(place, dict) else rng.randrange(min(len(place), 30))
        place[key] = rng.choice(MUTANTS)
        files = changed(parsed) | {
            "tokenizer_config.json": json.dumps(
                {**GPT2, "tokenizer_class": rng.choice(["LlamaTokenizer", "GPT2Tokenizer", "X"])}
            ).encode()
        }
        try:
            tokenizer = load_tokenizer(files)
            tokenizer.decode(tokenizer.encode("Hello  日本 \x00 </s>"))
        except TokenizerError:
            pass


class PanicException(BaseException):
    """Named like pyo3's, whose class cannot be imported."""


def test_a_files_escape_sequences_do_not_reach_the_terminal():
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(model(BYTE_LEVEL, merges=["\x1b[2J \u202e"]))
    assert r"\x1b[2J" in str(caught.value) and str(caught.value).isprintable()


def test_panics_become_errors_and_interrupts_stay():
    with pytest.raises(TokenizerError, match="the file: boom on two lines"), refusing("the file"):
        raise PanicException("boom\non two lines")
    for interrupt in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(interrupt), refusing("the file"):
            raise interrupt


def test_stderr_is_passed_on_unless_loading_fails(capfd):
    import os

    with quiet_panics():
        os.write(2, b"a warning\n")
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "a warning\n"
    with pytest.raises(ValueError), quiet_panics():
        os.write(2, b"a panic\n")
        raise ValueError
    assert capfd.readouterr().err == ""
