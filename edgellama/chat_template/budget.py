"""What one rendering of a chat template may spend: work, text, output and time.

Knows numbers and the plain values that a template handles. Does not know Jinja's grammar: `sandbox` calls `tick` from
compiled-in hooks wherever a template can make Python work, and `weigh` before anything whose cost depends on how deep a
value goes. A template is at most 64 kB of straight code between two hooks, some milliseconds, so the clock is looked at
often enough.

Everything grows with the caller's own input: a long conversation may render to a long text, a small one may not.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any

MAX_OUTPUT = 1_000_000
"""Bytes of rendered text (UTF-8), for a small conversation."""
MAX_TEXT = 1_000_000
"""Characters of any string that a template makes."""
MAX_WORK = 600_000
"""Hooks that a rendering may run through; long values count as many."""
MAX_DEPTH = 64
"""Macros, and rounds of a recursive loop, within each other."""
SECONDS = 0.5
"""Processor time of one compilation or rendering."""

_TEXTS = 16  # all strings together, in units of the longest one
_CLOCK = 128  # ticks between two looks at the clock
_PER_UNIT = 64  # characters that count as one tick
_CONTAINERS: Any = (list, tuple, set, type({}.keys()), type({}.values()), type({}.items()))
_LEAVES = (type(None), bool, float)


class TooMuch(Exception):
    """The template asked for more than its budget; the message says of what."""


class Budget:
    """Counts down. Once it is spent every further hook raises, so nothing in Jinja can swallow the end."""

    def __init__(self) -> None:
        self.depth = 0
        self.start(())

    def start(self, inputs: Iterable[Any]) -> None:
        """A new rendering of `inputs` (plain data, trusted to end: it is the caller's own)."""
        nodes = characters = 0
        stack = list(inputs)
        while stack:
            item = stack.pop()
            nodes += 1
            if isinstance(item, str):
                characters += len(item)
            elif isinstance(item, dict):
                stack.extend(item)
                stack.extend(item.values())
            elif isinstance(item, list | tuple):
                stack.extend(item)
        units = nodes + characters // _PER_UNIT
        self.max_text = MAX_TEXT + 8 * characters
        self._output = MAX_OUTPUT + 8 * characters
        self._text = _TEXTS * self.max_text
        self._work = MAX_WORK + 100 * units
        self._next_look = self._work
        self._deadline = time.thread_time() + SECONDS + 2e-5 * units
        self.depth = 0

    def tick(self, units: int = 1) -> None:
        """`units` of work are about to be done."""
        self._work -= units
        if self._work < self._next_look:
            if self._work < 0:
                raise TooMuch("too much work")
            if time.thread_time() > self._deadline:
                self._work = -1
                raise TooMuch("too much time")
            self._next_look = self._work - _CLOCK

    def read(self, characters: int) -> None:
        """A string of that length is about to be gone through."""
        self.tick(1 + characters // _PER_UNIT)

    def text(self, characters: int) -> None:
        """A string of that length is about to be made."""
        self._text -= characters
        if characters > self.max_text or self._text < 0:
            self._work = -1
            raise TooMuch("too long a text")
        self.tick(1 + characters // _PER_UNIT)

    def emit(self, text: str) -> None:
        """`text` goes to the output."""
        self._output -= len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
        if self._output < 0:
            self._work = -1
            raise TooMuch("too long a text")

    def iterate(self, values: Iterable[Any]) -> "Iteration":
        """`values`, each of which ticks when it is taken."""
        return Iteration(self, values)

    def weigh(self, value: Any) -> int:
        """Goes through `value` as `str`, `==` or `hash` would, ticking; returns about how long its text is.

        Lists that share parts (`[a, a]` of `[b, b]` of ...) are small in memory and endless to go through: here they
        run into the budget.
        """
        if type(value) is str:
            self.read(len(value))
            return len(value)
        size = 0
        stack = [value]
        while stack:
            item = stack.pop()
            self.tick()
            if isinstance(item, str):
                size += len(item) + 4
                self.tick(len(item) // _PER_UNIT)
            elif isinstance(item, _LEAVES):
                size += 24
            elif isinstance(item, int):
                size += item.bit_length() // 3 + 4
            elif isinstance(item, dict):
                size += 4 * len(item)
                self.tick(len(item))
                stack.extend(item)
                stack.extend(item.values())
            elif isinstance(item, _CONTAINERS):
                size += 2 * len(item)
                self.tick(len(item))
                stack.extend(item)
            elif isinstance(item, range):
                size += 64
                self.tick(len(item))
            else:
                size += 64  # what is left has a short `repr`: see `sandbox`
            if size > self.max_text:
                self._work = -1
                raise TooMuch("too long a text")
        return size


class Iteration:
    """An iterable that ticks for each value; as long and as true as what it wraps."""

    __slots__ = ("_budget", "_values")

    def __init__(self, budget: Budget, values: Iterable[Any]):
        self._budget, self._values = budget, values

    def __iter__(self) -> Iterator[Any]:
        tick = self._budget.tick
        for value in self._values:
            tick()
            yield value

    def __len__(self) -> int:
        return len(self._values)  # type: ignore[arg-type]  # TypeError for a generator, as Jinja expects

    def __bool__(self) -> bool:
        return bool(self._values)

    def __repr__(self) -> str:
        return "<generator>"
