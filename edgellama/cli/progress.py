"""Progress on stderr: a bar with the time left on a terminal, a line every tenth elsewhere (logs)."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from edgellama.cli import console

_LINES = 10
_MARGIN = 4  # the terminal shows ^C after the bar: on its line, where it goes with the bar
Update = Callable[[int, int], None]
GETTING_READY = "getting ready (a few seconds more on a machine's first run)"


class Progress:
    """A context manager; `update(done, total)` may come as often as it likes.

    `unit` is "B" or a word; `quiet` shows nothing; `ready_line` is what a terminal shows until the first update.
    """

    def __init__(self, what: str, unit: str, quiet: bool = False, ready_line: str = ""):
        self._what, self._unit, self._quiet = what, unit, quiet
        self._ready_line = ready_line
        self._bar: Any = None
        self._shown = 0
        self._first: tuple[int, float] | None = None  # what was done at the first update, and when it was

    def __enter__(self) -> "Progress":
        self._show_ready_line(self._ready_line)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar, or what was shown before it, off the terminal."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._show_ready_line(" " * len(self._ready_line))
        self._bar, self._ready_line = None, ""

    def _show_ready_line(self, text: str) -> None:
        if text and not self._quiet and console.is_terminal(sys.stderr):
            sys.stderr.write(text + "\r")
            sys.stderr.flush()

    def update(self, done: int, total: int) -> None:
        if self._quiet or total <= 0:
            return
        if console.is_terminal(sys.stderr):
            self._update_bar(done, total)
        else:
            self._update_lines(done, total)

    def _update_bar(self, done: int, total: int) -> None:
        if self._bar is None:
            self._show_ready_line(" " * len(self._ready_line))
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                desc=self._what,
                unit=self._unit if self._unit == "B" else f" {self._unit}",
                unit_scale=True,
                file=sys.stderr,
                leave=False,
                ncols=max(shutil.get_terminal_size().columns - _MARGIN, 10),
                bar_format="{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt} {rate_fmt}, {remaining} left",
            )
        self._bar.update(done - self._bar.n)

    def _update_lines(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:  # compiling came before: it says nothing about the speed
            self._first = done, now
        step = done * _LINES // total
        if step <= self._shown:
            return
        self._shown = step
        spent = now - self._first[1]
        left = spent * (total - done) / max(done - self._first[0], 1)
        if spent >= 1 or left >= 1:  # what is over at once needs no log
            console.note(f"{self._what}: {done * 100 // total} %, {console.seconds(left)} left")


@contextmanager
def conversion_progress(quiet: bool) -> Iterator[tuple[Update, Update]]:
    """What `convert` takes as `progress` and `receipt_progress`: a bar, and another once measuring begins."""
    with (
        Progress("convert", unit="weights", quiet=quiet, ready_line=GETTING_READY) as converted,
        Progress("measure", unit="weights", quiet=quiet) as measured,
    ):

        def measuring(done: int, total: int) -> None:
            converted.close()
            measured.update(done, total)

        yield converted.update, measuring
