"""A team of persistent Python threads that run one `nogil` function together, each with its rank.

The caller is rank 0. Numba's own threading layers are not used: one aborts the process when two Python
threads call it, another is missing on stock macOS. Knows nothing of what the function does.

Ctrl-C raises in the caller between any two bytecodes, also between a call that has done its work and the line that
notes it. So nothing here is counted in the caller: every step may be repeated, and shared state says how far we are.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

_POLL_S = 0.1  # a wake-up that an interrupt swallowed costs this much


@dataclass
class _Run:
    """One call of `Team.run`."""

    job: Callable[[int], object]
    finished: set[int] = field(default_factory=set)  # ranks but 0
    failure: BaseException | None = None


class Team:
    """`n_threads` threads; `run` calls a function in all of them and waits.

    Threads start with the first run, and again after a fork (a child has none of its parent's threads).
    One run at a time: the caller locks.
    """

    def __init__(self, n_threads: int):
        self.n_threads = n_threads
        self._pid = 0
        self._run: _Run | None = None
        self._end = threading.Event()
        self._go: list[threading.Lock] = []  # each released to wake its thread; twice does no harm
        self._done = threading.Lock()

    def run(self, job: Callable[[int], object], must_join: Callable[[], bool] = lambda: False) -> object:
        """job(rank) in every thread at once; rank 0's result. An error in any thread is raised here.

        True says that the job ended in a barrier: all have done their work, and none is waited for. An interrupt is
        raised once no thread computes any more. `must_join` is asked after one: True if rank 0 was interrupted before
        it got into the job, where the others wait for it.
        """
        if self._pid != os.getpid():
            self._start()
        run = self._run = _Run(job)
        result, interrupt = None, None
        while True:
            try:
                for go in self._go:
                    if go.locked():
                        go.release()
                if interrupt is None or (len(run.finished) < len(self._go) and must_join()):
                    result = job(0)
                    if result is True and interrupt is None:
                        break
                while len(run.finished) < len(self._go):
                    self._done.acquire(timeout=_POLL_S)
                break
            except BaseException as e:
                interrupt = e
        self._run = None
        error = interrupt or run.failure
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """End the threads."""
        if self._pid == os.getpid():
            self._end.set()
            for go in self._go:
                if go.locked():
                    go.release()
        self._go, self._pid = [], 0

    def _start(self) -> None:
        self._go = [threading.Lock() for _ in range(self.n_threads - 1)]
        self._done = threading.Lock()
        self._end = threading.Event()
        self._pid = os.getpid()
        for rank, go in enumerate(self._go, start=1):
            go.acquire()
            threading.Thread(target=self._loop, args=(rank, go), name=f"edgellama-{rank}", daemon=True).start()

    def _loop(self, rank: int, go: threading.Lock) -> None:
        done, end = self._done, self._end
        while True:
            go.acquire()
            if end.is_set():
                return
            run = self._run
            if run is None or rank in run.finished:
                continue
            try:
                run.job(rank)
            except BaseException as e:  # must reach the caller, which waits
                run.failure = e
            run.finished.add(rank)
            with contextlib.suppress(RuntimeError):  # another thread has woken the caller
                done.release()
            del run  # it holds the model's buffers
