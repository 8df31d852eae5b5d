"""One token stops load, prefill and decode; progress is told; Python goes on meanwhile; streams for event loops."""

import asyncio
import gc
import random
import threading
import time

import numpy as np
import pytest

import edgellama
from checkpoints import make_checkpoint
from edgellama.errors import CancelledError
from edgellama.generate.engine import CHUNK
from fakes import fake_llama, hash_llama

LIMIT_S = 60  # a test that hits it has found a deadlock


def some_ids(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(2, 30) for _ in range(n)]


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory):
    """A model with a long context whose prefill of it takes a second or so."""
    from edgellama_convert import convert

    folder = tmp_path_factory.mktemp("slow")
    make_checkpoint(folder / "hf", hidden_size=768, intermediate_size=2048, num_hidden_layers=4, vocab_size=300,
                    num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=4096)  # fmt: skip
    convert(folder / "hf", folder / "m.edgellama", method="rtn")
    return folder / "m.edgellama"


# -- the token -------------------------------------------------------------------------------------------------------


def test_a_token_calls_back_once_it_is_cancelled():
    token, calls = edgellama.CancelToken(), []
    token.link(lambda: calls.append(1))
    assert not token.cancelled
    token.raise_if_cancelled()
    token.cancel()
    token.cancel()
    assert token.cancelled and calls == [1, 1]
    with pytest.raises(CancelledError):
        token.raise_if_cancelled()
    token.link(lambda: calls.append(2))  # at once
    assert calls == [1, 1, 2]


def test_unlinked_callbacks_are_not_called():
    token, calls = edgellama.CancelToken(), []

    def callback():
        calls.append(1)

    token.unlink(callback)  # was never linked
    token.link(callback)
    token.unlink(callback)
    token.cancel()
    assert calls == []


# -- load ------------------------------------------------------------------------------------------------------------


def test_load_tells_its_progress(tiny_model):
    told = []
    with edgellama.load(tiny_model, progress=told.append) as llm:
        assert llm.load_s > 0
    assert told == sorted(told) and told[0] == 0 and told[-1] == 1


def test_load_can_be_cancelled_before_and_meanwhile(tiny_model, monkeypatch):
    token = edgellama.CancelToken()
    token.cancel()
    with pytest.raises(CancelledError):
        edgellama.load(tiny_model, cancel=token)
    monkeypatch.setattr("edgellama.format.reader._CHUNK", 1 << 12)
    token, told = edgellama.CancelToken(), []

    def progress(fraction):
        told.append(fraction)
        if fraction > 0.5:
            token.cancel()

    with pytest.raises(CancelledError):
        edgellama.load(tiny_model, cancel=token, progress=progress)
    assert 0.5 < told[-1] < 0.75


# -- prefill and decode ----------------------------------------------------------------------------------------------


def test_a_cancelled_token_stops_a_call_before_it_begins():
    llm, token = fake_llama(n_slots=2), edgellama.CancelToken()
    token.cancel()
    results = llm.generate(["a", "c", "e"], 5, cancel=token)
    assert [(result.text, result.finish_reason) for result in results] == [("", "cancelled")] * 3
    assert llm.backend.calls == []
    stream = llm.generate("a", 5, cancel=token, stream=True)
    assert list(stream) == [] and stream.result.finish_reason == "cancelled"


def test_cancel_from_another_thread_ends_a_batch():
    llm, token = fake_llama(delay=60, n_slots=2), edgellama.CancelToken()
    threading.Timer(0.05, token.cancel).start()
    results = llm.generate(["a", "c", "e"], 20, cancel=token)
    assert [(result.token_ids, result.finish_reason) for result in results] == [([], "cancelled")] * 3
    llm.backend.delay = 0
    assert llm.generate("a", 2, temperature=0).text == "bc"


def test_what_a_reply_has_said_stays():
    llm, token = fake_llama(), edgellama.CancelToken()

    def processor(ids, logits):
        if len(ids) == 5:
            token.cancel()
        return logits

    result = llm.generate("a", 20, temperature=0, cancel=token, logits_processor=processor, stop="ez")
    assert (result.text, result.finish_reason) == ("bcde", "cancelled")  # "e" might have become "ez"


def test_one_token_stops_several_models_and_a_stream_its_own_call_only():
    token = edgellama.CancelToken()
    one, two = (fake_llama().generate("a", 20, temperature=0, cancel=token, stream=True) for _ in range(2))
    assert (next(one), next(two)) == ("b", "b")
    one.cancel()
    assert list(one) == [] and not token.cancelled
    assert next(two) == "c"
    token.cancel()
    assert list(two) == [] and two.result.text == "bc"


