"""Streaming decode: the pieces join to `decode`'s text for any ids, and each is whole characters."""

import json
import random
import unicodedata

import pytest

from edgellama.tokenizer import load_tokenizer
from edgellama.tokenizer.stream import StreamDecoder, decoder_steps
from tokenizer_cases import CASES, random_text

TOKENIZERS = {case.name: case for case in CASES if case.name in ("spm-model", "spm-json-no-prefix", "bytelevel")}


def pieces(stream: StreamDecoder, ids: list[int]) -> list[str]:
    return [*(stream.push(index) for index in ids), stream.flush()]


def random_ids(rng: random.Random, tokenizer) -> list[int]:
    """Any ids; mostly bytes (halves of characters, invalid ones); or those of real text, cut anywhere."""
    kind = rng.randrange(3)
    if kind == 0:
        return [rng.randrange(tokenizer.vocab_size + 5) for _ in range(rng.randrange(30))]
    if kind == 1:
        return [rng.randrange(min(270, tokenizer.vocab_size)) for _ in range(rng.randrange(20))]
    ids = tokenizer.encode(random_text(rng, 60))
    return ids[rng.randrange(len(ids) + 1) :]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_stream_joins_to_decode(name):
    tokenizer, rng = load_tokenizer(TOKENIZERS[name].files()), random.Random(name)
    for _ in range(4000):
        ids = random_ids(rng, tokenizer)
        skip = rng.random() < 0.5
        assert "".join(pieces(tokenizer.stream(skip), ids)) == tokenizer.decode(ids, skip), ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_valid_text_never_shows_half_a_character(name):
    tokenizer, rng = load_tokenizer(TOKENIZERS[name].files()), random.Random(name)
    for _ in range(500):
        text = random_text(rng).replace("\ufffd", "")
        ids = tokenizer.encode(text)
        for piece in pieces(tokenizer.stream(), ids):
            assert "\ufffd" not in piece
            assert not any(unicodedata.category(character) == "Cs" for character in piece)


def test_an_emoji_of_four_byte_tokens_comes_at_once():
    tokenizer = load_tokenizer(TOKENIZERS["bytelevel"].files())
    ids = tokenizer.encode("a😀b", add_special_tokens=False)
    assert [piece for piece in pieces(tokenizer.stream(), ids) if piece] == ["a", "😀", "b"]
    assert len(ids) > 4


def test_text_is_not_held_back_longer_than_needed():
    """Plain words appear with their own token; only an unfinished character waits."""
    for case in TOKENIZERS.values():
        tokenizer = load_tokenizer(case.files())
        ids = tokenizer.encode("the quick brown fox", add_special_tokens=False)
        stream = tokenizer.stream()
        shown = "".join(stream.push(index) for index in ids)
        assert shown.endswith("fox") and stream.flush() == ""


def test_after_a_prompt_the_first_word_keeps_its_space():
    tokenizer = load_tokenizer(TOKENIZERS["spm-model"].files())
    prompt, new = tokenizer.encode("the quick"), tokenizer.encode("brown fox", add_special_tokens=False)
    assert "".join(pieces(tokenizer.stream(), new)) == "brown fox"
    assert "".join(pieces(tokenizer.stream(after=prompt), new)) == " brown fox"


def test_flush_ends_the_text_and_starts_anew():
    tokenizer = load_tokenizer(TOKENIZERS["spm-model"].files())
    ids = tokenizer.encode("the quick", add_special_tokens=False)
    stream = tokenizer.stream()
    assert ["".join(pieces(stream, ids)) for _ in range(2)] == ["the quick", "the quick"]


DECODERS = {
    "none": None,
    "metaspace": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "metaspace-never": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True},
    "bytefallback-metaspace": {
        "type": "Sequence",
        "decoders": [
            {"type": "ByteFallback"},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
        ],
    },
    "strip-both": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 2, "stop": 0},
            {"type": "Replace", "pattern": {"String": "e"}, "content": "EE"},
        ],
    },
    "strip-each": {"type": "Strip", "content": "▁", "start": 1, "stop": 0},
    "wordpiece": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "bpe": {"type": "BPEDecoder", "suffix": "</w>"},
    "replace-after-fuse": {
        "type": "Sequence",
        "decoders": [{"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "th"}, "content": "TH"}],
    },
    "regex": {"type": "Replace", "pattern": {"Regex": "[aeiou]+"}, "content": "*"},
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("clean", [False, True])
def test_any_decoder_of_a_tokenizer_json(name, clean):
    """Those that can't be followed token by token come whole at flush; `clean` holds lines."""
    files = next(case for case in CASES if case.name == "spm-json-as-it-is").files()
    parsed = json.loads(files["tokenizer.json"])
    parsed["decoder"] = DECODERS[name]
    wish = {
        "clean_up_tokenization_spaces": clean,
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
    }
    changed = {"tokenizer.json": json.dumps(parsed).encode(), "tokenizer_config.json": json.dumps(wish).encode()}
    tokenizer, rng = load_tokenizer(changed), random.Random(name)
    for _ in range(300):
        ids = random_ids(rng, tokenizer)
        skip = rng.random() < 0.5
        assert "".join(pieces(tokenizer.stream(skip), ids)) == tokenizer.decode(ids, skip), ids


def test_unknown_decoder_steps_are_known_as_such():
    assert decoder_steps(DECODERS["wordpiece"]) is None
    assert decoder_steps(DECODERS["replace-after-fuse"]) is None
    assert decoder_steps(DECODERS["metaspace"]) is not None
