"""A call to `generate` as it runs: to the end, piece by piece, or piece by piece in an event loop.

Knows: replies, something that takes them a step further, and how to get and give back the model. Does not know what a
step does.
"""

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

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


class AsyncStream(AsyncIterator[str]):
    """A running reply for `async for`; its steps run in a thread of its own, one for each piece that is asked for.

    So the event loop is free meanwhile, and nothing is made that nobody takes. Cancelling the task that waits for a
    piece cancels the reply, and returns once the model is free. Who may leave the loop early uses `async with`.
    """

    def __init__(self, make: Callable[[], Stream]):
        """`make` is called in the thread: it may take its time to tokenize."""
        self._make = make
        self._stream: Stream | None = None
        self._cancelled = self._closed = False
        self._executor: ThreadPoolExecutor | None = None

    async def __anext__(self) -> str:
        if self._closed:
            raise StopAsyncIteration
        try:
            piece = await self._in_thread(self._next)
        except asyncio.CancelledError:
            await asyncio.shield(asyncio.ensure_future(self.aclose()))
            raise
        if piece is None:
            self._closed = True
            self._end_thread()
            raise StopAsyncIteration
        return piece

    def cancel(self) -> None:
        """Ask the reply to stop, and iterate to its end. From any thread."""
        self._cancelled = True
        if self._stream is not None:
            self._stream.cancel()

    async def aclose(self) -> None:
        """End the reply and free the model. May be called twice."""
        self._closed = True
        self.cancel()
        if self._executor is not None:
            await self._in_thread(self._close)
            self._end_thread()

    @property
    def result(self) -> Generation:
        """The reply so far. ValueError before the first piece was asked for."""
        if self._stream is None:
            raise ValueError("nothing has been generated yet: iterate over the stream first")
        return self._stream.result

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def _next(self) -> str | None:
        if self._stream is None:
            self._stream = self._make()
            if self._cancelled:  # in between
                self._stream.cancel()
        return next(self._stream, None)

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="edgellama-stream")
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def _end_thread(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False)
            self._executor = None
