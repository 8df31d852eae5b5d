"""How well a model predicts a text: perplexity, with llama.cpp's windows or Hugging Face's.

Perplexity depends on how a text is cut, so figures compare only where the windows are the same. Two ways are common:

- llama.cpp (`llama-perplexity`): chunks of `ctx` tokens, one after the other; of each the second half is scored, so
  that every scored token has at least ctx / 2 before it. BOS, if the model's texts begin with it, replaces the first
  token of every chunk. What is left at the end counts for nothing.
- Hugging Face ("Perplexity of fixed-length models"): windows of `ctx` tokens that begin `stride` tokens apart; each
  scores what no window before it has. Where windows overlap, every token but the first is scored, and each counts the
  same (the page's own snippet weighs each window by a token too few, which shows on short texts).

Knows ids and logits, not files. The forward pass is a loaded model's: what is measured is the model as its device
runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellama.errors import EdgellamaError, TokenizerError
from edgellama.logprob import token_logprobs
from edgellama.rope import depends_on_length

if TYPE_CHECKING:
    from edgellama.model import Llama
    from edgellama.tokenizer import Tokenizer

DEFAULT_CTX = 512
_CALL = 256  # tokens of a window that go through the model at once, where that changes nothing: bounds the logits
_ROWS = 32  # of logits, made float64 at a time


@dataclass(frozen=True)
class Window:
    """One sequence, int32 [n]; the tokens from number `first` on are scored (1 <= first < n)."""

    tokens: np.ndarray
    first: int

    @property
    def scored(self) -> int:
        return len(self.tokens) - self.first


@dataclass(frozen=True)
class Perplexity:
    """`perplexity` = exp(mean of -log p over the scored tokens); `stderr` is of the perplexity, as llama.cpp has it."""

    perplexity: float
    stderr: float
    nll: float
    """Mean of -log p, in nats a token."""
    tokens: int
    """Scored ones."""
    windows: int
    ctx: int
    stride: int | None
    """None: llama.cpp's chunks."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def encode_text(tokenizer: Tokenizer, text: str, vocab_size: int) -> tuple[list[int], int | None]:
    """(ids of `text` alone, the BOS id that the model's texts begin with, or None).

    TokenizerError for an id that the model does not have.
    """
    begins = tokenizer.encode("", add_special_tokens=True)[:1]
    bos = tokenizer.bos_id if begins == [tokenizer.bos_id] else None
    ids = tokenizer.encode(text, add_special_tokens=False)
    highest = max([*ids, bos or 0])
    if highest >= vocab_size:
        raise TokenizerError(f"the tokenizer does not fit the model: id {highest}, but only {vocab_size} tokens")
    return ids, bos


def chunks(ids: Sequence[int], bos: int | None, ctx: int = DEFAULT_CTX) -> list[Window]:
    """llama.cpp's windows. EdgellamaError if the text does not fill one (llama.cpp asks for two)."""
    if ctx < 4:
        raise ValueError(f"ctx must be at least 4, got {ctx}")
    tokens = np.array(ids if bos is None else [bos, *ids], np.int32)
    n = len(tokens) // ctx
    if n == 0:
        raise EdgellamaError(
            f"the text has {len(tokens)} tokens, fewer than one window of {ctx}; choose a smaller --ctx"
        )
    parts = tokens[: n * ctx].reshape(n, ctx).copy()
    if bos is not None:
        parts[:, 0] = bos
    return [Window(part, ctx // 2 + 1) for part in parts]


def strided(ids: Sequence[int], bos: int | None, ctx: int = DEFAULT_CTX, stride: int = DEFAULT_CTX) -> list[Window]:
    """Hugging Face's windows. EdgellamaError if there is nothing to score."""
    if not 1 <= stride <= ctx or ctx < 2:
        raise ValueError(f"stride must be from 1 to ctx, got {stride} and {ctx}")
    tokens = np.array(ids if bos is None else [bos, *ids], np.int32)
    if len(tokens) < 2:
        raise EdgellamaError(f"the text has {len(tokens)} tokens: there is nothing to predict")
    windows = []
    before = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + ctx, len(tokens))
        first = max(before - begin, 1)
        if first < end - begin:
            windows.append(Window(tokens[begin:end], first))
        before = end
        if end == len(tokens):
            break
    return windows


def measure(
    llm: Llama, windows: Sequence[Window], *, progress: Callable[[int, int], None] | None = None
) -> tuple[float, float, int]:
    """(mean of -log p, its standard error, tokens scored) over the windows, each from an empty cache.

    `llm.n_ctx` must hold a window. progress(done, total) counts windows.
    """
    # Where RoPE follows the length of a call, a window is one call, as in transformers.
    call = max(len(window.tokens) for window in windows) if depends_on_length(llm.config) else _CALL
    losses: list[np.ndarray] = []
    for i, window in enumerate(windows):
        llm.reset()
        losses += _losses(llm, window, call)
        if progress is not None:
            progress(i + 1, len(windows))
    llm.reset()
    every = np.concatenate(losses)
    error = float(every.std(ddof=1) / math.sqrt(every.size)) if every.size > 1 else 0.0
    return float(every.mean()), error, every.size


def _losses(llm: Llama, window: Window, call: int) -> Iterator[np.ndarray]:
    """-log p of the scored tokens, float64, in pieces."""
    tokens = window.tokens
    for start in range(0, len(tokens), call):
        stop = min(start + call, len(tokens))
        first = max(window.first - 1, start)  # the token from which the first scored one is predicted
        logits = llm.forward(tokens[start:stop], logits_to_keep=max(stop - first, 1))
        targets = tokens[first + 1 : stop + 1]  # after the last token of all there is none
        for at in range(0, len(targets), _ROWS):
            yield -token_logprobs(logits[at : min(at + _ROWS, len(targets))], targets[at : at + _ROWS])


def perplexity(
    llm: Llama,
    text: str,
    *,
    ctx: int = DEFAULT_CTX,
    stride: int | None = None,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Of `text`, with llama.cpp's chunks, or Hugging Face's windows where a `stride` is given.

    `llm` must have been loaded with `n_ctx` of at least `ctx`. `max_windows`: only so many of the first ones.
    EdgellamaError: the text is too short. ContextError: `ctx` does not fit.

    >>> with edgellama.load("m.edgellama", n_ctx=512) as llm:
    ...     print(perplexity(llm, Path("book.txt").read_text()).perplexity)
    """
    if llm.config.is_classifier:
        raise EdgellamaError("a classifier has no next token to be measured by; perplexity takes a LlamaForCausalLM")
    ids, bos = encode_text(llm.tokenizer, text, llm.config.vocab_size)
    windows = chunks(ids, bos, ctx) if stride is None else strided(ids, bos, ctx, stride)
    windows = windows[:max_windows]
    nll, error, tokens = measure(llm, windows, progress=progress)
    value = math.exp(min(nll, 700.0))
    return Perplexity(value, value * error, nll, tokens, len(windows), ctx, stride)
