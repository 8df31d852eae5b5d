"""Speculative decoding: the same tokens as plain decoding, whatever is guessed; and the guesses themselves."""

import contextlib
import itertools
import json
import threading

import numpy as np
import pytest

import edgellama
from checkpoints import make_checkpoint
from edgellama import CancelToken
from edgellama.speculative import ModelDraft, PromptLookup

PROMPTS = ["Hello", "abcabcabcabc", "The cat and the dog and the cat and the"]


# -- guesses ---------------------------------------------------------------------------------------------------------


def naive_lookup(ids, num_tokens, limit):
    """What PromptLookup is to find, by looking everywhere."""
    for n in (3, 2):
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - n : end] == ids[len(ids) - n :]:
                whole = list(ids)
                while len(whole) < len(ids) + min(num_tokens, limit):
                    whole.append(whole[end + len(whole) - len(ids)])
                return whole[len(ids) :]
    return []


@pytest.mark.parametrize("letters", [2, 3, 8])
def test_prompt_lookup_finds_what_a_search_finds(letters):
    random = np.random.default_rng(letters)
    for _ in range(30):
        lookup, ids, found = PromptLookup(4), [], 0
        for step in random.integers(1, 5, 15).tolist():
            ids += random.integers(0, letters, step).tolist()
            limit = int(random.integers(1, 7))
            guess = lookup.propose(ids, limit)
            assert guess == naive_lookup(ids, 4, limit)
            found += bool(guess)
    assert found


@pytest.mark.parametrize(
    ("ids", "guess"),
    [
        ([], []),
        ([1], []),
        ([1, 2], []),
        ([1, 1], []),
        ([1, 1, 1], [1, 1, 1]),  # it runs into itself
        ([1, 2, 9, 1, 2], [9, 1, 2]),
        ([5, 1, 2, 7, 6, 1, 2, 8, 5, 1, 2], [7, 6, 1]),  # three ids in common count more than the latest two
        ([1, 2, 7, 1, 2, 8, 1, 2], [8, 1, 2]),  # of two equal ones the latest
    ],
)
def test_prompt_lookup_by_hand(ids, guess):
    assert PromptLookup(3).propose(ids, 3) == guess


def test_a_draft_model_guesses_while_it_is_sure():
    asked = []

    def step(ids):
        asked.append(list(ids))
        logits = np.zeros(10, np.float32)
        logits[(ids[-1] + 1) % 10] = 0.5 if ids[-1] == 6 else 9.0
        return logits

    assert ModelDraft(step, num_tokens=4).propose([1, 2], 9) == [3, 4, 5, 6]
    assert asked == [[1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]]
    assert ModelDraft(step, num_tokens=4).propose([1, 2], 2) == [3, 4]
    assert ModelDraft(step, num_tokens=4).propose([4], 4) == [5, 6]  # after 6 it is not sure
    assert ModelDraft(step, num_tokens=4, min_probability=0.1).propose([4], 4) == [5, 6, 7, 8]
    assert ModelDraft(lambda ids: None).propose([4], 4) == []


