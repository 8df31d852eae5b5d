"""Turns whatever a tokenizer library throws at hostile input into `TokenizerError`, and keeps its noise off stderr.

`tokenizers` is Rust: a panic there reaches Python as `pyo3_runtime.PanicException`, which is no `Exception`, after the
panic hook has already written to file descriptor 2. Knows nothing of tokenizers themselves.
"""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from edgellama.errors import TokenizerError

_STDERR = 2
_stderr_lock = threading.Lock()  # the descriptor belongs to the whole process


def one_line(error: BaseException, limit: int = 200) -> str:
    """The error's text on one line, cut to `limit` characters, unprintable ones (from a hostile file) spelt out."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[: 2 * limit])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


@contextmanager
def refusing(problem: str) -> Iterator[None]:
    """Any `Exception` or Rust panic inside becomes `TokenizerError(f"{problem}: ...")`; a Ctrl-C stays one."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or _is_panic(error):
            raise TokenizerError(f"{problem}: {one_line(error)}") from None
        raise


@contextmanager
def quiet_panics() -> Iterator[None]:
    """Holds back what native code writes to stderr; it is passed on afterwards unless an exception ended the block.

    Only for the short time of loading: the redirection is the process's. Where there is no descriptor 2, does nothing.
    """
    with _stderr_lock:
        try:
            saved = os.dup(_STDERR)
        except OSError:
            yield
            return
        failed = True
        with tempfile.TemporaryFile() as held:
            os.dup2(held.fileno(), _STDERR)
            try:
                yield
                failed = False
            finally:
                os.dup2(saved, _STDERR)
                os.close(saved)
                held.seek(0)
                text = b"" if failed else held.read()
                if text:
                    os.write(_STDERR, text)
