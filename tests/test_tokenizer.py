"""Token ids and text equal transformers': against stored goldens, live, and with real tokenizers if there are any."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgellama.errors import TokenizerError
from edgellama.tokenizer import load_tokenizer
from tokenizer_cases import CASES, GPT2, LLAMA, TEXTS, digest_if_long, goldens, random_text, token

GOLDENS = goldens()
BY_NAME = {case.name: case for case in CASES}


def load(name: str):
    return load_tokenizer(BY_NAME[name].files())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ids_and_text_equal_transformers(case):
    golden, tokenizer = GOLDENS[case.name], load_tokenizer(case.files())
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (
        golden["size"],
        golden["bos_id"],
        golden["eos_id"],
    )
    for position, text in enumerate(TEXTS):
        ids = tokenizer.encode(text)
        assert digest_if_long(ids) == golden["ids"][position], text[:80]
        assert digest_if_long(tokenizer.encode(text, False)) == golden["plain_ids"][position], text[:80]
        if position < len(golden["decoded"]):
            assert tokenizer.decode(ids) == golden["decoded"][position], text[:80]
            assert tokenizer.decode(ids, skip_special_tokens=True) == golden["skipped"][position], text[:80]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": b'{"model_type": "llama"}', **files}.items():
        (folder / name).write_bytes(content)
    return folder


LIVE_CASES = [
    *CASES,
    replace(
        BY_NAME["bytelevel"], name="null-bos", config={**GPT2, "bos_token": None, "tokenizer_class": "GPT2Tokenizer"}
    ),
    replace(BY_NAME["spm-model"], name="null-eos", config={**LLAMA, "eos_token": None, "add_eos_token": True}),
    replace(
        BY_NAME["spm-model"],
        name="object-tokens",
        config={**LLAMA, "bos_token": {"__type": "AddedToken", **token("<s>")}},
    ),
    replace(BY_NAME["spm-json"], name="new-bos", config={**LLAMA, "bos_token": "<|new|>", "image_token": "<img>"}),
    replace(
        BY_NAME["spm-model"], name="new-bos-model", config={**LLAMA, "bos_token": "<|new|>", "image_token": "<img>"}
    ),
    replace(BY_NAME["bytelevel"], name="unknown-class", config={**GPT2, "tokenizer_class": "NoSuchTokenizerFast"}),
    replace(BY_NAME["spm-json"], name="extra-object", config={**LLAMA, "extra_special_tokens": {"x_token": "<x>"}}),
]


@pytest.mark.torch
@pytest.mark.parametrize("case", LIVE_CASES, ids=lambda case: case.name)
def test_random_text_live_against_transformers(case, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(write(tmp_path, case.files()))
    ours, rng = load_tokenizer(case.files()), random.Random(case.name)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for _ in range(500):
        text = random_text(rng)
        for special in (True, False):
            assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=special), text
        ids = [rng.randrange(ours.vocab_size + 3) for _ in range(rng.randrange(20))]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), ids


@pytest.mark.torch
@pytest.mark.parametrize("name", ["spm-model", "spm-model-legacy-eos", "spm-json-added", "bytelevel", "bytelevel-gpt2"])
def test_what_transformers_saves_is_read_alike(name, tmp_path, monkeypatch):
    """A folder written by `save_pretrained`, with a token added in between."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    first = AutoTokenizer.from_pretrained(write(tmp_path / "first", BY_NAME[name].files()))
    first.add_special_tokens({"additional_special_tokens": ["<tool>", "<|new|>"], "pad_token": "<pad>"})
    first.add_tokens(["word"])
    first.chat_template = "{{ messages }}"
    saved = write(tmp_path / "saved", {})
    first.save_pretrained(saved)
    theirs, rng = AutoTokenizer.from_pretrained(saved), random.Random(name)
    ours = load_tokenizer({path.name: path.read_bytes() for path in saved.iterdir()})
    assert (ours.kind, ours.vocab_size, ours.chat_template) == ("tokenizer.json", len(theirs), "{{ messages }}")
    for _ in range(300):
        text = random_text(rng)
        assert ours.encode(text) == theirs.encode(text), text
        ids = [rng.randrange(ours.vocab_size) for _ in range(12)]
        assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True), ids


@pytest.mark.models
def test_minimind2_against_its_known_ids(minimind_dir):
    tokenizer = load_tokenizer(
        {path.name: path.read_bytes() for path in minimind_dir.iterdir() if path.stat().st_size < 1 << 24}
    )
    assert tokenizer.vocab_size == 6400
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.special_ids) == (1, 2, {0, 1, 2})
    text = "<|im_start|>user\nWhy is the sky blue? 为什么天空是蓝色的?<|im_end|>\n"
    ids = tokenizer.encode(text)
    assert ids[0] == 1 and 2 in ids
    assert tokenizer.decode(ids) == text
    assert "im_start" in tokenizer.chat_template


