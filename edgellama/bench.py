"""How fast a model runs here: llama-bench's tests, and what share of the memory's bandwidth decode gets.

Knows: a backend, a clock and the memory's own speed, which is measured in turn with every sample because shared
machines and laptops change speed from minute to minute; and what `generate` adds to forward passes. Does not know how
results are shown (`cli.bench`).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellama.errors import ContextError

if TYPE_CHECKING:
    from edgellama.backends.cpu import CpuBackend
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
    mapped file's resident pages.
    """

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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class GenerateRow:
    """What `generate` costs beyond its forward passes: greedy, `n_gen` tokens after a short prompt; medians.

    `generate_ts`, `forward_ts`: tokens a second of `generate`, and of bare passes over the same tokens, in turn.
    `outside_us`: microseconds for each token that `generate` spends outside its passes; `overhead`: their share, over
    the time inside. Comparing the first two instead would add the noise of two measurements of the same passes.
    """

    n_gen: int
    n_threads: int
    generate_ts: float
    forward_ts: float
    outside_us: float
    overhead: float

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
) -> Iterator[Row]:
    """Yield a Row for each test; `progress(test, repetition)` comes before each sample. Needs the CPU backend."""
    from edgellama.backends.cpu import CpuBackend
    from edgellama.backends.cpu.bandwidth import Bandwidth

    if not tests:
        return
    n_ctx = max(test.n_depth + max(test.n_prompt, test.n_gen) for test in tests)
    if n_ctx > file.config.max_position_embeddings:
        raise ContextError(f"{n_ctx} tokens do not fit into the model's {file.config.max_position_embeddings}")
    n_slots = max(test.n_batch for test in tests)
    backend = CpuBackend(file, n_ctx, n_slots, n_threads, kv_cache=kv_cache)
    bandwidth = Bandwidth(backend.n_threads)
    try:
        for test in tests:
            yield _measure(file, backend, bandwidth, test, repetitions, progress)
    finally:
        backend.close()
        bandwidth.close()


def run_generate(
    file: ModelFile, n_gen: int, repetitions: int, n_threads: int | None = None, kv_cache: str = "float16"
) -> GenerateRow:
    """Measure what `generate` adds to forward passes."""
    from edgellama.backends.cpu import CpuBackend
    from edgellama.model import Llama

    n_prompt = 8
    if n_prompt + n_gen > file.config.max_position_embeddings:
        raise ContextError(
            f"{n_prompt + n_gen} tokens do not fit into the model's {file.config.max_position_embeddings}"
        )
    backend = _Timed(CpuBackend(file, n_prompt + n_gen, n_threads=n_threads, kv_cache=kv_cache))
    # Not closed: the file is the caller's.
    llm = Llama(file, backend)
    prompt = np.random.default_rng(0).integers(0, file.config.vocab_size, n_prompt).tolist()
    inside, outside, bare = [], [], []
    try:
        for repetition in range(repetitions + 1):
            backend.seconds = 0.0
            started = time.perf_counter()
            reply = llm.generate(prompt, n_gen, temperature=0, eos_token_id=[])
            whole = time.perf_counter() - started
            passes = backend.seconds
            tokens = [*prompt, *reply.token_ids[:-1]]
            started = time.perf_counter()
            for position in range(n_prompt - 1, len(tokens)):
                backend.forward(np.array([tokens[position]]), np.array([position]), np.array([0]), np.array([0]))
            if repetition:  # the first one warms up
                bare.append(time.perf_counter() - started)
                inside.append(passes)
                outside.append(whole - passes)
    finally:
        backend.close()
    return GenerateRow(
        n_gen=n_gen,
        n_threads=backend.n_threads,
        generate_ts=n_gen / statistics.median(a + b for a, b in zip(inside, outside, strict=True)),
        forward_ts=n_gen / statistics.median(bare),
        outside_us=statistics.median(outside) / n_gen * 1e6,
        overhead=statistics.median(a / b for a, b in zip(outside, inside, strict=True)),
    )


class _Timed:
    """A backend that adds up the seconds spent in `forward`."""

    def __init__(self, backend: CpuBackend):
        self._backend = backend
        self.seconds = 0.0

    def forward(self, *arrays: np.ndarray) -> np.ndarray:
        started = time.perf_counter()
        try:
            return self._backend.forward(*arrays)
        finally:
            self.seconds += time.perf_counter() - started

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def _measure(
    file: ModelFile, backend: CpuBackend, bandwidth: Any, test: Test, repetitions: int, progress: Callable
) -> Row:
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
        share = bytes_per_step(file, test, backend.kv_cache) * steps_a_second / memory
    return Row(
        **asdict(test),
        n_threads=backend.n_threads,
        avg_ts=statistics.mean(rates),
        stddev_ts=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        samples_ts=rates,
        bandwidth_share=share,
        bandwidth=memory,
        ttft_s=statistics.median(seconds) if test.n_prompt else None,
        model_bytes=file.size,
        peak_rss=peak_rss(),
    )


class _Run:
    """Samples of one test on one backend, with random tokens."""

    def __init__(self, backend: CpuBackend, rng: np.random.Generator):
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
        for step in range(min(test.n_gen, 4) if warm_up else test.n_gen):
            positions = np.full(test.n_batch, test.n_depth + step)
            logits = self._backend.forward(tokens, positions, slots, slots)
            tokens = logits.argmax(axis=1).astype(np.int32)
        return time.perf_counter() - started


def bytes_per_step(file: ModelFile, test: Test, kv_cache: str = "float16") -> float:
    """Bytes that one decode step reads on average: every weight once, and the cache of each slot.

    An untied embedding is not counted: a step reads a row of it.
    """
    from edgellama.kv_cache import bytes_per_position

    skipped = "model.embed_tokens.weight" if not file.config.tie_word_embeddings else None
    weights = sum(entry.nbytes for entry in file.tensors.values() if entry.name != skipped)
    positions = test.n_depth + (test.n_gen + 1) / 2
    return weights + test.n_batch * positions * bytes_per_position(file.config, kv_cache)


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


__all__ = ["GenerateRow", "Row", "Test", "parameters", "plan", "run", "run_generate"]
