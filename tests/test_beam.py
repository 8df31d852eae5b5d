"""Beam search against exhaustive search, against transformers, and its slots against computing every beam anew."""

import itertools
import math
import re

import numpy as np
import pytest

import edgellama
from checkpoints import make_checkpoint
from closeness import ORACLE_TOLERANCE
from edgellama import CancelToken
from edgellama.beam import BeamParams, BeamSearch
from edgellama.config import LlamaConfig
from edgellama.errors import CancelledError, EdgellamaError
from edgellama.generate.beams import SlotBeams
from edgellama.generate.engine import Engine
from edgellama.logprob import log_softmax, token_logprobs
from fakes import CONFIG

EOS = frozenset({0})


def beam_search(beams, params, **options):
    """The whole search."""
    search = BeamSearch(beams, params, **options)
    while search.step():
        pass
    assert not search.step()  # it stays over
    return search.best()


def slot_beams(backend, prompt, slots):
    """With an engine whose slots know nothing."""
    engine = Engine(backend, backend.config)
    return SlotBeams(engine, np.array(prompt, np.int32), [engine.slots.slots[slot] for slot in slots])


class TableBeams:
    """A model whose logits are random, but the same for the same ids; `calls` counts the beams of each step."""

    def __init__(self, vocab_size, seed=0):
        self.vocab_size, self.seed, self.calls, self.texts = vocab_size, seed, [], [()]

    def logits(self, ids):
        return np.random.default_rng([self.seed, *ids, 99]).normal(0, 1.5, self.vocab_size).astype(np.float32)

    def start(self):
        return self.logits(())[None]

    def advance(self, sources, tokens):
        self.calls.append(len(tokens))
        self.texts = [(*self.texts[source], token) for source, token in zip(sources, tokens, strict=True)]
        return np.stack([self.logits(ids) for ids in self.texts])


def exhaustive(model, length, eos_ids, penalty):
    """Every text that ends with an id of `eos_ids`, or at `length`: (score, ids), best first."""
    found = []
    for n in range(1, length + 1):
        for ids in itertools.product(range(model.vocab_size), repeat=n):
            if any(token in eos_ids for token in ids[:-1]) or (n < length and ids[-1] not in eos_ids):
                continue
            logprob = sum(
                math.log(np.exp(row[token].astype(float)) / np.exp(row.astype(float)).sum())
                for row, token in ((model.logits(ids[:i]), ids[i]) for i in range(n))
            )
            found.append((logprob / n**penalty, ids))
    return sorted(found, key=lambda each: -each[0])


@pytest.mark.parametrize("early_stopping", [False, "never"])
@pytest.mark.parametrize("penalty", [1.0, 0.0, -0.5, 2.0])
@pytest.mark.parametrize("eos_ids", [frozenset(), EOS, frozenset({0, 3})])
def test_with_beams_for_everything_it_is_exhaustive_search(eos_ids, penalty, early_stopping):
    for seed in range(3):
        model = TableBeams(4, seed)
        expected = exhaustive(model, 4, eos_ids, penalty)
        params = BeamParams(len(expected), len(expected), penalty, early_stopping)
        got = beam_search(model, params, max_new_tokens=4, eos_ids=eos_ids)
        assert [each.token_ids for each in got] == [ids for _, ids in expected]
        np.testing.assert_allclose([each.score for each in got], [score for score, _ in expected], rtol=1e-12)
        for each in got:
            assert each.finish_reason == ("stop" if each.token_ids[-1] in eos_ids else "length")
            assert each.score == pytest.approx(each.logprob / len(each.token_ids) ** penalty)


def test_few_beams_find_less_than_many_and_never_more_than_there_is():
    misses = 0
    for seed in range(30):
        best = exhaustive(TableBeams(4, seed), 4, EOS, 1.0)[0]
        scores = [
            beam_search(TableBeams(4, seed), BeamParams(n, early_stopping="never"), max_new_tokens=4, eos_ids=EOS)[
                0
            ].score
            for n in (1, 2, 8)
        ]
        assert max(scores) <= best[0] + 1e-12
        misses += scores[0] < best[0] - 1e-9
    assert misses > 0  # or else this says nothing about pruning


def test_one_beam_that_stops_early_is_greedy():
    for seed in range(20):
        model, ids = TableBeams(6, seed), ()
        while len(ids) < 8 and (not ids or ids[-1] != 0):
            ids += (int(model.logits(ids).argmax()),)
        (got,) = beam_search(model, BeamParams(1, early_stopping=True), max_new_tokens=8, eos_ids=EOS)
        assert got.token_ids == ids


