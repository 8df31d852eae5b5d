"""Beam search: the most probable continuations that keeping `num_beams` of them at each step finds.

The algorithm and its results are those of transformers' `generate(num_beams=...)`; it has been described often, e.g. in
Freitag and Al-Onaizan, "Beam Search Strategies for Neural Machine Translation" (2017). Nothing is drawn at random.

`BeamSearch` knows scores and tokens; the model is a `Beams`. `SlotBeams` is one over a backend: a beam lives in a slot
of the cache, stays there as long as it goes on, and only what sets it apart is copied where it splits.

Ties, here as in every other choice, go to what comes first: the better beam of the step before, then the lower id.
(transformers leaves them to `torch.topk`.) Scores are summed in float64, transformers' in float32, so where two beams
differ by no more than its rounding, the two may choose differently.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from edgellama.errors import EdgellamaError
from edgellama.logprob import log_softmax

Processor = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(ids int32 [T], prompt and beam; log-probabilities float32 [vocab_size], its own) -> those to use instead."""


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
    "stop", "length", or what `best` was told for a text in the making.
    """

    token_ids: tuple[int, ...]
    score: float
    logprob: float
    finish_reason: str


class Beams(Protocol):
    """The model as `BeamSearch` sees it."""

    def start(self) -> np.ndarray:
        """Logits float32 [1, vocab_size] after the prompt, which is the only beam."""

    def advance(self, sources: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Beam i becomes what beam `sources[i]` was, and `tokens[i]`; logits after each, float32 [B, vocab_size].

        One beam may be the source of several or of none; there are never more than `num_beams`.
        """


@dataclass(frozen=True)
class _Beam:
    """A text not yet finished; `source` is the number of the beam that it continues."""

    tokens: tuple[int, ...]
    logprob: float
    source: int


class BeamSearch:
    """One search: `step` until it says False, then (or at any time) `best`.

    `processors` change the log-probabilities before they are added up, each beam's by itself; `stop(new ids)` says that
    a text is finished though it has no end-of-text id.
    """

    def __init__(
        self,
        beams: Beams,
        params: BeamParams,
        *,
        max_new_tokens: int,
        eos_ids: frozenset[int],
        prompt_ids: Sequence[int] | np.ndarray = (),
        processors: Sequence[Processor] = (),
        stop: Callable[[tuple[int, ...]], bool] | None = None,
    ):
        self._beams, self._params, self._max_new_tokens = beams, params, max_new_tokens
        self._eos_ids, self._processors, self._stop = eos_ids, processors, stop
        self._prompt = np.asarray(prompt_ids, np.int32)
        self._running = [_Beam((), 0.0, 0)]
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
        scores = _continuations(logits, running, self._prompt, self._processors)
        # So many that num_beams of them go on even if every beam's best ones all end.
        candidates = _best(scores, running, max(2, 1 + len(self._eos_ids)) * params.num_beams)
        going, ended = [], []
        for rank, beam in enumerate(candidates):
            reason = self._finish_reason(beam.tokens)
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
        return Hypothesis(beam.tokens, score, beam.logprob, reason)

    def _finish_reason(self, tokens: tuple[int, ...]) -> str | None:
        if tokens[-1] in self._eos_ids or (self._stop is not None and self._stop(tokens)):
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


def _continuations(
    logits: np.ndarray, running: Sequence[_Beam], prompt: np.ndarray, processors: Sequence[Processor]
) -> np.ndarray:
    """float64 [B, vocab_size]: the log-probability of each beam with each next token."""
    scores = log_softmax(logits)
    if processors:
        for i, beam in enumerate(running):
            ids, changed = np.append(prompt, np.array(beam.tokens, np.int32)), scores[i].astype(np.float32)
            for process in processors:
                changed = process(ids, changed)
            scores[i] = changed
    scores += np.array([[beam.logprob] for beam in running])
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
        found.append(_Beam((*running[source].tokens, token), float(flat[index]), source))
    return found


def _ranked(hypotheses: list[Hypothesis], n: int) -> list[Hypothesis]:
    return sorted(hypotheses, key=lambda each: -each.score)[:n]


class SlotBeams:
    """Beams in slots of a backend's cache; `forward` and `copy_slot` are the backend's (or wrap them).

    `contents`: slot -> the ids whose keys and values it holds, true at any time. `slots[0]` holds the first `n_past` of
    `prompt_ids` at the start; what the others hold is lost. There must be as many slots as beams.
    """

    def __init__(
        self,
        forward: Callable[..., np.ndarray],
        copy_slot: Callable[..., None],
        prompt_ids: Sequence[int],
        slots: Sequence[int],
        n_past: int = 0,
    ):
        self._forward, self._copy_slot, self._prompt = forward, copy_slot, list(prompt_ids)
        self._places = [slots[0]]  # beam -> slot
        self.contents: dict[int, list[int]] = {slot: [] for slot in slots}
        self.contents[slots[0]] = self._prompt[:n_past]

    def start(self) -> np.ndarray:
        """See `Beams.start`."""
        slot, n_past = self._places[0], len(self.contents[self._places[0]])
        new = np.array(self._prompt[n_past:], np.int32)
        positions = np.arange(n_past, n_past + new.size, dtype=np.int32)
        last = np.array([new.size - 1], np.int32)
        logits = self._forward(new, positions, np.full(new.size, slot, np.int32), last)
        self.contents[slot] = list(self._prompt)
        return logits

    def advance(self, sources: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """See `Beams.advance`."""
        places = self._places_for(sources)
        n_past = len(self.contents[places[0]])
        logits = self._forward(
            np.array(tokens, np.int32),
            np.full(len(tokens), n_past, np.int32),
            np.array(places, np.int32),
            np.arange(len(tokens), dtype=np.int32),
        )
        self._places = places
        for slot, token in zip(places, tokens, strict=True):
            self.contents[slot].append(token)
        return logits

    def _places_for(self, sources: Sequence[int]) -> list[int]:
        """A slot for each beam i with the keys and values of beam `sources[i]`.

        Its first heir stays in its slot, others get copies in slots of beams without heirs.
        """
        parents = [self._places[source] for source in sources]
        heirs = {slot: i for i, slot in reversed(list(enumerate(parents)))}
        free = [slot for slot in self.contents if slot not in heirs]
        places = []
        for i, parent in enumerate(parents):
            if heirs[parent] == i:
                places.append(parent)
                continue
            # The slot that has the most in common with it: equal ids behind equal ids have equal keys and values.
            ids = self.contents[parent]
            shared, slot = max((_shared(ids, self.contents[slot]), -slot) for slot in free)
            free.remove(-slot)
            self._copy_slot(parent, -slot, len(ids), start=shared)
            self.contents[-slot] = list(ids)
            places.append(-slot)
        return places


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids at the beginning are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
