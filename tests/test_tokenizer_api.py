"""The methods of transformers' tokenizer: equal to its own results where it has them, and to their definitions."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from conftest import byte_tokenizer
from edgellama.errors import TokenizerError
from edgellama.tokenizer import load_tokenizer
from tokenizer_cases import CASES, DATA, FAST, GPT2, LLAMA, random_text
from tokenizer_cases import token as added_token

BY_NAME = {case.name: case for case in CASES}
LLAMA_3_PROCESSOR = {
    "type": "Sequence",
    "processors": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
        },
    ],
}


def load(name: str, **config):
    case = BY_NAME[name]
    return load_tokenizer(replace(case, config={**(case.config or {}), **config}).files())


def padded(name: str = "spm-model", **config):
    tokenizer = load(name, **config)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# -- against transformers, live --------------------------------------------------------------------------------------


def both(case, tmp_path, monkeypatch):
    """(ours, transformers') tokenizer of the same files."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    for name, content in {"config.json": b'{"model_type": "llama"}', **case.files()}.items():
        (tmp_path / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(case.files(), _Config())
    return ours, theirs


class _Config:
    bos_token_id, eos_token_ids, raw = None, (), {"model_type": "llama"}


OPTIONS = [
    {},
    {"add_special_tokens": False},
    {"padding": True},
    {"padding": "longest", "padding_side": "left", "pad_to_multiple_of": 8},
    {"padding": "max_length", "max_length": 24, "padding_side": "right"},
    {"padding": "max_length", "max_length": 9, "truncation": True},
    {"truncation": True, "max_length": 6},
    {"max_length": 5},
    {"truncation": "longest_first", "max_length": 8, "add_special_tokens": False, "padding": True},
    {"return_token_type_ids": True, "return_special_tokens_mask": True, "return_length": True},
    {"return_offsets_mapping": True, "return_attention_mask": False, "truncation": True, "max_length": 7},
    {"truncation": True, "max_length": 7, "stride": 2, "return_overflowing_tokens": True, "padding": True},
    {"split_special_tokens": True},
    {"padding": True, "return_tensors": "np", "truncation": True, "max_length": 16},
]
PAIR_OPTIONS = [
    *(options for options in OPTIONS if "return_overflowing_tokens" not in options),
    {"truncation": "only_first", "max_length": 22, "return_overflowing_tokens": True, "stride": 1},
    {"truncation": "only_second", "max_length": 22, "padding": True},
    {"return_token_type_ids": True, "return_special_tokens_mask": True, "padding": True},
]


def same(ours, theirs, what):
    assert set(ours) == set(theirs), what
    for name in theirs:
        a, b = ours[name], theirs[name]
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype and a.shape == b.shape, (what, name)
        assert np.asarray(a, object).tolist() == np.asarray(b, object).tolist(), (what, name)


@pytest.mark.torch
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_calls_equal_transformers(case, side, tmp_path, monkeypatch):
    ours, theirs = both(case, tmp_path, monkeypatch)
    assert ours.padding_side == theirs.padding_side
    assert ours.model_input_names == theirs.model_input_names
    assert ours.model_max_length == theirs.model_max_length
    for tokenizer in (ours, theirs):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.truncation_side = side
    assert ours.pad_token_id == theirs.pad_token_id
    rng = random.Random(case.name)
    for _ in range(12):
        texts = [random_text(rng) + " the end of it" for _ in range(rng.randrange(1, 5))]
        pairs = [random_text(rng, 12) + " and more" for _ in texts]
        for options in OPTIONS:
            if options.get("return_tensors"):
                same(ours(texts[0], **options), theirs(texts[0], **options), (texts[0], options))
            else:
                same(ours(texts[0], **options), theirs(texts[0], **options), (texts[0], options))
                assert ours.encode(texts[0], **options) == theirs.encode(texts[0], **options)
            same(ours(texts, **options), theirs(texts, **options), (texts, options))
        for options in PAIR_OPTIONS:
            if options.get("truncation") not in ("only_first", "only_second"):
                same(ours(texts, pairs, **options), theirs(texts, pairs, **options), (texts, pairs, options))
        first, second = "one two three four five six seven", "a b c"
        for options in PAIR_OPTIONS[-3:]:
            if options.get("truncation") == "only_second":
                first, second = second, first
            same(ours(first, second, **options), theirs(first, second, **options), options)
        ids = [[rng.randrange(len(ours)) for _ in range(9)] for _ in range(3)]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
            assert ours.batch_decode(ids, skip) == theirs.batch_decode(ids, skip)
            assert ours.convert_ids_to_tokens(ids[0], skip) == theirs.convert_ids_to_tokens(ids[0], skip)
        tokens = theirs.tokenize(texts[0])
        assert ours.tokenize(texts[0]) == tokens
        assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
        assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)
        batch, their_batch = ours(texts, padding=True), theirs(texts, padding=True)
        for row in range(len(texts)):
            assert batch.tokens(row) == their_batch.tokens(row)
            assert batch.word_ids(row) == their_batch.word_ids(row)
            assert batch.sequence_ids(row) == their_batch.sequence_ids(row)
        rows = {"input_ids": [ours.encode(text) for text in texts]}
        for options in ({}, {"padding": "max_length", "max_length": 90, "padding_side": "left"}):
            same(ours.pad(dict(rows), **options), theirs.pad(dict(rows), **options), options)


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_special_tokens_equal_transformers(case, tmp_path, monkeypatch):
    ours, theirs = both(case, tmp_path, monkeypatch)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert ours.get_vocab() == theirs.get_vocab()
    for pair in (False, True):
        assert ours.num_special_tokens_to_add(pair) == theirs.num_special_tokens_to_add(pair)
    for call in (
        lambda t: t.add_tokens(["word", "zebra<", "word"]),
        lambda t: t.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<x>", "<y>"]}),
        lambda t: t.add_special_tokens({"bos_token": "<begin>"}),
    ):
        assert call(ours) == call(theirs)
        assert len(ours) == len(theirs)
        assert ours.special_tokens_map == theirs.special_tokens_map
        assert ours.all_special_tokens == theirs.all_special_tokens
    for mine in (ours, theirs):
        mine.add_bos_token = True
        mine.add_eos_token = True
        mine.update_post_processor()
    ids, more = [5, 6, 7], [8, 9]
    text = "Hello <x> zebra<s> <begin>"
    assert ours.encode(text) == theirs.encode(text)
    assert (ours.add_bos_token, ours.add_eos_token) == (theirs.add_bos_token, theirs.add_eos_token)
    for pair in (None, "two words"):
        got = theirs(text, pair, return_token_type_ids=True, return_special_tokens_mask=True)
        ids = theirs.encode(text, add_special_tokens=False)
        more = None if pair is None else theirs.encode(pair, add_special_tokens=False)
        assert ours.build_inputs_with_special_tokens(ids, more) == got["input_ids"]
        assert ours.get_special_tokens_mask(ids, more) == got["special_tokens_mask"]
        assert ours.create_token_type_ids_from_sequences(ids, more) == got["token_type_ids"]
    ids = [0, 1, 2, 5, len(ours) - 1]
    assert ours.get_special_tokens_mask(ids, already_has_special_tokens=True) == theirs.get_special_tokens_mask(
        ids, already_has_special_tokens=True
    )


@pytest.mark.torch
def test_a_llama_3_tokenizer_equals_transformers(tmp_path, monkeypatch):
    """BOS from a template behind a ByteLevel step, pairs with a BOS each, offsets trimmed once only."""
    case = replace(BY_NAME["bytelevel"], name="llama-3", config={**FAST, "model_max_length": 12})
    parsed = json.loads(case.files()["tokenizer.json"])
    begin = next(each for each in parsed["added_tokens"] if each["content"] == "<|begin_of_text|>")
    processor = json.loads(json.dumps(LLAMA_3_PROCESSOR))
    processor["processors"][1]["special_tokens"] = {
        begin["content"]: {"id": begin["content"], "ids": [begin["id"]], "tokens": [begin["content"]]}
    }
    case = replace(case, others={"tokenizer.json": {**parsed, "post_processor": processor}})
    ours, theirs = both(case, tmp_path, monkeypatch)
    for tokenizer in (ours, theirs):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    texts = ["  Hello there  my friend", "a", "def f(x):\n    return x + 1 and so on and so on"]
    options = {"return_offsets_mapping": True, "return_token_type_ids": True, "return_special_tokens_mask": True}
    for more in ({}, {"truncation": True}, {"padding": "max_length"}, {"truncation": True, "max_length": 4}):
        same(ours(texts, **options, **more), theirs(texts, **options, **more), more)
        same(ours(texts, texts[::-1], **options, **more), theirs(texts, texts[::-1], **options, **more), more)
    words = [text.split() for text in texts]
    split = {"is_split_into_words": True, "truncation": True, "max_length": 6}
    same(ours(words, **split), theirs(words, **split), words)
    assert ours(words, **split).word_ids(0) == theirs(words, **split).word_ids(0)
    same(ours("a", text_target="b c"), theirs("a", text_target="b c"), "labels")


# -- without transformers --------------------------------------------------------------------------------------------


def test_a_batch_of_different_lengths():
    tokenizer = padded(padding_side="left")
    texts = ["Hello this is a test", "Hello"]
    batch = tokenizer(texts, padding=True)
    long, short = (tokenizer.encode(text) for text in texts)
    missing = len(long) - len(short)
    assert batch.input_ids == [long, [tokenizer.eos_id] * missing + short]
    assert batch["attention_mask"] == [[1] * len(long), [0] * missing + [1] * len(short)]
    arrays = tokenizer(texts, padding=True, padding_side="right", return_tensors="np")
    assert arrays.input_ids.dtype == np.int64 and arrays.input_ids.shape == (2, len(long))
    assert arrays.attention_mask[1].tolist() == [1] * len(short) + [0] * missing
    assert tokenizer.batch_decode(arrays.input_ids, skip_special_tokens=True) == texts
    assert tokenizer("Hello", return_tensors="np").input_ids.shape == (1, len(short))
    assert tokenizer([]).input_ids == []
    assert batch[1].ids == batch.input_ids[1] and batch[1].tokens == batch.tokens(1)
    start, end = batch.token_to_chars(0, len(long) - 1)
    assert texts[0][start:end].strip() == tokenizer.decode(long[-1:]) and batch.token_to_chars(1, 0) is None
    assert batch.char_to_token(0, 0) == 1 and batch.char_to_token(0, 999) is None
    with pytest.raises(AttributeError, match="has no 'labels', only input_ids, attention_mask"):
        _ = batch.labels


def test_a_call_leaves_no_trace():
    """transformers leaves padding and truncation set in its backend; here two calls know nothing of each other."""
    tokenizer = padded()
    before = tokenizer.encode("Hello this is a test")
    tokenizer(["Hello this is a test", "x"], padding="max_length", max_length=4, truncation=True)
    tokenizer("</s>", split_special_tokens=True)
    assert tokenizer.encode("Hello this is a test") == before
    assert tokenizer.encode("</s>", add_special_tokens=False) == [tokenizer.eos_id]


def test_threads_share_a_tokenizer():
    from concurrent.futures import ThreadPoolExecutor

    tokenizer = padded()
    texts = ["word " * n for n in range(1, 40)]

    def work(n):
        if n % 2:
            return tokenizer(texts[n], max_length=4, truncation=True).input_ids
        return tokenizer(texts[n], padding="max_length", max_length=64).input_ids

    want = [work(n) for n in range(len(texts))]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert list(pool.map(work, range(len(texts)))) == want


def test_what_cannot_be_is_refused():
    tokenizer = load("spm-model")
    with pytest.raises(ValueError, match="padding needs a pad token"):
        tokenizer(["a"], padding=True)
    tokenizer = padded()
    for options, message in {
        ("padding", "sideways"): "padding must be one of longest, max_length, do_not_pad, got 'sideways'",
        ("truncation", "first"): "truncation must be one of longest_first",
        ("max_length", -1): "max_length must be a whole number",
        ("padding_side", "top"): "padding_side must be one of left, right",
        ("return_tensors", "pt"): "NumPy arrays: return_tensors='np'",
        ("return_tensors", "tf"): "must be 'np' or None",
    }.items():
        with pytest.raises(ValueError, match=message):
            tokenizer("a", **{"padding": True, **dict([options])})
    with pytest.raises(ValueError, match="an array needs padding=True"):
        tokenizer(["a", "a b c d"], return_tensors="np")
    with pytest.raises(ValueError, match="max_length 0 is less than the 1 special"):
        tokenizer("a b", max_length=0, truncation=True)
    with pytest.raises(ValueError, match="cannot be reached by truncating the second text alone"):
        tokenizer("a b c d", "e f", max_length=4, truncation="only_second")
    with pytest.raises(ValueError, match="stride 5 must be less than"):
        tokenizer("a b c d e f g h", max_length=5, truncation=True, stride=5, return_overflowing_tokens=True)
    with pytest.raises(ValueError, match="not a multiple of pad_to_multiple_of"):
        tokenizer("a", max_length=5, truncation=True, padding=True, pad_to_multiple_of=4)
    with pytest.raises(ValueError, match="a text must be str"):
        tokenizer([1, 2])
    with pytest.raises(ValueError, match="text or text_target"):
        tokenizer()
    with pytest.raises(ValueError, match="text has 2 rows, text_pair 1"):
        tokenizer(["a", "b"], ["c"])
    with pytest.raises(TypeError, match="text_pair must be a list"):
        tokenizer(["a"], "c")
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer(["a", "b\ud800"])
    with pytest.raises(TypeError):
        tokenizer.encode(b"bytes")
    with pytest.raises(ValueError, match="not a special token's role"):
        tokenizer.add_special_tokens({"no_token": "<x>"})
    with pytest.raises(TokenizerError, match="'<nobody>' is not in the vocabulary"):
        tokenizer.bos_token = "<nobody>"
        tokenizer.add_bos_token = True
    for settings in ({"padding_side": "up"}, {"model_max_length": -1}, {"model_input_names": [1]}):
        with pytest.raises(TokenizerError, match=f"tokenizer_config.json: {next(iter(settings))}"):
            load("spm-model", **settings)


def test_overflow_keeps_every_token_of_a_text():
    tokenizer = load("spm-model")
    text = "The quick brown fox jumps over the lazy dog. " * 3
    plain = tokenizer.encode(text, add_special_tokens=False)
    for side in ("right", "left"):
        tokenizer.truncation_side = side
        windows = tokenizer(text, max_length=9, truncation=True, stride=3, return_overflowing_tokens=True)
        assert windows["overflow_to_sample_mapping"] == [0] * len(windows.input_ids)
        assert all(row[0] == tokenizer.bos_id and len(row) <= 9 for row in windows.input_ids)
        rows = [row[1:] for row in windows.input_ids]
        if side == "left":
            rows = rows[::-1]
        joined = list(rows[0])
        for row in rows[1:]:
            overlap = next(n for n in range(8, -1, -1) if n == 0 or joined[-n:] == row[:n])
            assert overlap >= 3
            joined += row[overlap:]
        assert joined == plain


def test_a_changed_bos_needs_update_post_processor():
    tokenizer = load("spm-json")
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    begin = tokenizer.bos_token_id
    assert tokenizer.bos_id == begin == len(tokenizer) - 1
    assert tokenizer.encode("Hello")[0] != begin
    tokenizer.update_post_processor()
    assert tokenizer.encode("Hello")[0] == begin
    assert begin in tokenizer.special_ids and tokenizer.decode([begin], skip_special_tokens=True) == ""
    tokenizer.add_bos_token, tokenizer.add_eos_token = False, True
    assert tokenizer.encode("Hello")[-1] == tokenizer.eos_id
    assert (tokenizer.add_bos_token, tokenizer.add_eos_token) == (False, True)
    tokenizer.pad_token_id = tokenizer.eos_id
    assert tokenizer.pad_token == "</s>"
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None


def test_a_changed_eos_where_no_bos_is_added():
    tokenizer = load("spm-model", add_bos_token=False, add_eos_token=True)
    assert (tokenizer.add_bos_token, tokenizer.add_eos_token) == (False, True)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.update_post_processor()
    ids = tokenizer.encode("Hello")
    assert ids[-1] == tokenizer.eos_id == tokenizer.token_to_id("<end>") and ids[0] != tokenizer.bos_id
    tokenizer.eos_token = None
    tokenizer.update_post_processor()
    assert tokenizer.encode("Hello") == ids[:-1] and not tokenizer.add_eos_token


def test_tokens_that_only_the_models_config_names():
    class Config:
        bos_token_id, eos_token_ids, raw = 1, (2,), {}

    tokenizer = load_tokenizer({"tokenizer.json": byte_tokenizer().encode()}, Config())
    assert (tokenizer.bos_token, tokenizer.add_bos_token, tokenizer.add_eos_token) == (None, True, False)
    tokenizer.add_eos_token = True
    assert tokenizer.encode("a") == [1, 100, 2]


def test_spaces_between_special_tokens():
    tokenizer = load("spm-model")
    ids = tokenizer.encode("Hello</s>there")
    assert tokenizer.decode(ids) == "<s> Hello</s>there"
    assert tokenizer.decode(ids, spaces_between_special_tokens=True) == "<s> Hello </s> there"
    assert tokenizer.decode(ids, True, spaces_between_special_tokens=True) == "Hello there"


def test_clean_up_is_for_tokenizers_that_need_it():
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"hello": 0, ",": 1, "you": 2, ".": 3, "u": 4}, unk_token="u"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = load_tokenizer({"tokenizer.json": backend.to_str().encode()})
    ids = words.encode("hello, you.")
    assert words.decode(ids) == "hello , you ."
    assert words.decode(ids, clean_up_tokenization_spaces=True) == "hello, you."
    bpe = load("bytelevel", **GPT2)
    ids = bpe.encode("a . b", add_special_tokens=False)
    assert bpe.decode(ids, clean_up_tokenization_spaces=True) == "a . b"


