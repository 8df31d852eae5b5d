"""Many replies at once: results as one by one, slots that are shared out, prefixes that are reused, windows that slide.

The HashBackend notices anything that is reused wrongly; the same is then asked of the real CPU backend, bit by bit.
"""

import contextlib
import json
import random
import threading

import numpy as np
import pytest

import edgellama
from checkpoints import make_checkpoint
from edgellama.errors import ContextError
from edgellama.generate.engine import CHUNK, SCORED_CHUNK
from edgellama.generate.slots import MIN_SHARED
from edgellama.rope import length_class
from fakes import CONFIG, VOCAB, FakeFile, fake_llama, hash_llama

LONGROPE = {
    "head_dim": 8,
    "max_position_embeddings": 200,
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 40,
    },
}
DYNAMIC = {"max_position_embeddings": 40, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
ROPES = {"default": {}, "dynamic": DYNAMIC, "longrope": LONGROPE}


def some_ids(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(2, VOCAB) for _ in range(n)]


def said(result) -> tuple:
    return result.text, result.token_ids, result.finish_reason, result.stop, result.logprobs


# -- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("n_slots", [1, 2, 5])
def test_a_batch_says_what_each_says_alone(n_slots, rope):
    rng = random.Random(0)
    prompts = [some_ids(rng, rng.randrange(1, 60)) for _ in range(9)]
    prompts += [prompts[0][:30] + some_ids(rng, 5), prompts[0]]
    options = {"temperature": 0.9, "top_logprobs": 2, "stop": ["é", "ab"]}
    results = hash_llama(n_slots=n_slots, n_ctx=90, **ROPES[rope]).generate(prompts, 20, seed=7, **options)
    for index, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        alone = hash_llama(n_ctx=90, **ROPES[rope]).generate(prompt, 20, seed=7 + index, **options)
        assert said(result) == said(alone)
        assert result.index == index and result.prompt_token_ids == prompt
    assert len({result.finish_reason for result in results}) > 1


def test_decode_steps_are_shared_and_a_slot_goes_to_the_next_in_line():
    llm = fake_llama(n_slots=2)
    a, c, y = llm.generate(["a", "c", "y"], 3, temperature=0, eos_token_id=[])
    assert (a.text, c.text, y.text) == ("bcd", "def", "zé")
    tokens = [sorted(zip(call[2], call[0], strict=True)) for call in llm.backend.calls]
    assert tokens == [
        [(0, 0), (0, 2), (1, 0), (1, 4)],  # both prompts in one pass
        [(0, 3), (1, 5)],
        [(0, 4), (1, 6)],
        [(0, 0), (0, 26)],  # the third; a common <s> is not worth a copy
        [(0, 27)],
        [(0, 28)],
    ]


def test_prompts_go_in_chunks_beside_the_decoding_of_others():
    llm = hash_llama(n_ctx=1000, n_slots=2, eos_token_id=[])
    rng = random.Random(2)
    long = some_ids(rng, 700)
    short, result = llm.generate([[5, 6], long], 10, temperature=0)
    assert max(len(call) for call in llm.backend.calls) == CHUNK
    assert len(short.token_ids) == len(result.token_ids) == 10
    for call in llm.backend.calls[1:3]:
        assert {slot for slot, _, _ in call} == {0, 1}  # the short one is not kept waiting


def test_several_sequences_share_the_prompt():
    prompt = list(range(2, 29)) * 3
    llm = hash_llama(n_ctx=200, n_slots=4, eos_token_id=[])
    results = llm.generate(prompt, 5, num_return_sequences=6, seed=3, temperature=1.5)
    assert [result.index for result in results] == list(range(6))
    computed = [at for call in llm.backend.calls for _, at, _ in call if at < len(prompt) - 1]
    assert sorted(computed) == list(range(len(prompt) - 1)), "every token but the last once"
    assert len(llm.backend.copies) == 3
    alone = [hash_llama(n_ctx=200, eos_token_id=[]).generate(prompt, 5, seed=3 + i, temperature=1.5) for i in range(6)]
    assert [said(result) for result in results] == [said(result) for result in alone]
    assert len({tuple(result.token_ids) for result in results}) > 3


def test_a_backend_that_cannot_copy_computes_again():
    llm = hash_llama(n_ctx=200, eos_token_id=[])
    llm._engine.slots.copies = False
    prompt = list(range(2, 29)) * 3
    results = llm.generate(prompt, 5, num_return_sequences=3, seed=3)
    alone = [hash_llama(n_ctx=200, eos_token_id=[]).generate(prompt, 5, seed=3 + i) for i in range(3)]
    assert [said(result) for result in results] == [said(result) for result in alone]
    assert llm.backend.copies == []


def test_one_prompt_in_a_list_is_a_list_of_one_result():
    assert [result.text for result in fake_llama().generate(["a"], 2, temperature=0)] == ["bc"]
    assert [result.text for result in fake_llama().generate([[0, 2]], 2, temperature=0)] == ["bc"]
    array = np.array([[0, 2], [0, 3]])
    assert [result.text for result in fake_llama().generate(array, 2, temperature=0)] == ["bc", "cd"]


@pytest.mark.parametrize(
    ("prompts", "error", "says"),
    [
        (["a", "b\udcff"], edgellama.TokenizerError, "prompt 1: "),
        ([[1], [2, 99]], ValueError, r"prompt 1: .*99"),
        ([[1], []], ValueError, "prompt 1: .*empty"),
        (["a", 3], ValueError, "prompt 1: .*one dimension"),
        ([[1], "a" * 80], ContextError, "prompt 1 has 81 tokens"),
        ([], ValueError, "empty"),
    ],
)
def test_the_wrong_one_of_several_prompts_is_named(prompts, error, says):
    llm = fake_llama()
    with pytest.raises(error, match=says):
        llm.generate(prompts)
    assert llm.backend.calls == []


def test_an_error_in_one_reply_ends_the_call_and_leaves_the_model_usable():
    llm = hash_llama()

    def bad(ids, logits):
        if len(ids) == 4:
            raise RuntimeError("mine")
        return logits

    with pytest.raises(RuntimeError, match="mine"):
        llm.generate([[2, 3], [4]], 9, logits_processor=bad, eos_token_id=[])
    assert said(llm.generate([2, 3], 9, temperature=0)) == said(hash_llama().generate([2, 3], 9, temperature=0))


# -- prefix reuse ----------------------------------------------------------------------------------------------------


def test_a_conversation_computes_only_what_is_new():
    llm = hash_llama(n_ctx=200, eos_token_id=[])
    prompt = list(range(2, 22))
    first = llm.generate(prompt, 6, temperature=0)
    assert first.timings.cached_tokens == 0
    longer = prompt + first.token_ids + [7, 8, 9]
    n_before = len(llm.backend.calls)
    second = llm.generate(longer, 6, temperature=0)
    # The last token of the reply was never computed, since nothing came after it.
    assert second.timings.cached_tokens == len(longer) - 4
    assert [at for _, at, _ in llm.backend.calls[n_before]] == list(range(len(longer) - 4, len(longer)))
    assert said(second) == said(hash_llama(n_ctx=200, eos_token_id=[]).generate(longer, 6, temperature=0))


def test_the_same_prompt_again_computes_one_token():
    llm = hash_llama(eos_token_id=[])
    prompt = list(range(2, 22))
    first, again = (llm.generate(prompt, 6, temperature=0) for _ in range(2))
    assert said(first) == said(again) and again.timings.cached_tokens == len(prompt) - 1


def test_conversations_keep_their_slots_and_the_oldest_goes():
    llm = hash_llama(n_ctx=200, n_slots=3, eos_token_id=[])
    prompts = [[i] * 40 for i in range(2, 6)]
    for prompt in prompts[:3]:
        llm.generate(prompt, 3, temperature=0)
    assert [llm.generate(prompts[i], 3, temperature=0).timings.cached_tokens for i in (0, 2, 1)] == [39, 39, 39]
    llm.generate(prompts[3], 3, temperature=0)  # takes the slot of 0, unused for longest
    assert llm.generate(prompts[0], 3, temperature=0).timings.cached_tokens == 0
    assert llm.generate(prompts[1], 3, temperature=0).timings.cached_tokens == 39


def test_a_common_beginning_is_copied_rather_than_taken_from_a_long_conversation():
    llm = hash_llama(n_ctx=200, n_slots=3, eos_token_id=[])
    system, rng = list(range(2, 2 + MIN_SHARED)), random.Random(0)
    long, other = system + some_ids(rng, 60), system + some_ids(rng, 9)
    llm.generate(long, 3, temperature=0)
    assert llm.generate(other, 3, temperature=0).timings.cached_tokens == MIN_SHARED
    assert [copy[2] for copy in llm.backend.copies] == [MIN_SHARED]
    assert llm.generate(long, 3, temperature=0).timings.cached_tokens == len(long) - 1


def test_reset_forgets_and_prefix_reuse_can_be_switched_off():
    llm = hash_llama()
    llm.generate([5] * 30, 3)
    llm.reset()
    assert llm.generate([5] * 30, 3).timings.cached_tokens == 0
    off = hash_llama(prefix_reuse=False)
    assert [off.generate([5] * 30, 3).timings.cached_tokens for _ in range(2)] == [0, 0]
    unsure = hash_llama()
    unsure.backend.batch_invariant = False
    unsure = type(unsure)(unsure.file, unsure.backend)
    assert [unsure.generate([5] * 30, 3).timings.cached_tokens for _ in range(2)] == [0, 0]


def test_forward_and_generate_share_the_cache():
    llm = hash_llama(eos_token_id=[])
    prompt = list(range(2, 22))
    logits = llm.forward(prompt)
    result = llm.generate(prompt, 4, temperature=0)
    assert result.token_ids[0] == logits[-1].argmax() and result.timings.cached_tokens == len(prompt) - 1
    assert llm.n_past == len(prompt) + 3
    more = llm.forward([result.token_ids[-1], 5])
    fresh = hash_llama(eos_token_id=[]).forward(prompt + result.token_ids + [5])
    assert (more == fresh[-2:]).all()


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("n_slots", [1, 3])
def test_random_calls_say_what_a_fresh_model_says(n_slots, rope):
    """Prompts that share beginnings, batches, forward, reset, failures in mid-pass: never a difference."""
    rng = random.Random(n_slots)
    llm = hash_llama(n_ctx=80, n_slots=n_slots, **ROPES[rope])
    known = [some_ids(rng, 50)]
    n_reused = 0

    def prompt() -> list[int]:
        base = rng.choice(known)
        ids = base[: rng.randrange(1, len(base) + 1)] + some_ids(rng, rng.randrange(4))
        known.append(ids[:70])
        return known[-1]

    for _ in range(150):
        what = rng.randrange(8)
        options = {"temperature": rng.choice([0, 1]), "seed": 5}
        if what == 0:
            llm.reset()
        elif what == 1:
            ids = prompt()
            llm.reset()
            expected = hash_llama(n_ctx=80, **ROPES[rope]).forward(ids, 1)
            assert (llm.forward(ids, 1) == expected).all()
        elif what == 2:
            llm.backend.fail_after = rng.randrange(3)
            with contextlib.suppress(MemoryError):
                llm.generate([prompt(), prompt()], 9)
            llm.backend.fail_after = None
        else:
            batch = [prompt() for _ in range(rng.randrange(1, 5))]
            for index, result in enumerate(llm.generate(batch, 12, **options)):
                fresh = hash_llama(n_ctx=80, **ROPES[rope])
                expected = fresh.generate(batch[index], 12, **{**options, "seed": 5 + index})
                assert said(result) == said(expected)
                n_reused += result.timings.cached_tokens
                known.append((batch[index] + result.token_ids)[:70])
    assert n_reused > 100


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_keys_of_another_rotation_are_not_reused(rope):
    llm = hash_llama(n_ctx=200, eos_token_id=[], **ROPES[rope])
    short, long = [3] * 30, [3] * 60
    llm.generate(short, 3)
    assert llm.generate(short, 3).timings.cached_tokens == 29
    assert llm.generate(long, 3).timings.cached_tokens == 0  # 40 is the original length
    again = llm.generate(long, 3).timings.cached_tokens
    assert again == 59
    assert llm.generate([*long, 4], 3).timings.cached_tokens == (0 if rope == "dynamic" else 60)
    # A whole prompt is rotated as one, however long: it is not cut where that would change the rotation.
    long_llm = hash_llama(n_ctx=2000, n_slots=1, **{**ROPES[rope], "max_position_embeddings": 40})
    long_llm.generate([3] * 700, 1)
    lengths = {length_class(long_llm.config, 1 + max(at for _, at, _ in call)) for call in long_llm.backend.calls}
    assert lengths == {length_class(long_llm.config, 700)}


# -- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_ctx", "rope"), [(2, "default"), (5, "default"), (16, "default"), (60, "dynamic")])
def test_sliding_keeps_the_first_and_the_latest_positions(n_ctx, rope):
    llm = hash_llama(n_ctx=n_ctx, n_slots=1, eos_token_id=[], **ROPES[rope])
    prompt = [7] if n_ctx == 2 else [7, 8, 9, 10]
    result = llm.generate(prompt, 4 * n_ctx, temperature=0, on_full="slide")
    assert len(result.token_ids) == 4 * n_ctx and result.finish_reason == "length"
    # The oracle: every time the window is full, a fresh model gets the kept tokens as its prompt.
    sinks = min(4, n_ctx // 2)
    window, expected = list(prompt), []
    fresh = hash_llama(n_ctx=n_ctx, n_slots=1, eos_token_id=[], **ROPES[rope])
    new = window
    while len(expected) < 4 * n_ctx:
        token = int(fresh.forward(new, 1)[0].argmax())
        expected.append(token)
        window.append(token)
        new = [token]
        if len(window) > n_ctx:
            new = window = window[:sinks] + window[-max(1, (n_ctx - sinks) // 2) :]
            fresh.reset()
    assert result.token_ids == expected
    if rope == "default" and n_ctx > 5:  # the kept beginning is not computed again
        assert min(at for call in llm.backend.calls[1:] for _, at, _ in call) == sinks


def test_sliding_in_a_batch_and_a_prompt_that_does_not_fit():
    prompts = [[5] * 10, [6] * 3]
    llm = hash_llama(n_ctx=16, n_slots=2, eos_token_id=[])
    for prompt, result in zip(prompts, llm.generate(prompts, 40, temperature=0, on_full="slide"), strict=True):
        alone = hash_llama(n_ctx=16, eos_token_id=[]).generate(prompt, 40, temperature=0, on_full="slide")
        assert said(result) == said(alone) and len(result.token_ids) == 40
    with pytest.raises(ContextError, match="16 tokens"):
        llm.generate([5] * 16, on_full="slide")


# -- log-probabilities and echo --------------------------------------------------------------------------------------


def log_softmax(row: np.ndarray) -> np.ndarray:
    wide = row.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


def test_logprobs_are_the_models_own():
    prompt = [7, 8, 9]
    result = hash_llama().generate(prompt, 5, temperature=0, top_logprobs=3, logit_bias={11: -50.0}, eos_token_id=[])
    rows = hash_llama().forward(prompt + result.token_ids)[len(prompt) - 1 : -1]
    assert len(result.logprobs) == 5
    for entry, token_id, row in zip(result.logprobs, result.token_ids, rows, strict=True):
        expected = log_softmax(row)
        assert entry.token_id == token_id and entry.logprob == pytest.approx(expected[token_id], abs=1e-5)
        best = np.argsort(-expected)[:3].tolist()
        assert [index for index, _, _ in entry.top] == best
        assert [value for _, _, value in entry.top] == pytest.approx(expected[best].tolist(), abs=1e-5)
        assert entry.text == ("\ufffd" if token_id in (28, 29) else "" if token_id < 2 else chr(95 + token_id))
    assert hash_llama().generate(prompt, 2).logprobs is None
    plain = hash_llama().generate(prompt, 2, logprobs=True)
    assert [entry.top for entry in plain.logprobs] == [[], []]


@pytest.mark.parametrize("size", [1, 5, SCORED_CHUNK, 2 * SCORED_CHUNK + 7])
def test_echo_has_the_prompt_and_its_logprobs(size):
    prompt = some_ids(random.Random(size), size)
    llm = hash_llama(n_ctx=200, eos_token_id=[])
    llm.generate(prompt, 2)  # what the cache holds already does not matter
    result = llm.generate(prompt, 4, temperature=0, echo=True, logprobs=True)
    rows = hash_llama(n_ctx=200).forward(prompt + result.token_ids)
    every = prompt + result.token_ids
    assert [entry.token_id for entry in result.logprobs] == every
    assert result.logprobs[0].logprob is None
    for i in range(1, len(every)):
        assert result.logprobs[i].logprob == pytest.approx(log_softmax(rows[i - 1])[every[i]], abs=1e-5)
    assert result.text.startswith(llm.tokenizer.decode(prompt))


def test_echo_of_a_text_comes_first_in_a_stream():
    assert list(fake_llama().generate("abc", 2, temperature=0, echo=True, stream=True)) == ["abcd", "e"]
    assert fake_llama().generate("abc", 2, temperature=0, echo=True).text == "abcde"


# -- ends ------------------------------------------------------------------------------------------------------------


def test_eos_ids_of_the_caller_replace_the_models():
    assert fake_llama([3, 4, 1]).generate("a", 9, temperature=0, eos_token_id=4).token_ids == [3, 4]
    assert fake_llama([3, 1, 4, 9]).generate("a", 4, temperature=0, eos_token_id=[4, 9]).token_ids == [3, 1, 4]
    assert len(fake_llama([3, 1, 4]).generate("a", 3, temperature=0, eos_token_id=[]).token_ids) == 3
    for bad in ("a", [1.5], [True], {}):
        with pytest.raises(TypeError, match="eos_token_id"):
            fake_llama().generate("a", eos_token_id=bad)


def test_time_is_up():
    llm = fake_llama(delay=0.01, n_slots=2, eos_token_id=[])
    results = llm.generate(["a", "c", "e"], 60, temperature=0, max_time=0.1)
    assert [result.finish_reason for result in results] == ["time"] * 3
    assert results[0].text == "bcdefghijklmnopq"[: len(results[0].text)] and 1 <= len(results[0].token_ids) < 20
    assert results[2].token_ids == []  # it was still waiting
    assert fake_llama().generate("a", 3, temperature=0, max_time=60).finish_reason == "length"


@pytest.mark.parametrize(
    "options",
    [
        {"max_time": 0},
        {"max_time": "1"},
        {"num_return_sequences": 0},
        {"top_logprobs": -1},
        {"logprobs": 1},
        {"echo": "yes"},
        {"on_full": "stop"},
        {"num_beams": 1.5},
        {"early_stopping": 3},
        {"cancel": threading.Event()},
        {"progress": 3},
        {"logits_processor": 3},
        {"prompt_lookup_num_tokens": 0},
        {"regex": "a", "choice": ["a"]},
        {"num_beams": 2, "prompt_lookup_num_tokens": 3},
        {"num_beams": 2, "on_full": "slide"},
    ],
    ids=lambda options: " ".join(f"{name}={type(value).__name__}" for name, value in options.items()),
)
def test_options_that_make_no_sense_are_named(options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        fake_llama().generate("a", **options)


def test_a_stream_is_of_one_reply():
    for prompt, options in ((["a", "b"], {}), ("a", {"num_return_sequences": 2}), ("a", {"num_beams": 2})):
        with pytest.raises(ValueError, match="stream=True takes one prompt"):
            fake_llama().generate(prompt, stream=True, **options)


def test_logits_processors_see_prompt_and_reply():
    seen = []

    def processor(ids, logits):
        seen.append(ids.tolist())
        return np.where(np.arange(VOCAB) == 9, logits + 100, logits)

    assert fake_llama().generate([2, 3], 3, temperature=0, logits_processor=processor).token_ids == [9, 9, 9]
    assert seen == [[2, 3], [2, 3, 9], [2, 3, 9, 9]]


# -- the real thing --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rope_models(tmp_path_factory):
    """rope type -> a tiny model whose RoPE depends on the call's length from 40 positions on, or not at all."""
    from edgellama_convert import convert

    ropes = {
        "default": {},
        "dynamic": {"max_position_embeddings": 40, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        "longrope": {
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1 + i / 9 for i in range(16)],
                "long_factor": [1.0 + i for i in range(16)],
                "original_max_position_embeddings": 40,
            },
        },
    }
    paths = {}
    for name, config in ropes.items():
        folder = tmp_path_factory.mktemp(name)
        make_checkpoint(folder / "hf", **config)
        convert(folder / "hf", folder / "m.edgellama", method="rtn")
        paths[name] = folder / "m.edgellama"
    return paths


@pytest.mark.parametrize("kv_cache", ["float16", "int8"])
@pytest.mark.parametrize("rope", ROPES)
def test_bits_of_batches_and_of_reused_prefixes(rope_models, rope, kv_cache):
    rng = random.Random(4)
    base = [rng.randrange(3, 277) for _ in range(70)]
    prompts = [
        base[: rng.randrange(1, 70)] + [rng.randrange(3, 277) for _ in range(rng.randrange(9))] for _ in range(10)
    ]
    options = {"temperature": 0.8, "top_logprobs": 4, "eos_token_id": list(range(3, 20)), "seed": 1}

    def load(n_slots):
        return edgellama.load(rope_models[rope], n_ctx=128, n_slots=n_slots, kv_cache=kv_cache, n_threads=2)

    alone = []
    with load(1) as llm:
        for index, prompt in enumerate(prompts):
            llm.reset()
            alone.append(llm.generate(prompt, 20, **{**options, "seed": 1 + index}))
    assert not any(result.timings.cached_tokens for result in alone)
    for n_slots in (1, 3, 8):
        with load(n_slots) as llm:
            batch = llm.generate(prompts, 20, **options)
            assert [said(result) for result in batch] == [said(result) for result in alone]
            again = [llm.generate(prompt, 20, **{**options, "seed": 1 + i}) for i, prompt in enumerate(prompts)]
            assert [said(result) for result in again] == [said(result) for result in alone]
            assert sum(result.timings.cached_tokens for result in again) > 20
            for prompt in prompts:  # and the logits themselves
                llm.reset()
                expected = llm.forward(prompt, 1)
                llm.generate(prompt, 1)
                cached = llm._engine.slots.take(np.array(prompt, np.int32))
                assert cached.n == len(prompt) - 1 or len(prompt) == 1
                got = llm._engine.extend(cached, np.array(prompt[cached.n :], np.int32), 1)
                assert (got == expected).all()
                llm._engine.slots.release(cached)


def test_a_batch_on_the_reference_backend(tiny_model):
    prompts = [[1, 75, 104], [1, 9, 30, 77, 12, 200, 4], [1], [1, 75, 104, 111]]
    with edgellama.load(tiny_model, device="reference", n_slots=2) as llm:
        batch = llm.generate(prompts, 12, temperature=0)
        alone = [llm.generate(prompt, 12, temperature=0) for prompt in prompts]
        assert [result.token_ids for result in batch] == [result.token_ids for result in alone]
        assert not any(result.timings.cached_tokens for result in alone)


@pytest.mark.parametrize("eos", [None, []])
def test_each_reply_of_a_batch_has_a_constraint_of_its_own(tiny_model, eos):
    pytest.importorskip("llguidance")
    prompts = ["Hello", "a", "Once upon", "1"]
    with edgellama.load(tiny_model, n_slots=3) as llm:
        choice = ["yes", "yellow", "no", "never"]
        options = {"seed": 3, "temperature": 2.0, "eos_token_id": eos}
        batch = llm.generate(prompts, 30, choice=choice, num_return_sequences=3, **options)
        assert {result.text for result in batch} <= set(choice) and len({result.text for result in batch}) > 2
        assert {result.finish_reason for result in batch} == {"stop"}
        for i, result in enumerate(batch):
            alone = llm.generate(prompts[i // 3], 30, choice=choice, **{**options, "seed": 3 + i})
            assert said(alone) == said(result)
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
                  "additionalProperties": False}  # fmt: skip
        for result in llm.generate(prompts, 120, json_schema=schema, **options):
            if result.finish_reason == "stop":
                assert isinstance(json.loads(result.text)["n"], int)
        assert "".join(llm.generate("a", 9, regex="[xyz]{4}", stream=True, **options)).strip("xyz") == ""
        with pytest.raises(edgellama.ConstraintError, match="regex"):
            llm.generate("a", regex="(")


@pytest.mark.torch
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_greedy_batches_are_those_of_transformers(tiny_checkpoint, tmp_path, device):
    """Prompts of different lengths, padded on the left there, and a list of end-of-text ids."""
    import torch
    from transformers import LlamaForCausalLM

    from edgellama_convert import convert, export_hf

    convert(tiny_checkpoint, tmp_path / "m.edgellama", method="search")
    export_hf(tmp_path / "m.edgellama", tmp_path / "hf", dtype="float32")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager").eval()
    rng = random.Random(5)
    prompts = [[1] + [rng.randrange(3, 259) for _ in range(n)] for n in (3, 17, 8, 1, 30)]
    eos = [2, *range(20, 40)]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        out = model.generate(
            padded, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=eos, pad_token_id=0
        )[:, longest:].tolist()
    expected = []
    for row in out:
        end = next((i for i, token in enumerate(row) if token in eos), len(row) - 1)
        expected.append(row[: end + 1])
    assert len({len(row) for row in expected}) > 1
    with edgellama.load(tmp_path / "m.edgellama", device=device, n_slots=3) as llm:
        got = llm.generate(prompts, 24, temperature=0, eos_token_id=eos)
    assert [result.token_ids for result in got] == expected


def test_config_of_the_fakes_is_known():
    assert FakeFile().config.vocab_size == CONFIG["vocab_size"] == VOCAB
