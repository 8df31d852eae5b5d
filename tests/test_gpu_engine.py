"""The engine over the torch backend (plain torch on the CPU): every way of running a model, against the oracle's.

Bits depend on what shares a pass, so numbers are compared to rounding, along the tokens that were chosen.
"""

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

import edgellama
from closeness import relative_error
from edgellama.errors import CancelledError, ContextError, EdgellamaError
from edgellama.generate import CancelToken

pytestmark = pytest.mark.torch

PROMPTS = ["The quick brown fox", "Hello", "jumps over the lazy dog, and over it again"]
GREEDY = {"temperature": 0, "eos_token_id": [], "logprobs": True}
CLOSE = 4 * 2.0**-11
"""Of a float16 cache, as for the CPU backend (test_cpu_backend): two roundings in each of two layers."""


@pytest.fixture(scope="module")
def llm(tiny_model):
    with edgellama.load(tiny_model, "torch-cpu", n_ctx=96, n_slots=4) as model:
        yield model


@pytest.fixture(scope="module")
def reference(tiny_model):
    with edgellama.load(tiny_model, "reference", n_ctx=96, n_slots=4) as model:
        yield model


def check(reply, reference, greedy=True):
    """The text, its log-probabilities and that its tokens are the likeliest, by the oracle's logits for them."""
    ids = reply.prompt_token_ids + reply.token_ids
    reference.reset()
    logits = reference.forward(ids[:-1])[-len(reply.token_ids) :].astype(np.float64)
    chosen = logits[np.arange(len(logits)), reply.token_ids]
    if greedy:
        assert (logits.max(axis=1) - chosen < 0.02).all()
    logprobs = chosen - np.log(np.exp(logits).sum(axis=1))
    assert np.abs(logprobs - [each.logprob for each in reply.logprobs]).max() < 0.02
    assert reference.tokenizer.decode(ids, skip_special_tokens=True).endswith(reply.text)


def test_a_batch_larger_than_the_cache(llm, reference):
    replies = llm.generate(PROMPTS * 2, 12, **GREEDY)
    assert len(replies) == 6 and {len(each.token_ids) for each in replies} == {12}
    for reply in replies:
        check(reply, reference)


def test_several_replies_and_their_seeds(llm, reference):
    options = {**GREEDY, "num_return_sequences": 3, "temperature": 1.2, "top_k": 20, "seed": 3}
    replies = llm.generate(PROMPTS[0], 10, **options)
    assert len({tuple(each.token_ids) for each in replies}) == 3
    for reply in replies:
        check(reply, reference, greedy=False)


def test_a_stream(llm, reference):
    stream = llm.generate(PROMPTS[2], 12, stream=True, **GREEDY)
    pieces = list(stream)
    check(stream.result, reference)
    assert "".join(pieces) == stream.result.text


def test_a_long_prompt_in_several_passes(tiny_model, reference):
    ids = np.random.default_rng(0).integers(3, 259, 80).tolist()
    told = []
    with edgellama.load(tiny_model, "torch-cpu", n_ctx=96, n_slots=1) as llm:
        assert llm._engine.chunk == llm._backend.pass_tokens > 256
        llm._engine.chunk = 30
        reply = llm.generate(ids, 6, progress=lambda *each: told.append(each), **GREEDY)
    assert told == [(30, 80), (60, 80), (80, 80)]
    check(reply, reference)


def test_beams(llm, reference):
    options = {"num_beams": 4, "num_return_sequences": 2}
    replies, expected = (each.generate(PROMPTS[0], 8, **options) for each in (llm, reference))
    assert [each.token_ids for each in replies] == [each.token_ids for each in expected]


def test_guesses_are_verified(llm, reference):
    prompt = "abcabcabcabcabc"
    reply = llm.generate(prompt, 20, prompt_lookup_num_tokens=3, **GREEDY)
    check(reply, reference)


def test_scores_and_vectors(llm, reference):
    choices = [" jumps", " sleeps", " is a"]
    got, expected = ([each.logprob for each in one.score(PROMPTS[0], choices)] for one in (llm, reference))
    assert np.abs(np.array(got) - expected).max() < 0.05
    for pooling in ("mean", "last"):
        vectors = [each.embed(PROMPTS, pooling) for each in (llm, reference)]
        assert relative_error(*vectors) < CLOSE


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8"])
def test_a_session_goes_on_with_the_same_bits(tiny_model, tmp_path, kind):
    path = tmp_path / "a.session"
    with edgellama.load(tiny_model, "torch-cpu", n_ctx=96, n_slots=2, kv_cache=kind) as first:
        ids = first.tokenizer.encode(PROMPTS[2])
        first.forward(ids)
        first.save_session(path)
        expected = first.forward([50, 51, 52])
    with edgellama.load(tiny_model, "torch-cpu", n_ctx=64, kv_cache=kind, prefix_reuse=True) as second:
        second.generate("something else", 5)
        assert second.load_session(path) == ids
        assert (second.forward([50, 51, 52]) == expected).all()
        second.load_session(path)
        reply = second.generate([*ids, 60, 61], 3, **GREEDY)
        assert reply.timings.cached_tokens == len(ids)
    other = "int8" if kind != "int8" else "float16"
    with (
        edgellama.load(tiny_model, "torch-cpu", n_ctx=96, kv_cache=other) as third,
        pytest.raises(EdgellamaError, match=f"a session with a {kind} cache"),
    ):
        third.load_session(path)


def test_a_session_of_the_cpu_goes_on_to_rounding(tiny_model, tmp_path):
    """The file says nothing of devices: only the cache's kind must be the same."""
    path = tmp_path / "a.session"
    with edgellama.load(tiny_model, n_ctx=96, n_threads=1) as cpu:
        ids = cpu.tokenizer.encode(PROMPTS[2])
        cpu.forward(ids)
        cpu.save_session(path)
        expected = cpu.forward([50, 51, 52])
    with edgellama.load(tiny_model, "torch-cpu", n_ctx=96) as llm:
        assert llm.load_session(path) == ids
        assert relative_error(llm.forward([50, 51, 52]), expected) < CLOSE


def test_nothing_is_reused_where_bits_depend_on_the_cut(llm, tiny_model):
    for _ in range(2):
        assert llm.generate(PROMPTS[2], 3, **GREEDY).timings.cached_tokens == 0
    with edgellama.load(tiny_model, "torch-cpu", n_ctx=96, prefix_reuse=True) as eager:
        replies = [eager.generate(PROMPTS[2], 3, **GREEDY) for _ in range(2)]
        assert replies[1].timings.cached_tokens > 16 and replies[0].token_ids == replies[1].token_ids


def test_cancelled_and_too_long(llm):
    token = CancelToken()
    stream = llm.generate(PROMPTS[0], 40, stream=True, cancel=token, **GREEDY)
    next(stream)
    token.cancel()
    list(stream)
    assert stream.result.finish_reason == "cancelled"
    with pytest.raises(CancelledError):
        llm.forward([1, 2, 3], cancel=token)
    with pytest.raises(ContextError):
        llm.forward([5] * 97)
    assert llm.generate(PROMPTS[0], 3, **GREEDY).finish_reason == "length"