def test_a_call_that_waits_for_its_turn_can_be_cancelled():
    llm, token = fake_llama(), edgellama.CancelToken()
    stream = llm.generate("a", 20, temperature=0, stream=True)
    next(stream)
    got = []
    waiting = threading.Thread(target=lambda: got.append(llm.generate("c", 5, cancel=token)), daemon=True)
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive()
    token.cancel()
    waiting.join(LIMIT_S)
    assert [result.finish_reason for result in got] == ["cancelled"]
    assert next(stream) == "c"


def test_cancels_that_come_at_any_time_hit_nothing_else():
    """Calls with tokens that are cancelled at random moments, between calls that must not notice."""
    llm = fake_llama(delay=0.0005)
    expected = llm.generate("a", 8, temperature=0).text
    for i in range(60):
        token = edgellama.CancelToken()
        timer = threading.Timer(i * 0.0002, token.cancel)
        timer.start()
        assert expected.startswith(llm.generate("a", 8, temperature=0, cancel=token).text)
        assert llm.generate("a", 8, temperature=0).text == expected
        timer.join()


def test_prefill_ends_in_mid_pass_and_the_cache_stays_right(slow_model):
    prompt = [1 + i % 290 for i in range(1500)]
    other = [*prompt[:300], 7]
    with edgellama.load(slow_model, n_slots=1, n_threads=1) as llm:
        expected = llm.generate(other, 3, temperature=0, top_logprobs=9)
        llm.reset()
        n_cached = 0
        for at in (CHUNK, 3 * CHUNK):  # the second call goes on where the first one was stopped
            token = edgellama.CancelToken()

            def progress(done, total, token=token, at=at):
                assert total == len(prompt)
                if done >= at:
                    threading.Timer(0.002, token.cancel).start()

            result = llm.generate(prompt, 5, cancel=token, progress=progress)
            assert (result.token_ids, result.finish_reason) == ([], "cancelled")
            assert result.timings.cached_tokens == n_cached
            n_cached = llm.n_past
            assert at <= n_cached < len(prompt)
        again = llm.generate(other, 3, temperature=0, top_logprobs=9)
        assert again.timings.cached_tokens == 300
        assert (again.token_ids, again.logprobs) == (expected.token_ids, expected.logprobs)


def test_a_cancelled_forward_changes_nothing(slow_model):
    ids = [1 + i % 290 for i in range(1000)]
    with edgellama.load(slow_model, n_threads=1) as llm:
        llm.forward(ids[:5])
        token = edgellama.CancelToken()
        threading.Timer(0.005, token.cancel).start()
        with pytest.raises(CancelledError):
            llm.forward(ids[5:], 1, cancel=token)
        assert llm.n_past == 5
        logits = llm.forward(ids[5:9], 1)
        llm.reset()
        assert (logits == llm.forward(ids[:9], 1)).all()


def test_threads_with_batches_streams_and_cancels_at_once():
    """Every thread's replies are what a fresh model says, or a beginning of it where it was cancelled."""
    llm, failures = hash_llama(n_ctx=80, n_slots=2), []
    rng = random.Random(0)
    prompts = [some_ids(rng, 1 + 5 * i) for i in range(8)]
    expected = [hash_llama(n_ctx=80).generate(prompt, 15, temperature=0).token_ids for prompt in prompts]

    def work(seed):
        rng = random.Random(seed)
        try:
            for _ in range(12):
                i, token = rng.randrange(8), edgellama.CancelToken()
                how = rng.randrange(4)
                if how == 0:
                    got = [result.token_ids for result in llm.generate(prompts[i:] + prompts[:i], 15, temperature=0)]
                    assert got == expected[i:] + expected[:i]
                elif how == 1:
                    threading.Timer(rng.random() * 0.01, token.cancel).start()
                    ids = llm.generate(prompts[i], 15, temperature=0, cancel=token).token_ids
                    assert ids == expected[i][: len(ids)]
                elif how == 2:
                    with llm.generate(prompts[i], 15, temperature=0, stream=True) as stream:
                        for _ in zip(range(rng.randrange(9)), stream, strict=False):
                            pass
                    assert stream.token_ids == expected[i][: len(stream.token_ids)]
                else:
                    assert llm.generate(prompts[i], 15, temperature=0).token_ids == expected[i]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "deadlock"
    assert failures == []


# -- progress --------------------------------------------------------------------------------------------------------


def test_prefill_tells_its_progress():
    llm, told = hash_llama(n_ctx=1000, eos_token_id=[]), []
    prompt = list(range(2, 29)) * 30
    llm.generate(prompt, 3, progress=lambda *at: told.append(at))
    assert told == [(256, 810), (512, 810), (768, 810), (810, 810)]
    told.clear()
    llm.generate([*prompt, 7], 3, progress=lambda *at: told.append(at))
    assert told == [(811, 811)]  # what was in the cache counts as done
    told.clear()
    llm.reset()
    llm.generate([[2], prompt, [3, 4]], 3, progress=lambda *at: told.append(at))
    assert told == sorted(told) and told[-1] == (813, 813)