def test_early_stopping_stops_earlier():
    steps = {}
    for early_stopping in (True, False, "never"):
        counts = []
        for seed in range(10):
            model = TableBeams(6, seed)
            beam_search(model, BeamParams(3, 1, 1.0, early_stopping), max_new_tokens=12, eos_ids=EOS)
            counts.append(len(model.calls))
        steps[early_stopping] = sum(counts)
    assert steps[True] < steps[False] < steps["never"]


def test_ties_go_to_the_lower_id_of_the_better_beam():
    class Flat(TableBeams):
        def logits(self, ids):
            return np.zeros(self.vocab_size, np.float32)

    got = beam_search(Flat(5), BeamParams(3, 3), max_new_tokens=2, eos_ids=frozenset())
    assert [each.token_ids for each in got] == [(0, 0), (0, 1), (0, 2)]


class NoRepeats:
    """A `Guide`: no id of the prompt or the beam again; the beam is finished with five."""

    def __init__(self, ids):
        self.ids = ids

    def adjust(self, logprobs):
        assert logprobs.dtype == np.float32
        changed = logprobs.copy()
        changed[list(self.ids)] = -np.inf
        return changed

    def after(self, token):
        return NoRepeats((*self.ids, token))

    @property
    def finished(self):
        return len(self.ids) == 5


def test_a_guide_follows_each_beam():
    got = beam_search(TableBeams(6), BeamParams(3, 3), max_new_tokens=9, eos_ids=frozenset(), guide=NoRepeats((5,)))
    assert all(len({5, *each.token_ids}) == 5 == 1 + len(each.token_ids) for each in got)
    assert {each.finish_reason for each in got} == {"stop"}
    model, best = TableBeams(6), []
    for ids in itertools.permutations(range(5), 4):
        logprobs = [log_softmax(model.logits(ids[:i]))[ids[i]] for i in range(4)]
        best.append((sum(logprobs) / 4, ids))
    all_beams = BeamParams(len(best), 3)
    got = beam_search(model, all_beams, max_new_tokens=9, eos_ids=frozenset(), guide=NoRepeats((5,)))
    assert [each.token_ids for each in got] == [ids for _, ids in sorted(best, reverse=True)[:3]]


def test_a_text_may_be_stopped_by_what_it_says():
    got = beam_search(
        TableBeams(5), BeamParams(4, 4), max_new_tokens=6, eos_ids=EOS, stop=lambda ids: ids[-2:] == (2, 3)
    )
    assert all(each.token_ids[-2:] == (2, 3) or each.token_ids[-1] == 0 or len(each.token_ids) == 6 for each in got)
    assert all((2, 3) not in itertools.pairwise(each.token_ids[:-1]) for each in got)


def test_a_search_that_is_left_early_gives_what_is_there():
    search = BeamSearch(TableBeams(5), BeamParams(2, 2), max_new_tokens=50, eos_ids=frozenset())
    assert search.best() == []
    assert [search.step() for _ in range(3)] == [True] * 3
    got = search.best("time")
    assert [(len(each.token_ids), each.finish_reason) for each in got] == [(3, "time")] * 2
    assert got[0].score == got[0].logprob / 3 >= got[1].score
    assert search.step() and search.length == 4


def test_a_step_that_fails_can_be_repeated():
    class Failing(TableBeams):
        fails = False

        def advance(self, sources, tokens):
            if self.fails:
                raise InterruptedError
            return super().advance(sources, tokens)

    model = Failing(5)
    search = BeamSearch(model, BeamParams(3, 3), max_new_tokens=5, eos_ids=EOS)
    search.step()
    model.fails = True
    with pytest.raises(InterruptedError):
        search.step()
    model.fails = False
    while search.step():
        pass
    assert search.best() == beam_search(TableBeams(5), BeamParams(3, 3), max_new_tokens=5, eos_ids=EOS)


