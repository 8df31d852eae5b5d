"""Threads at the end of the process: a daemon thread inside a model is stopped before the interpreter goes.

Until Python 3.13, a thread that wants the GIL back while the interpreter ends is unwound; where that goes through C++
that must not throw, such as a NumPy sum, the process aborts: one exit in twenty of a program that left in the middle
of a reply. So at exit, calls end as if cancelled, and their threads sleep until the process is gone.
Knows nothing of models.
"""

import atexit
import os
import threading
import time
from types import TracebackType

from edgellama.generate.cancel import CancelToken

_LIMIT_S = 2.0  # what cannot be cancelled in this time is left as it is
_POLL_S = 0.001

_inside: dict[int, CancelToken | None] = {}  # threads that compute, and what ends that
_leaver: list[int] = []  # the thread that ends the process, once it does


class computing:
    """`with computing(cancel):` around what must not run while the interpreter ends."""

    def __init__(self, cancel: CancelToken | None):
        self._cancel = cancel

    def __enter__(self) -> None:
        me = threading.get_ident()
        _inside[me] = self._cancel
        if _leaver:
            _stay(me)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        me = threading.get_ident()
        if _leaver:
            _stay(me)
        _inside.pop(me, None)


def _stay(me: int) -> None:
    """Never return; but the thread that ends the process may go on, its own exit handlers may use a model."""
    _inside.pop(me, None)
    if me not in _leaver:
        threading.Event().wait()


def _leave() -> None:
    me = threading.get_ident()
    _leaver.append(me)
    deadline = time.monotonic() + _LIMIT_S
    while (threads := [each for each in tuple(_inside) if each != me]) and time.monotonic() < deadline:
        for thread in threads:
            if (cancel := _inside.get(thread)) is not None:
                cancel.cancel()
        time.sleep(_POLL_S)


atexit.register(_leave)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_inside.clear)  # a child has none of its parent's threads
