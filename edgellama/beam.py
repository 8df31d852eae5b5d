"""Beam search: the most probable continuations that keeping `num_beams` of them at each step finds.

The algorithm and its results are those of transformers' `generate(num_beams=...)`; it has been described often, e.g. in
Freitag and Al-Onaizan, "Beam Search Strategies for Neural Machine Translation" (2017). Nothing is drawn at random.

`beam_search` knows scores and tokens; the model is a `Beams`. `SlotBeams` is one over a backend: a beam lives in a slot
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

from edgellama.backends import Backend
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
    "stop", "length", or what `interrupted` gave.
    """

    token_ids: tuple[int, ...]
    score: float
    logprob: float
    finish_reason: str


class Beams(Protocol):
    """The model as `beam_search` sees it."""

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


def beam_search(
    beams: Beams,
    params: BeamParams,
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    prompt_ids: Sequence[int] = (),
    processors: Sequence[Processor] = (),
    stop: Callable[[tuple[int, ...]], bool] | None = None,
    interrupted: Callable[[], str | None] | None = None,
) -> list[Hypothesis]:
    """The best `num_return_sequences` texts, best first; fewer only where there are no more.

    `processors` change the log-probabilities before they are added up, each beam's by itself; `stop(new ids)` says that
    a text is finished though it has no end-of-text id; `interrupted()` is asked before each step, and a reason ends the
    search with the beams that are there. Raises EdgellamaError where every continuation has been forbidden.
    """
    running = [_Beam((), 0.0, 0)]
    finished: list[Hypothesis] = []
    logits = beams.start()
    prompt = np.asarray(prompt_ids, np.int32)
    for length in range(1, max_new_tokens + 1):
        scores = _continuations(logits, running, prompt, processors)
        # So many that num_beams of them go on even if every beam's best ones all end.
        candidates = _best(scores, running, max(2, 1 + len(eos_ids)) * params.num_beams)
        going, ended = [], []
        for rank, beam in enumerate(candidates):
            reason = _finish_reason(beam.tokens, max_new_tokens, eos_ids, stop)
            if reason is None:
                going.append(beam)
            elif rank < params.num_beams:  # those further down are there to replace the ended ones only
                score = beam.logprob / length**params.length_penalty
                ended.append(Hypothesis(beam.tokens, score, beam.logprob, reason))
        finished = _ranked(finished + ended, params.num_beams)
        running = going[: params.num_beams]
        if not running or _is_over(finished, running[0].logprob, length, max_new_tokens, params):
            break
        reason = interrupted() if interrupted else None
        if reason:
            penalty = length**params.length_penalty
            rest = [Hypothesis(beam.tokens, beam.logprob / penalty, beam.logprob, reason) for beam in running]
            finished = _ranked(finished + rest, params.num_beams)
            break
        logits = beams.advance([beam.source for beam in running], [beam.tokens[-1] for beam in running])
    if not finished:
        raise EdgellamaError("beam search found no text: every next token has been forbidden")
    return finished[: params.num_return_sequences]


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


def _finish_reason(
    tokens: tuple[int, ...],
    max_new_tokens: int,
    eos_ids: frozenset[int],
    stop: Callable[[tuple[int, ...]], bool] | None,
) -> str | None:
    if tokens[-1] in eos_ids or (stop is not None and stop(tokens)):
        return "stop"
    return "length" if len(tokens) == max_new_tokens else None


def _ranked(hypotheses: list[Hypothesis], n: int) -> list[Hypothesis]:
    return sorted(hypotheses, key=lambda each: -each.score)[:n]


def _is_over(finished: list[Hypothesis], best: float, length: int, max_new_tokens: int, params: BeamParams) -> bool:
    """Whether to stop though beams are running, the best of them with log-probability `best`."""
    if len(finished) < params.num_beams:
        return False
    if params.early_stopping is True:
        return True
    longest = params.early_stopping == "never" and params.length_penalty > 0
    possible = best / (max_new_tokens if longest else length) ** params.length_penalty
    return possible <= finished[-1].score


class SlotBeams:
    """Beams in slots of a backend's cache.

    `contents`: slot -> the ids whose keys and values it holds, true at any time. `slots[0]` holds the first `n_past` of
    `prompt_ids` at the start; what the others hold is lost. There must be as many slots as beams.
    """

    def __init__(self, backend: Backend, prompt_ids: Sequence[int], slots: Sequence[int], n_past: int = 0):
        self._backend, self._prompt = backend, list(prompt_ids)
        self._places = [slots[0]]  # beam -> slot
        self.contents: dict[int, list[int]] = {slot: [] for slot in slots}
        self.contents[slots[0]] = self._prompt[:n_past]

    def start(self) -> np.ndarray:
        """See `Beams.start`."""
        slot, n_past = self._places[0], len(self.contents[self._places[0]])
        new = np.array(self._prompt[n_past:], np.int32)
        positions = np.arange(n_past, n_past + new.size, dtype=np.int32)
        last = np.array([new.size - 1], np.int32)
        logits = self._backend.forward(new, positions, np.full(new.size, slot, np.int32), last)
        self.contents[slot] = list(self._prompt)
        return logits

    def advance(self, sources: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """See `Beams.advance`."""
        self._move(sources)
        n_past = len(self.contents[self._places[0]])
        logits = self._backend.forward(
            np.array(tokens, np.int32),
            np.full(len(tokens), n_past, np.int32),
            np.array(self._places, np.int32),
            np.arange(len(tokens), dtype=np.int32),
        )
        for slot, token in zip(self._places, tokens, strict=True):
            self.contents[slot].append(token)
        return logits

    def _move(self, sources: Sequence[int]) -> None:
        """Give beam i the keys and values of beam `sources[i]`: its first heir stays in its slot, others get copies."""
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
            self._backend.copy_slot(parent, -slot, len(ids), start=shared)
            self.contents[-slot] = list(ids)
            places.append(-slot)
        self._places = places


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids at the beginning are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
