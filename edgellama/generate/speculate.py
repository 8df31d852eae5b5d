"""Speculative decoding within a call: guesses (`edgellama.speculative`) run through the model together with the token
that they follow, and are taken as far as the sampler chooses the same. Rejected positions are written over."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from edgellama.errors import CancelledError
from edgellama.generate.cancel import CancelToken
from edgellama.generate.engine import Batch, Engine, Progress
from edgellama.generate.reply import Reply
from edgellama.generate.request import Request
from edgellama.generate.slots import Slot, common_prefix
from edgellama.speculative import Draft, ModelDraft, PromptLookup


class SpeculativeBatch(Batch):
    """A `Batch` whose replies, once their prompts are computed, take several tokens a pass where guesses are right."""

    def __init__(
        self,
        engine: Engine,
        replies: Sequence[Reply],
        make_draft: Callable[[Reply], Draft],
        *,
        cancel: CancelToken,
        deadline: float | None = None,
        progress: Progress | None = None,
    ):
        super().__init__(engine, replies, cancel=cancel, deadline=deadline, progress=progress)
        self._make_draft = make_draft
        self._drafts: dict[int, Draft] = {}  # by the reply's index

    def step(self) -> bool:
        """See `Batch.step`."""
        if self._waiting:
            self._admit()
        is_time = self._deadline is not None and time.perf_counter() >= self._deadline
        if self._cancel.cancelled or is_time or not self._running or any(map(_is_prefill, self._running)):
            return super().step()
        begun = time.perf_counter()
        try:
            guesses = [self._guess(reply) for reply in self._running]
            logits = self._verify(guesses)
        except CancelledError:
            self._end_all("cancelled")
            return False
        row = 0
        for reply, guess in zip(self._running, guesses, strict=True):
            self._take(reply, guess, logits[row : row + len(guess) + 1])
            row += len(guess) + 1
            reply.decode_s += time.perf_counter() - begun
        self._running = [reply for reply in self._running if reply.finish_reason is None]
        return bool(self._running or self._waiting)

    def _guess(self, reply: Reply) -> list[int]:
        """No more than fit into the cache, nor than RoPE rotates as if they came one by one."""
        if reply.index not in self._drafts:
            self._drafts[reply.index] = self._make_draft(reply)
        n = len(reply.ids)
        limit = min(self._engine.backend.n_ctx - n, reply.max_new_tokens - len(reply.token_ids) - 1)
        guess = self._drafts[reply.index].propose(reply.ids, limit) if limit > 0 else []
        of = self._slots.length_class
        return guess if of(n + len(guess)) == of(n) else []

    def _verify(self, guesses: list[list[int]]) -> np.ndarray:
        """Logits of every reply's last token and its guesses. What is known to be in the cache is noted."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for reply, guess in zip(self._running, guesses, strict=True):
            assert reply.slot is not None
            tokens += [reply.ids[-1], *guess]
            positions += range(reply.slot.n, reply.slot.n + len(guess) + 1)
            slots += [reply.slot.index] * (len(guess) + 1)
        logits = self._engine.forward(tokens, positions, slots, range(len(tokens)), self._cancel)
        for reply in self._running:
            assert reply.slot is not None
            reply.slot.record([reply.ids[-1]], self._slots.length_class(reply.slot.n + 1))
        return logits

    def _take(self, reply: Reply, guess: list[int], rows: np.ndarray) -> None:
        """The sampler's choices from `rows`, until one is no longer what was guessed."""
        slot = reply.slot
        assert slot is not None
        reply.proposed_tokens += len(guess)
        for i, row in enumerate(rows):
            token = reply.take(row)
            if i < len(guess) and token == guess[i]:
                reply.accepted_tokens += 1
                slot.record([token], self._slots.length_class(slot.n + 1))
            else:
                break
            if reply.finish_reason is not None:
                break
        if reply.finish_reason is not None:
            self._slots.release(slot)


def _is_prefill(reply: Reply) -> bool:
    assert reply.slot is not None
    return len(reply.ids) - reply.slot.n > 1


class DraftModel:
    """Another model's engine, its slots lent to the replies of one call.

    A reply keeps its slot to its end; one that finds none has no guesses.
    """

    def __init__(self, engine: Engine, cancel: CancelToken):
        self._engine, self._cancel = engine, cancel
        engine.slots.begin()
        self._slots: list[tuple[Reply, Slot]] = []

    def draft(self, reply: Reply) -> ModelDraft:
        """Guesses for one reply."""
        for other, taken in self._slots:
            if other.finish_reason is not None:
                self._engine.slots.release(taken)
        self._slots = [each for each in self._slots if each[0].finish_reason is None]
        slot = self._engine.slots.take(reply.prompt)
        if slot is not None:
            self._slots.append((reply, slot))
        return ModelDraft(lambda ids: None if slot is None else self._logits(slot, ids))

    def _logits(self, slot: Slot, ids: Sequence[int]) -> np.ndarray | None:
        """After `ids`, of which the slot holds the beginning: all but the last guess or so."""
        engine = self._engine
        if len(ids) > engine.backend.n_ctx:
            return None
        tokens = np.array(ids, np.int32)
        slot.n = min(common_prefix(slot.tokens, tokens), len(ids) - 1)
        return engine.extend(slot, tokens[slot.n :], 1, self._cancel)[0]


def speculative_batch(
    engine: Engine,
    replies: Sequence[Reply],
    request: Request,
    draft: Engine | None,
    *,
    cancel: CancelToken,
    deadline: float | None,
) -> SpeculativeBatch:
    """What runs the replies of a request with `prompt_lookup_num_tokens`, or with a draft model: `draft`, its engine.

    ValueError for a draft model of another vocabulary.
    """
    if draft is not None:
        theirs, ours = draft.config.vocab_size, engine.config.vocab_size
        if theirs != ours:
            raise ValueError(f"draft_model has a vocabulary of {theirs} tokens, the model one of {ours}: not the same")
        make_draft: Callable[[Reply], Draft] = DraftModel(draft, cancel).draft
    else:
        n = request.prompt_lookup_num_tokens
        assert n is not None
        make_draft = lambda reply: PromptLookup(n)  # noqa: E731
    return SpeculativeBatch(engine, replies, make_draft, cancel=cancel, deadline=deadline, progress=request.progress)
