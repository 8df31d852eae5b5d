"""How fast a model runs here: llama-bench's tests, and what share of the memory's bandwidth decode gets.

Knows: a backend, a clock and the memory's own speed, which is measured in turn with every sample because shared
machines and laptops change speed from minute to minute. Does not know how results are shown (`cli.bench`).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellama import devices
from edgellama.errors import ContextError

if TYPE_CHECKING:
    from edgellama.format import ModelFile


@dataclass(frozen=True)
class Test:
    """`n_prompt` tokens in one pass (prefill) or `n_gen` one by one (decode), after `n_depth`, in `n_batch` slots."""

    n_prompt: int
    n_gen: int
    n_depth: int
    n_batch: int

    @property
    def name(self) -> str:
        """As llama-bench names it: pp512, tg128 @ d4096; x8 for a batch."""
        what = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        batch = f" x{self.n_batch}" if self.n_batch > 1 else ""
        return what + batch + (f" @ d{self.n_depth}" if self.n_depth else "")


@dataclass(frozen=True)
class Row:
    """One test's outcome. Rates in tokens a second of all slots together, sizes in bytes, times in seconds.

    `bandwidth_share`: bytes of weights and cache that the steps read, over what the memory delivers to as many threads;
    None for prefill. `ttft_s`: prompt to first token; None for decode. `peak_rss`: of the process so far, with the
    mapped file's resident pages. `n_threads` is 0 and `device_bytes` (the most memory held so far) not None on a GPU.
    """

    backend: str
    n_prompt: int
    n_gen: int
    n_depth: int
    n_batch: int
    n_threads: int
    avg_ts: float
    stddev_ts: float
    samples_ts: list[float]
    bandwidth_share: float | None
    bandwidth: float
    ttft_s: float | None
    model_bytes: int
    peak_rss: int
    device_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(prompts: list[int], gens: list[int], depths: list[int], batches: list[int]) -> list[Test]:
    """All combinations: for each depth and batch, each prompt length and each number of tokens (0: no such test)."""
    tests = []
    for depth in depths:
        for batch in batches:
            tests += [Test(n, 0, depth, batch) for n in prompts if n]
            tests += [Test(0, n, depth, batch) for n in gens if n]
    return tests


def run(
    file: ModelFile,
    tests: list[Test],
    repetitions: int,
    n_threads: int | None = None,
    kv_cache: str = "float16",
    progress: Callable[[Test, int], None] = lambda test, repetition: None,
    device: str = "cpu",
) -> Iterator[Row]:
    """Yield a Row for each test; `progress(test, repetition)` comes before each sample."""
    device = devices.resolve(device, kv_cache)
    n_ctx = max(test.n_depth + max(test.n_prompt, test.n_gen) for test in tests)
    if n_ctx > file.config.max_position_embeddings:
        raise ContextError(f"{n_ctx} tokens do not fit into the model's {file.config.max_position_embeddings}")
    n_slots = max(test.n_batch for test in tests)
    backend = devices.make_backend(device, file, n_ctx, n_slots, n_threads, kv_cache)
    threads, bandwidth = _yardstick(device, backend)
    try:
        for test in tests:
            yield _measure(file, device, backend, threads, bandwidth, test, repetitions, progress)
    finally:
        backend.close()
        bandwidth.close()


def _yardstick(device: str, backend: Any) -> tuple[int, Any]:
    """Threads that compute (0: none of the CPU's), and what measures the memory they read."""
    if device == "cuda":
        from edgellama.backends.gpu.bandwidth import DeviceBandwidth

        return 0, DeviceBandwidth()
    from edgellama.backends.cpu.bandwidth import Bandwidth
    from edgellama.backends.cpu.threads import default_threads

    threads = getattr(backend, "n_threads", None) or default_threads()
    return threads, Bandwidth(threads)


def _measure(
    file: ModelFile, device: str, backend: Any, threads: int, bandwidth: Any, test: Test, repetitions: int,
    progress: Callable,
) -> Row:  # fmt: skip
    rng = np.random.default_rng(0)
    run = _Run(backend, rng)
    for slot in range(test.n_batch if test.n_depth else 0):
        run.prefill(test.n_depth, 0, slot)
    run.sample(test, warm_up=True)
    bandwidth.samples.clear()
    seconds = []
    for repetition in range(repetitions):
        progress(test, repetition)
        bandwidth.measure()
        seconds.append(run.sample(test))
        bandwidth.measure()
    tokens = test.n_batch * (test.n_prompt or test.n_gen)
    rates = [tokens / s for s in seconds]
    memory = statistics.median(bandwidth.samples)
    share = None
    if test.n_gen:
        steps_a_second = statistics.median(rates) / test.n_batch
        share = bytes_per_step(file, test, getattr(backend, "kv_cache", "float32")) * steps_a_second / memory
    return Row(
        backend=device,
        **asdict(test),
        n_threads=threads,
        avg_ts=statistics.mean(rates),
        stddev_ts=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        samples_ts=rates,
        bandwidth_share=share,
        bandwidth=memory,
        ttft_s=statistics.median(seconds) if test.n_prompt else None,
        model_bytes=file.size,
        peak_rss=peak_rss(),
        device_bytes=getattr(backend, "device_bytes", None),
    )


class _Run:
    """Samples of one test on one backend, with random tokens."""

    def __init__(self, backend: Any, rng: np.random.Generator):
        self._backend, self._rng = backend, rng

    def _tokens(self, n: int) -> np.ndarray:
        return self._rng.integers(0, self._backend.config.vocab_size, n).astype(np.int32)

    def prefill(self, n: int, start: int, slot: int) -> None:
        positions, slots = np.arange(start, start + n), np.full(n, slot)
        logits = self._backend.forward(self._tokens(n), positions, slots, np.array([n - 1]))
        logits[-1].argmax()

    def sample(self, test: Test, warm_up: bool = False) -> float:
        """Seconds of one repetition (of a few steps only, to warm up)."""
        slots = np.arange(test.n_batch)
        tokens = self._tokens(test.n_batch)
        started = time.perf_counter()
        if test.n_prompt:
            for slot in slots:
                self.prefill(test.n_prompt, test.n_depth, int(slot))
        steps = min(test.n_gen, 4) if warm_up else test.n_gen
        if steps and hasattr(self._backend, "decode"):  # feeds its own choices back, on its device
            self._backend.decode(tokens, np.full(test.n_batch, test.n_depth), slots, steps)
            steps = 0
        for step in range(steps):
            positions = np.full(test.n_batch, test.n_depth + step)
            logits = self._backend.forward(tokens, positions, slots, slots)
            tokens = logits.argmax(axis=1).astype(np.int32)
        return time.perf_counter() - started


def bytes_per_step(file: ModelFile, test: Test, kv_cache: str = "float16") -> float:
    """Bytes that one decode step reads on average: every weight once, and the cache of each slot.

    An untied embedding is not counted: a step reads a row of it.
    """
    from edgellama.kv_cache import bytes_per_position

    position_bytes = bytes_per_position(file.config, "int8" if kv_cache == "int8" else "float16")
    if kv_cache == "float32":
        position_bytes *= 2
    skipped = "model.embed_tokens.weight" if not file.config.tie_word_embeddings else None
    weights = sum(entry.nbytes for entry in file.tensors.values() if entry.name != skipped)
    positions = test.n_depth + (test.n_gen + 1) / 2
    return weights + test.n_batch * positions * position_bytes


def peak_rss() -> int:
    """The process's largest resident size so far in bytes; 0 where nobody tells."""
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def parameters(file: ModelFile) -> int:
    """Weights of the model, without padding."""
    return sum(int(np.prod(entry.shape)) for entry in file.tensors.values() if not entry.name.endswith(".scales"))


__all__ = ["Row", "Test", "parameters", "plan", "run"]
