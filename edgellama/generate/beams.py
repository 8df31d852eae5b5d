"""Beam search within a call: beams in slots of the cache, texts into replies. The search itself is `edgellama.beam`."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgellama.beam import BeamParams, BeamSearch
from edgellama.errors import CancelledError, EdgellamaError
from edgellama.generate.cancel import CancelToken
from edgellama.generate.engine import Engine, Progress
from edgellama.generate.reply import Reply
from edgellama.generate.request import Request
from edgellama.generate.results import FinishReason
from edgellama.generate.slots import Slot, common_prefix
from edgellama.sampling import Sampler

if TYPE_CHECKING:
    from edgellama.tokenizer import Tokenizer


class SlotBeams:
    """`beam.Beams` over an engine's slots, as many as there are beams.

    A beam stays in its slot as long as it goes on, and only what sets it apart is copied where it splits. `slots[0]`
    may hold the beginning of the prompt; what the others hold is lost.
    """

    def __init__(self, engine: Engine, prompt: np.ndarray, slots: Sequence[Slot], cancel: CancelToken | None = None):
        self._engine, self._prompt, self._slots, self._cancel = engine, prompt, slots, cancel
        self._places = [slots[0]]  # of each beam

    def start(self) -> np.ndarray:
        """See `beam.Beams`."""
        slot = self._places[0]
        return self._engine.extend(slot, self._prompt[slot.n :], 1, self._cancel)

    def advance(self, sources: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """See `beam.Beams`."""
        places = self._places_for(sources)
        n = places[0].n
        logits = self._engine.forward(
            tokens, [n] * len(tokens), [slot.index for slot in places], range(len(tokens)), self._cancel
        )
        self._places = places
        for slot, token in zip(places, tokens, strict=True):
            slot.record([token], self._engine.slots.length_class(n + 1))
        return logits

    def _places_for(self, sources: Sequence[int]) -> list[Slot]:
        """A slot for each beam i with the keys and values of beam `sources[i]`.

        Its first heir stays in its slot, others get copies in slots of beams without heirs.
        """
        parents = [self._places[source] for source in sources]
        free = [slot for slot in self._slots if slot not in parents]
        places: list[Slot] = []
        for parent in parents:
            if parent not in places:
                places.append(parent)
                continue
            # The slot that has the most in common with it: equal ids behind equal ids have equal keys and values.
            slot = max(free, key=lambda slot: _shared(parent, slot))
            free.remove(slot)
            self._engine.slots.copy(parent, slot, parent.n)
            places.append(slot)
        return places


def _shared(a: Slot, b: Slot) -> int:
    n = min(a.n, b.n)
    return common_prefix(a.tokens[:n], b.tokens[:n], a.classes[:n] != b.classes[:n])


class SamplerGuide:
    """A sampler's penalties, bans, processors and constraint as a `beam.Guide`; nothing is drawn."""

    def __init__(self, sampler: Sampler):
        self._sampler = sampler

    def adjust(self, logprobs: np.ndarray) -> np.ndarray:
        """See `beam.Guide`."""
        return self._sampler.adjust(logprobs)

    def after(self, token: int) -> "SamplerGuide":
        """See `beam.Guide`."""
        sampler = self._sampler.fork()
        sampler.accept(token)
        return SamplerGuide(sampler)

    @property
    def finished(self) -> bool:
        """See `beam.Guide`."""
        constraint = self._sampler.constraint
        return constraint is not None and bool(getattr(constraint, "finished", False))


def beam_batch(
    engine: Engine,
    replies: Sequence[Reply],
    request: Request,
    tokenizer: "Tokenizer | None",
    *,
    cancel: CancelToken,
    deadline: float | None,
) -> "BeamBatch":
    """What runs the replies of a request with `num_beams`. ValueError for options that do not go together."""
    params = BeamParams(request.num_beams, request.num_return_sequences, request.length_penalty, request.early_stopping)

    def says_stop(token_ids: tuple[int, ...]) -> bool:
        assert tokenizer is not None
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        return any(stop in text for stop in request.stop)

    return BeamBatch(
        engine,
        replies,
        params,
        cancel=cancel,
        deadline=deadline,
        stop=says_stop if request.stop else None,
        progress=request.progress,
    )


