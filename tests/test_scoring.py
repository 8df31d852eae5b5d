"""llm.score and llm.embed against each text computed alone, the float32 reference, and transformers."""

import math

import numpy as np
import pytest

import edgellama
from checkpoints import make_checkpoint
from closeness import ORACLE_TOLERANCE, relative_error
from edgellama import CancelToken
from edgellama.backends.cpu import CpuBackend
from edgellama.backends.reference import ReferenceBackend
from edgellama.errors import CancelledError, ContextError
from edgellama.scoring import MAX_ROWS, read_choices
from edgellama_convert import convert

PROMPT = "The capital of France is"
CHOICES = [" Paris", " Rome, and that of Italy too", "!", " London.", " a", " b", " c and d"]


@pytest.fixture(scope="module")
def llm(tiny_model):
    with edgellama.load(tiny_model, n_ctx=128, n_slots=3, n_threads=2) as model:
        yield model


def logprobs_alone(backend, text, first, method="forward"):
    """float64 log-probability of text[first:], computed in one call."""
    n = len(text)
    logits = backend.forward(text, np.arange(n), np.zeros(n, int), np.arange(n)).astype(np.float64)
    total = np.log(np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1)) + logits.max(axis=-1)
    return sum(logits[i - 1, text[i]] - total[i - 1] for i in range(first, n))


def test_scores_are_those_of_each_text_alone(llm):
    prompt = llm.tokenizer.encode(PROMPT)
    cpu, reference = CpuBackend(llm.file, 128, n_threads=1), ReferenceBackend(llm.file, 128)
    got = llm.score(PROMPT, CHOICES)
    assert len({each.logprob for each in got}) == len(CHOICES)
    for score, choice in zip(got, CHOICES, strict=True):
        ids = llm.tokenizer.encode(choice, add_special_tokens=False)
        assert score.token_ids == ids
        assert score.logprob == pytest.approx(logprobs_alone(cpu, prompt + ids, len(prompt)), rel=1e-12)
        # 15-bit activations and a float16 cache: see test_beam.
        expected = logprobs_alone(reference, prompt + ids, len(prompt))
        assert score.logprob == pytest.approx(expected, abs=4 * math.sqrt(2e-6) * len(ids))
        assert score.logprob_per_token == score.logprob / len(ids)


@pytest.mark.parametrize("kv_cache", ["float16", "int8"])
def test_bits_do_not_depend_on_slots_order_or_company(tiny_model, kv_cache):
    with (
        edgellama.load(tiny_model, n_ctx=128, n_slots=1, n_threads=1, kv_cache=kv_cache) as one,
        edgellama.load(tiny_model, n_ctx=128, n_slots=4, n_threads=2, kv_cache=kv_cache) as four,
    ):
        expected = one.score(PROMPT, CHOICES)
        for _ in range(2):
            assert four.score(PROMPT, CHOICES) == expected
            assert four.score(PROMPT, CHOICES[::-1]) == expected[::-1]
            assert [four.score(PROMPT, [choice])[0] for choice in CHOICES] == expected
            four.generate([PROMPT + " Paris, and", "other"], 9, temperature=0)  # leaves its own in the cache
        assert one.generate(PROMPT, 9, temperature=0).token_ids == four.generate(PROMPT, 9, temperature=0).token_ids


def test_the_prompt_is_computed_once(llm, monkeypatch):
    counts, forward = [], llm._engine.backend.forward
    monkeypatch.setattr(
        llm._engine.backend, "forward", lambda *arrays: (counts.append(len(arrays[0])), forward(*arrays))[1]
    )
    llm.reset()
    got = llm.score(PROMPT, CHOICES)
    scored = [len(score.token_ids) for score in got]
    prompt = len(llm.tokenizer.encode(PROMPT))
    # The prompt but for its last token, then three choices a pass, each from that token on.
    assert counts == [prompt - 1, sum(scored[:3]), sum(scored[3:6]), scored[6]]
    counts.clear()
    llm.score(PROMPT, CHOICES[:3])
    assert counts == [sum(scored[:3])]


def test_choices_longer_than_a_piece(llm):
    long, short = "x" * (MAX_ROWS + 20), "yes"
    got = llm.score("p", [short, long, short, short])
    assert got[0] == got[2] == got[3] == llm.score("p", [short])[0]
    cpu, ids = CpuBackend(llm.file, 128), llm.tokenizer.encode("p" + long)
    assert len(got[1].token_ids) == len(long) > MAX_ROWS
    assert got[1].logprob == pytest.approx(logprobs_alone(cpu, ids, 2), rel=1e-12)


