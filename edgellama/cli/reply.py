"""Showing a reply while it is made: shared by the verbs that generate."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from edgellama.cli import console

if TYPE_CHECKING:
    from edgellama.generate import Generation, Stream


def stream_reply(stream: "Stream", write: Callable[[str], None], *, patient: bool = False) -> int:
    """`write` the pieces as they come; returns 0, or 130 when Ctrl-C ended the reply.

    Ctrl-C lets the token in work finish, so the result is whole. Before the first token (unless `patient`: the
    caller goes on afterwards), or pressed twice, it is a KeyboardInterrupt as usual.
    """
    interrupted = False

    def on_interrupt(*_: object) -> None:
        nonlocal interrupted
        again, interrupted = interrupted, True
        stream.cancel()  # first: what is raised inside a callback of C code is lost
        if again or not (patient or stream.token_ids):
            raise KeyboardInterrupt

    with _on_interrupt(on_interrupt, stream):
        for piece in stream:
            write(piece)
    return 130 if interrupted else 0


@contextlib.contextmanager
def _on_interrupt(handler: Callable[..., None], stream: "Stream") -> Iterator[None]:
    """`handler` for SIGINT. Python runs it between bytecodes only, so a thread that the signal wakes at once
    cancels what the compiled code computes: a long prompt must not delay Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and only it is interrupted
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while number := reader.recv(1):
            if number[0] == signal.SIGINT:
                stream.cancel()

    threading.Thread(target=watch, daemon=True).start()
    before_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(before_fd)
        writer.close()  # ends the thread


def summary(result: "Generation", *, context_full: bool = False) -> str:
    """One line: how much, how fast, why it ended.

    A rate is only told where there is something to measure.
    """
    timings = result.timings
    new = f"{len(result.token_ids)} new"
    if timings.decode_tps is not None:
        new += f" at {timings.decode_tps:.1f}/s"
    if result.finish_reason == "stop":
        end = "the text ended"
    elif result.finish_reason == "cancelled":
        end = "interrupted"
    else:
        end = "the context is full" if context_full else "stopped by -n"
    return (
        f"[{len(result.prompt_token_ids)} prompt tokens in {console.seconds(timings.prefill_s)}; {new}; "
        f"opened in {console.seconds(timings.load_s)}; {end}]"
    )


def note_end(result: "Generation", *, room: int) -> str:
    """What a chat tells about a reply that did not end by itself; `room` tokens of context were left for it."""
    n = len(result.token_ids)
    if result.finish_reason == "cancelled":
        return f"(stopped after {n} tokens)"
    if result.finish_reason != "length":
        return ""
    return "(the context is full)" if n >= room else f"(cut after {n} tokens: max_new_tokens)"
