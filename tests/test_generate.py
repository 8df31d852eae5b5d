"""The loop: what is fed to the model, when it ends, what the caller gets."""

import gc
import json
import threading

import pytest

from edgellama.errors import ContextError, EdgellamaError, TokenizerError
from fakes import fake_llama

A, B, C, EOS, HALF, OTHER_HALF = 2, 3, 4, 1, 28, 29


def test_one_prefill_then_one_token_at_a_time():
    llm = fake_llama()
    result = llm.generate("a", max_new_tokens=3, temperature=0)
    assert result.text == "bcd"
    assert result.token_ids == [3, 4, 5]
    assert result.prompt_token_ids == [0, 2]
    assert result.finish_reason == "length"
    assert llm.backend.calls == [
        ([0, 2], [0, 1], [0, 0], [1]),
        ([3], [2], [0], [0]),
        ([4], [3], [0], [0]),
    ]


def test_an_end_of_text_token_stops_and_is_not_text():
    result = fake_llama([A, B, EOS]).generate("a", max_new_tokens=50, temperature=0)
    assert (result.text, result.token_ids, result.finish_reason) == ("ab", [A, B, EOS], "stop")


def test_end_of_text_as_the_very_first_token():
    result = fake_llama([EOS]).generate("a", temperature=0)
    assert (result.text, result.token_ids, result.finish_reason) == ("", [EOS], "stop")
    assert result.timings.decode_tps is None
    assert result.timings.ttft_s > 0


@pytest.mark.parametrize("given", [[B, C], [C], C, B, [], None])
def test_eos_ids_come_from_generation_config_before_config(given):
    files = {"generation_config.json": json.dumps({"eos_token_id": given}).encode()}
    result = fake_llama([B, B], files=files, eos_token_id=27).generate("a", 2, temperature=0)
    first_is_eos = given is not None and B in (given if isinstance(given, list) else [given])
    assert result.finish_reason == ("stop" if first_is_eos else "length")


def test_config_eos_list():
    result = fake_llama([A, C], eos_token_id=[1, C]).generate("a", 10, temperature=0)
    assert result.finish_reason == "stop"


def test_defaults_of_the_model_hold_and_arguments_win():
    files = {"generation_config.json": b'{"do_sample": false, "max_new_tokens": 2}'}
    llm = fake_llama(files=files)
    assert llm.generate("a").token_ids == [3, 4]
    assert len(llm.generate("a", 5).token_ids) == 5


def test_stream_is_the_same_text_in_pieces():
    llm = fake_llama([A, HALF, OTHER_HALF, B])
    stream = llm.generate("a", 4, temperature=0, stream=True)
    pieces = list(stream)
    assert pieces == ["a", "é", "b"]
    assert stream.result.text == "aéb"
    assert stream.result.finish_reason == "length"
    assert list(stream) == []


def test_half_a_character_at_the_end_is_flushed_once():
    assert fake_llama([A, HALF]).generate("a", 2, temperature=0).text == "a\ufffd"


def test_nothing_runs_before_the_first_piece_is_asked_for():
    llm = fake_llama()
    stream = llm.generate("a", 3, stream=True)
    assert llm.backend.calls == []
    stream.close()
    assert llm.generate("a", 1, temperature=0).text == "b"


def test_cancel_keeps_what_was_made():
    llm = fake_llama()
    stream = llm.generate("a", 20, temperature=0, stream=True)
    assert [next(stream), next(stream)] == ["b", "c"]
    stream.cancel()
    assert list(stream) == []
    assert (stream.result.text, stream.result.finish_reason) == ("bc", "cancelled")
    assert llm.generate("a", 1, temperature=0).text == "b"


def test_cancel_from_another_thread_ends_a_long_prefill():
    llm = fake_llama(delay=60)
    stream = llm.generate("abc", 20, temperature=0, stream=True)
    timer = threading.Timer(0.05, stream.cancel)
    timer.start()
    assert list(stream) == []
    assert (stream.result.token_ids, stream.result.finish_reason) == ([], "cancelled")
    assert llm.n_past == 0


def test_a_cancel_that_came_too_late_does_not_hit_the_next_call():
    llm = fake_llama()
    llm.backend.cancel()
    assert llm.forward([5]).argmax() == 6
    llm.backend.cancel()
    assert llm.generate("a", 2, temperature=0).text == "bc"


