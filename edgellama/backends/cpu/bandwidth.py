"""How fast this machine's memory can be read: the yardstick of decode, which reads every weight for each token.

A team of threads streams a buffer far larger than any cache, with the kernels' own 512-bit loads. Knows
nothing of models.
"""

from __future__ import annotations

import time

import numpy as np

from ...kv_cache import aligned_zeros
from . import native
from .jit import Native
from .simd import splat, vload, vmax, vstore
from .sync import fetch_add
from .team import Team

CHUNK = 1 << 20
PASSES = 5


@Native
def stream(buffer, nbytes, counter, out):
    """Read `nbytes` (whole chunks) from `buffer` (addresses), a chunk at a time; `out`: a place for one vector."""
    a, b, c, d = splat(np.float32(0)), splat(np.float32(0)), splat(np.float32(0)), splat(np.float32(0))
    while True:
        start = fetch_add(counter, CHUNK)
        if start >= nbytes:
            break
        for at in range(buffer + start, buffer + start + CHUNK, 256):
            a = vmax(a, vload(at))
            b = vmax(b, vload(at + 64))
            c = vmax(c, vload(at + 128))
            d = vmax(d, vload(at + 192))
    vstore(out, vmax(vmax(a, b), vmax(c, d)))  # so that nobody optimizes the loads away


class Bandwidth:
    """Measures the read bandwidth of `n_threads` threads, over and over; use it around what is compared with it."""

    def __init__(self, n_threads: int, nbytes: int = 256 << 20):
        self._team = Team(n_threads)
        self._stream = native.function(stream.name, 4)
        self._buffer = aligned_zeros(nbytes // CHUNK * CHUNK)
        self._buffer[:] = 1  # resident: reading untouched zero pages would read one page from a cache
        self._out, self._counter = aligned_zeros(64 * n_threads), np.zeros(8, np.int64)
        self.samples: list[float] = []
        self.measure()
        self.samples.clear()  # that one woke the threads

    def measure(self) -> float:
        """Bytes a second of the fastest of a few passes in a row; also appended to `samples`.

        The first pass alone would be far too slow a yardstick: it waits for sleeping threads and cores to wake.
        """
        self.samples.append(max(self._pass() for _ in range(PASSES)))
        return self.samples[-1]

    def _pass(self) -> float:
        self._counter[0] = 0
        buffer, counter, out = (a.ctypes.data for a in (self._buffer, self._counter, self._out))
        started = time.perf_counter()
        self._team.run(lambda rank: self._stream(buffer, self._buffer.nbytes, counter, out + 64 * rank))
        return self._buffer.nbytes / (time.perf_counter() - started)

    def close(self) -> None:
        self._team.close()