@pytest.mark.models
@pytest.mark.torch
def test_minimind2_live_against_transformers(minimind_dir, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    theirs, rng = AutoTokenizer.from_pretrained(minimind_dir), random.Random(1)
    ours = load_tokenizer({path.name: path.read_bytes() for path in minimind_dir.glob("*token*.json")})
    for _ in range(1000):
        text = random_text(rng)
        assert ours.encode(text) == theirs.encode(text), text


@pytest.mark.models
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_llama_2_says_hello(models_dir, name):
    """Llama-2's own files may not be shipped; put them into EDGELLAMA_TEST_MODELS/llama2-tokenizer to run this."""
    path = models_dir / "llama2-tokenizer" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    tokenizer = load_tokenizer({name: path.read_bytes()})
    assert tokenizer.encode("Hello this is a test") == [1, 15043, 445, 338, 263, 1243]
    assert tokenizer.encode("def f(x):\n    return  x") == [1, 822, 285, 29898, 29916, 1125, 13, 1678, 736, 29871, 921]
    assert tokenizer.decode([15043, 445, 338], skip_special_tokens=True) == "Hello this is"


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("normalization", ["identity", "nmt_nfkc"])
def test_tokenizer_model_alone_equals_sentencepiece(model_type, normalization):
    """No other file: BOS, a space before the first word, and else SentencePiece's own ids."""
    if (model_type, normalization) == ("bpe", "nmt_nfkc"):
        pytest.skip("transformers drops a BPE model's normalizer, and so do we")
    sentencepiece = pytest.importorskip("sentencepiece")
    import io

    rng, model = random.Random(7), io.BytesIO()
    words = ["hello", "there", "token", "value", "index", "return", "the", "a", "of", "naïve", "12", "日本"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(rng.choice(words) for _ in range(8)) for _ in range(400)),
        model_writer=model,
        vocab_size=310,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name=normalization,
        remove_extra_whitespaces=normalization != "identity",
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = load_tokenizer({"tokenizer.model": model.getvalue()})
    for _ in range(500):
        text = "x" + "".join(
            rng.choice([*"abc ñ1é\n語", " hello", " the", "  ", "日本"]) for _ in range(rng.randrange(20))
        )
        assert ours.encode(text) == [1, *theirs.encode(text)], text


def test_first_word_is_decoded_without_the_prefix_space():
    tokenizer = load("spm-model")
    ids = tokenizer.encode("Hello this is a test", add_special_tokens=False)
    assert tokenizer.decode(ids) == "Hello this is a test"
    assert tokenizer.decode(tokenizer.encode("Hello"), skip_special_tokens=True) == "Hello"


def test_surrogates_and_wrong_types_are_refused():
    tokenizer = load("bytelevel")
    with pytest.raises(TokenizerError, match=r"lone surrogate U\+D800 at 1"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(TokenizerError, match="-1 is not a token id"):
        tokenizer.decode([3, -1])
    with pytest.raises(TokenizerError, match="not a token id"):
        tokenizer.stream().push(-1)
    with pytest.raises(TypeError):
        tokenizer.decode([1.5])
    with pytest.raises(TypeError):
        tokenizer.encode(b"bytes")


def test_numpy_integers_are_ids():
    import numpy as np

    tokenizer = load("bytelevel")
    ids = np.array(tokenizer.encode("hello"), dtype=np.int32)
    assert tokenizer.decode(ids) == "<|begin_of_text|>hello"


def test_prompts_are_never_cut_or_padded():
    files = BY_NAME["bytelevel"].files()
    parsed = json.loads(files["tokenizer.json"])
    parsed["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    parsed["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    parsed["model"]["dropout"] = 0.9
    files["tokenizer.json"] = json.dumps(parsed).encode()
    text = "The quick brown fox jumps"
    assert load_tokenizer(files).encode(text) == load("bytelevel").encode(text)


def test_ids_fall_back_to_the_model_config():
    class Config:
        bos_token_id, eos_token_ids, raw = 5, (7, 8), {"tokenizer_class": "LlamaTokenizer"}

    tokenizer = load_tokenizer(BY_NAME["bytelevel-as-it-is"].files(), Config())
    assert (tokenizer.bos_id, tokenizer.eos_id) == (5, 7)
    # config.json's tokenizer_class counts where tokenizer_config.json is missing.
    tokenizer = load_tokenizer(BY_NAME["spm-json-as-it-is"].files(), Config())
    assert tokenizer.encode(" Hello") == load("spm-json").encode(" Hello")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_chat_template_file_comes_before_the_config():
    files = replace(BY_NAME["bytelevel"], config={**GPT2, "chat_template": "from config"}).files()
    assert load_tokenizer(files).chat_template == "from config"
    assert load_tokenizer({**files, "chat_template.jinja": b"from\r\nfile"}).chat_template == "from\nfile"
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    files = replace(BY_NAME["bytelevel"], config={**GPT2, "chat_template": several}).files()
    assert load_tokenizer(files).chat_template == {"default": "a", "tool_use": "b"}
    assert load("bytelevel-as-it-is").chat_template is None


def test_tokenizer_json_comes_before_tokenizer_model():
    both = {**BY_NAME["spm-model"].files(), **BY_NAME["bytelevel"].files()}
    assert load_tokenizer(both).kind == "tokenizer.json"
    assert load("spm-model").kind == "tokenizer.model"


def test_import_is_cheap():
    """Neither `tokenizers` nor `sentencepiece` is imported before a tokenizer is loaded."""
    code = "import sys, edgellama.tokenizer; sys.exit(any(m in sys.modules for m in ('tokenizers', 'sentencepiece')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
