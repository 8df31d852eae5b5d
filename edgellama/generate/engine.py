"""The engine: several replies share each forward pass, and the cache's slots.

`Engine` is the way to a backend: it keeps the slots' books and makes a pass end on request. `Batch` runs the replies of
one call: every pass takes one token of each reply that is being decoded and as much of the prompts as fits beside them;
who has ended leaves its slot to the next in line (continuous batching). Where the backend's bits do not depend on what
shares a pass, every reply is what it would be alone. Does not know text, locks, or who calls.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from edgellama.backends import Backend
from edgellama.config import LlamaConfig
from edgellama.errors import CancelledError
from edgellama.generate.cancel import CancelToken
from edgellama.generate.reply import Reply
from edgellama.generate.results import FinishReason
from edgellama.generate.slots import MIN_SHARED, Slot, SlotTable, common_prefix

CHUNK = 256
"""Tokens of a pass while prompts are computed, where the backend does not say (`pass_tokens`)."""
SCORED_CHUNK = 32
"""The same where the logits of every position are wanted, which are large."""

_T = TypeVar("_T")

Progress = Callable[[int, int], None]


class Engine:
    """A backend and its slots. Calls must not overlap."""

    def __init__(self, backend: Backend, config: LlamaConfig, prefix_reuse: bool | None = None):
        self.backend, self.config = backend, config
        self.slots = SlotTable(backend, config, prefix_reuse)
        self.chunk = getattr(backend, "pass_tokens", CHUNK)
        self._abort: Callable[[], None] = getattr(backend, "cancel", _nothing)

    def forward(
        self,
        tokens: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        slots: Sequence[int] | np.ndarray,
        rows: Sequence[int] | np.ndarray,
        cancel: CancelToken | None = None,
    ) -> np.ndarray:
        """`Backend.forward`, ended by `cancel`: CancelledError. What it was to write is then unknown."""
        return self._run(self.backend.forward, (tokens, positions, slots, rows), cancel)

    def hidden(
        self,
        tokens: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        slots: Sequence[int] | np.ndarray,
        rows: Sequence[int] | np.ndarray,
        cancel: CancelToken | None = None,
    ) -> np.ndarray:
        """`Backend.hidden`, likewise."""
        return self._run(self.backend.hidden, (tokens, positions, slots, rows), cancel)

    def _run(
        self,
        method: Callable[..., np.ndarray],
        batch: tuple[Sequence[int] | np.ndarray, ...],
        cancel: CancelToken | None,
    ) -> np.ndarray:
        arrays = [np.asarray(each, np.int32) for each in batch]
        return self.run(lambda: method(*arrays), cancel)

    def run(self, work: Callable[[], _T], cancel: CancelToken | None = None) -> _T:
        """Work of the backend that may be done twice, ended by `cancel`: CancelledError."""
        if cancel is None:
            cancel = CancelToken()
        while True:
            cancel.raise_if_cancelled()
            try:
                cancel.link(self._abort)
                return work()
            except CancelledError:
                # If it was not ours, it was meant for a call that had ended just before: it must not hit this one.
                if cancel.cancelled:
                    raise
            finally:
                cancel.unlink(self._abort)

    def extend(self, slot: Slot, ids: np.ndarray, keep: int, cancel: CancelToken | None = None) -> np.ndarray:
        """Run `ids` int32 [T] in one pass after what is in `slot`; the logits of the last `keep`."""
        end = slot.n + ids.size
        positions = np.arange(slot.n, end, dtype=np.int32)
        rows = np.arange(ids.size - keep, ids.size, dtype=np.int32)
        logits = self.forward(ids, positions, np.full(ids.size, slot.index, np.int32), rows, cancel)
        slot.record(ids, self.slots.length_class(end))
        return logits


class Batch:
    """The replies of one call, each until it ends; `step` by `step`, then `close`."""

    def __init__(
        self,
        engine: Engine,
        replies: Sequence[Reply],
        *,
        cancel: CancelToken,
        deadline: float | None = None,
        slide: bool = False,
        progress: Progress | None = None,
    ):
        """`deadline`: on `time.perf_counter()`'s clock. `slide`: a full slot goes on with a part of what it held;
        without it, the replies' `max_new_tokens` see to it that none gets full.

        `progress(done, total)`: tokens of all prompts, after every pass that computed some.
        """
        self._engine, self._slots = engine, engine.slots
        self._slots.begin()
        self._cancel, self._deadline, self._slide, self._progress = cancel, deadline, slide, progress
        self._waiting = deque(replies)
        self._running: list[Reply] = []
        self._done, self._total = 0, sum(reply.prompt.size for reply in replies)

    def step(self) -> bool:
        """One forward pass, and a token for each reply whose turn it is; False if there is nothing left to do."""
        if self._cancel.cancelled:
            self._end_all("cancelled")
        elif self._deadline is not None and time.perf_counter() >= self._deadline:
            self._end_all("time")
        if self._waiting:
            self._admit()
        if not self._running:
            return False
        begun = time.perf_counter()
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        parts = self._parts()
        for reply, start, end in parts:
            assert reply.slot is not None
            n = len(tokens)
            tokens += reply.ids[start:end]
            positions += range(start, end)
            slots += [reply.slot.index] * (end - start)
            if reply.scores_prompt and not reply.token_ids:
                rows += range(n, n + end - start)
            elif end == len(reply.ids):
                rows.append(n + end - start - 1)
        try:
            logits = self._engine.forward(tokens, positions, slots, rows, self._cancel)
        except CancelledError:
            self._end_all("cancelled")
            return False
        passed = time.perf_counter() - begun
        self._book(parts, logits, passed)
        if self._done < self._total:
            self._tell(parts)
        spent = time.perf_counter() - begun
        for reply, _, _ in parts:
            if len(reply.token_ids) > 1:
                reply.decode_s += spent
        self._running = [reply for reply in self._running if reply.finish_reason is None]
        return bool(self._running or self._waiting)

    def close(self) -> None:
        """Free the slots. What has not ended is "cancelled"."""
        self._end_all("cancelled")

    def _parts(self) -> list[tuple[Reply, int, int]]:
        """Whose positions (from, to) go into the next pass: decoding first, then prompts, until it is full."""
        if len(self._running) == 1 or not any(_is_prefill(reply) for reply in self._running):
            order = self._running
        else:
            order = sorted(self._running, key=_is_prefill)
        room = self._engine.chunk
        parts = []
        for reply in order:
            slot = reply.slot
            assert slot is not None
            if self._slide and len(reply.ids) > self._engine.backend.n_ctx:
                self._move_window(reply, slot)
            start, end = slot.n, len(reply.ids)
            if end - start > 1:
                if room <= 0:
                    continue
                end = self._end_of_part(reply, start, room)
            room -= end - start
            parts.append((reply, start, end))
        return parts

    def _end_of_part(self, reply: Reply, start: int, room: int) -> int:
        """How far a prompt is computed in one pass with `room` tokens of it."""
        whole = len(reply.ids)
        most = min(room, SCORED_CHUNK) if reply.scores_prompt else room
        end = min(start + most, whole)
        # Where RoPE depends on the length of the call, all keys are to be rotated as for the whole prompt.
        of = self._slots.length_class
        return end if end == whole or of(end) == of(whole) else whole

    def _move_window(self, reply: Reply, slot: Slot) -> None:
        """The slot is full: compute the kept tokens again, at new positions (keys are stored with their rotation)."""
        reply.slide(self._engine.backend.n_ctx)
        ids = np.array(reply.ids, np.int32)
        slot.n = min(slot.shared(ids, self._slots.length_class(ids.size)), ids.size - 1)

    def _book(self, parts: list[tuple[Reply, int, int]], logits: np.ndarray, passed: float) -> None:
        """Note what is in the cache now, before anything else can fail; then a token for whom a row of logits is."""
        for reply, start, end in parts:
            assert reply.slot is not None
            reply.slot.record(reply.ids[start:end], self._slots.length_class(end))
        row = 0
        for reply, start, end in parts:
            if not reply.token_ids:
                reply.prefill_s += passed
            last = end == len(reply.ids)
            if reply.scores_prompt and not reply.token_ids:
                reply.score_prompt(start, logits[row : row + end - start])
                row += end - start - last
            if last:
                reply.take(logits[row])
                row += 1
                if reply.finish_reason is not None and reply.slot is not None:
                    self._slots.release(reply.slot)

    def _tell(self, parts: list[tuple[Reply, int, int]]) -> None:
        """Progress, of the prompts only."""
        before = self._done
        for reply, start, end in parts:
            if not reply.slid and start < reply.prompt.size:
                self._done += end - start
        if self._done > before and self._progress is not None:
            self._progress(self._done, self._total)

    def _admit(self) -> None:
        """Give slots to those who wait, in order, as long as the next pass has room for their tokens."""
        room = self._engine.chunk - sum(len(reply.ids) - reply.slot.n for reply in self._running if reply.slot)
        while self._waiting and room > 0:
            reply = self._waiting[0]
            if self._is_to_be_shared(reply):
                return
            slot = self._slots.take(reply.prompt, reuse=not reply.scores_prompt)
            if slot is None:
                return
            self._waiting.popleft()
            self._running.append(reply)
            reply.slot, reply.cached_tokens = slot, slot.n
            self._done += slot.n
            room -= len(reply.ids) - slot.n

    def _is_to_be_shared(self, reply: Reply) -> bool:
        """Whether a running reply is about to compute the beginning of this one's prompt, which can then be copied."""
        if not self._slots.copies or reply.scores_prompt:
            return False
        prefilling = [other for other in self._running if _is_prefill(other) and not other.slid]
        if not prefilling:
            return False
        prompt, of = reply.prompt, self._slots.length_class
        alike = [other.prompt for other in prefilling if of(other.prompt.size) == of(prompt.size)]
        n = max((common_prefix(other, prompt[:-1]) for other in alike), default=0)
        return n - self._slots.best(prompt)[1] >= MIN_SHARED

    def _end_all(self, reason: FinishReason) -> None:
        for reply in self._running:
            reply.finish(reason)
            if reply.slot is not None:
                self._slots.release(reply.slot)
        for reply in self._waiting:
            reply.finish(reason)
        self._running = []
        self._waiting.clear()


def _is_prefill(reply: Reply) -> bool:
    assert reply.slot is not None
    return len(reply.ids) - reply.slot.n > 1


def _nothing() -> None:
    pass