def test_when_everything_is_forbidden_it_says_so():
    with pytest.raises(EdgellamaError, match="every next token has been forbidden"):
        beam_search(TableBeams(3), BeamParams(2), max_new_tokens=3, eos_ids=EOS, guide=NoRepeats((0, 1, 2)))


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"num_beams": 0}, ValueError, "num_beams must be at least 1"),
        ({"num_beams": 2.0}, TypeError, "num_beams must be an integer"),
        ({"num_beams": True}, TypeError, "num_beams"),
        ({"num_beams": 2, "num_return_sequences": 3}, ValueError, r"at most num_beams \(2\), got 3"),
        ({"num_beams": 2, "length_penalty": math.nan}, ValueError, "length_penalty must be finite"),
        ({"num_beams": 2, "length_penalty": "1"}, TypeError, "length_penalty must be a number"),
        ({"num_beams": 2, "early_stopping": "always"}, ValueError, 'early_stopping must be False, True or "never"'),
    ],
)
def test_parameters_that_are_none(values, error, says):
    with pytest.raises(error, match=says):
        BeamParams(**values)


def test_logprobs():
    logits = np.array([[0.0, 1.0, 2.0], [1e4, 0.0, -1e4]], np.float32)
    expected = logits[0].astype(float) - math.log(sum(math.exp(x) for x in (0, 1, 2)))
    np.testing.assert_allclose(log_softmax(logits)[0], expected, rtol=1e-12)
    assert log_softmax(logits)[1].tolist() == [0.0, -1e4, -2e4]
    np.testing.assert_allclose(token_logprobs(logits, np.array([2, 1])), [expected[2], -1e4])
    with pytest.raises(EdgellamaError, match="not finite"):
        log_softmax(np.array([[0.0, np.nan]]))


# -- beams in slots --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    from edgellama.format import open_model
    from edgellama_convert import convert

    folder = tmp_path_factory.mktemp("beam")
    make_checkpoint(folder / "hf")
    convert(folder / "hf", folder / "m.edgellama", method="rtn")
    with open_model(folder / "m.edgellama") as file:
        yield file


@pytest.mark.parametrize("kv_cache", ["float16", "int8", "float32"])
def test_beams_in_slots_have_the_bits_of_texts_computed_anew(model_file, kv_cache):
    from edgellama.backends.cpu import CpuBackend
    from edgellama.backends.reference import ReferenceBackend

    def backend(n_slots):
        if kv_cache == "float32":
            return ReferenceBackend(model_file, 64, n_slots)
        return CpuBackend(model_file, 64, n_slots, n_threads=2, kv_cache=kv_cache)

    alone = backend(1)
    prompt = [1, 9, 30, 77]

    def anew(ids):
        n = len(prompt)
        logits = alone.forward(prompt, np.arange(n), np.zeros(n, int), [n - 1])
        for i, token in enumerate(ids):
            logits = alone.forward([token], [n + i], [0], [0])
        return logits[0]

    beams = slot_beams(backend(5), prompt, [3, 0, 4, 1])
    assert (
        np.allclose(beams.start()[0], anew([]), atol=1e-4)
        if kv_cache == "float32"
        else (beams.start() == anew([])).all()
    )
    texts = [[]]
    random = np.random.default_rng(0)
    for width in (4, 4, 3, 4, 1, 4, 4, 4, 2, 4):
        sources = random.integers(0, len(texts), width).tolist()
        tokens = random.integers(0, 277, width).tolist()
        texts = [[*texts[source], token] for source, token in zip(sources, tokens, strict=True)]
        logits = beams.advance(sources, tokens)
        for row, ids in zip(logits, texts, strict=True):
            if kv_cache == "float32":  # BLAS adds in another order for another number of rows
                np.testing.assert_allclose(row, anew(ids), atol=1e-4)
            else:
                assert (row == anew(ids)).all()
        held = [slot.tokens.tolist() for slot in beams._places]
        assert held == [prompt + ids for ids in texts]


def test_beams_stay_in_their_slots_and_copy_only_what_differs():
    class Recorder:
        n_ctx, n_slots, batch_invariant, config = 32, 3, True, LlamaConfig.from_dict(CONFIG)

        def __init__(self):
            self.copies = []

        def copy_slot(self, source, target, n, start=0):
            self.copies.append((source, target, n, start))

        def forward(self, tokens, positions, slots, rows):
            return np.zeros((len(rows), 8), np.float32)

    recorder = Recorder()
    beams = slot_beams(recorder, [1, 2, 3], [0, 1, 2])
    beams.start()
    beams.advance([0, 0, 0], [4, 5, 6])
    assert recorder.copies == [(0, 1, 3, 0), (0, 2, 3, 0)]
    recorder.copies.clear()
    beams.advance([2, 0, 1], [4, 4, 4])  # other ranks, nothing to copy
    assert recorder.copies == []
    beams.advance([0, 0, 2], [7, 7, 7])  # beam 1 ends; its slot takes over what differs, behind the prompt
    assert recorder.copies == [(2, 0, 5, 3)]