class BeamBatch:
    """The prompts of a call, one after the other, each by beam search; a `stream.Stepper`.

    `replies`: `params.num_return_sequences` to each prompt, best first. `stop(new ids)`: the text ends here. Raises
    ValueError where the cache has fewer slots than beams.
    """

    def __init__(
        self,
        engine: Engine,
        replies: Sequence[Reply],
        params: BeamParams,
        *,
        cancel: CancelToken,
        deadline: float | None = None,
        stop: Callable[[tuple[int, ...]], bool] | None = None,
        progress: Progress | None = None,
    ):
        if params.num_beams > len(engine.slots.slots):
            raise ValueError(
                f"num_beams {params.num_beams} needs as many sequences in the cache, which has "
                f"{len(engine.slots.slots)}; load the model with n_slots={params.num_beams}"
            )
        engine.slots.begin()
        self._engine, self._params, self._stop = engine, params, stop
        self._cancel, self._deadline, self._progress = cancel, deadline, progress
        n = params.num_return_sequences
        self._waiting = deque(list(replies[i : i + n]) for i in range(0, len(replies), n))
        self._replies: list[Reply] = []  # to the prompt that is being searched for
        self._slots: list[Slot] = []
        self._search: BeamSearch | None = None
        self._done, self._total = 0, sum(group[0].prompt.size for group in self._waiting)

    def step(self) -> bool:
        """One forward pass of one search; False if there is nothing left to do."""
        if self._cancel.cancelled:
            self._end("cancelled")
        elif self._deadline is not None and time.perf_counter() >= self._deadline:
            self._end("time")
        if self._search is None:
            if not self._waiting:
                return False
            self._begin(self._waiting.popleft())
        search, begun = self._search, time.perf_counter()
        assert search is not None
        try:
            goes_on = search.step()
        except CancelledError:
            self._end("cancelled")
            return False
        spent = time.perf_counter() - begun
        for reply in self._replies:
            if search.length == 1:
                reply.prefill_s += spent
            else:
                reply.decode_s += spent
        if search.length == 1 and self._progress is not None:
            self._done += self._replies[0].prompt.size
            self._progress(self._done, self._total)
        if not goes_on:
            self._finish("length")
        return self._search is not None or bool(self._waiting)

    def close(self) -> None:
        """Free the slots. What has not ended is "cancelled"."""
        self._end("cancelled")

    def _begin(self, replies: list[Reply]) -> None:
        first, table = replies[0], self._engine.slots
        taken = [table.take(first.prompt)]
        taken += [table.take(first.prompt, reuse=False) for _ in range(1, self._params.num_beams)]
        self._replies, self._slots = replies, [slot for slot in taken if slot is not None]
        for reply in replies:
            reply.cached_tokens = self._slots[0].n
        assert isinstance(first.sampler, Sampler)
        self._search = BeamSearch(
            SlotBeams(self._engine, first.prompt, self._slots, self._cancel),
            self._params,
            max_new_tokens=first.max_new_tokens,
            eos_ids=first.eos_ids,
            guide=SamplerGuide(first.sampler.fork()),
            stop=self._stop,
            note=first.note,
        )

    def _finish(self, unfinished: FinishReason) -> None:
        """Tell the replies what has been found, and free the slots."""
        search, self._search = self._search, None
        for slot in self._slots:
            self._engine.slots.release(slot)
        if search is None:
            return
        found = search.best(unfinished)
        if search.length and len(found) < len(self._replies):
            raise EdgellamaError(f"beam search found {len(found)} texts where {len(self._replies)} were asked for")
        for reply, text in zip(self._replies, found, strict=False):
            for token, note in itertools.zip_longest(text.token_ids, text.notes):
                reply.append(token, noted=note)
        for reply in self._replies:
            reply.finish(unfinished)

    def _end(self, reason: FinishReason) -> None:
        self._finish(reason)
        for replies in self._waiting:
            for reply in replies:
                reply.finish(reason)
        self._waiting.clear()
