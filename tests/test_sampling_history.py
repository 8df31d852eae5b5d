"""Penalties, bans, DRY, mirostat and the sampler's state, against plain definitions over the whole text."""

import math
from collections import Counter

import numpy as np
import pytest

from edgellama.errors import EdgellamaError
from edgellama.sampling import Sampler, SamplingParams, breaker_ids

VOCAB = 12
GREEDY = {"temperature": 0.0}


def adjusted(sampler, logits):
    """The logits that the sampler chooses from, seen by a processor, which comes after penalties and bans."""
    seen = []
    sampler._processors = (lambda ids, values: seen.append((ids.copy(), values.copy())) or values,)
    sampler(logits)
    return seen[0][1]


def random_walk(rng, size, vocab=VOCAB):
    """Ids that like to repeat themselves."""
    ids = []
    while len(ids) < size:
        if len(ids) > 8 and rng.random() < 0.3:
            start = rng.integers(len(ids) - 6)
            ids += ids[start : start + int(rng.integers(2, 7))]
        else:
            ids.append(int(rng.integers(vocab)))
    return ids[:size]


def drive(params, size, prompt_size, check, **more):
    """Runs a sampler over a text and calls `check(expected_ids, prompt_size, logits, adjusted logits)` on the way."""
    rng = np.random.default_rng(size)
    ids = random_walk(rng, size)
    sampler = Sampler(SamplingParams(**params), prompt_ids=ids[:prompt_size], **more)
    for end in range(prompt_size, size + 1):
        logits = rng.normal(0, 3, VOCAB).astype(np.float32)
        check(ids[:end], prompt_size, logits, adjusted(sampler, logits))
        if end < size:
            sampler.accept(ids[end])


@pytest.mark.parametrize("last_n", [-1, 0, 1, 7, 1000])
@pytest.mark.parametrize("prompt_size", [0, 5, 40])
def test_penalties_count_what_was_said(last_n, prompt_size):
    params = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.2, "penalty_last_n": last_n}

    def check(ids, prompt_size, logits, result):
        window = ids if last_n < 0 else ids[len(ids) - last_n :] if last_n else []
        said = ids[prompt_size:] if last_n < 0 else ids[prompt_size:][-last_n:] if last_n else []
        expected = logits.astype(np.float64)
        for index in set(window if last_n < len(ids) else ids):
            expected[index] *= 1.3 if expected[index] < 0 else 1 / 1.3
        for index, count in Counter(said).items():
            expected[index] -= 0.2 * count + 0.7
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)

    drive(GREEDY | params, 60, prompt_size, check)


def test_penalties_by_hand():
    sampler = Sampler(
        SamplingParams(temperature=0, repetition_penalty=2.0, frequency_penalty=1.0), prompt_ids=[0, 1, 1]
    )
    sampler.accept(2)
    sampler.accept(2)
    # The prompt's tokens are penalized for repetition only; 3 was never said.
    result = adjusted(sampler, np.array([4.0, -1.0, 4.0, 4.0], np.float32))
    assert result.tolist() == [2.0, -2.0, 0.0, 4.0]


def test_logit_bias_adds_and_forbids():
    logits = np.zeros(4, np.float32)
    params = SamplingParams(temperature=0, logit_bias={1: 2.5, 2: -math.inf})
    assert adjusted(Sampler(params), logits).tolist() == [0, 2.5, -math.inf, 0]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("prompt_size", [0, 1, 30])
def test_no_ngram_comes_twice(size, prompt_size):
    def check(ids, prompt_size, logits, result):
        ngrams = {tuple(ids[at : at + size]) for at in range(len(ids) - size + 1)}
        tail = ids[len(ids) - size + 1 :] if size > 1 else []
        banned = [len(ids) >= size and (*tail, index) in ngrams for index in range(VOCAB)]
        np.testing.assert_array_equal(result, np.where(banned, -np.inf, logits) if not all(banned) else result)

    try:
        drive(GREEDY | {"no_repeat_ngram_size": size}, 60, prompt_size, check)
    except EdgellamaError as error:  # single tokens run out
        assert size == 1
        assert "no token is left" in str(error)


def test_bad_words_are_never_completed():
    bad = [[3], [1, 2], [1, 4], [5, 1, 6], [7], [8, 8]]

    def check(ids, prompt_size, logits, result):
        banned = {word[-1] for word in bad if word != [7] and ids[len(ids) - len(word) + 1 :] == word[:-1]}
        expected = [-np.inf if index in banned else value for index, value in enumerate(logits)]
        np.testing.assert_array_equal(result, np.array(expected, np.float32))

    drive(GREEDY | {"bad_words_ids": bad}, 200, 5, check, eos_ids={7})