def test_sampling_gives_other_ids_of_the_same_text():
    tokenizer = load("spm-model")
    text = "Hello this is a test of something longer"
    usual = tokenizer.encode(text)
    tokenizer.sp_model_kwargs = {"enable_sampling": True, "alpha": 0.3, "nbest_size": -1}
    seen = {tuple(tokenizer.encode(text)) for _ in range(50)}
    assert len(seen) > 10
    assert {tokenizer.decode(ids, skip_special_tokens=True) for ids in seen} == {text}
    tokenizer.sp_model_kwargs = {"enable_sampling": True, "alpha": 0.0}
    assert tokenizer.encode(text) == usual
    tokenizer.sp_model_kwargs = {}
    assert tokenizer.encode(text) == usual
    for wrong in ({"seed": 1}, {"alpha": 2.0}):
        with pytest.raises(ValueError):
            tokenizer.sp_model_kwargs = wrong


def test_sampling_is_sentencepieces():
    """With no merge and with all of them, where there is no chance; in between as many tokens on the average."""
    sentencepiece = pytest.importorskip("sentencepiece")
    data = (DATA / "spm-model" / "tokenizer.model").read_bytes()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = load_tokenizer({"tokenizer.model": data})
    text = "Hello this is a test of something longer"

    def sample(alpha):
        ours.sp_model_kwargs = {"enable_sampling": True, "alpha": alpha}
        return ours.encode(text, add_special_tokens=False), theirs.sample_encode_as_ids(text, -1, alpha)

    for alpha in (0.0, 1.0):
        ids, expected = sample(alpha)
        assert ids == expected
    random.seed(5)
    for alpha in (0.1, 0.4, 0.7):
        lengths = np.mean([[len(ids) for ids in sample(alpha)] for _ in range(400)], axis=0)
        assert abs(lengths[0] - lengths[1]) < 0.05 * lengths[1]


