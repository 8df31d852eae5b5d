"""Sampling against a plain definition of each filter, and reproducibility."""

import math

import numpy as np
import pytest

from edgellama.errors import ConfigError, EdgellamaError
from edgellama.sampling import Sampler, SamplingParams, log_softmax, top_logprobs
from edgellama.sampling.filters import draw, min_p, top_k, top_p

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def test_greedy_takes_the_first_of_equal_logits():
    logits = np.array([0.0, 3.0, 3.0, 1.0], np.float32)
    assert Sampler(SamplingParams(temperature=0))(logits) == 1


@pytest.mark.parametrize("k", [1, 2, 3, 50, 999, 1000, 5000])
def test_top_k_is_the_head_of_a_stable_sort(k):
    rng = np.random.default_rng(k)
    logits = rng.integers(-20, 20, 1000).astype(np.float32)  # many ties
    ids, kept = top_k(logits, k)
    expected = np.argsort(-logits, kind="stable")[:k]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(kept, logits[expected])


def test_top_k_zero_keeps_all():
    assert top_k(LOGITS, 0)[0].tolist() == [1, 3, 4, 0, 2]


@pytest.mark.parametrize(("p", "expected"), [(0.3, [1]), (0.41, [1, 3]), (0.65, [1, 3]), (0.86, [1, 3, 4, 0]), (1, 5)])
def test_top_p_is_the_shortest_head_that_reaches_p(p, expected):
    ids, _ = top_p(*top_k(LOGITS, 0), p - 1e-6 if p < 1 else 1)
    assert ids.tolist() == expected if isinstance(expected, list) else ids.size == expected


@pytest.mark.parametrize(("p", "expected"), [(1.0, [1]), (0.6, [1, 3]), (0.49, [1, 3, 4]), (0, [1, 3, 4, 0, 2])])
def test_min_p_is_relative_to_the_best(p, expected):
    assert min_p(*top_k(LOGITS, 0), p)[0].tolist() == expected


def test_draw_inverts_the_distribution():
    ids, kept = top_k(LOGITS, 0)
    assert [draw(ids, kept, 1.0, u) for u in (0, 0.39, 0.41, 0.64, 0.66, 0.999999)] == [1, 1, 3, 3, 4, 2]


def test_frequencies_follow_temperature():
    sampler = Sampler(SamplingParams(temperature=0.5, top_k=0, top_p=1, min_p=0, seed=0))
    drawn = np.bincount([sampler(LOGITS) for _ in range(20_000)], minlength=5) / 20_000
    np.testing.assert_allclose(drawn, softmax(LOGITS / 0.5), atol=0.012)


def test_a_tiny_temperature_is_greedy_and_quiet(recwarn):
    sampler = Sampler(SamplingParams(temperature=1e-300, top_k=0, top_p=1, min_p=0, seed=0))
    assert {sampler(LOGITS * 1000) for _ in range(20)} == {1}
    assert not recwarn.list


def test_filters_come_before_temperature():
    # At temperature 100 all five are about equally likely; min_p still judges the model's own distribution.
    sampler = Sampler(SamplingParams(temperature=100, top_k=0, top_p=1, min_p=0.49, seed=0))
    assert {sampler(LOGITS) for _ in range(200)} == {1, 3, 4}


def test_seed_repeats_and_differs():
    logits = np.zeros(1000, np.float32)

    def drawn(seed):
        sampler = Sampler(SamplingParams(seed=seed, top_k=0))
        return [sampler(logits) for _ in range(8)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)


def test_the_stream_of_a_seed_never_changes():
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=0, top_p=1, min_p=0, seed=1234))
    assert [sampler(np.zeros(100, np.float32)) for _ in range(6)] == [97, 38, 92, 26, 31, 11]


def test_masked_logits_are_never_drawn():
    logits = np.full(50, -np.inf, np.float32)
    logits[[7, 9]] = 0
    sampler = Sampler(SamplingParams(seed=0))
    assert {sampler(logits) for _ in range(50)} == {7, 9}


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(temperature, bad):
    logits = np.zeros(10, np.float32)
    logits[3] = bad
    with pytest.raises(EdgellamaError, match="not finite"):
        Sampler(SamplingParams(temperature=temperature))(logits)


def test_the_logits_are_left_alone():
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)
    logits.flags.writeable = False
    Sampler(SamplingParams(seed=0))(logits)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"temperature": -0.1}, ValueError),
        ({"temperature": float("nan")}, ValueError),
        ({"temperature": "1"}, TypeError),
        ({"temperature": True}, TypeError),
        ({"top_k": -1}, ValueError),
        ({"top_k": 1.5}, TypeError),
        ({"top_p": 0}, ValueError),
        ({"top_p": 1.01}, ValueError),
        ({"min_p": -0.1}, ValueError),
        ({"min_p": 1.1}, ValueError),
        ({"seed": -1}, ValueError),
        ({"seed": "x"}, TypeError),
    ],
)
def test_values_out_of_range_are_refused_by_name(values, error):
    with pytest.raises(error, match=next(iter(values))):
        SamplingParams(**values)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, SamplingParams(0.8, 40, 0.95, 0.05)),
        ({"bos_token_id": 1, "eos_token_id": 2}, SamplingParams(0.8, 40, 0.95, 0.05)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, SamplingParams(0.6, 50, 0.9, 0.0)),
        ({"temperature": 0.9, "top_p": 0.6}, SamplingParams(0.9, 50, 0.6, 0.0)),
        ({"do_sample": True}, SamplingParams(1.0, 50, 1.0, 0.0)),
        ({"do_sample": False, "temperature": 0.6}, SamplingParams(temperature=0.0)),
        ({"temperature": None, "top_k": 5}, SamplingParams(1.0, 5, 1.0, 0.0)),
    ],
)
def test_generation_config(raw, expected):
    assert SamplingParams.from_generation_config(raw) == expected