def test_an_error_in_a_callback_ends_the_call():
    llm = fake_llama()

    def progress(done, total):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        llm.generate("a", 3, progress=progress)
    assert llm.generate("a", 2, temperature=0).text == "bc"


# -- Python goes on --------------------------------------------------------------------------------------------------


def test_the_gil_is_free_while_a_prompt_is_computed(slow_model):
    """A thread that wants to run every millisecond, as a window's event loop does, runs during one single pass.

    Were the GIL held, there would be a tick at either end. The pass takes a few hundred milliseconds here.
    """
    with edgellama.load(slow_model, n_threads=1) as llm:
        llm.forward([1])
        llm.reset()
        n_ticks, computing, over = 0, threading.Event(), threading.Event()

        def tick():
            nonlocal n_ticks
            while not over.is_set():
                n_ticks += computing.is_set()
                time.sleep(0.001)

        ticking = threading.Thread(target=tick, daemon=True)
        ticking.start()
        computing.set()
        llm.forward([1 + i % 290 for i in range(1500)], 1)
        computing.clear()
        over.set()
        ticking.join(LIMIT_S)
    assert n_ticks >= 5


# -- event loops -----------------------------------------------------------------------------------------------------


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, LIMIT_S))


def test_an_async_stream_has_the_pieces_and_the_result():
    llm = fake_llama([2, 28, 29, 3])

    async def main():
        stream = llm.astream("a", 4, temperature=0)
        with pytest.raises(ValueError, match="nothing has been generated"):
            stream.result  # noqa: B018
        pieces = [piece async for piece in stream]
        assert [piece async for piece in stream] == []
        return pieces, stream.result

    pieces, result = run(main())
    assert pieces == ["a", "é", "b"] and result.text == "aéb" and result.finish_reason == "length"
    assert llm.generate("a", 1, temperature=0).text == "b"


def test_the_event_loop_stays_free_and_nothing_is_made_that_nobody_takes():
    llm = fake_llama(delay=0.02)

    async def main():
        n_ticks = 0

        async def tick():
            nonlocal n_ticks
            while True:
                n_ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        async with llm.astream("a", 20, temperature=0) as stream:
            assert [await anext(stream), await anext(stream)] == ["b", "c"]
            await asyncio.sleep(0.1)
            assert len(llm.backend.calls) == 2
        ticking.cancel()
        return n_ticks

    assert run(main()) >= 5
    llm.backend.delay = 0
    assert llm.generate("a", 1, temperature=0).text == "b"


def test_cancelling_the_task_cancels_the_reply_and_frees_the_model():
    llm = fake_llama(delay=60)

    async def main():
        stream = llm.astream("a", 20, temperature=0)
        task = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        llm.backend.delay = 0
        assert llm.generate("a", 1, temperature=0).text == "b"  # in this very thread: it would wait for ever
        assert stream.result.finish_reason == "cancelled"
        assert [piece async for piece in stream] == []

    run(main())


def test_cancel_and_a_token_end_an_async_stream():
    async def main():
        token = edgellama.CancelToken()
        for stop, options in ((lambda stream: stream.cancel(), {}), (lambda _: token.cancel(), {"cancel": token})):
            llm = fake_llama()
            stream = llm.astream("a", 20, temperature=0, **options)
            await anext(stream)
            stop(stream)
            assert [piece async for piece in stream] == [] and stream.result.text == "b"
            assert llm.generate("a", 1, temperature=0).text == "b"

    run(main())


def test_several_async_streams_take_turns_and_a_dropped_one_frees_the_model():
    llm = fake_llama()

    async def all_of(letter):
        return "".join([piece async for piece in llm.astream(letter, 3, temperature=0)])

    async def main():
        assert await asyncio.gather(*map(all_of, "ace")) == ["bcd", "def", "fgh"]
        async for _ in llm.astream("a", 20, temperature=0):
            break
        gc.collect()
        assert await all_of("g") == "hij"

    run(main())


def test_errors_come_to_whoever_awaits():
    async def main():
        with pytest.raises(edgellama.ContextError):
            await anext(fake_llama(n_ctx=8).astream("a" * 20))
        with pytest.raises(TypeError, match="temprature"):
            await anext(fake_llama().astream("a", temprature=1))

    run(main())


def test_results_are_plain_values():
    result = fake_llama().generate("a", 2, temperature=0, top_logprobs=1)
    assert result.to_dict()["logprobs"][0]["token_id"] == 3
    with pytest.raises(AttributeError):
        result.text = "x"
    assert np.isfinite([entry.logprob for entry in result.logprobs]).all()