def test_sequence_biases_add_up_where_the_others_were_said():
    biases = {(3,): 0.5, (1, 3): -2.0, (1, 2): 1.25, (4, 1, 2): 4.0, (8, 8): -math.inf, (5, 1, 6): 8.0, (1, 6): 0.25}

    def check(ids, prompt_size, logits, result):
        expected = logits.copy()
        for index in range(VOCAB):
            text = (*ids, index)
            expected[index] += sum(bias for each, bias in biases.items() if text[-len(each) :] == each)
        np.testing.assert_array_equal(result, expected)

    drive(GREEDY | {"sequence_bias": biases}, 300, 0, check)


def test_min_new_tokens_holds_eos_back():
    sampler = Sampler(SamplingParams(temperature=0, min_new_tokens=2), prompt_ids=[1, 2, 3], eos_ids={0, 2})
    logits = np.array([9, 1, 8, 2], np.float32)
    for expected in (3, 3, 0):
        token = sampler(logits)
        assert token == expected
        sampler.accept(token)


def dry_penalties(ids, multiplier, base, allowed, last_n, breakers):
    """Token -> penalty, by comparing every earlier place with the end."""
    window = ids if last_n < 0 else ids[max(0, len(ids) - last_n) :]
    since = len(window)  # tokens after the last complete breaker
    for end in range(len(ids), 0, -1):
        if any(tuple(ids[:end][-len(breaker) :]) == breaker for breaker in breakers):
            since = min(since, len(ids) - end)
            break
    longest = {}
    for end in range(1, len(window)):
        length = 0
        while length < end and length < since and window[end - 1 - length] == window[len(window) - 1 - length]:
            length += 1
        if length >= allowed:
            longest[window[end]] = max(longest.get(window[end], 0), length)
    return {
        token: multiplier * base ** (length - allowed) for token, length in longest.items() if (token,) not in breakers
    }


@pytest.mark.parametrize("last_n", [-1, 1, 10, 33])
@pytest.mark.parametrize("breakers", [(), ((0,),), ((0,), (3, 4), (1, 2, 5))])
@pytest.mark.parametrize("allowed", [1, 2, 4])
def test_dry_penalizes_what_continues_a_repetition(last_n, breakers, allowed):
    def check(ids, prompt_size, logits, result):
        expected = logits.astype(np.float64)
        for token, penalty in dry_penalties(ids, 0.8, 1.75, allowed, last_n, breakers).items():
            expected[token] -= penalty
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)

    params = {"dry_multiplier": 0.8, "dry_allowed_length": allowed, "dry_penalty_last_n": last_n}
    for prompt_size in (0, 90):
        drive(GREEDY | params | {"dry_sequence_breaker_ids": breakers}, 120, prompt_size, check)


def test_dry_by_hand():
    # "a b c c b c y a b c": after "a b c" came c (3 tokens repeated), after "b c" y (2), after "c" b (1, too short).
    a, b, c, y = range(4)
    sampler = Sampler(
        SamplingParams(temperature=0, dry_multiplier=1.0, dry_base=2.0), prompt_ids=[a, b, c, c, b, c, y, a, b, c]
    )
    assert adjusted(sampler, np.zeros(5, np.float32)).tolist() == [0, 0, -2, -1, 0]


def test_breakers_are_the_tokens_that_have_them():
    tokens = [b"a", b"\n", b" x:\n", b'"', b"**", b"\xc3", b"", b"no"]
    assert breaker_ids(tokens) == ((1,), (2,), (3,), (4,))
    assert breaker_ids(tokens, ["o", "\xc3"]) == ((7,),)


def test_dry_on_a_long_repetition_saturates_quietly(recwarn):
    sampler = Sampler(SamplingParams(temperature=0, dry_multiplier=5.0), prompt_ids=[1] * 3000)
    sampler.accept(1)
    result = adjusted(sampler, np.zeros(3, np.float32))
    assert result[1] < -1e38
    assert (result[[0, 2]] == 0).all()
    assert not recwarn.list


