"""Perplexity: which tokens each way of cutting scores, and the figure against brute force and transformers."""

import json
import math

import numpy as np
import pytest

from checkpoints import make_checkpoint
from closeness import all_logits
from edgellama.backends.reference import ReferenceBackend
from edgellama.cli import main
from edgellama.errors import EdgellamaError, TokenizerError
from edgellama.format import open_model
from edgellama.logprob import token_logprobs
from edgellama.model import load
from edgellama.perplexity import Window, chunks, encode_text, measure, perplexity, strided
from edgellama_convert import convert

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 6


def test_chunks_are_llama_cpps():
    """Chunks one after the other, BOS over the first token of each, logits of the second half, the rest dropped."""
    windows = chunks(range(100, 125), 1, 8)  # 26 tokens with BOS
    assert [window.tokens.tolist() for window in windows] == [
        [1, *range(100, 107)],
        [1, *range(108, 115)],
        [1, *range(116, 123)],
    ]
    # llama.cpp: first = n_ctx / 2, count += n_ctx - first - 1, targets tokens[first + 1:]
    assert {(window.first, window.scored) for window in windows} == {(5, 3)}
    assert [window.tokens.tolist() for window in chunks(range(9), None, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_strided_windows_score_every_token_but_the_first_once():
    for n in (2, 7, 16, 17, 29, 32):
        for ctx, stride in ((8, 8), (8, 4), (8, 3), (5, 1)):
            windows = strided(range(n), None, ctx, stride)
            scored = [token for window in windows for token in window.tokens[window.first :].tolist()]
            assert all(len(window.tokens) <= ctx for window in windows)
            assert [window.tokens[0] for window in windows] == [i * stride for i in range(len(windows))]
            # Where windows do not overlap, the first token of each has nothing before it, in the page's snippet, too.
            missing = set(range(1, n)) - set(scored)
            assert missing == ({i for i in range(stride, n, stride)} if ctx == stride else set())
            assert len(scored) == len(set(scored))


def test_texts_that_are_too_short():
    with pytest.raises(EdgellamaError, match="has 6 tokens, fewer than one window of 8"):
        chunks(range(5), 1, 8)
    with pytest.raises(EdgellamaError, match="nothing to predict"):
        strided([], 1, 8, 4)


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("stride", [None, 40])
def test_is_that_of_brute_force(tiny_model, device, stride):
    with load(tiny_model, device, 64, n_slots=1) as llm:
        result = perplexity(llm, TEXT, ctx=64, stride=stride)
        ids, bos = encode_text(llm.tokenizer, TEXT, llm.config.vocab_size)
        assert bos == 1 and llm.n_past == 0
        again = perplexity(llm, TEXT, ctx=64, stride=stride)
    assert again == result
    windows = chunks(ids, bos, 64) if stride is None else strided(ids, bos, 64, stride)
    losses = []
    with open_model(tiny_model) as file:
        for window in windows:
            logits = all_logits(ReferenceBackend(file, 64), window.tokens)
            losses.append(-token_logprobs(logits[window.first - 1 : -1], window.tokens[window.first :]))
    every = np.concatenate(losses)
    assert (result.tokens, result.windows, result.ctx, result.stride) == (every.size, len(windows), 64, stride)
    assert result.nll == pytest.approx(every.mean(), rel=1e-5 if device == "reference" else 1e-3)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert result.stderr == pytest.approx(result.perplexity * every.std(ddof=1) / every.size**0.5, rel=1e-2)


@pytest.mark.parametrize("rope", [None, {"rope_type": "dynamic", "factor": 4.0}])
def test_a_long_window_goes_in_calls_where_that_changes_nothing(tmp_path, rope):
    """Dynamic RoPE follows the length of a call: there the window is one call, like the oracle's."""
    make_checkpoint(tmp_path / "model", max_position_embeddings=300 if rope is None else 32, rope_scaling=rope)
    convert(tmp_path / "model", tmp_path / "m.edgellama", receipt=False, method="search")
    tokens = (np.arange(300) * 37 % 277).astype(np.int32)
    with load(tmp_path / "m.edgellama", n_ctx=300, n_slots=1) as llm:
        nll, _, n = measure(llm, [Window(tokens, 20)])
        want = -token_logprobs(all_logits(ReferenceBackend(llm.file, 300), tokens)[19:-1], tokens[20:]).mean()
    assert n == 280
    assert nll == pytest.approx(want, rel=1e-4)


def test_the_verb(tiny_model, tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    argv = ["perplexity", str(tiny_model), str(text), "--ctx", "64"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert shown.startswith(f"perplexity {facts['perplexity']:.4f} ± {facts['stderr']:.4f} ({facts['tokens']} tokens")
    assert facts["windows"] == 6 and facts["tokens"] == 6 * 31
    assert main([*argv, "--stride", "32", "--chunks", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 63 + 32
    for wrong, says in (
        (["--stride", "65"], "tokens would be left out"),
        (["--ctx", "3"], "at least 4"),
        (["--stride", "0"], "too small"),
    ):
        assert main([*argv, *wrong]) == 2
        assert says in capsys.readouterr().err
    assert main(["perplexity", str(tiny_model), str(text), "--ctx", "500"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "fewer than one window of 500" in err
    assert main(["perplexity", str(tiny_model), str(tmp_path / "none.txt")]) == 1
    assert "none.txt: no such file" in capsys.readouterr().err


def test_a_tokenizer_that_does_not_fit(tiny_checkpoint, tmp_path):
    make_checkpoint(tmp_path / "model", vocab_size=80)
    (tmp_path / "model" / "tokenizer.json").write_bytes((tiny_checkpoint / "tokenizer.json").read_bytes())
    convert(tmp_path / "model", tmp_path / "m.edgellama", receipt=False, method="search")
    with load(tmp_path / "m.edgellama") as llm, pytest.raises(TokenizerError, match="does not fit the model"):
        perplexity(llm, TEXT, ctx=64)


# -- transformers ----------------------------------------------------------------------------------------------------


def transformers_perplexity(folder, ids, max_length, stride):
    """The snippet of Hugging Face's page "Perplexity of fixed-length models", on these ids.

    But for the weight of a window, which there is one less than the losses that the model's mean is over.
    """
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    input_ids_all = torch.tensor([ids])
    seq_len = input_ids_all.size(1)
    nll_sum, n_tokens, prev_end_loc = 0.0, 0, 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        input_ids = input_ids_all[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            neg_log_likelihood = model(input_ids, labels=target_ids).loss
        num_loss_tokens = (target_ids[:, 1:] != -100).sum().item()
        nll_sum += neg_log_likelihood.item() * num_loss_tokens
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return math.exp(nll_sum / n_tokens)


def transformers_chunks(folder, windows):
    """llama.cpp's convention, computed by transformers."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    for window in windows:
        tokens = torch.from_numpy(window.tokens.astype(np.int64))
        with torch.no_grad():
            logits = model(tokens[None]).logits[0]
        ours = torch.nn.functional.cross_entropy(
            logits[window.first - 1 : -1].double(), tokens[window.first :], reduction="none"
        )
        losses.append(ours.numpy())
    return math.exp(np.concatenate(losses).mean())


def check_against_transformers(path, folder, text, ctx, stride):
    from edgellama_convert import export_hf

    export_hf(path, folder)
    with load(path, n_ctx=ctx, n_slots=1) as llm:
        ids, bos = encode_text(llm.tokenizer, text, llm.config.vocab_size)
        hugging_face = perplexity(llm, text, ctx=ctx, stride=stride).perplexity
        llama_cpp = perplexity(llm, text, ctx=ctx).perplexity
    whole = ids if bos is None else [bos, *ids]
    assert hugging_face == pytest.approx(transformers_perplexity(folder, whole, ctx, stride), rel=1e-3)
    assert llama_cpp == pytest.approx(transformers_chunks(folder, chunks(ids, bos, ctx)), rel=1e-3)


@pytest.mark.torch
def test_agrees_with_transformers_on_a_random_model(tiny_model, tmp_path):
    check_against_transformers(tiny_model, tmp_path / "hf", TEXT[:416], 64, 32)


@pytest.mark.torch
@pytest.mark.models
def test_agrees_with_transformers_on_a_real_model(minimind_dir, tmp_path):
    from edgellama_convert.receipt import heldout_text

    convert(minimind_dir, tmp_path / "m.edgellama", receipt=False, method="search")
    check_against_transformers(tmp_path / "m.edgellama", tmp_path / "hf", heldout_text(), 512, 256)
