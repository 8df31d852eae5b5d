"""The receipt: what a conversion cost in quality, measured on text that no calibration has seen, for the file itself.

Figures are those of `comparison`, on windows of the text that ships (`heldout.txt`, our own words: prose, dialogue,
code, sums, German, French, Spanish, Chinese), with the golden vectors of `edgellama.golden`, whose prompt goes along.
They are rounded to 4 digits, so that a last bit of NumPy's exp on another machine does not show.

The cost is bounded: the sample shrinks as the model grows, from 8 windows of 256 tokens to 1. Up to 15 billion weights,
weights x tokens stay below 4e12, which is 16 TFLOP for the two models together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import xxhash

from edgellama import golden
from edgellama.config import LlamaConfig
from edgellama.errors import EdgellamaError, TokenizerError
from edgellama.format import has_tokenizer
from edgellama.perplexity import Window
from edgellama.sizing import layer_weights
from edgellama.tokenizer import Tokenizer, load_tokenizer

from .comparison import Comparison, NotFinite, Prompt, measure, prompt_logits, windows_of
from .resources import MIB, private_bytes
from .walk import SLAB_WEIGHTS
from .weights import Weights

CTX = 256
MAX_WINDOWS = 8
MAX_WORK = 4_000_000_000_000
"""Weights x tokens of a sample, unless one window alone is more."""
_DIGITS = 4


@dataclass(frozen=True)
class Receipt:
    """`stored` goes into the file; None where nothing could be measured: `warnings` say why."""

    stored: dict[str, Any] | None
    warnings: tuple[str, ...] = ()
    peak_rss: int | None = None


class _NoRoom(Exception):
    """More memory is held than the user allows."""


def make_receipt(
    source: Weights,
    model: Weights,
    files: Mapping[str, bytes],
    facts: Mapping[str, Any],
    n_threads: int,
    *,
    max_ram: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Receipt:
    """Measure `model`, the weights just written, against `source`. `facts` (method, calibration, ...) are kept with it.

    Without a tokenizer there is no text to measure on: then only the golden logits are kept. Where `max_ram` is too
    little, nothing is.
    """
    config = model.config
    tokenizer, windows, warnings = _text(files, config)
    prompt = golden.prompt_ids(config, tokenizer)
    rows = Prompt(prompt, golden.prompt_rows(len(prompt)))
    needed = (private_bytes() or 0) + working_bytes(config, sum(len(each.tokens) for each in windows) + len(prompt))
    if max_ram is not None and needed > max_ram:
        return _no_room(needed)
    watch = _Watch(max_ram, progress)
    try:
        if windows:
            comparison, logits = measure(source, model, windows, n_threads, rows, watch)
            assert logits is not None
        else:
            comparison, logits = None, prompt_logits(model, rows, n_threads, watch)
        if not np.isfinite(logits).all():
            raise NotFinite("the logits are not all finite: the weights overflow")
    except _NoRoom:
        return _no_room(watch.peak or needed)
    except NotFinite as error:
        return Receipt(None, (f"no receipt is stored: {error}",), watch.peak)
    stored = {
        **facts,
        "quality": None if comparison is None else _quality(comparison),
        "golden": golden.make(prompt, logits, tokenizer),
    }
    return Receipt(stored, tuple(warnings), watch.peak)


def heldout_text() -> str:
    """The text that receipts are measured on."""
    return resources.files(__package__).joinpath("heldout.txt").read_text(encoding="utf-8")


def _text(files: Mapping[str, bytes], config: LlamaConfig) -> tuple[Tokenizer | None, list[Window], list[str]]:
    """The model's tokenizer and the sample in its tokens; a warning where there is none."""
    if not has_tokenizer(files):
        return None, [], ["no quality figures are stored: without a tokenizer there is no text to measure them on"]
    tokenizer = load_tokenizer(files, config)
    try:
        assert tokenizer is not None
        windows = windows_of(tokenizer, heldout_text(), config.vocab_size, min(CTX, config.max_position_embeddings))
    except (TokenizerError, EdgellamaError, ValueError) as error:
        return tokenizer, [], [f"no quality figures are stored: {error}"]
    weights = layer_weights(config) + config.vocab_size * config.hidden_size
    return tokenizer, _sample(windows, weights), []


def _sample(windows: list[Window], weights: int) -> list[Window]:
    """As many windows as the work allows, spread over the text.

    >>> [int(window.tokens[0]) for window in _sample([Window(np.full(256, i), 129) for i in range(10)], 6_600_000_000)]
    [0, 5]
    """
    n = min(max(1, MAX_WORK // (weights * len(windows[0].tokens))), MAX_WINDOWS, len(windows))
    return [windows[i * len(windows) // n] for i in range(n)]


def working_bytes(config: LlamaConfig, tokens: int) -> int:
    """Upper bound of what measuring holds: activations of two models, slabs of weights, logits."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    widest = max(hidden + config.intermediate_size, 2 * heads + 2 * keys)
    a_token = 2 * 4 * (3 * hidden + widest + max(hidden, config.intermediate_size, heads))
    return tokens * a_token + 16 * SLAB_WEIGHTS + 24 * MIB


def _quality(comparison: Comparison) -> dict[str, Any]:
    values = comparison.to_dict()
    figures = ("kl_mean", "kl_p99", "top1", "perplexity", "source_perplexity")
    return {
        **{name: float(f"{values[name]:.{_DIGITS}g}") for name in figures},
        **{name: values[name] for name in ("tokens", "windows", "ctx")},
        "text": f"builtin {xxhash.xxh3_128_hexdigest(heldout_text().encode())[:8]}",
    }


def _no_room(needed: int) -> Receipt:
    return Receipt(
        None, (f"no receipt is stored: measuring the quality takes {needed // MIB} MiB, more than --max-ram allows",)
    )


class _Watch:
    """Progress that measures memory by the way, and ends the work where it is too much."""

    def __init__(self, max_ram: int | None, progress: Callable[[int, int], None] | None):
        self._max_ram, self._progress = max_ram, progress
        self.peak: int | None = None

    def __call__(self, done: int, total: int) -> None:
        held = private_bytes()
        if held is not None:
            self.peak = max(held, self.peak or 0)
            if self._max_ram is not None and held > self._max_ram:
                raise _NoRoom
        if self._progress is not None:
            self._progress(done, total)


__all__ = ["Receipt", "heldout_text", "make_receipt"]
