"""Pipelines and transformers' generation options: the shapes of calls and results."""

import numpy as np
import pytest

import edgellama
from checkpoints import make_checkpoint
from conftest import byte_tokenizer
from edgellama_convert import convert
from fakes import fake_llama

TEMPLATE = '{"chat_template": "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"}'


@pytest.fixture
def generator():
    """Goes on with the alphabet; greedy."""
    llm = fake_llama(n_slots=2)
    return edgellama.pipeline("text-generation", llm, do_sample=False, max_new_tokens=3)


def test_a_text_and_texts(generator):
    assert generator("ab") == [{"generated_text": "abcde"}]
    assert generator(["ab", "k"]) == [[{"generated_text": "abcde"}], [{"generated_text": "klmn"}]]
    assert generator(["ab"], return_full_text=False) == [[{"generated_text": "cde"}]]
    assert generator("ab", max_new_tokens=1) == [{"generated_text": "abc"}]
    assert generator("ab", return_tensors=True) == [{"generated_token_ids": [0, 2, 3, 4, 5, 6]}]
    assert generator("b", prefix="a") == [{"generated_text": "bcde"}]
    assert generator([]) == []


def test_several_replies(generator):
    out = generator(["a", "d"], num_return_sequences=2, do_sample=True, seed=1, temperature=0.01)
    assert [[each["generated_text"] for each in replies] for replies in out] == [["abcd"] * 2, ["defg"] * 2]


def test_stop_sequences_stay_in_the_text(generator):
    assert generator("a", stop_sequence="c", max_new_tokens=9) == [{"generated_text": "abc"}]


def test_options_that_exclude_each_other(generator):
    with pytest.raises(ValueError, match="return_text"):
        generator("a", return_full_text=True, return_tensors=True)
    with pytest.raises(ValueError, match="handle_long_generation"):
        generator("a", handle_long_generation="cut")
    with pytest.raises(TypeError, match="a text, a chat"):
        generator(5)
    with pytest.raises(TypeError, match="nonsense"):
        generator("a", nonsense=1)


def test_a_long_prompt_with_a_hole(generator):
    text = "abcdefghij" * 8
    with pytest.raises(edgellama.ContextError):
        generator(text)
    out = generator(text, handle_long_generation="hole", return_full_text=False)
    assert out == [{"generated_text": "klm"}]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    make_checkpoint(folder / "source")
    (folder / "source" / "tokenizer.json").write_text(byte_tokenizer(), encoding="utf-8")
    (folder / "source" / "tokenizer_config.json").write_text(TEMPLATE)
    convert(folder / "source", folder / "m.edgellama", receipt=False, method="search")
    return folder / "m.edgellama"


def test_chats(chatty):
    with edgellama.pipeline(model=chatty, device="reference", n_ctx=64, max_new_tokens=4, do_sample=False) as generate:
        ask = [{"role": "user", "content": "hi"}]
        (reply,) = generate(ask)
        said = reply["generated_text"][1]
        assert reply["generated_text"] == [*ask, {"role": "assistant", "content": said["content"]}]
        assert generate([ask, ask]) == [[reply], [reply]]
        assert generate(ask, return_full_text=False) == [{"generated_text": said["content"]}]
        begun = [*ask, {"role": "assistant", "content": "so"}]
        (longer,) = generate(begun)
        assert len(longer["generated_text"]) == 2 and longer["generated_text"][1]["content"].startswith("so")
    with pytest.raises(edgellama.EdgellamaError, match="closed"):
        generate("a")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    keys = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}
    make_checkpoint(folder / "source", **keys)
    (folder / "source" / "tokenizer.json").write_text(byte_tokenizer(), encoding="utf-8")
    convert(folder / "source", folder / "m.edgellama", method="search")
    with edgellama.pipeline("text-classification", folder / "m.edgellama", device="reference", n_ctx=64) as pipe:
        yield pipe