def test_beams_are_where_they_were_when_the_model_fails(model_file):
    from edgellama.backends.cpu import CpuBackend

    backend = CpuBackend(model_file, 64, 3, n_threads=2)
    params, prompt = BeamParams(3, 3), [1, 9, 30]
    options = {"max_new_tokens": 10, "eos_ids": frozenset()}
    expected = beam_search(slot_beams(backend, prompt, [0, 1, 2]), params, **options)
    beams = slot_beams(backend, prompt, [0, 1, 2])
    search, going = BeamSearch(beams, params, **options), True
    while going:
        beams._cancel = CancelToken()
        beams._cancel.cancel()
        with pytest.raises(CancelledError):
            search.step()
        beams._cancel = None
        going = search.step()
    assert search.best() == expected


# -- generate(num_beams=...) -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tiny_model):
    with edgellama.load(tiny_model, n_ctx=64, n_slots=4, n_threads=2) as model:
        yield model


def search_alone(llm, prompt, params, **options):
    """With a backend of its own."""
    from edgellama.backends.cpu import CpuBackend

    backend = CpuBackend(llm.file, 64, params.num_beams, n_threads=1)
    return beam_search(slot_beams(backend, prompt, range(params.num_beams)), params, eos_ids=llm.eos_ids, **options)


def test_generate_returns_the_best_texts(llm):
    prompt = llm.tokenizer.encode("Hello")
    expected = search_alone(llm, prompt, BeamParams(4, 3, 0.5), max_new_tokens=10)
    got = llm.generate("Hello", 10, num_beams=4, num_return_sequences=3, length_penalty=0.5)
    assert [tuple(each.token_ids) for each in got] == [each.token_ids for each in expected]
    assert [each.index for each in got] == [0, 1, 2]
    for each, text in zip(got, expected, strict=True):
        assert each.finish_reason == text.finish_reason
        assert each.text == llm.tokenizer.decode(each.token_ids, skip_special_tokens=True)
        assert each.timings.prefill_s > 0 and each.timings.ttft_s > 0
    assert llm.generate("Hello", 10, num_beams=4, length_penalty=0.5).token_ids == got[0].token_ids
    assert llm.generate("Hello", 10, num_beams=4, temperature=2.0, length_penalty=0.5).token_ids == got[0].token_ids


def test_several_prompts_and_what_earlier_calls_left_in_the_cache_change_nothing(llm):
    prompts = ["The quick brown fox jumps", "The quick brown fox sleeps", "x"]
    expected = [search_alone(llm, llm.tokenizer.encode(p), BeamParams(3), max_new_tokens=8)[0] for p in prompts]
    for _ in range(2):
        llm.generate("The quick brown fox", 5, temperature=0)
        calls = []
        got = llm.generate(prompts, 8, num_beams=3, progress=lambda *now, calls=calls: calls.append(now))
        assert [tuple(each.token_ids) for each in got] == [each.token_ids for each in expected]
        assert calls[-1] == (sum(len(llm.tokenizer.encode(p)) for p in prompts),) * 2
    assert got[1].timings.cached_tokens >= 16
    fresh = llm.generate(prompts[0], 20, temperature=0)
    llm.reset()
    assert llm.generate(prompts[0], 20, temperature=0).token_ids == fresh.token_ids


def test_penalties_and_bans_hold_in_every_beam(llm):
    got = llm.generate("Hello", 20, num_beams=4, num_return_sequences=4, no_repeat_ngram_size=1, min_new_tokens=5)
    for each in got:
        assert len(set(each.token_ids)) == len(each.token_ids) >= 5
        assert not set(each.token_ids) & set(each.prompt_token_ids)
    banned = got[0].token_ids[0]
    again = llm.generate("Hello", 5, num_beams=4, num_return_sequences=4, bad_words_ids=[[banned]])
    assert all(banned not in each.token_ids for each in again)


def test_stop_strings_end_beams(llm):
    free = llm.generate("Hello", 12, num_beams=3, num_return_sequences=3, eos_token_id=[])
    stop = next(char for char in free[0].text if char.isascii() and char.isprintable())
    got = llm.generate("Hello", 12, num_beams=3, num_return_sequences=3, eos_token_id=[], stop=stop)
    assert all(stop not in each.text for each in got)
    assert any(each.stop == stop and each.finish_reason == "stop" for each in got)


