"""A reply piece by piece in an event loop. By itself, because asyncio takes longer to import than all of `generate`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from edgellama.generate.results import Generation
from edgellama.generate.stream import Stream


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
