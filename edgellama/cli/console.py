"""What the verbs share on the terminal: notes, one-line errors, sizes and times as people read them.

Text from files and models is cleaned before a terminal sees it: an untrusted file must not send escape sequences.
"""

import contextlib
import difflib
import errno
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from typing import IO, Any

from edgellama.errors import EdgellamaError, FormatError
from edgellama.terminal import has_colours, is_terminal

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

_LOOKS = {"dim": "2", "bold": "1", "error": "31"}


def prepare_streams() -> None:
    """A character the terminal cannot show becomes `?`, never an exception; a closed stream is /dev/null.

    A Ctrl-C that hits where Python cannot raise (a callback of C code, a finalizer) is not told with a traceback.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (for the process's life)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:
            with contextlib.suppress(OSError, ValueError):
                reconfigure(errors="replace")
    sys.unraisablehook = _tell_unless_interrupt


def _tell_unless_interrupt(event: Any) -> None:
    if not isinstance(event.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(event)


def note(text: str = "", look: str = "") -> None:
    """One line to stderr, with a `look` of `styled`; a closed stderr is nobody's problem.

    On a terminal that is narrower it is broken between words.
    """
    with contextlib.suppress(OSError, ValueError):
        print(styled(_fitted(clean(text)), look, sys.stderr), file=sys.stderr, flush=True)


def _fitted(line: str) -> str:
    width = shutil.get_terminal_size().columns
    if len(line) <= width or not is_terminal(sys.stderr):
        return line
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)


def styled(text: str, look: str, stream: IO[str]) -> str:
    """`text` in the `look` of _LOOKS where `stream` is a terminal that knows colours, and NO_COLOR is not set."""
    if not (text and look and has_colours(stream)):
        return text
    return f"\x1b[{_LOOKS[look]}m{text}\x1b[0m"


def write(text: str) -> None:
    """A piece of an answer to stdout, at once. Cleaned only for a terminal: a pipe gets the very text."""
    sys.stdout.write(clean(text, keep="\n\t") if is_terminal(sys.stdout) else text)
    sys.stdout.flush()


def say(text: str) -> None:
    """A line of an answer to stdout."""
    write(text + "\n")


def say_json(value: Any) -> None:
    """One JSON object on one line of stdout."""
    utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(value, ensure_ascii=not utf8, allow_nan=False) + "\n")
    sys.stdout.flush()


def clean(text: str, keep: str = "\t") -> str:
    """`text` without control characters and direction overrides, except those in `keep`.

    >>> clean("a\\x1b[2Jb")
    'a?[2Jb'
    """
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else "?", text)


def one_line(error: Exception) -> str | None:
    """The line that tells a user what went wrong; None for what is no user's error."""
    if isinstance(error, FormatError):
        text = _format_error(error)
    elif isinstance(error, EdgellamaError):
        text = str(error)
    elif isinstance(error, MemoryError):
        text = "out of memory; close other programs, or ask for a shorter context (-c)"
    elif isinstance(error, OSError):
        text = _os_error(error)
    else:
        return None
    return "edgellama: error: " + " ".join(text.split())


def _format_error(error: FormatError) -> str:
    """With what to do about a model file that is damaged, where the error does not say it itself."""
    text = str(error)
    said = error.path is None or error.field == "prologue.magic" or "again" in text or "update edgellama" in text
    return text if said else f"{text}; convert or download it again"


def _os_error(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        reason = "no space left on the disk"
    elif error.strerror:
        reason = error.strerror[0].lower() + error.strerror[1:]
    else:
        return str(error) or type(error).__name__
    where = error.filename2 or error.filename
    return f"{where}: {reason}" if where else reason


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The end of a line about an unknown word: the closest known one, or nothing.

    >>> did_you_mean("genrate", ["generate", "convert"])
    "; did you mean 'generate'?"
    """
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def drop_stdout() -> None:
    """Send the rest of stdout nowhere, so that the interpreter's last flush stays quiet."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class WordWrap:
    """Writes streamed text so that no word is broken at the terminal's edge; a word appears once it is complete.

    Chinese and Japanese have no spaces: there any character may begin a line.

    >>> wrap = WordWrap(sys.stdout.write, width=10)
    >>> wrap.push("Once upon a time"); wrap.flush()
    Once upon
    a time
    """

    def __init__(self, write: Callable[[str], None], width: int):
        self._write, self._width = write, width
        self._column = 0
        self._word = ""  # with the space before it
        self._word_width = 0

    def push(self, text: str) -> None:
        for character in text:
            wide = unicodedata.east_asian_width(character) in "WF"
            if wide or character in " \n\t":
                self.flush()
            if character == "\n":
                self._write("\n")
                self._column = 0
            else:
                self._word += character
                self._word_width += self._cells(character, wide)
                if wide:
                    self.flush()

    def flush(self) -> None:
        """Write the word in hand."""
        if self._column and self._column + self._word_width > self._width:
            if self._word[:1] == " ":
                self._word, self._word_width = self._word[1:], self._word_width - 1
            self._write("\n")
            self._column = 0
        self._column += self._word_width
        if self._word:
            self._write(self._word)
        self._word, self._word_width = "", 0

    def _cells(self, character: str, wide: bool) -> int:
        if character == "\t":
            return 8 - self._column % 8
        return 2 if wide else int(not unicodedata.combining(character))


def size(n_bytes: float) -> str:
    """
    >>> size(13_476_925_163), size(999), size(2_500_000)
    ('13.48 GB', '999 B', '2.5 MB')
    """
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1)):
        if n_bytes < 1000:
            return f"{n_bytes:.{digits}f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} GB"


def count(n: float) -> str:
    """
    >>> count(6_738_415_616), count(25_829_888), count(640)
    ('6.74 B', '25.8 M', '640')
    """
    for unit, scale, digits in (("B", 1e9, 2), ("M", 1e6, 1), ("k", 1e3, 1)):
        if n >= scale:
            return f"{n / scale:.{digits}f} {unit}"
    return f"{n:.0f}"


def seconds(value: float) -> str:
    """
    >>> seconds(0.0123), seconds(4.25), seconds(312)
    ('12 ms', '4.2 s', '5 min 12 s')
    """
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    return f"{value // 60:.0f} min {value % 60:.0f} s"


def shell_path(path: str | os.PathLike[str]) -> str:
    """`path` as a shell takes it back, with ~ for the home folder where the shell knows it."""
    text, home = os.fspath(path), os.path.expanduser("~")
    if os.name == "nt":
        return f'"{text}"' if " " in text else text
    if len(home) > 1 and text.startswith(home + os.sep):
        return "~/" + shlex.quote(text[len(home) + 1 :])
    return shlex.quote(text)


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns, the first padded."""
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)