def test_a_constraint_holds_in_every_beam(llm):
    pytest.importorskip("llguidance")
    got = llm.generate("Hello", 20, num_beams=4, num_return_sequences=4, regex="[a-f]{2,4}(x|yz)")
    assert len({each.text for each in got}) == 4
    assert all(re.fullmatch("[a-f]{2,4}(x|yz)", each.text) and each.finish_reason == "stop" for each in got)
    choices = ["Paris", "Rome", "London"]
    every = llm.generate("Hello", 20, num_beams=4, num_return_sequences=3, choice=choices, length_penalty=0.0)
    assert {each.text for each in every} == set(choices)


def test_a_search_ends_on_time_or_request(llm):
    cancel = CancelToken()
    cancel.cancel()
    got = llm.generate(["Hello", "World"], 10, num_beams=2, cancel=cancel)
    assert [(each.finish_reason, each.token_ids) for each in got] == [("cancelled", [])] * 2
    got = llm.generate("Hello", 40, num_beams=4, max_time=1e-9, eos_token_id=[])
    assert got.finish_reason == "time" and got.token_ids == []
    cancel = CancelToken()

    def stop_after_the_prompt(done, total):
        cancel.cancel()

    got = llm.generate("Hello", 40, num_beams=4, cancel=cancel, progress=stop_after_the_prompt, eos_token_id=[])
    assert got.finish_reason == "cancelled" and len(got.token_ids) == 1
    assert llm.generate("Hello", 3, num_beams=4).token_ids  # the model is free


def test_logprobs_are_those_of_plain_decoding(llm):
    """The same texts, forced upon plain decoding; whatever penalties made of the logits, the model's own are told."""

    def force(token_ids):
        def processor(ids, logits):
            logits[np.arange(logits.size) != token_ids[len(ids) - n_prompt]] = -np.inf
            return logits

        return processor

    n_prompt = len(llm.tokenizer.encode("Hello"))
    for options in ({"logprobs": True}, {"top_logprobs": 3, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}):
        found = llm.generate("Hello", 12, num_beams=4, num_return_sequences=3, **options)
        for each in found:
            asked = {name: value for name, value in options.items() if "logprobs" in name}
            plain = llm.generate("Hello", 12, logits_processor=force(each.token_ids), **asked)
            assert plain.token_ids == each.token_ids
            assert each.logprobs == plain.logprobs
    assert llm.generate("Hello", 3, num_beams=2).logprobs is None


def test_options_that_beams_do_not_take(llm):
    with pytest.raises(ValueError, match=r"num_beams 5 needs .* n_slots=5"):
        llm.generate("Hello", 3, num_beams=5)
    with pytest.raises(ValueError, match="num_return_sequences must be at most num_beams"):
        llm.generate("Hello", 3, num_beams=2, num_return_sequences=3)
    with pytest.raises(ValueError, match="logprobs of an echoed prompt"):
        llm.generate("Hello", 3, num_beams=2, logprobs=True, echo=True)
    with pytest.raises(ValueError, match="no beams"):
        llm.generate("Hello", 3, num_beams=2, stream=True)
    assert llm.generate("Hello", 3, num_beams=2).token_ids


# -- transformers ----------------------------------------------------------------------------------------------------

