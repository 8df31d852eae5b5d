"""Work in parts, on threads: what the parts are does not depend on how many threads there are, so bits do not either.

Each thread's BLAS calls stay on that thread: a BLAS's own threads divide a product by their number, and wait for each
other at every small one. Knows nothing of what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

from ..checkpoint import row_slabs


@contextmanager
def threads(n: int) -> Iterator[Executor]:
    """A pool of `n` threads; meanwhile a BLAS call of any thread of this process uses that thread only."""
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(n, thread_name_prefix="gptq") as pool:
        yield pool


def each_part(pool: Executor | None, n: int, size: int, work: Callable[[int, int], None]) -> None:
    """`work(begin, end)` for each part, at once on the pool's threads; without a pool one after the other."""
    each(pool, list(row_slabs(n, size)), work)


def each(pool: Executor | None, arguments: Sequence[tuple[int, ...]], work: Callable[..., None]) -> None:
    """`work(*arguments)` for each tuple; waits for all, then raises the first error."""
    if pool is None or len(arguments) == 1:
        for some in arguments:
            work(*some)
        return
    jobs = [pool.submit(work, *some) for some in arguments]
    errors = [error for job in jobs if (error := job.exception()) is not None]
    if errors:
        raise errors[0]
