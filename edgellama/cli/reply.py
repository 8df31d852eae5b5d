"""Showing a reply while it is made: shared by the verbs that generate."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from edgellama.cli import console
from edgellama.errors import EdgellamaError

if TYPE_CHECKING:
    from edgellama.generate import CancelToken, Generation, Stream


def stream_reply(stream: "Stream | WholeReply", write: Callable[[str], None], *, patient: bool = False) -> int:
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
def _on_interrupt(handler: Callable[..., None], stream: "Stream | WholeReply") -> Iterator[None]:
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


def start(call: Callable[..., Any], *args: Any, **options: Any) -> "Stream | WholeReply":
    """`call` is `llm.generate` or `llm.chat`; a stream of its reply, of one piece where beams are searched.

    A value that it refuses is what a user chose, so EdgellamaError is raised, not ValueError or TypeError.
    """
    if (options.get("num_beams") or 1) > 1:
        return WholeReply(lambda cancel: call(*args, **options, cancel=cancel))
    with _users_choice():
        return call(*args, **options, stream=True)


@contextlib.contextmanager
def _users_choice() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        raise EdgellamaError(str(error)) from error


class WholeReply(Iterator[str]):
    """A reply that is only known once it is complete, in the shape of a Stream."""

    def __init__(self, run: Callable[["CancelToken"], "Generation"]):
        from edgellama.generate import CancelToken

        self._run, self._cancel = run, CancelToken()
        self._result: Generation | None = None

    def __next__(self) -> str:
        if self._result is not None:
            raise StopIteration
        with _users_choice():
            self._result = self._run(self._cancel)
        return self._result.text

    @property
    def token_ids(self) -> list[int]:
        return [] if self._result is None else self._result.token_ids

    @property
    def result(self) -> "Generation":
        assert self._result is not None, "not run yet"
        return self._result

    def cancel(self) -> None:
        self._cancel.cancel()

    def __enter__(self) -> "WholeReply":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.cancel()


def summary(result: "Generation", *, context_full: bool = False) -> str:
    """One line: how much, how fast, how long it took to open the model, why it ended."""
    if result.finish_reason == "stop":
        end = "the text ended"
    elif result.finish_reason == "cancelled":
        end = "interrupted"
    else:
        end = "the context is full" if context_full else "stopped by -n"
    return f"[{speed(result)}; opened in {console.seconds(result.timings.load_s)}; {end}]"


def speed(result: "Generation") -> str:
    """How much and how fast. A rate is only told where there is something to measure."""
    timings = result.timings
    new = f"{len(result.token_ids)} new"
    if timings.decode_tps is not None:
        new += f" at {timings.decode_tps:.1f}/s"
    if timings.acceptance_rate is not None:
        new += f" ({timings.acceptance_rate:.0%} of the guesses right)"
    known = f" ({timings.cached_tokens} known)" if timings.cached_tokens else ""
    return f"{len(result.prompt_token_ids)} prompt tokens{known} in {console.seconds(timings.prefill_s)}; {new}"


def note_end(result: "Generation", *, room: int) -> str:
    """What a chat tells about a reply that did not end by itself; `room` tokens of context were left for it."""
    n = len(result.token_ids)
    if result.finish_reason == "cancelled":
        return f"(stopped after {n} tokens)"
    if result.finish_reason != "length":
        return ""
    return "(the context is full)" if n >= room else f"(cut after {n} tokens: max_new_tokens)"