def test_ids_in_place_of_texts(llm):
    prompt = llm.tokenizer.encode(PROMPT)
    ids = [llm.tokenizer.encode(choice, add_special_tokens=False) for choice in CHOICES]
    assert llm.score(prompt, ids) == llm.score(PROMPT, CHOICES) == llm.score(PROMPT, ids)


def test_the_probabilities_of_all_next_tokens_add_up(llm):
    ids = llm.tokenizer.encode(PROMPT)
    got = llm.score(ids, [[token] for token in range(llm.config.vocab_size)])
    assert sum(math.exp(each.logprob) for each in got) == pytest.approx(1, abs=1e-9)
    most = max(got, key=lambda each: each.logprob)
    assert most.token_ids == llm.generate(ids, 1, temperature=0).token_ids


@pytest.mark.parametrize(
    ("prompt", "choices", "n_shared", "texts"),
    [
        ("a", ["b", "c"], 2, [[0, 1, 2], [0, 1, 3]]),
        ("aX", ["c"], 3, [[0, 1, 4, 3]]),
        ("aX", ["b"], 2, [[0, 1, 5]]),
        ("aX", ["c", "b"], 2, [[0, 1, 4, 3], [0, 1, 5]]),  # the first is scored from X on, too
        ("X", ["b"], 1, [[0, 5]]),
    ],
)
def test_a_token_across_the_border_is_scored_whole(prompt, choices, n_shared, texts):
    """A tokenizer that makes one token of "Xb"; 0 begins every text."""
    vocab = {"a": 1, "b": 2, "c": 3, "X": 4, "Xb": 5}

    def encode(text):
        ids = [0]
        while text:
            n = 2 if text[:2] in vocab else 1
            ids.append(vocab[text[:n]])
            text = text[n:]
        return np.array(ids, np.int32)

    read = read_choices(prompt, choices, encode, np.asarray)
    assert read.n_shared == n_shared
    assert [text.tolist() for text in read.texts] == texts


@pytest.mark.parametrize(
    ("prompt", "choices", "error", "says"),
    [
        ("x", "yes", TypeError, "a list of texts"),
        ("x", [], ValueError, "no choices"),
        ("x", ["a", ""], ValueError, "choice 1 adds no token"),
        ([1, 5], ["a"], TypeError, "choice 0 is a text, but the prompt is not"),
        ([1, 5], [[1000]], ValueError, "vocabulary of 277"),
        ([], [[1]], ValueError, "empty"),
        ("x", ["a", "b" * 200], ContextError, "choice 1 with its prompt has 202 tokens, the context 128"),
    ],
)
def test_choices_that_are_none(llm, prompt, choices, error, says):
    with pytest.raises(error, match=says):
        llm.score(prompt, choices)
    assert llm.score("x", ["a"])  # the model is free


def test_a_text_that_fills_the_context(llm):
    prompt = [1, 5, 6]
    (got,) = llm.score(prompt, [[7] * 125])
    assert got.logprob == pytest.approx(logprobs_alone(CpuBackend(llm.file, 128), prompt + [7] * 125, 3), rel=1e-12)


@pytest.mark.parametrize("shared", [3, 12, 30])
def test_rope_that_depends_on_the_length_of_a_call(shared, tmp_path):
    """Each text counts as computed in one call, as transformers would, whatever the others' lengths."""
    make_checkpoint(tmp_path / "hf", max_position_embeddings=24, rope_scaling={"type": "dynamic", "factor": 2.0})
    convert(tmp_path / "hf", tmp_path / "m.edgellama", method="rtn")
    prompt = [1, *range(40, 40 + shared - 1)]
    choices = [[7], [8, 9, 10], list(range(60, 90)), [7] * 22, [100 + i for i in range(10)]]
    with edgellama.load(tmp_path / "m.edgellama", n_ctx=64, n_slots=3) as llm:
        got = llm.score(prompt, choices)
        for score, choice in zip(got, choices, strict=True):
            expected = logprobs_alone(CpuBackend(llm.file, 64), prompt + choice, len(prompt))
            assert score.logprob == pytest.approx(expected, rel=1e-12)