def test_a_dropped_stream_frees_the_model():
    llm = fake_llama()
    for _ in llm.generate("a", 20, stream=True):
        break
    gc.collect()
    assert llm.generate("a", 1, temperature=0).text == "b"


def test_a_stream_left_open_is_told_not_a_deadlock():
    llm = fake_llama()
    with llm.generate("a", 20, stream=True) as stream:
        next(stream)
        for call in (lambda: llm.generate("a"), lambda: llm.forward([1]), llm.reset):
            with pytest.raises(EdgellamaError, match="still open"):
                call()
    llm.reset()


def test_an_exception_in_the_backend_frees_the_model():
    llm = fake_llama()
    forward = llm.backend.forward

    def broken(*_):
        raise MemoryError

    llm.backend.forward = broken
    with pytest.raises(MemoryError):
        llm.generate("a")
    llm.backend.forward = forward
    assert llm.generate("a", 1, temperature=0).text == "b"


def test_an_interrupt_frees_the_model_though_its_traceback_lives_on():
    llm = fake_llama()
    forward, kept = llm.backend.forward, []

    def interrupted(*args):
        raise KeyboardInterrupt

    llm.backend.forward = interrupted
    try:
        llm.generate("a")
    except KeyboardInterrupt as error:
        kept.append(error)
    llm.backend.forward = forward
    assert llm.generate("a", 1, temperature=0).text == "b"


def test_a_prompt_that_does_not_fit_names_both_numbers():
    llm = fake_llama(n_ctx=8)
    with pytest.raises(ContextError, match=r"8 tokens, the context 8"):
        llm.generate("a" * 7)
    with pytest.raises(ContextError, match=r"\b31\b.*\b8\b"):
        llm.generate("a" * 30)
    assert llm.backend.calls == []


def test_a_full_context_ends_the_reply():
    result = fake_llama(n_ctx=8).generate("aaaa", 100, temperature=0)
    assert (len(result.token_ids), result.finish_reason) == (3, "length")


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt(prompt):
    llm = fake_llama()
    llm.tokenizer.encode = lambda text, add_special_tokens=True: []
    with pytest.raises((EdgellamaError, ValueError), match="empty"):
        llm.generate(prompt)


def test_a_tokenizer_that_does_not_fit_the_model():
    llm = fake_llama()
    llm.tokenizer.encode = lambda text, add_special_tokens=True: [5, 3000]
    with pytest.raises(TokenizerError, match="3000"):
        llm.generate("x")


def test_lone_surrogates_in_a_prompt():
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        fake_llama().generate("a\udcff")


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True])
def test_max_new_tokens_is_a_positive_integer(value):
    with pytest.raises((ValueError, TypeError), match="max_new_tokens"):
        fake_llama().generate("a", value)


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="temprature"):
        fake_llama().generate("a", temprature=0)


@pytest.mark.parametrize("text", [b"[1]", b"{", b'{"a": NaN}', b"[" * 100_000])
def test_a_bad_generation_config_is_one_error(text):
    with pytest.raises(EdgellamaError, match=r"generation_config\.json"):
        fake_llama(files={"generation_config.json": text}).generate("a")


def test_timings_have_every_figure():
    result = fake_llama(delay=0.002).generate("abc", 4, temperature=0)
    timings = result.to_dict()["timings"]
    assert set(timings) == {
        "load_s", "prefill_s", "prefill_tps", "decode_tps", "ttft_s", "cached_tokens", "acceptance_rate"
    }  # fmt: skip
    assert timings["ttft_s"] >= timings["prefill_s"] >= 0.002
    assert timings["prefill_tps"] == pytest.approx(4 / timings["prefill_s"])
    assert 0 < timings["decode_tps"] < 500
    json.dumps(result.to_dict())


def test_two_threads_take_turns():
    llm = fake_llama(delay=0.001)
    texts = {}

    def run(letter):
        texts[letter] = "".join(llm.generate(letter, 5, temperature=0, stream=True))

    threads = [threading.Thread(target=run, args=(letter,)) for letter in "aceg"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert texts == {"a": "bcdef", "c": "defgh", "e": "fghij", "g": "hijkl"}


def test_a_stream_that_was_left_by_break_does_not_keep_the_model_busy():
    llm = fake_llama()
    for _ in llm.generate([2], 20, temperature=0, stream=True):
        break
    assert llm.generate([2], 2, temperature=0).token_ids == [3, 4]
