"""A call to `generate` as it runs: to the end, or piece by piece.

Knows: replies, something that takes them a step further, and how to get and give back the model. Does not know what a
step does.
"""

import contextlib
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol

from edgellama.errors import CancelledError
from edgellama.generate.cancel import CancelToken
from edgellama.generate.exiting import computing
from edgellama.generate.reply import Reply
from edgellama.generate.results import FinishReason, Generation


class Stepper(Protocol):
    """What runs replies: `engine.Batch`, beam search, speculative decoding. `replies` are those of the call."""

    def step(self) -> bool:
        """Some work and some tokens; False if there is nothing left to do."""

    def close(self) -> None:
        """Free what it holds in the cache; replies that have not ended are "cancelled"."""


class Call:
    """One call: its replies and its own cancel token, which the caller's (`outer`) sets off, too."""

    def __init__(
        self,
        replies: Sequence[Reply],
        start: Callable[["Call"], Stepper],
        *,
        acquire: Callable[["Call"], None],
        release: Callable[["Call"], None],
        outer: CancelToken | None = None,
    ):
        """`acquire` and `release` bracket the model's use; `start` comes in between."""
        self.replies = replies
        self.cancel = CancelToken()
        self.stream: weakref.ref[Stream] | None = None  # who iterates over it
        self._start, self._acquire, self._release, self._outer = start, acquire, release, outer

    def steps(self) -> Generator[None, None, None]:
        """Yields after every step but the last; the model is free again once this has ended, or is closed."""
        if self._outer is not None:
            self._outer.link(self.cancel.cancel)
        try:
            self._acquire(self)
            try:
                stepper = self._start(self)
                try:
                    while self._step(stepper):
                        yield
                finally:
                    stepper.close()
            finally:
                self._release(self)
        except CancelledError:  # while it waited for its turn
            if not self.cancel.cancelled:
                raise
            for reply in self.replies:
                reply.finish("cancelled")
        finally:
            if self._outer is not None:
                self._outer.unlink(self.cancel.cancel)

    def _step(self, stepper: Stepper) -> bool:
        with computing(self.cancel):
            return stepper.step()

    def run(self) -> list[Generation]:
        """All steps; an interrupt leaves the model free, whoever keeps its traceback."""
        with contextlib.closing(self.steps()) as steps:
            for _ in steps:
                pass
        return [reply.result for reply in self.replies]


def _pieces(call: Call) -> Generator[str, None, None]:
    """The text of a call's one reply. Does not hold the Stream, so that a stream that nobody holds ends at once."""
    (reply,) = call.replies
    with contextlib.closing(call.steps()) as steps:
        for _ in steps:
            if text := reply.new_text():
                yield text
    if text := reply.new_text():
        yield text


class Stream(Iterator[str]):
    """A running reply: iterate for its pieces of text, then (or at any time) read `.result`.

    A piece is never half a character, and never the beginning of a stop string. The model is busy until the stream is
    exhausted, closed or garbage; `with llm.generate(..., stream=True) as stream:` closes it. `cancel()` ends it from
    any thread; the pieces until then stay valid.
    """

    def __init__(self, call: Call):
        self._call, self._reply, self._iterator = call, call.replies[0], _pieces(call)
        call.stream = weakref.ref(self)

    @property
    def token_ids(self) -> list[int]:
        """The new ids so far."""
        return self._reply.token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it runs."""
        return self._reply.finish_reason

    @property
    def cancelled(self) -> bool:
        return self._call.cancel.cancelled

    def __next__(self) -> str:
        return next(self._iterator)

    def cancel(self) -> None:
        """Ask the running loop to stop, a long prefill included; the pieces until then stay valid."""
        self._call.cancel.cancel()

    def close(self) -> None:
        """End the reply now and free the model for the next call. May be called twice."""
        self.cancel()
        # ValueError: another thread is inside the generator; it sees the flag and ends after its token.
        with contextlib.suppress(ValueError):
            self._iterator.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def result(self) -> Generation:
        """The reply so far; complete once iteration has ended."""
        return self._reply.result
