"""Showing a reply while it is made: shared by the verbs that generate."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgellama.cli import console

if TYPE_CHECKING:
    from edgellama.generate import Generation, Stream


def stream_reply(stream: "Stream", *, silent: bool = False) -> int:
    """Print the pieces as they come; returns 0, or 130 when Ctrl-C ended the reply.

    Ctrl-C lets the token in work finish, so the result is whole. Before the first token, or pressed twice, it is
    a KeyboardInterrupt as usual.
    """
    interrupted = False

    def on_interrupt(*_: object) -> None:
        nonlocal interrupted
        if interrupted or not stream.token_ids:
            raise KeyboardInterrupt
        interrupted = True
        stream.cancel()

    with _interrupt_handler(on_interrupt):
        for piece in stream:
            if not silent:
                console.say(piece, end="")
    return 130 if interrupted else 0


@contextlib.contextmanager
def _interrupt_handler(handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and only it is interrupted
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def summary(result: "Generation", *, context_full: bool = False) -> str:
    """One line: how much, how fast, why it ended.

    A rate is only told where there is something to measure.
    """
    timings = result.timings
    parts = [
        f"prompt {len(result.prompt_token_ids)} tokens in {console.seconds(timings.prefill_s)}",
        f"{len(result.token_ids)} new tokens"
        + (f" at {timings.decode_tps:.1f}/s" if timings.decode_tps is not None else ""),
        f"model opened in {console.seconds(timings.load_s)}",
    ]
    if result.finish_reason == "stop":
        parts.append("the text ended")
    else:
        parts.append("the context is full" if context_full else "stopped at -n")
    return "[" + "; ".join(parts) + "]"