@pytest.mark.parametrize("name", ["spm-model-added", "bytelevel", "spm-json-legacy"])
def test_dropping_no_merge_gives_the_usual_encoding(name):
    """Everything that an encoding tells, not its ids alone; and a seed repeats a sample."""
    tokenizer, rng = load(name), random.Random(name)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    options = {"return_offsets_mapping": True, "return_token_type_ids": True, "return_special_tokens_mask": True}
    for _ in range(40):
        texts = [random_text(rng), random_text(rng), "the same again"]
        tokenizer.sp_model_kwargs = {}
        usual = tokenizer(texts, texts[::-1], padding=True, **options)
        tokenizer.sp_model_kwargs = {"enable_sampling": True, "alpha": 0.0}
        sampled = tokenizer(texts, texts[::-1], padding=True, **options)
        assert sampled == usual
        for row in range(3):
            assert sampled.tokens(row) == usual.tokens(row) and sampled.word_ids(row) == usual.word_ids(row)
            assert sampled.sequence_ids(row) == usual.sequence_ids(row)
        tokenizer.sp_model_kwargs = {"enable_sampling": True, "alpha": 0.3}
        random.seed(3)
        first = tokenizer(texts, truncation=True, max_length=20)
        random.seed(3)
        assert tokenizer(texts, truncation=True, max_length=20) == first
        ids = tokenizer(texts).input_ids
        tokenizer.sp_model_kwargs = {}
        assert tokenizer.batch_decode(ids) == tokenizer.batch_decode(tokenizer(texts).input_ids)


