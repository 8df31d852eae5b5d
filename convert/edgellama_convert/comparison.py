"""How far a quantized model is from its source: their next-token distributions on a text, and their weights.

Both go through the layers together in float32 (`walk`), so what is measured is the weights' error alone, whatever the
device. Windows and scored tokens are llama.cpp's, as in `edgellama.perplexity`: the second half of each chunk; but a
window always begins with BOS where there is one.

KL is the Kullback-Leibler divergence of the model's distribution from the source's, in nats a token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.backends.cpu.threads import default_threads
from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.format import ModelFile, has_tokenizer, open_model
from edgellama.perplexity import DEFAULT_CTX, Window, chunks, encode_text
from edgellama.sizing import layer_weights
from edgellama.tokenizer import Tokenizer, load_tokenizer

from .siblings import as_llama_files, model_type_of, open_checkpoint
from .source import resolve
from .walk import Stream, Walk
from .weights import CheckpointWeights, StoredWeights, Weights, check_same_model

GROUP_TOKENS = 2048
"""Tokens that go through the layers together; more need more memory, fewer more reading of the weights."""

_COLUMNS = 128  # scored tokens whose logits are made float64 at a time

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Comparison:
    """KL in nats a token, its mean and 99th percentile; `top1`: share of tokens with the same likeliest next token."""

    kl_mean: float
    kl_p99: float
    top1: float
    perplexity: float
    source_perplexity: float
    tokens: int
    """Scored ones."""
    windows: int
    ctx: int
    tensor_errors: dict[str, float]
    """Matrix -> rms of (model - source) over rms of source."""
    layer_errors: list[float]
    """The same of the activations after each layer, over all tokens."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class NotFinite(ConvertError):
    """Weights that are numbers, and logits that are not."""