def mirostat_reference(logits, temperature, mu, tau, eta, u):
    """(token, new mu), as the paper's algorithm 2 with llama.cpp's renormalization, by a full sort."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    probabilities = weights / weights.sum()
    kept = np.flatnonzero(-np.log2(probabilities) <= mu)
    if not kept.size:
        kept = np.array([probabilities.argmax()])
    inside = probabilities[kept] / probabilities[kept].sum()
    index = int(np.searchsorted(np.cumsum(inside), u, side="right"))
    return int(kept[index]), mu - eta * (-math.log2(inside[index]) - tau)


@pytest.mark.parametrize("tau", [0.5, 3.0, 6.0])
def test_mirostat_follows_its_definition(tau):
    params = SamplingParams(mirostat=2, mirostat_tau=tau, mirostat_eta=0.2, temperature=0.9, seed=3, top_k=1)
    sampler, numbers = Sampler(params), np.random.Generator(np.random.PCG64(3))
    rng, mu = np.random.default_rng(0), 2 * tau
    for _ in range(60):
        logits = rng.normal(0, 2, 500).astype(np.float32)
        expected, mu = mirostat_reference(logits, 0.9, mu, tau, 0.2, numbers.random())
        token = sampler(logits)
        assert token == expected
        sampler.accept(token)


def test_mirostat_reaches_its_surprise():
    sampler = Sampler(SamplingParams(mirostat=2, mirostat_tau=3.0, seed=1, temperature=1.0))
    logits = np.random.default_rng(0).normal(0, 2.5, 2000).astype(np.float32)
    surprises = []
    for _ in range(400):
        token = sampler(logits)
        surprises.append(sampler._surprise[1])
        sampler.accept(token)
    assert np.mean(surprises[100:]) == pytest.approx(3.0, abs=0.2)  # the whole distribution has 7 bits


def test_mirostat_does_not_learn_from_forced_tokens():
    logits = np.random.default_rng(0).normal(0, 2, 50).astype(np.float32)
    one, other = (Sampler(SamplingParams(mirostat=2, seed=1)) for _ in range(2))
    one.accept(3)
    assert [one(logits) for _ in range(5)] == [other(logits) for _ in range(5)]


EVERYTHING = {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9, "top_n_sigma": 3.0, "xtc_probability": 0.5}
EVERYTHING |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1, "no_repeat_ngram_size": 4}
EVERYTHING |= {
    "dry_multiplier": 0.8,
    "logit_bias": {3: 1.0},
    "sequence_bias": {(7, 3): 2.0},
    "bad_words_ids": [[4], [5, 6]],
    "min_new_tokens": 5,
}


@pytest.mark.parametrize("mirostat", [0, 2])
def test_a_fork_goes_its_own_way_and_leaves_the_original_alone(mirostat):
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 3, (40, 300)).astype(np.float32)

    def make():
        params = SamplingParams(seed=5, temperature=1.2, mirostat=mirostat, **EVERYTHING)
        return Sampler(params, prompt_ids=random_walk(np.random.default_rng(1), 50, 300), eos_ids={2})

    def run(sampler, rows):
        tokens = []
        for row in rows:
            tokens.append(sampler(row))
            sampler.accept(tokens[-1])
        return tokens

    undisturbed = run(make(), rows)
    sampler = make()
    begun = run(sampler, rows[:20])
    twin = sampler.fork()
    run(twin, rows[::-1])
    third = sampler.fork()
    assert begun + run(sampler, rows[20:]) == undisturbed
    assert run(third, rows[20:]) == undisturbed[20:]


def test_a_window_and_a_growing_history_survive_many_tokens():
    params = {"repetition_penalty": 1.5, "penalty_last_n": 100, "dry_multiplier": 1.0, "no_repeat_ngram_size": 3}
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 1000, 700).tolist()
    grown = Sampler(SamplingParams(temperature=0, **params), prompt_ids=ids[:3])
    for index in ids[3:]:
        grown.accept(index)
    logits = rng.normal(0, 3, 1000).astype(np.float32)
    at_once = Sampler(SamplingParams(temperature=0, **params), prompt_ids=ids)
    np.testing.assert_array_equal(adjusted(grown, logits), adjusted(at_once, logits))


def test_processors_see_the_text_and_come_before_the_filters():
    calls = []

    def forbid(ids, logits):
        calls.append((ids.tolist(), ids.dtype, logits.dtype))
        logits[3] = -np.inf
        return logits

    def triple(ids, logits):
        return logits * 3

    sampler = Sampler(SamplingParams(temperature=0), prompt_ids=[5, 6], processors=[forbid, triple])
    logits = np.array([0, 1, 2, 3], np.float32)
    assert sampler(logits) == 2
    sampler.accept(2)
    sampler(logits)
    assert [call[0] for call in calls] == [[5, 6], [5, 6, 2]]
    assert calls[0][1:] == (np.int32, np.float32)
    assert logits.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("processor", "error", "message"),
    [
        (lambda ids, logits: None, TypeError, "returned None"),
        (lambda ids, logits: logits[:2], ValueError, r"shape \(2,\)"),
        (lambda ids, logits: logits * np.nan, EdgellamaError, "processor returned NaN"),
        (lambda ids, logits: logits - np.inf, EdgellamaError, "no token is left"),
    ],
)
def test_processors_that_go_wrong_are_named(processor, error, message):
    with pytest.raises(error, match=message):
        Sampler(SamplingParams(), processors=[processor])(np.zeros(4, np.float32))


def test_bans_of_everything_are_said():
    with pytest.raises(EdgellamaError, match="no token is left"):
        Sampler(SamplingParams(bad_words_ids=[[0], [1]]))(np.zeros(2, np.float32))


@pytest.mark.parametrize(
    "values", [{"logit_bias": {4: 1.0}}, {"sequence_bias": {(4, 1): 1.0}}, {"bad_words_ids": [[1, 9]]}]
)
def test_ids_outside_the_vocabulary_are_refused(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} names token"):
        Sampler(SamplingParams(**values))(np.zeros(4, np.float32))


class OnlyThese:
    """A constraint that allows fixed ids."""

    def __init__(self, ids):
        self.ids, self.accepted = ids, []

    def mask(self, logits):
        kept = logits[self.ids].copy()
        logits[:] = -np.inf
        logits[self.ids] = kept

    def accept(self, token_id):
        self.accepted.append(token_id)

    def fork(self):
        return OnlyThese(self.ids)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_constraint_masks_and_follows(temperature):
    constraint = OnlyThese([2, 5])
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0), constraint=constraint)
    logits = np.arange(10, 0, -1).astype(np.float32) / 3
    tokens = [sampler(logits) for _ in range(20)]
    assert set(tokens) == ({2} if temperature == 0 else {2, 5})
    sampler.accept(5)
    assert constraint.accepted == [5]
    assert sampler.fork().constraint is not constraint
    assert logits[0] == np.float32(10 / 3)


def test_the_constraint_outweighs_bans():
    sampler = Sampler(
        SamplingParams(temperature=0, min_new_tokens=10, bad_words_ids=[[1]]), eos_ids={0}, constraint=OnlyThese([0, 1])
    )
    assert sampler(np.array([1, 2, 3], np.float32)) == 1


def exact_distribution(logits, top_k, typical, top_p, min_p, xtc, xtc_threshold, sigma, temperature):
    """token -> probability, every step spelt out on a sorted list, in llama.cpp's order."""
    pairs = sorted(((float(value), -index) for index, value in enumerate(logits)), reverse=True)
    pairs = [(value, -index) for value, index in pairs]
    deviation = np.std([value for value, _ in pairs])
    pairs = [pair for pair in pairs if pair[0] >= pairs[0][0] - sigma * deviation][:top_k]

    def probabilities(pairs, temperature=1.0):
        weights = [math.exp((value - pairs[0][0]) / temperature) for value, _ in pairs]
        return [weight / sum(weights) for weight in weights]

    shares = probabilities(pairs)
    entropy = -sum(p * math.log(p) for p in shares)
    ranked = sorted(range(len(pairs)), key=lambda at: abs(-math.log(shares[at]) - entropy))
    total, chosen = 0.0, []
    for at in ranked:
        chosen.append(at)
        total += shares[at]
        if total >= typical:
            break
    pairs = [pairs[at] for at in sorted(chosen)]
    shares, total, count = probabilities(pairs), 0.0, 0
    while total < top_p:
        total, count = total + shares[count], count + 1
    pairs = pairs[:count]
    shares = probabilities(pairs)
    pairs = [pair for pair, share in zip(pairs, shares, strict=True) if share >= min_p * shares[0]]
    shares = probabilities(pairs)
    likely = sum(share >= xtc_threshold for share in shares)
    result: Counter = Counter()
    for chance, remaining in ((1 - xtc, pairs), (xtc, pairs[max(0, likely - 1) :])):
        for (_, index), share in zip(remaining, probabilities(remaining, temperature), strict=True):
            result[index] += chance * share
    return result


@pytest.mark.parametrize("case", range(6))
def test_the_whole_chain_draws_the_exact_distribution(case):
    rng = np.random.default_rng(case)
    logits = rng.normal(0, 2, 60).astype(np.float32)
    values = {"top_k": 30, "typical_p": 0.95, "top_p": 0.9, "min_p": 0.05, "xtc_probability": 0.4}
    values |= {"xtc_threshold": 0.1, "top_n_sigma": 2.5, "temperature": (0.7, 1.0, 1.6)[case % 3]}
    sampler = Sampler(SamplingParams(seed=case, **values))
    names = {"typical_p": "typical", "xtc_probability": "xtc", "top_n_sigma": "sigma"}
    expected = exact_distribution(logits, **{names.get(name, name): value for name, value in values.items()})
    draws = 4000
    counts = Counter(sampler(logits) for _ in range(draws))
    assert set(counts) <= set(expected)
    for index, share in expected.items():
        assert abs(counts[index] / draws - share) < 5 * math.sqrt(share * (1 - share) / draws) + 1e-9