CONFIGS = {
    "gqa": {"num_key_value_heads": 3},
    "tied biases": {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 6},
    "small vocabulary": {"vocab_size": 23, "num_hidden_layers": 1},
}
SEARCHES = [
    (2, 1.0, False),
    (3, 1.0, True),
    (4, 0.0, "never"),
    (4, 2.0, False),
    (5, 1.5, "never"),
    (3, -1.0, False),
    (6, -0.5, True),
]


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_texts_and_scores_are_those_of_transformers(name, tmp_path):
    """On the float32 reference ids are equal and scores agree to rounding; on the CPU scores do, to its own."""
    import torch
    from transformers import LlamaForCausalLM

    from edgellama.backends.cpu import CpuBackend
    from edgellama.backends.reference import ReferenceBackend
    from edgellama.format import open_model
    from edgellama_convert import convert, export_hf

    torch.set_num_threads(1)
    finished = different = 0
    for seed in range(2):
        folder = tmp_path / str(seed)
        config = make_checkpoint(folder / "hf", seed=seed, **CONFIGS[name])
        convert(folder / "hf", folder / "m.edgellama", method="search")
        export_hf(folder / "m.edgellama", folder / "exported", dtype="float32")
        model = LlamaForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32).eval()
        vocab, length = config["vocab_size"], 12
        # Enough end-of-text ids that beams end at every length.
        eos_sets = ([2], list(range(2, vocab, 5)))
        with open_model(folder / "m.edgellama") as file:
            reference, cpu = ReferenceBackend(file, 64, 6), CpuBackend(file, 64, 6, n_threads=2)
            for (num_beams, penalty, early_stopping), eos in itertools.product(SEARCHES, eos_sets):
                prompt = [1, *((np.arange(5) * 31 + num_beams + 7 * seed) % vocab).tolist()]
                expected = model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    num_beams=num_beams,
                    num_return_sequences=num_beams,
                    length_penalty=penalty,
                    early_stopping=early_stopping,
                    do_sample=False,
                    max_new_tokens=length,
                    eos_token_id=eos,
                    pad_token_id=vocab - 1,
                    return_dict_in_generate=True,
                    output_scores=True,
                )
                texts = [_until_eos(ids, eos) for ids in expected.sequences[:, len(prompt) :].tolist()]
                scores = expected.sequences_scores.tolist()
                params = BeamParams(num_beams, num_beams, penalty, early_stopping)
                for backend in (reference, cpu):
                    beams = slot_beams(backend, prompt, range(num_beams))
                    got = beam_search(beams, params, max_new_tokens=length, eos_ids=frozenset(eos))
                    for each in got:
                        finished += each.finish_reason == "stop"
                    if [each.token_ids for each in got] != texts:
                        # On the CPU's own rounding a near tie on the way went the other way: that is no mistake if
                        # what it found has the scores that it says.
                        assert backend is cpu, (name, seed, params, eos)
                        different += 1
                        scores = [_score(reference, prompt, each.token_ids, penalty) for each in got]
                    # Errors of `length` log-probabilities add up; the penalty divides them by at least 1, or by at
                    # least length ** penalty where it is negative.
                    error = REFERENCE_ERROR if backend is reference else CPU_ERROR
                    worst = np.abs(np.subtract([each.score for each in got], scores)).max()
                    assert worst <= error * length * max(1, length**-penalty)
    assert finished > 30 and different <= 2  # texts that end by themselves; near ties


@pytest.mark.torch
@pytest.mark.models
def test_texts_of_a_real_model_are_those_of_transformers(minimind_dir, tmp_path):
    import torch
    from transformers import LlamaForCausalLM

    from edgellama_convert import convert, export_hf

    torch.set_num_threads(1)
    convert(minimind_dir, tmp_path / "m.edgellama", method="search")
    export_hf(tmp_path / "m.edgellama", tmp_path / "exported", dtype="float32")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    for device in ("reference", "cpu"):
        with edgellama.load(tmp_path / "m.edgellama", device=device, n_ctx=128, n_slots=4) as llm:
            for prompt, options in [
                ("The capital of France is", {"num_beams": 4}),
                ("Once upon a time", {"num_beams": 3, "length_penalty": 0.5, "no_repeat_ngram_size": 3}),
                ("1, 2, 3,", {"num_beams": 2, "early_stopping": True, "repetition_penalty": 1.2}),
            ]:
                ids = llm.tokenizer.encode(prompt)
                expected = model.generate(
                    torch.tensor([ids]),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                    do_sample=False,
                    max_new_tokens=24,
                    eos_token_id=sorted(llm.eos_ids),
                    pad_token_id=0,
                    **options,
                )[0, len(ids) :]
                neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, **options}
                got = llm.generate(prompt, 24, **neutral)
                assert got.token_ids == list(_until_eos(expected.tolist(), llm.eos_ids)), (device, prompt)


# Of one log-probability. The reference's: twice the largest error of a logit, whose range is below 25 here. The CPU's:
# a divergence of 1e-6 (see closeness.py) comes of an error of some sqrt(2e-6) in each logit; four times that.
REFERENCE_ERROR = 2 * ORACLE_TOLERANCE * 25
CPU_ERROR = 4 * math.sqrt(2e-6)


def _score(backend, prompt, ids, penalty):
    """Of a text that is computed in one call."""
    whole = np.array([*prompt, *ids])
    rows = np.arange(len(prompt) - 1, len(whole) - 1)
    logits = backend.forward(whole, np.arange(len(whole)), np.zeros(len(whole), int), rows)
    return token_logprobs(logits, np.array(ids)).sum() / len(ids) ** penalty


def _until_eos(ids, eos):
    end = next((i + 1 for i, token in enumerate(ids) if token in eos), len(ids))
    return tuple(ids[:end])