# -- generate --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tiny_model):
    with edgellama.load(tiny_model, n_ctx=128, n_slots=3, n_threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def twin(tiny_model):
    """The same model as a draft: right unless it is not sure."""
    with edgellama.load(tiny_model, n_ctx=128, n_slots=3, n_threads=1, kv_cache="int8") as model:
        yield model


@pytest.fixture(scope="module")
def stranger(tiny_checkpoint, tmp_path_factory):
    """Another random model: hardly ever right."""
    from edgellama_convert import convert

    folder = tmp_path_factory.mktemp("stranger")
    make_checkpoint(folder / "hf", seed=9, num_hidden_layers=1, eos_token_id=2)
    convert(folder / "hf", folder / "m.edgellama", method="rtn")
    with edgellama.load(folder / "m.edgellama", n_ctx=40, n_slots=1) as model:
        yield model


def both(llm, prompt, max_new_tokens, guesses, **options):
    """With and without guesses; the same but for the timings."""
    plain = llm.generate(prompt, max_new_tokens, **options)
    guessed = llm.generate(prompt, max_new_tokens, **guesses, **options)
    for a, b in zip(*(each if isinstance(each, list) else [each] for each in (plain, guessed)), strict=True):
        for name in ("token_ids", "text", "finish_reason", "logprobs", "stop", "index", "prompt_token_ids"):
            assert getattr(a, name) == getattr(b, name), name
        assert a.timings.acceptance_rate is None
    return guessed


OPTIONS = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3, "no_repeat_ngram_size": 4},
    {"temperature": 0, "logprobs": True, "top_logprobs": 3, "echo": True},
    {"temperature": 0.3, "seed": 4},
    {"temperature": 1.5, "seed": 5, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"seed": 6, "mirostat": 2},
    {"seed": 7, "frequency_penalty": 0.5, "dry_multiplier": 0.8, "xtc_probability": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_guesses_change_no_token(llm, twin, stranger, options):
    for prompt, guesses in [
        (PROMPTS[1], {"prompt_lookup_num_tokens": 1}),
        (PROMPTS[2], {"prompt_lookup_num_tokens": 8}),
        (PROMPTS[0], {"draft_model": twin}),
        (PROMPTS[0], {"draft_model": stranger}),  # its context ends before the reply
    ]:
        both(llm, prompt, 36, guesses, **options)


@pytest.mark.parametrize("options", [OPTIONS[2], OPTIONS[3]], ids=" ".join)
def test_guesses_change_no_token_of_a_batch(llm, twin, stranger, options):
    """Five replies in three slots: some wait, some end early, and `stranger` has a slot for one only."""
    prompts = [*PROMPTS, "Hello", "xyz" * 10]
    for guesses in ({"prompt_lookup_num_tokens": 5}, {"draft_model": twin}, {"draft_model": stranger}):
        both(llm, prompts, 15, guesses, **options)


def test_stop_strings_and_ends_of_text_are_found_among_guesses(llm):
    free = llm.generate(PROMPTS[1], 40, temperature=0, eos_token_id=[])
    guesses = {"prompt_lookup_num_tokens": 7}
    for place in (3, 10, 25, 39):
        got = both(llm, PROMPTS[1], 40, guesses, temperature=0, eos_token_id=free.token_ids[place])
        assert got.finish_reason == "stop"
    printable = [char for char in free.text if char.isascii() and char.isprintable()]
    both(llm, PROMPTS[1], 40, guesses, temperature=0, eos_token_id=[], stop=[printable[-1], free.text[10:12]])


@pytest.mark.parametrize(
    "constraint",
    [
        {"regex": "([a-f]{3}, )+end"},
        {"choice": ["abcabcabc", "abcabd"]},
        {"json_schema": {"type": "array", "items": {"enum": ["yes", "no"]}, "minItems": 3, "maxItems": 5}},
    ],
    ids=" ".join,
)
def test_a_constraint_holds_and_guesses_change_nothing(llm, twin, constraint):
    pytest.importorskip("llguidance")
    for guesses, options in itertools.product(
        [{"prompt_lookup_num_tokens": 6}, {"draft_model": twin}], [{"temperature": 0}, {"temperature": 1.2, "seed": 3}]
    ):
        got = both(llm, ["abcabcabc, abc, end", "[yes, no"], 30, guesses, **constraint, **options)
        for each in got:
            if each.finish_reason == "stop" and "json_schema" in constraint:
                assert set(json.loads(each.text)) <= {"yes", "no"}
            if "choice" in constraint:
                assert each.text in constraint["choice"]


def test_a_full_context_ends_the_reply(llm, twin):
    for guesses in ({"prompt_lookup_num_tokens": 50}, {"draft_model": twin}):
        got = both(llm, "x" * 100, 500, guesses, temperature=0, eos_token_id=[])
        assert got.finish_reason == "length" and len(got.token_ids) == 128 - 101


def test_a_logits_processor_sees_the_tokens_that_were_taken(llm, twin):
    def seen(**guesses):
        calls = []

        def only_new(ids, logits):
            calls.append(ids.tolist())
            logits[ids[-4:]] = -np.inf
            return logits

        llm.generate(PROMPTS[2], 30, temperature=0, logits_processor=only_new, **guesses)
        return calls

    assert seen() == seen(prompt_lookup_num_tokens=6) == seen(draft_model=twin)


@pytest.mark.parametrize("kv_cache", ["float16", "int8"])
@pytest.mark.parametrize(
    "rope",
    [
        {"type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0 + 0.02 * i for i in range(16)],
            "long_factor": [1.0 + 0.5 * i for i in range(16)],
            "original_max_position_embeddings": 24,
        },
    ],
    ids=["dynamic", "longrope"],
)
def test_rope_that_depends_on_the_length_of_a_call(rope, kv_cache, tmp_path):
    """Positions that are checked together would be rotated otherwise than one by one: they are not."""
    from edgellama_convert import convert

    make_checkpoint(tmp_path / "hf", max_position_embeddings=24, rope_scaling=rope)
    convert(tmp_path / "hf", tmp_path / "m.edgellama", method="rtn")
    with edgellama.load(tmp_path / "m.edgellama", n_ctx=48, n_slots=2, kv_cache=kv_cache) as llm:
        prompt = [1, 9, 30, 77, 9, 30, 77, 9, 30]
        both(llm, [prompt, prompt[:5]], 39, {"prompt_lookup_num_tokens": 6}, temperature=0, eos_token_id=[])


def passes(llm, monkeypatch):
    """The number of rows of each forward pass."""
    counts, forward = [], llm._engine.backend.forward
    monkeypatch.setattr(
        llm._engine.backend, "forward", lambda *arrays: (counts.append(len(arrays[0])), forward(*arrays))[1]
    )
    return counts


def test_a_draft_that_is_the_same_model_is_right(llm, twin, monkeypatch):
    """Up to near ties, for its cache is int8; and where it is not sure, it does not guess."""
    counts = passes(llm, monkeypatch)
    got = both(llm, PROMPTS[1], 40, {"draft_model": twin}, temperature=0, eos_token_id=[])
    assert got.timings.acceptance_rate >= 0.9
    plain, guessed = counts[:40], counts[40:]
    assert plain[1:] == [1] * 39 and len(guessed) < 40 and max(guessed[1:]) > 1


def test_wrong_guesses_are_counted(llm, monkeypatch):
    from edgellama.generate import speculate

    class Wrong:
        def __init__(self, num_tokens):
            pass

        def propose(self, ids, limit):
            return [7, 7, 7][:limit]

    monkeypatch.setattr(speculate, "PromptLookup", Wrong)
    plain = llm.generate(PROMPTS[0], 20, temperature=0, eos_token_id=[])
    assert 7 not in plain.token_ids
    got = both(llm, PROMPTS[0], 20, {"prompt_lookup_num_tokens": 3}, temperature=0, eos_token_id=[])
    assert got.timings.acceptance_rate == 0


def test_guesses_that_are_all_right_take_a_pass_for_every_few_tokens(llm, monkeypatch):
    from edgellama.generate import speculate

    plain = llm.generate(PROMPTS[0], 31, temperature=0, eos_token_id=[])
    whole = plain.prompt_token_ids + plain.token_ids

    class Right:
        def __init__(self, num_tokens):
            self.n = num_tokens

        def propose(self, ids, limit):
            return whole[len(ids) : len(ids) + min(self.n, limit)]

    monkeypatch.setattr(speculate, "PromptLookup", Right)
    counts = passes(llm, monkeypatch)
    got = llm.generate(PROMPTS[0], 31, temperature=0, eos_token_id=[], prompt_lookup_num_tokens=4)
    assert got.token_ids == plain.token_ids and got.timings.acceptance_rate == 1
    assert counts[1:] == [5] * 6  # the prompt's pass gives the first token, each later one five


def test_pieces_of_a_stream_and_a_cancelled_one(llm, twin):
    options = {"temperature": 0, "eos_token_id": []}
    plain = llm.generate(PROMPTS[1], 40, **options)
    for guesses in ({"prompt_lookup_num_tokens": 5}, {"draft_model": twin}):
        stream = llm.generate(PROMPTS[1], 40, stream=True, **guesses, **options)
        assert "".join(stream) == plain.text == stream.result.text
        with llm.generate(PROMPTS[1], 40, stream=True, **guesses, **options) as stream:
            next(stream)
        assert stream.result.finish_reason == "cancelled"
        got = stream.result.token_ids
        assert got == plain.token_ids[: len(got)]
    assert twin.generate(PROMPTS[1], 10, **options).token_ids == llm.generate(PROMPTS[1], 10, **options).token_ids


def test_the_cache_is_right_afterwards(llm, twin):
    """What a later call takes over from the slots has been computed from the tokens that were taken."""
    options = {"temperature": 0, "eos_token_id": []}
    for guesses in ({"prompt_lookup_num_tokens": 9}, {"draft_model": twin}):
        llm.reset()
        first = llm.generate(PROMPTS[2], 40, **guesses, **options)
        more = [*first.prompt_token_ids, *first.token_ids, 50, 51]
        again = llm.generate(more, 20, logprobs=True, **options)
        assert again.timings.cached_tokens >= len(more) - 3
        llm.reset()
        expected = llm.generate(more, 20, logprobs=True, **options)
        assert expected.timings.cached_tokens == 0
        assert (again.token_ids, again.logprobs) == (expected.token_ids, expected.logprobs)


def test_a_draft_model_must_be_another_one_of_the_same_vocabulary(llm, tmp_path):
    from edgellama_convert import convert

    for bad in (llm, "draft.edgellama", object()):
        with pytest.raises(ValueError, match="draft_model must be another model"):
            llm.generate("x", 3, draft_model=bad)
    make_checkpoint(tmp_path / "hf", vocab_size=300)
    convert(tmp_path / "hf", tmp_path / "m.edgellama", method="rtn")
    with (
        edgellama.load(tmp_path / "m.edgellama") as other,
        pytest.raises(ValueError, match="vocabulary of 300 tokens, the model one of 277"),
    ):
        llm.generate("x", 3, draft_model=other)
    with edgellama.load(llm.file.path) as closed:
        pass
    with pytest.raises(edgellama.EdgellamaError, match="closed"):
        llm.generate("x", 3, draft_model=closed)
    assert llm.generate("x", 3, temperature=0).token_ids


def test_two_models_that_draft_for_each_other_never_wait_for_each_other(llm, twin, monkeypatch):
    """Each thread waits once it has one of its two models, so that both could have one, then asks for the other."""
    meeting, has_one = threading.Barrier(2), threading.local()
    acquire = edgellama.Llama._acquire

    def acquire_and_meet(model, cancel=None):
        acquire(model, cancel)
        if not hasattr(has_one, "first"):
            has_one.first = model
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait(0.3)

    monkeypatch.setattr(edgellama.Llama, "_acquire", acquire_and_meet)
    cancel, got = CancelToken(), []

    def work(model, draft):
        got.append(model.generate("x", 5, draft_model=draft, cancel=cancel, temperature=0, eos_token_id=[]))

    threads = [threading.Thread(target=work, args=pair) for pair in ((llm, twin), (twin, llm))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    cancel.cancel()
    for thread in threads:
        thread.join(10)
    assert [each.finish_reason for each in got] == ["length"] * 2


def test_a_draft_model_may_be_closed_with_the_stream_still_open(llm):
    with edgellama.load(llm.file.path) as draft:
        stream = llm.generate("Hello", 50, stream=True, draft_model=draft, eos_token_id=[])
        next(stream)
    assert stream.finish_reason == "cancelled"
    assert llm.generate("x", 3, eos_token_id=[]).token_ids


def test_cancel_reaches_a_draft_model_that_is_in_use(llm, twin):
    """Somebody else's stream holds the draft model: the call waits for it, and stops waiting when it is cancelled."""
    cancel, got = CancelToken(), []
    with twin.generate("Hello", 50, stream=True, eos_token_id=[]) as stream:
        next(stream)
        thread = threading.Thread(target=lambda: got.append(llm.generate("x", 5, draft_model=twin, cancel=cancel)))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        cancel.cancel()
        thread.join(10)
        assert not thread.is_alive()
    assert got[0].finish_reason == "cancelled"
    assert llm.generate("x", 5, draft_model=twin).token_ids
