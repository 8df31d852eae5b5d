"""Reading what a user types: line editing, a history that outlives the chat, and messages of several lines.

Uses the standard library's readline, which Windows does not have: there the console edits lines itself.
"""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from edgellama.cli import console

QUOTES = '"""'
_CONTINUED = "... "
_HISTORY_LENGTH = 1000


class LineReader:
    """`read(prompt)` gives one line, as `input` does: EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C.

    `complete(line) -> words` offers what may stand for the line's last word. `keep_history` may be changed at any
    time. The history is written at each line, so that no crash loses it and two chats may share the file.
    """

    def __init__(self, history: Path, complete: Callable[[str], Sequence[str]]):
        self.keep_history = True
        self.interrupted_text = ""  # what had been typed when Ctrl-C came
        self._history = history
        self._complete = complete
        self._matches: list[str] = []
        self._readline = _readline() if console.is_terminal(sys.stdin) and console.is_terminal(sys.stdout) else None
        if self._readline is not None:
            self._prepare(self._readline)

    def _prepare(self, readline: ModuleType) -> None:
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            # Several pasted lines become one message, not one after the other.
            readline.parse_and_bind("set enable-bracketed-paste on")
        readline.set_completer(self._completer)
        readline.set_completer_delims(" ")
        readline.set_auto_history(False)
        readline.clear_history()
        with contextlib.suppress(OSError):
            readline.read_history_file(self._history)

    def read(self, prompt: str) -> str:
        if self._readline is None:
            sys.stderr.write(prompt)  # stdout is for answers
            sys.stderr.flush()
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.removesuffix("\n")
        with self._interruptible(self._readline):
            line = input(_measured(prompt))
        if self.keep_history and line.strip():
            self._remember(self._readline, line)
        return line

    @contextlib.contextmanager
    def _interruptible(self, readline: ModuleType) -> Iterator[None]:
        """Only a signal handler still sees the line that Ctrl-C throws away."""

        def on_interrupt(*_: object) -> None:
            self.interrupted_text = readline.get_line_buffer()
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _remember(self, readline: ModuleType, line: str) -> None:
        last = readline.get_current_history_length()
        if last and readline.get_history_item(last) == line:
            return
        readline.add_history(line)
        with contextlib.suppress(OSError, AttributeError):
            self._history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._history, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600))
            readline.append_history_file(1, self._history)

    def close(self) -> None:
        """Shorten the history file; line editing is as it was before."""
        if self._readline is None:
            return
        self._readline.set_completer(None)
        with contextlib.suppress(OSError):
            lines = self._history.read_bytes().splitlines(keepends=True)
            if len(lines) > 2 * _HISTORY_LENGTH:
                self._history.write_bytes(b"".join(lines[-_HISTORY_LENGTH:]))

    def _completer(self, text: str, state: int) -> str | None:
        if state == 0:
            line = self._readline.get_line_buffer() if self._readline is not None else ""
            self._matches = [word for word in self._complete(line) if word.startswith(text)]
        return self._matches[state] if state < len(self._matches) else None


def read_message(read: Callable[[str], str], prompt: str) -> str:
    '''One message: a line, or the lines between two """.'''
    line = read(prompt)
    before, quotes, text = line.partition(QUOTES)
    if not quotes or (before.strip() and not before.lstrip().startswith("/")):
        return line  # quotes in the middle of a sentence are only quotes
    lines = [text]
    while QUOTES not in lines[-1]:
        lines.append(read(_CONTINUED))
    lines[-1] = lines[-1].partition(QUOTES)[0]
    return before + "\n".join(lines).removeprefix("\n").removesuffix("\n")


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    return readline


def _measured(prompt: str) -> str:
    """Colours in marks, so that readline knows how wide the prompt is."""
    return re.sub(r"\x1b\[[\d;]*m", "\x01\\g<0>\x02", prompt)
