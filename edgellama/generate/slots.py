"""Who sits where in the KV cache, and what each slot still remembers of earlier sequences.

A slot keeps the tokens of a sequence that has ended until another one needs the room. A new sequence starts with the
longest prefix that any slot remembers, in that slot or in a copy, and computes the rest. That changes no bits: the
backend promises that keys do not depend on how a sequence was cut into calls (`batch_invariant`), and where RoPE
depends on the length of the call, only positions are reused that this call would have rotated alike. Backends that
promise nothing share prefixes within one call of `generate` only. Knows tokens, positions and slots; the numbers in the
cache are the backend's.
"""

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np

from edgellama.backends import Backend
from edgellama.config import LlamaConfig
from edgellama.errors import ContextError
from edgellama.rope import length_class

# A shorter prefix is not worth a copy, or waiting for: it costs less to compute it again.
MIN_SHARED = 16


class Owner(Protocol):
    """A sequence of a caller's own that lies in `slot`, or in none while others use them all."""

    slot: "Slot | None"

    def save(self) -> None:
        """The slot is about to be taken away."""

    def restore(self) -> None:
        """It has a slot again, which holds nothing."""


class Slot:
    """The place of one sequence. Its first `n` positions are known to hold the keys and values of `tokens`.

    Lower `n` before positions from there on are written, and call `record` once they are: then it never says too much,
    whatever interrupts the forward pass in between.
    """

    def __init__(self, index: int, n_ctx: int):
        self.index = index
        self.n = 0
        self.busy = False
        self.last_used = 0
        self.owner: weakref.ref[Owner] | None = None
        """Whose the contents are, beside what `n` says; see `SlotTable.hold`."""
        self._tokens = np.zeros(n_ctx, np.int32)
        self._classes = np.zeros(n_ctx, np.int32)

    @property
    def tokens(self) -> np.ndarray:
        """int32 [n]; a view."""
        return self._tokens[: self.n]

    @property
    def classes(self) -> np.ndarray:
        """int32 [n]: `rope.length_class` of the calls that wrote the positions; a view."""
        return self._classes[: self.n]

    def record(self, tokens: np.ndarray | list[int], classes: np.ndarray | int) -> None:
        """`tokens` have been written after the first `n` positions, in a call of length class `classes`."""
        n = len(tokens)
        # One token, as after nearly every pass, by index: a slice takes five times as long.
        where = self.n if n == 1 and isinstance(classes, int) else slice(self.n, self.n + n)
        self._tokens[where] = tokens[0] if isinstance(where, int) else tokens
        self._classes[where] = classes
        self.n += n

    def shared(self, tokens: np.ndarray, class_: int) -> int:
        """How many positions hold the beginning of `tokens` (int32), as a call of length class `class_` writes it."""
        n = min(self.n, tokens.size)
        return common_prefix(self._tokens[:n], tokens[:n], self._classes[:n] != class_)


def common_prefix(a: np.ndarray, b: np.ndarray, differ: np.ndarray | None = None) -> int:
    """How many elements two arrays share at the beginning; a place that is True in `differ` counts as different.

    >>> common_prefix(np.array([1, 2, 3, 4]), np.array([1, 2, 5]))
    2
    """
    n = min(a.size, b.size)
    unequal = a[:n] != b[:n]
    if differ is not None:
        unequal |= differ[:n]
    return int(unequal.argmax()) if unequal.any() else n


