"""A team of persistent Python threads that run one `nogil` function together, each with its rank.

The caller is rank 0. Numba's own threading layers are not used: one aborts the process when two Python
threads call it, another is missing on stock macOS. Knows nothing of what the function does.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


class Team:
    """`n_threads` threads; `run` calls a function in all of them and waits.

    Threads start with the first run, and again after a fork (a child has none of its parent's threads).
    One run at a time: the caller locks.
    """

    def __init__(self, n_threads: int):
        self.n_threads = n_threads
        self._pid = 0
        self._job: Callable[[int], object] | None = None
        self._go: list[threading.Semaphore] = []
        self._done = threading.Semaphore(0)
        self._failure: BaseException | None = None

    def run(self, job: Callable[[int], object]) -> object:
        """job(rank) in every thread at once; rank 0's result. An error in any thread is raised here."""
        if self._pid != os.getpid():
            self._start()
        self._job, self._failure = job, None
        for go in self._go:
            go.release()
        try:
            return job(0)
        finally:
            self._wait_for_the_others()
            self._job = None
            if self._failure is not None:
                raise self._failure

    def _wait_for_the_others(self) -> None:
        """Ctrl-C must not leave a thread computing into buffers that the next run will use."""
        interrupted, waiting = None, len(self._go)
        while waiting:
            try:
                self._done.acquire()
                waiting -= 1
            except KeyboardInterrupt as e:
                interrupted = e
        if interrupted:
            raise interrupted

    def close(self) -> None:
        """End the threads."""
        if self._pid == os.getpid():
            self._job = None
            for go in self._go:
                go.release()
        self._go, self._pid = [], 0

    def _start(self) -> None:
        self._go = [threading.Semaphore(0) for _ in range(self.n_threads - 1)]
        self._done = threading.Semaphore(0)
        self._pid = os.getpid()
        for rank, go in enumerate(self._go, start=1):
            threading.Thread(target=self._loop, args=(rank, go), name=f"edgellama-{rank}", daemon=True).start()

    def _loop(self, rank: int, go: threading.Semaphore) -> None:
        done = self._done
        while True:
            go.acquire()
            job = self._job
            if job is None:
                return
            try:
                job(rank)
            except BaseException as e:  # must reach the caller, which waits
                self._failure = e
            done.release()