class Divergence:
    """Sums over the vocabulary, a slab of ids at a time, for R scored tokens; then figures for each of them.

    `targets` int [R]: the tokens that came. The order of the sums is that of the slabs.
    """

    def __init__(self, targets: np.ndarray):
        self._targets, n = targets, len(targets)
        self._a, self._b = _LogSum(n), _LogSum(n)
        self._weighted = np.zeros(n)  # sum of exp(a - top of a) * (a - b)

    def add(self, first: int, a: np.ndarray, b: np.ndarray) -> None:
        """Logits of ids first..first+len-1, float32 [ids, R]: the source's and the model's."""
        for start in range(0, len(self._targets), _COLUMNS):
            self._add(first, a, b, slice(start, start + _COLUMNS))

    def _add(self, first: int, a: np.ndarray, b: np.ndarray, part: slice) -> None:
        here = self._targets[part] - first
        columns = np.flatnonzero((here >= 0) & (here < len(a)))
        came = here[columns], columns
        wide_a, wide_b = a[:, part].astype(np.float64), b[:, part].astype(np.float64)
        shrink, terms = self._a.add(first, wide_a, came, part)
        terms *= wide_a - wide_b
        self._weighted[part] = self._weighted[part] * shrink + terms.sum(axis=0)
        self._b.add(first, wide_b, came, part)

    def figures(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(KL, whether both have the same likeliest id, -log p of the source, of the model), each [R]."""
        a, b = self._a, self._b
        kl = self._weighted / a.total - a.log_total() + b.log_total()
        return np.maximum(kl, 0.0), a.best == b.best, a.log_total() - a.target, b.log_total() - b.target


class _LogSum:
    """Running log of a sum of exponentials, the likeliest id and the target's logit, for R tokens."""

    def __init__(self, n: int):
        self.top, self.total = np.full(n, -np.inf), np.zeros(n)
        self.best, self.target = np.zeros(n, np.int64), np.zeros(n)

    def add(
        self, first: int, x: np.ndarray, came: tuple[np.ndarray, np.ndarray], part: slice
    ) -> tuple[np.ndarray, np.ndarray]:
        """x [ids, tokens] of the tokens in `part`, `came` (row, column) in it of the targets.

        Returns what earlier sums are to be multiplied with [tokens], and exp(x - top) [ids, tokens].
        """
        rows = x.argmax(axis=0)
        largest = np.take_along_axis(x, rows[None], axis=0)[0]
        self.best[part] = np.where(largest > self.top[part], rows + first, self.best[part])
        top = np.maximum(self.top[part], largest)
        shrink = np.exp(self.top[part] - top)
        terms = np.exp(x - top)
        self.total[part] = self.total[part] * shrink + terms.sum(axis=0)
        self.top[part] = top
        self.target[part][came[1]] = x[came]
        return shrink, terms

    def log_total(self) -> np.ndarray:
        return self.top + np.log(self.total)


@dataclass(frozen=True)
class Prompt:
    """A sequence that only the model computes, beside the windows, for its logits after the last `rows` tokens."""

    tokens: np.ndarray
    rows: int


@np.errstate(over="ignore", invalid="ignore")  # that figures are not finite is seen at the end
def measure(
    source: Weights,
    model: Weights,
    windows: Sequence[Window],
    n_threads: int,
    prompt: Prompt | None = None,
    progress: Progress | None = None,
) -> tuple[Comparison, np.ndarray | None]:
    """(the comparison, the prompt's logits float32 [rows, vocab_size]). Windows are all of one length.

    progress(done, total) counts weights, once for each group of windows.
    """
    per_group = max(1, GROUP_TOKENS // len(windows[0].tokens))
    groups = [windows[i : i + per_group] for i in range(0, len(windows), per_group)]
    tally = _Tally(model.config, len(groups), progress)
    figures: list[tuple[np.ndarray, ...]] = []
    squares: list[np.ndarray] = []
    errors: dict[str, float] = {}
    logits = None
    for group in groups:
        mine = prompt if not figures else None
        tokens = [window.tokens for window in group]
        streams = [Stream(source, tokens), Stream(model, tokens if mine is None else [*tokens, mine.tokens])]
        with Walk(streams, n_threads, tally.add, compare=not errors) as walk:
            squares.append(np.array(list(_through_the_layers(walk))))
            divergence, mine_logits = _at_the_head(walk, group, mine)
        figures.append(divergence.figures())
        logits = logits if mine_logits is None else mine_logits
        errors = errors or {name: error.relative_rms for name, error in walk.errors.items()}
    kl, same, source_nll, nll = (np.concatenate(each) for each in zip(*figures, strict=True))
    if not (np.isfinite(kl).all() and np.isfinite(nll).all() and np.isfinite(source_nll).all()):
        raise NotFinite("the logits are not all finite: the weights of the model or of its source are damaged")
    sums = np.sum(squares, axis=0)
    comparison = Comparison(
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1=float(same.mean()),
        perplexity=float(np.exp(nll.mean())),
        source_perplexity=float(np.exp(source_nll.mean())),
        tokens=kl.size,
        windows=len(windows),
        ctx=len(windows[0].tokens),
        tensor_errors=errors,
        layer_errors=[float(each) for each in np.sqrt(sums[:, 0] / sums[:, 1])],
    )
    return comparison, logits


def _through_the_layers(walk: Walk) -> Iterator[tuple[float, float]]:
    """After each layer: sums of squares of the streams' difference and of the first stream."""
    walk.embed()
    a, b = walk.streams
    for i in range(walk.config.num_hidden_layers):
        walk.layer(i)
        difference = a.x - b.x[:, : a.x.shape[1]]
        yield tuple(float(np.square(x, dtype=np.float64).sum(axis=0).sum()) for x in (difference, a.x))  # type: ignore


def _at_the_head(walk: Walk, windows: Sequence[Window], prompt: Prompt | None) -> tuple[Divergence, np.ndarray | None]:
    starts = np.cumsum([0] + [len(window.tokens) for window in windows])
    columns = np.concatenate(
        [start + np.arange(w.first - 1, len(w.tokens) - 1) for start, w in zip(starts, windows, strict=False)]
    )
    divergence = Divergence(np.concatenate([window.tokens[window.first :] for window in windows]))
    n, ours, logits = len(columns), columns, None
    if prompt is not None:
        last = walk.streams[1].x.shape[1]
        ours = np.concatenate([columns, np.arange(last - prompt.rows, last)])
        logits = np.empty((prompt.rows, walk.config.vocab_size), np.float32)
    for first, last, (a, b) in walk.logits([columns, ours]):
        divergence.add(first, a, b[:, :n])
        if logits is not None:
            logits[:, first:last] = b[:, n:].T
    return divergence, logits


@np.errstate(over="ignore", invalid="ignore")
def prompt_logits(model: Weights, prompt: Prompt, n_threads: int, progress: Progress | None = None) -> np.ndarray:
    """float32 [rows, vocab_size]: logits after the last tokens of a prompt, where there is no text to measure on."""
    tally = _Tally(model.config, 1, progress)
    logits = np.empty((prompt.rows, model.config.vocab_size), np.float32)
    with Walk([Stream(model, [prompt.tokens])], n_threads, tally.add) as walk:
        walk.embed()
        for i in range(model.config.num_hidden_layers):
            walk.layer(i)
        columns = np.arange(len(prompt.tokens) - prompt.rows, len(prompt.tokens))
        for first, last, (ours,) in walk.logits([columns]):
            logits[:, first:last] = ours.T
    return logits


class _Tally:
    """Weights that were used, told as progress."""

    def __init__(self, config: LlamaConfig, rounds: int, progress: Progress | None):
        self._progress, self._done = progress, 0
        self._total = rounds * (layer_weights(config) + config.vocab_size * config.hidden_size)

    def add(self, n: int) -> None:
        self._done += n
        if self._progress is not None:
            self._progress(self._done, self._total)


def windows_of(tokenizer: Tokenizer, text: str, vocab_size: int, ctx: int) -> list[Window]:
    """The windows to measure on, each begun with BOS where there is one, even if the tokenizer adds none.

    Models that were only trained on chats know no text without it: MiniMind2's perplexity goes from 72 to 50,000.
    """
    ids, bos = encode_text(tokenizer, text, vocab_size)
    if bos is None and tokenizer.bos_id is not None and tokenizer.bos_id < vocab_size:
        bos = tokenizer.bos_id
    return chunks(ids, bos, ctx)


def compare(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str],
    text: str,
    *,
    ctx: int = DEFAULT_CTX,
    max_windows: int | None = None,
    revision: str | None = None,
    offline: bool = False,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare an `.edgellama` file with what it was made from, or with another `.edgellama` file, on a text.

    `source`: a checkpoint's folder, a hub id, or an `.edgellama` file; its float weights are read layer by layer, so
    memory does not grow with the model (about 40 bytes for each hidden and intermediate value of 2048 tokens). Raises
    ConvertError where the two are not the same model or the text is read differently, EdgellamaError for a short text.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open_model(model))
        theirs, tokenizer = _open_source(source, stack, revision, offline)
        check_same_model(theirs.config, file.config, str(source), str(model))
        if file.config.is_classifier:
            raise ConvertError(f"{model} is a classifier, and compare goes by the next tokens; export --to hf instead")
        vocab_size = file.config.vocab_size
        ours = load_tokenizer(file.files, file.config)
        windows = windows_of(ours, text, vocab_size, ctx)[:max_windows]
        if tokenizer is not None and encode_text(tokenizer, text, vocab_size) != encode_text(ours, text, vocab_size):
            raise ConvertError(f"the tokenizers of {model} and {source} read the text differently: nothing to compare")
        return measure(theirs, StoredWeights.of_file(file), windows, n_threads or default_threads(), progress=progress)[
            0
        ]


def _open_source(
    source: str | os.PathLike[str], stack: ExitStack, revision: str | None, offline: bool
) -> tuple[Weights, Tokenizer | None]:
    path = Path(source)
    if path.suffix == ".edgellama" and path.is_file():
        file: ModelFile = stack.enter_context(open_model(path))
        return StoredWeights.of_file(file), load_tokenizer(file.files, file.config)
    from .files import read_config, read_files

    origin = resolve(source, revision=revision, offline=offline)
    _, config = read_config(origin.folder)
    files = as_llama_files(read_files(origin.folder), model_type_of(origin.folder))
    checkpoint = stack.enter_context(open_checkpoint(origin.folder, config))
    return CheckpointWeights(config, checkpoint), load_tokenizer(files, config) if has_tokenizer(files) else None