class SlotTable:
    """All slots of a backend. `prefix_reuse`: from call to call; None: where the backend's bits allow it."""

    def __init__(self, backend: Backend, config: LlamaConfig, prefix_reuse: bool | None = None):
        self._backend = backend
        self.slots = [Slot(index, backend.n_ctx) for index in range(backend.n_slots)]
        self.reuses = getattr(backend, "batch_invariant", False) if prefix_reuse is None else prefix_reuse
        self.copies = hasattr(backend, "copy_slot")
        self.length_class = partial(length_class, config)
        """`rope.length_class` of this model: length -> class."""
        self._clock = 0

    def take(self, tokens: np.ndarray, *, reuse: bool = True) -> Slot | None:
        """A slot for a sequence that begins with `tokens` (int32), busy from now on; None if all are.

        Its `n` says how many of them it holds already: never all, for the last one's logits are wanted.
        """
        free = [slot for slot in self.slots if not slot.busy]
        if not free:
            return None
        source, n = self.best(tokens) if reuse else (None, 0)
        # In place, unless that throws away more than it saves and there is another place for a copy. Without
        # `copy_slot` likewise, if there is something worth saving.
        if source is not None and not source.busy:
            keeps = source.n - n <= n or len(free) == 1 or (not self.copies and n >= MIN_SHARED)
            if keeps:
                source.n = n
                return self._occupied(source)
        oldest = min((slot for slot in free if slot is not source), key=_worth)
        self._evict(oldest)
        if source is not None and self.copies and n >= MIN_SHARED:
            self._backend.copy_slot(source.index, oldest.index, n)
            oldest.record(source.tokens[:n], source.classes[:n])
        return self._occupied(oldest)

    def best(self, tokens: np.ndarray) -> tuple[Slot | None, int]:
        """The slot that holds the longest beginning of `tokens`, all but the last at most, and its length.

        A free one rather than a busy one, then the latest. (None, 0): no slot holds any.
        """
        if tokens.size < 2:
            return None, 0
        class_ = self.length_class(tokens.size)
        found = [(slot.shared(tokens[:-1], class_), not slot.busy, slot.last_used, slot) for slot in self.slots]
        n, _, _, slot = max(found, key=lambda each: each[:3])
        return (slot, n) if n else (None, 0)

    def copy(self, source: Slot, target: Slot, n: int) -> None:
        """Have `target` hold the first `n` positions of `source`, and no more; it keeps what is the same already."""
        tokens, classes = source.tokens[:n], source.classes[:n]
        if target.owner is not None:
            self._evict(target)
        n_old = min(target.n, n)
        target.n = common_prefix(tokens, target.tokens, target.classes[:n_old] != classes[:n_old])
        self._backend.copy_slot(source.index, target.index, n, start=target.n)
        target.record(tokens[target.n :], classes[target.n :])

    def hold(self, owners: Sequence[Owner]) -> list[Slot]:
        """A slot for each of `owners`, which keeps it until somebody else needs the place. No sequence may be running.

        ContextError where they are more than the slots.
        """
        if len(owners) > len(self.slots):
            raise ContextError(
                f"a batch of {len(owners)} needs as many slots, the cache has {len(self.slots)}; "
                f"load the model with n_slots={len(owners)}"
            )
        held = [owner.slot for owner in owners if owner.slot is not None]
        for owner in owners:
            if owner.slot is None:
                slot = min((each for each in self.slots if each not in held), key=_worth)
                self._evict(slot)
                slot.owner, owner.slot = weakref.ref(owner), slot
                held.append(slot)
                owner.restore()
        slots = [owner.slot for owner in owners if owner.slot is not None]
        for slot in slots:
            self.release(slot)
        return slots

    def _evict(self, slot: Slot) -> None:
        """Nothing of what is in the slot stays there."""
        owner = None if slot.owner is None else slot.owner()
        if owner is not None:
            owner.save()
            owner.slot = None
        slot.owner, slot.n = None, 0

    def release(self, slot: Slot) -> None:
        """The sequence has ended; the slot remembers it until somebody needs the place."""
        slot.busy = False
        self._clock += 1
        slot.last_used = self._clock

    def begin(self) -> None:
        """A new call: no sequence runs (calls do not overlap: what is busy was left so by an interrupt)."""
        for slot in self.slots:
            slot.busy = False
        if not self.reuses:
            self.forget()

    def forget(self) -> None:
        """Nothing is in the cache any more, for all we know."""
        for slot in self.slots:
            slot.n = slot.last_used = 0

    def _occupied(self, slot: Slot) -> Slot:
        slot.busy = True
        return slot


def _worth(slot: Slot) -> tuple[bool, bool, int]:
    """What would be lost with a slot's contents: the least comes first."""
    return slot.owner is not None and slot.owner() is not None, slot.n > 0, slot.last_used