def test_unigram_samples_too(tmp_path):
    from tokenizers import Tokenizer, models

    vocab = [("<unk>", 0.0), ("a", -1.0), ("b", -1.1), ("ab", -1.5), ("aba", -2.0), ("ba", -1.7)]
    backend = Tokenizer(models.Unigram(vocab, 0))
    tokenizer = load_tokenizer({"tokenizer.json": backend.to_str().encode()})
    tokenizer.sp_model_kwargs = {"enable_sampling": True, "alpha": 0.5, "nbest_size": -1}
    assert len({tuple(tokenizer.encode("ababab")) for _ in range(50)}) > 3


def test_save_vocabulary_writes_the_very_file(tmp_path):
    case = BY_NAME["spm-model"]
    (path,) = load("spm-model").save_vocabulary(tmp_path)
    assert path == str(tmp_path / "tokenizer.model")
    assert (tmp_path / "tokenizer.model").read_bytes() == case.files()["tokenizer.model"]
    (path,) = load("bytelevel").save_vocabulary(tmp_path, "mine")
    assert path == str(tmp_path / "mine-tokenizer.json")
    assert load_tokenizer({"tokenizer.json": (tmp_path / "mine-tokenizer.json").read_bytes()}).vocab_size
    with pytest.raises(TokenizerError, match="is not a folder"):
        load("bytelevel").save_vocabulary(tmp_path / "nowhere")


def test_settings_are_read():
    tokenizer = load(
        "spm-model",
        padding_side="right",
        truncation_side="left",
        model_max_length=64,
        use_default_system_prompt=True,
        added_tokens_decoder={"800": added_token("<pad>")},
        pad_token="<pad>",
    )
    assert (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length) == ("right", "left", 64)
    assert tokenizer.use_default_system_prompt and not tokenizer.legacy
    assert tokenizer.pad_token_id == 800
    assert load("spm-model", model_max_length=1e30).model_max_length == int(1e30)
    assert load("spm-model").padding_side == "left"
    assert len(tokenizer(["a"], padding="max_length").input_ids[0]) == 64
    assert LLAMA["legacy"] is False