def test_labels(classifier):
    logits = classifier.model.classify("some text").logits[0]
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = int(p.argmax())
    (only,) = classifier("some text")
    assert only["label"] == "abc"[best] and abs(only["score"] - p[best]) < 1e-6
    everything = classifier("some text", top_k=None)
    assert [each["label"] for each in everything] == ["abc"[i] for i in np.argsort(-p)]
    assert abs(sum(each["score"] for each in everything) - 1) < 1e-6
    assert classifier(["some text"], top_k=2) == [everything[:2]]
    together = classifier(["some text", "x"])[0]
    assert together["label"] == only["label"] and abs(together["score"] - only["score"]) < 1e-6
    raw = classifier("some text", function_to_apply="none", top_k=1)
    assert abs(raw[0]["score"] - logits.max()) < 1e-6
    sigmoid = classifier("some text", function_to_apply="sigmoid", top_k=1)
    assert abs(sigmoid[0]["score"] - 1 / (1 + np.exp(-logits.max()))) < 1e-6
    assert classifier({"text": "some", "text_pair": "text"})[0]["label"] in "abc"
    assert classifier("some text" * 20, truncation=True, max_length=10) == classifier("some text")
    assert classifier([]) == []


def test_what_is_no_text_or_option(classifier):
    for call, error in [
        (lambda: classifier(5), TypeError),
        (lambda: classifier({"txt": "a"}), ValueError),
        (lambda: classifier("a", top_k="all"), TypeError),
        (lambda: classifier("a", function_to_apply="tanh"), ValueError),
        (lambda: classifier("a", colour="red"), TypeError),
    ]:
        with pytest.raises(error):
            call()


def test_the_task_must_fit(classifier):
    assert edgellama.pipeline(None, classifier.model).task == "text-classification"
    assert edgellama.pipeline("sentiment-analysis", classifier.model).task == "text-classification"
    with pytest.raises(ValueError, match="not for a LlamaForSequenceClassification"):
        edgellama.pipeline("text-generation", classifier.model)
    with pytest.raises(ValueError, match="unknown task"):
        edgellama.pipeline("translation", classifier.model)
    with pytest.raises(ValueError, match="give model="):
        edgellama.pipeline("text-generation")
    with pytest.raises(ValueError, match="open already"):
        edgellama.pipeline("text-generation", fake_llama(), n_ctx=5)


class GenerationConfig:
    """The shape of transformers' class."""

    def __init__(self, **values):
        self.values = values

    def to_dict(self):
        return {"transformers_version": "5", "top_h": None, "num_beam_groups": 1, **self.values}


def test_generation_config():
    llm = fake_llama()
    out = llm.generate("ab", generation_config=GenerationConfig(max_new_tokens=2))
    assert out.text == "cd"  # greedy, as in transformers: it does not say do_sample
    assert (
        llm.generate("ab", generation_config={"max_new_tokens": 2, "do_sample": False, "temperature": 9.0}).text == "cd"
    )
    assert llm.generate("ab", 4, generation_config={"max_new_tokens": 2}).text == "cdef"
    assert llm.generate("ab", do_sample=False, max_length=6).text == "cde"
    assert llm.generate("ab", do_sample=False, max_length=9, stop_strings=["d"]).text == "c"
    assert llm.generate("ab", do_sample=False, max_new_tokens=1, suppress_tokens=[4]).text != "c"
    assert llm.generate("ab", do_sample=False, max_new_tokens=1, sequence_bias={(10,): 50.0}).text == "i"
    biases = [[[4, 10], 50.0], [[4, 10, 5], 60.0], [[4, 11], 40.0]]
    for options in ({"sequence_bias": biases}, {"generation_config": {"sequence_bias": biases}}):
        assert llm.generate("ab", 3, do_sample=False, **options).text == "cid"
    for cache in ("static", "dynamic"):
        out = llm.generate("ab", do_sample=False, max_new_tokens=1, cache_implementation=cache, use_cache=True)
        assert out.text == "c"
    replies = llm.generate("ab", generation_config={"num_return_sequences": 2, "max_new_tokens": 1})
    assert [reply.text for reply in replies] == ["c", "c"]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"generation_config": 5}, TypeError, "a dict or a GenerationConfig"),
        ({"generation_config": {"penalty_alpha": 0.6}}, ValueError, "penalty_alpha is not supported"),
        ({"generation_config": {"temperature": -1.0, "do_sample": True}}, ValueError, "temperature"),
        ({"generation_config": {"sequence_bias": {(1, "b"): 1.0}}}, ValueError, "each id in sequence_bias"),
        ({"cache_implementation": "quantized"}, ValueError, "cache_implementation"),
        ({"max_length": 2}, ValueError, "leaves nothing"),
        ({"max_length": "x"}, TypeError, "max_length"),
    ],
)
def test_generation_options_that_are_wrong(options, error, says):
    with pytest.raises(error, match=says):
        fake_llama().generate("ab", **options)
