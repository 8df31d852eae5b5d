"""Names that transformers has mean exactly what its logits processors do."""

import numpy as np
import pytest

from edgellama.sampling import Sampler, SamplingParams, filters

pytestmark = pytest.mark.torch
VOCAB = 200


def cases(count=25):
    """(ids list, logits float32 [VOCAB]) with repeated tokens and n-grams."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        ids = rng.integers(0, 20, rng.integers(1, 60)).tolist()
        yield ids, rng.normal(0, 3, VOCAB).astype(np.float32)


def theirs(processor, ids, logits):
    import torch

    return processor(torch.tensor([ids]), torch.tensor(logits)[None])[0].numpy()


def ours(ids, prompt_size, logits, eos_ids=(), **params):
    """The logits after penalties and bans."""
    seen = []

    def spy(ids, values):
        seen.append(values.copy())
        return values

    params = SamplingParams(temperature=0, **params)
    sampler = Sampler(params, prompt_ids=ids[:prompt_size], eos_ids=eos_ids, processors=[spy])
    for index in ids[prompt_size:]:
        sampler.accept(index)
    sampler(logits)
    return seen[0]


@pytest.mark.parametrize("penalty", [0.8, 1.0001, 1.3])
def test_repetition_penalty(penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    for ids, logits in cases():
        expected = theirs(RepetitionPenaltyLogitsProcessor(penalty), ids, logits)
        for prompt_size in (0, len(ids) // 2, len(ids)):
            np.testing.assert_array_equal(ours(ids, prompt_size, logits, repetition_penalty=penalty), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_repeat_ngram_size(size):
    from transformers import NoRepeatNGramLogitsProcessor

    for ids, logits in cases():
        expected = theirs(NoRepeatNGramLogitsProcessor(size), ids, logits)
        np.testing.assert_array_equal(ours(ids, len(ids) // 2, logits, no_repeat_ngram_size=size), expected)


def test_bad_words_ids():
    from transformers import NoBadWordsLogitsProcessor

    words = [[1], [2, 3], [4, 5, 6], [7], [8, 8], [3, 199], *([index, 100 + index] for index in range(20))]
    for ids, logits in cases():
        expected = theirs(NoBadWordsLogitsProcessor(words, eos_token_id=[7, 9]), ids, logits)
        np.testing.assert_array_equal(ours(ids, 0, logits, eos_ids=(7, 9), bad_words_ids=words), expected)


def test_sequence_bias():
    from transformers import SequenceBiasLogitsProcessor

    rng = np.random.default_rng(1)
    biases = {(1,): 0.1, (3,): -0.7, (2, 3): 1.3, (4, 5, 6): -2.0, (8, 8): -np.inf}
    for _ in range(300):  # most end in the same few tokens, with bits that depend on the order of addition
        size = rng.integers(1, 4)
        biases[tuple(rng.integers(0, 20, size).tolist())] = float(rng.normal())
    for ids, logits in cases():
        expected = theirs(SequenceBiasLogitsProcessor(biases), ids, logits)
        for given in (biases, [[list(sequence), bias] for sequence, bias in biases.items()]):
            np.testing.assert_array_equal(ours(ids, len(ids) // 2, logits, sequence_bias=given), expected)


@pytest.mark.parametrize("least", [1, 5, 1000])
def test_min_new_tokens(least):
    from transformers import MinNewTokensLengthLogitsProcessor

    for ids, logits in cases():
        prompt_size = len(ids) // 2
        processor = MinNewTokensLengthLogitsProcessor(prompt_size, least, [3, 4])
        result = ours(ids, prompt_size, logits, eos_ids=(3, 4), min_new_tokens=least)
        np.testing.assert_array_equal(result, theirs(processor, ids, logits))


def kept_by(name, logits, value):
    ids, kept = np.arange(logits.size), logits
    if name == "top_k":
        return set(filters.top_k(logits, value)[0].tolist())
    return set(getattr(filters, name)(ids, kept, value)[0].tolist())


@pytest.mark.parametrize(
    ("name", "values", "warper"),
    [
        ("top_k", [1, 5, 50], "TopKLogitsWarper"),
        ("top_p", [0.1, 0.5, 0.9, 0.999], "TopPLogitsWarper"),
        ("min_p", [0.01, 0.1, 0.9], "MinPLogitsWarper"),
        ("typical_p", [0.1, 0.5, 0.9, 0.99], "TypicalLogitsWarper"),
    ],
)
def test_filters(name, values, warper):
    import transformers.generation.logits_process as theirs_module

    for ids, logits in cases():
        for value in values:
            expected = theirs(getattr(theirs_module, warper)(value), ids, logits)
            assert kept_by(name, logits, value) == set(np.flatnonzero(np.isfinite(expected)).tolist())


def test_filters_on_a_large_vocabulary():
    """Where float32 sums differ by rounding, the boundary may differ by a token or two of 128,000."""
    from transformers.generation.logits_process import TopPLogitsWarper, TypicalLogitsWarper

    logits = np.random.default_rng(0).normal(0, 2, 128_256).astype(np.float32)
    for name, warper, value in [("top_p", TopPLogitsWarper, 0.9), ("typical_p", TypicalLogitsWarper, 0.8)]:
        expected = set(np.flatnonzero(np.isfinite(theirs(warper(value), [0], logits))).tolist())
        assert len(expected ^ kept_by(name, logits, value)) <= len(expected) * 1e-3


GENERATION = {
    "repetition": {"repetition_penalty": 1.4},
    "ngrams": {"no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": []},  # filled in below, with words that it would say
    "sequence bias": {"sequence_bias": {}},  # likewise
    "min new tokens": {"min_new_tokens": 12, "repetition_penalty": 0.7},
    "all": {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "bad_words_ids": [[7], [8]], "min_new_tokens": 5},
}


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    from edgellama_convert import export_hf

    folder = tmp_path_factory.mktemp("exported") / "tiny"
    export_hf(tiny_model, folder, dtype="float32")
    return folder


@pytest.mark.parametrize("name", GENERATION)
def test_greedy_generate(name, tiny_model, exported):
    """The whole loop against transformers' `generate` on the exported checkpoint."""
    import torch
    from transformers import LlamaForCausalLM

    import edgellama

    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = [1, 5, 9, 5, 9, 5]
    penalties = dict(GENERATION[name])

    def generate(eos, **options):
        options |= {"max_new_tokens": 24, "do_sample": False, "num_beams": 1, "eos_token_id": eos, "pad_token_id": 0}
        with torch.no_grad():
            return model.generate(torch.tensor([prompt]), **options)[0].tolist()

    plain = generate([2])
    # What is most probable ends the text at once: min_new_tokens has something to do.
    eos = [2, plain[len(prompt)]] if "min_new_tokens" in penalties else [2]
    if name == "bad words":
        penalties["bad_words_ids"] = [plain[8:9], plain[9:11], plain[11:14]]
    if name == "sequence bias":
        penalties["sequence_bias"] = {tuple(plain[8:9]): -0.1, tuple(plain[9:11]): -3.0, (*plain[9:10], 33): 20.0}
    theirs = generate(eos, **penalties)
    assert theirs != plain
    sampler = Sampler(SamplingParams(temperature=0, **penalties), prompt_ids=prompt, eos_ids=eos)
    ids = list(prompt)
    with edgellama.load(tiny_model, device="reference") as llm:
        logits = llm.forward(prompt)[-1]
        while len(ids) < len(prompt) + 24:
            ids.append(sampler(logits))
            sampler.accept(ids[-1])
            if ids[-1] in eos:
                break
            logits = llm.forward([ids[-1]])[-1]
    assert ids == theirs
    assert len(ids) > len(prompt) + 3