def test_a_bad_generation_config_names_the_key():
    with pytest.raises(ConfigError, match=r"generation_config\.json: top_p"):
        SamplingParams.from_generation_config({"top_p": "high"})


def test_override_keeps_what_is_none():
    assert SamplingParams(top_k=7).override(temperature=0, top_k=None) == SamplingParams(temperature=0, top_k=7)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"typical_p": 0}, ValueError),
        ({"xtc_probability": 1.5}, ValueError),
        ({"xtc_threshold": -0.1}, ValueError),
        ({"dry_multiplier": -1}, ValueError),
        ({"dry_base": 0.5}, ValueError),
        ({"dry_allowed_length": 0}, ValueError),
        ({"dry_penalty_last_n": -2}, ValueError),
        ({"dry_sequence_breaker_ids": "\n"}, TypeError),
        ({"mirostat": 1}, ValueError),
        ({"mirostat_tau": 0}, ValueError),
        ({"repetition_penalty": 0}, ValueError),
        ({"repetition_penalty": None}, TypeError),
        ({"penalty_last_n": 1.0}, TypeError),
        ({"no_repeat_ngram_size": -1}, ValueError),
        ({"logit_bias": [1]}, TypeError),
        ({"logit_bias": {"5": 1.0}}, TypeError),
        ({"logit_bias": {5: float("inf")}}, ValueError),
        ({"sequence_bias": 5}, TypeError),
        ({"sequence_bias": [[1, 2], [3]]}, TypeError),
        ({"sequence_bias": {5: 1.0}}, TypeError),
        ({"sequence_bias": {(): 1.0}}, ValueError),
        ({"sequence_bias": {(1, -1): 1.0}}, ValueError),
        ({"sequence_bias": {(1, 2): "x"}}, TypeError),
        ({"sequence_bias": [[[1, 2], float("inf")]]}, ValueError),
        ({"bad_words_ids": [5]}, TypeError),
        ({"bad_words_ids": [[]]}, ValueError),
        ({"bad_words_ids": [[-1]]}, ValueError),
        ({"min_new_tokens": True}, TypeError),
    ],
)
def test_the_other_values_are_checked_by_name_too(values, error):
    with pytest.raises(error, match=next(iter(values))):
        SamplingParams(**values)


def test_sequences_are_kept_as_tuples():
    params = SamplingParams(bad_words_ids=[[1, 2], [np.int64(3)]], dry_sequence_breaker_ids=[4, [5, 6]])
    assert params.bad_words_ids == ((1, 2), (3,))
    assert params.dry_sequence_breaker_ids == ((4,), (5, 6))
    assert hash(params) == hash(SamplingParams(bad_words_ids=((1, 2), (3,)), dry_sequence_breaker_ids=((4,), (5, 6))))


@pytest.mark.parametrize("do_sample", [None, True, False])
def test_a_models_own_penalties_are_taken(do_sample):
    raw = {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "bad_words_ids": [[5], [6, 7]], "min_new_tokens": 2}
    raw["sequence_bias"] = [[[5, 6], -1.5]]
    params = SamplingParams.from_generation_config({**raw, "do_sample": do_sample})
    assert (params.repetition_penalty, params.no_repeat_ngram_size) == (1.1, 3)
    assert (params.bad_words_ids, params.min_new_tokens) == (((5,), (6, 7)), 2)
    assert params.sequence_bias == {(5, 6): -1.5}
    assert params.temperature == {None: 0.8, True: 1.0, False: 0.0}[do_sample]


def test_a_models_own_typical_p_is_an_opinion_on_sampling():
    params = SamplingParams.from_generation_config({"typical_p": 0.9})
    assert (params.typical_p, params.temperature, params.top_k) == (0.9, 1.0, 50)


def test_logprobs():
    logits = np.array([0.0, math.log(3), math.log(4)], np.float32)
    np.testing.assert_allclose(np.exp(log_softmax(logits)), [1 / 8, 3 / 8, 4 / 8], rtol=1e-6)
    logprob, best = top_logprobs(logits, 0, 2)
    assert logprob == pytest.approx(math.log(1 / 8), abs=1e-6)
    assert [index for index, _ in best] == [2, 1]
    assert [value for _, value in best] == pytest.approx([math.log(1 / 2), math.log(3 / 8)], abs=1e-6)
    assert top_logprobs(logits, 1, 0) == (pytest.approx(math.log(3 / 8), abs=1e-6), [])


def test_logprobs_of_a_large_vocabulary():
    logits = np.random.default_rng(0).normal(0, 4, 128_256).astype(np.float32)
    exact = logits.astype(np.float64)
    exact -= exact.max() + np.log(np.exp(exact - exact.max()).sum())
    np.testing.assert_allclose(log_softmax(logits), exact, atol=3e-6)
    logprob, best = top_logprobs(logits, 17, 20)
    assert logprob == pytest.approx(exact[17], abs=1e-6)
    assert [index for index, _ in best] == np.argsort(-exact)[:20].tolist()