def test_score_and_embed_can_be_cancelled(llm):
    cancel = CancelToken()
    cancel.cancel()
    for call in (lambda: llm.score("x", ["a"], cancel=cancel), lambda: llm.embed("x", cancel=cancel)):
        with pytest.raises(CancelledError):
            call()
    assert llm.score("x", ["a"]) and llm.embed("x").any()


# -- embed -----------------------------------------------------------------------------------------------------------

TEXTS = ["Hello", "The quick brown fox", "x", "Hello", "jumps over the lazy dog"]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_pooled_hidden_states(llm, pooling):
    reference = ReferenceBackend(llm.file, 128)
    raw = llm.embed(TEXTS, pooling, normalize=False)
    unit = llm.embed(TEXTS, pooling)
    assert raw.dtype == unit.dtype == np.float32 and raw.shape == unit.shape == (5, llm.config.hidden_size)
    for i, text in enumerate(TEXTS):
        ids = np.array(llm.tokenizer.encode(text))
        states = reference.hidden(ids, np.arange(ids.size), np.zeros(ids.size, int), np.arange(ids.size))
        expected = states.mean(axis=0) if pooling == "mean" else states[-1]
        assert relative_error(raw[i], expected) < 4 * 2.0**-11  # see test_cpu_backend
        np.testing.assert_allclose(unit[i], raw[i] / np.linalg.norm(raw[i]), rtol=1e-6)
    assert (raw[0] == raw[3]).all() and (raw[0] != raw[1]).any()


def test_bits_of_vectors_do_not_depend_on_company(llm):
    for pooling in ("mean", "last"):
        together = llm.embed(TEXTS, pooling)
        llm.generate(TEXTS, 5, temperature=0)
        for i, text in enumerate(TEXTS):
            assert (llm.embed(text, pooling) == together[i]).all()
            assert (llm.embed([llm.tokenizer.encode(text)], pooling)[0] == together[i]).all()


def test_vectors_leave_replies_alone(llm):
    expected = llm.generate("Hello", 10, temperature=0, logprobs=True)
    llm.embed(["Hello and more", "Hello"])
    again = llm.generate("Hello", 10, temperature=0, logprobs=True)
    assert (again.token_ids, again.logprobs) == (expected.token_ids, expected.logprobs)
    assert llm.embed("Hello").any()


def test_texts_that_cannot_be_embedded(llm):
    with pytest.raises(ValueError, match='pooling must be "mean" or "last"'):
        llm.embed("x", "max")
    with pytest.raises(ContextError, match="text 1 has 201 tokens, the context 128"):
        llm.embed(["x", "y" * 200])
    with pytest.raises(ValueError):
        llm.embed([])
    assert llm.embed(["y" * 127]).shape == (1, llm.config.hidden_size)


# -- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 6}], ids=["gqa", "tied"])
def test_scores_and_vectors_are_those_of_transformers(config, tmp_path):
    import torch
    from transformers import LlamaForCausalLM

    from edgellama_convert import export_hf

    torch.set_num_threads(1)
    make_checkpoint(tmp_path / "hf", seed=3, **config)
    convert(tmp_path / "hf", tmp_path / "m.edgellama", method="search")
    export_hf(tmp_path / "m.edgellama", tmp_path / "exported", dtype="float32")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    prompt = [1, 40, 41, 42, 99, 3]
    choices = [[7, 8], [200], list(range(20, 50))]
    for device, error in (("reference", 2 * ORACLE_TOLERANCE * 25), ("cpu", 4 * math.sqrt(2e-6))):
        with edgellama.load(tmp_path / "m.edgellama", device=device, n_ctx=64, n_slots=2) as llm, torch.no_grad():
            scores = llm.score(prompt, choices)
            means, lasts = (llm.embed([prompt, choices[2]], pooling, False) for pooling in ("mean", "last"))
            for score, choice in zip(scores, choices, strict=True):
                logits = model(torch.tensor([prompt + choice])).logits[0].double()
                every = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
                expected = every[torch.arange(len(choice)), torch.tensor(choice)].sum().item()
                assert score.logprob == pytest.approx(expected, abs=error * len(choice))
            tolerance = ORACLE_TOLERANCE if device == "reference" else 4 * 2.0**-11
            for i, ids in enumerate([prompt, choices[2]]):
                states = model.model(torch.tensor([ids])).last_hidden_state[0].numpy()
                assert relative_error(means[i], states.mean(axis=0)) < tolerance
                assert relative_error(lasts[i], states[-1]) < tolerance
