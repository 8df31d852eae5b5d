"""Beam search: the most probable continuations that keeping `num_beams` of them at each step finds.

The algorithm and its results are those of transformers' `generate(num_beams=...)`; it has been described often, e.g. in
Freitag and Al-Onaizan, "Beam Search Strategies for Neural Machine Translation" (2017). Nothing is drawn at random.

Knows scores and tokens. The model is a `Beams`, what may be said a `Guide`; where beams live is not known here.

Ties, here as in every other choice, go to what comes first: the better beam of the step before, then the lower id.
(transformers leaves them to `torch.topk`.) Scores are summed in float64, transformers' in float32, so where two beams
differ by no more than its rounding, the two may choose differently.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from edgellama.errors import EdgellamaError
from edgellama.logprob import log_softmax


@dataclass(frozen=True)
class BeamParams:
    """What to search for; names and meanings are transformers'.

    `length_penalty`: a finished text's score is its log-probability over its number of new tokens to this power, so
    above 0 favours long texts and below 0 short ones. `early_stopping` says when to stop once there are `num_beams`
    finished texts: at once (True), when the best running beam at its present length is no better than they (False), or
    when it cannot become so at any length ("never"). Raises TypeError or ValueError for other values.
    """

    num_beams: int
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        for name in ("num_beams", "num_return_sequences"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences must be at most num_beams ({self.num_beams}), got {self.num_return_sequences}"
            )
        penalty = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, int | float | np.floating | np.integer):
            raise TypeError(f"length_penalty must be a number, got {type(penalty).__name__}")
        if not math.isfinite(penalty):
            raise ValueError(f"length_penalty must be finite, got {penalty}")
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise ValueError(f'early_stopping must be False, True or "never", got {self.early_stopping!r}')


@dataclass(frozen=True)
class Hypothesis:
    """A text that the search found: new ids, with the end-of-text id if it ended so.

    `logprob` is the sum over them, `score` what it is ranked by (transformers' `sequences_scores`). `finish_reason`:
    "stop", "length", or what `best` was told for a text in the making. `notes`: of each token, if they were taken.
    """

    token_ids: tuple[int, ...]
    score: float
    logprob: float
    finish_reason: str
    notes: tuple[Any, ...] = ()


class Beams(Protocol):
    """The model as `BeamSearch` sees it."""

    def start(self) -> np.ndarray:
        """Logits float32 [1, vocab_size] after the prompt, which is the only beam."""

    def advance(self, sources: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Beam i becomes what beam `sources[i]` was, and `tokens[i]`; logits after each, float32 [B, vocab_size].

        One beam may be the source of several or of none; there are never more than `num_beams`.
        """


class Guide(Protocol):
    """Penalties, bans and constraints of one beam. Not changed by what is called."""

    def adjust(self, logprobs: np.ndarray) -> np.ndarray:
        """float32 [vocab_size], left as they are -> what to use instead; -inf forbids a token."""

    def after(self, token: int) -> "Guide":
        """The guide of this beam with one more token."""

    @property
    def finished(self) -> bool:
        """Nothing may follow."""


@dataclass(frozen=True)
class _Beam:
    """A text in the making; `source` is the number of the beam that it continues."""

    tokens: tuple[int, ...]
    logprob: float
    source: int
    guide: Guide | None
    notes: tuple[Any, ...] = ()


class BeamSearch:
    """One search: `step` until it says False, then (or at any time) `best`.

    The `guide` changes log-probabilities before they are added up, as transformers' logits processors do; `stop(new
    ids)` says that a text is finished though it has no end-of-text id. `note(token, logits)` makes the `notes`, from
    the model's own logits float32 [vocab_size], which it must not keep.
    """

    def __init__(
        self,
        beams: Beams,
        params: BeamParams,
        *,
        max_new_tokens: int,
        eos_ids: frozenset[int],
        guide: Guide | None = None,
        stop: Callable[[tuple[int, ...]], bool] | None = None,
        note: Callable[[int, np.ndarray], Any] | None = None,
    ):
        self._beams, self._params, self._max_new_tokens = beams, params, max_new_tokens
        self._eos_ids, self._stop, self._note = eos_ids, stop, note
        self._running = [_Beam((), 0.0, 0, guide)]
        self._finished: list[Hypothesis] = []
        self.length = 0
        """New tokens of the running beams."""

    def step(self) -> bool:
        """Run the model once and go one token further; False when the search is over.

        Raises EdgellamaError where every continuation has been forbidden, and what the model raises: then nothing has
        changed.
        """
        if not self._running:
            return False
        params, running = self._params, self._running
        if self.length == 0:
            logits = self._beams.start()
        else:
            logits = self._beams.advance([beam.source for beam in running], [beam.tokens[-1] for beam in running])
        self.length += 1
        scores = _continuations(logits, running)
        # So many that num_beams of them go on even if every beam's best ones all end.
        candidates = _best(scores, running, max(2, 1 + len(self._eos_ids)) * params.num_beams)
        going, ended = [], []
        for rank, beam in enumerate(candidates):
            if self._note is not None:
                notes = (*running[beam.source].notes, self._note(beam.tokens[-1], logits[beam.source]))
                beam = replace(beam, notes=notes)
            reason = self._finish_reason(beam)
            if reason is None:
                going.append(beam)
            elif rank < params.num_beams:  # those further down are there to replace the ended ones only
                ended.append(self._hypothesis(beam, reason))
        self._finished = _ranked(self._finished + ended, params.num_beams)
        self._running = going[: params.num_beams]
        if self._running and self._is_over(self._running[0].logprob):
            self._running = []
        if not self._running and not self._finished:
            raise EdgellamaError("beam search found no text: every next token has been forbidden")
        return bool(self._running)

    def best(self, unfinished: str = "length") -> list[Hypothesis]:
        """The best `num_return_sequences` texts, best first; fewer only where there are no more.

        Of a search that is not over, the running beams too, with this `finish_reason`.
        """
        texts = self._finished + [self._hypothesis(beam, unfinished) for beam in self._running if beam.tokens]
        return _ranked(texts, self._params.num_return_sequences)

    def _hypothesis(self, beam: _Beam, reason: str) -> Hypothesis:
        score = beam.logprob / len(beam.tokens) ** self._params.length_penalty
        return Hypothesis(beam.tokens, score, beam.logprob, reason, beam.notes)

    def _finish_reason(self, beam: _Beam) -> str | None:
        tokens = beam.tokens
        if tokens[-1] in self._eos_ids or (self._stop is not None and self._stop(tokens)):
            return "stop"
        if beam.guide is not None and beam.guide.finished:
            return "stop"
        return "length" if len(tokens) == self._max_new_tokens else None

    def _is_over(self, best: float) -> bool:
        """Whether to stop though beams are running, the best of them with log-probability `best`."""
        params = self._params
        if len(self._finished) < params.num_beams:
            return False
        if params.early_stopping is True:
            return True
        longest = params.early_stopping == "never" and params.length_penalty > 0
        possible = best / (self._max_new_tokens if longest else self.length) ** params.length_penalty
        return possible <= self._finished[-1].score


def _continuations(logits: np.ndarray, running: Sequence[_Beam]) -> np.ndarray:
    """float64 [B, vocab_size]: the log-probability of each beam with each next token."""
    scores = log_softmax(logits)
    for row, beam in zip(scores, running, strict=True):
        if beam.guide is not None:
            row[:] = beam.guide.adjust(row.astype(np.float32))
        row += beam.logprob
    return scores


def _best(scores: np.ndarray, running: Sequence[_Beam], k: int) -> list[_Beam]:
    """The k best continuations, best first; those of probability 0 are none."""
    flat = scores.reshape(-1)
    lowest = np.partition(flat, flat.size - k)[flat.size - k] if k < flat.size else -np.inf
    order = np.flatnonzero((flat >= lowest) & (flat > -np.inf))
    order = order[np.argsort(-flat[order], kind="stable")][:k]
    found = []
    for index in order.tolist():
        source, token = divmod(index, scores.shape[1])
        parent = running[source]
        guide = parent.guide and parent.guide.after(token)
        found.append(_Beam((*parent.tokens, token), float(flat[index]), source, guide))
    return found


def _ranked(hypotheses: list[Hypothesis], n: int) -> list[Hypothesis]:
    return sorted(hypotheses, key=lambda each: -each.score)[:n]
