"""One object that stops what was started with it: loading, prefill, decode, from any thread or signal handler.

Nothing here waits or locks: a signal handler may run between any two bytecodes of the thread that it interrupts.
"""

from collections.abc import Callable

from edgellama.errors import CancelledError


class CancelToken:
    """Hand it to `load`, `generate` or `chat` as `cancel=`, and call `cancel()` to stop them; it cannot be undone.

    A forward pass ends within one layer of one chunk (of 256 tokens at most). `generate` then returns what it has, with
    `finish_reason` "cancelled"; `load` raises CancelledError. One token may serve many calls, one after another or at
    once.
    """

    def __init__(self) -> None:
        self._cancelled = False
        self._callbacks: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """Stop now. From any thread; more than once is fine."""
        self._cancelled = True
        for callback in tuple(self._callbacks):
            callback()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def raise_if_cancelled(self) -> None:
        """CancelledError once `cancel()` was called."""
        if self._cancelled:
            raise CancelledError("cancelled on request")

    def link(self, callback: Callable[[], None]) -> None:
        """Have `callback()` called by `cancel`, or now if that has been; it may be called more than once.

        Until `unlink`, which may come while `cancel` runs: a callback that comes too late must do no harm.
        """
        self._callbacks.append(callback)  # before the test: `cancel` sets the flag before it looks at the list
        if self._cancelled:
            callback()

    def unlink(self, callback: Callable[[], None]) -> None:
        """Undo `link`; nothing happens where there is nothing to undo."""
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    def __repr__(self) -> str:
        return f"<CancelToken {'cancelled' if self._cancelled else 'not cancelled'}>"
