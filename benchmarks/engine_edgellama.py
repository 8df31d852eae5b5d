"""edgellama's CPU backend, without tokenizer or sampling but the argmax."""

from __future__ import annotations

import time
from pathlib import Path

import engine
import numpy as np
import random_model

import edgellama
from edgellama.backends.cpu import CpuBackend
from edgellama.format import open_model


def make(shape: str, folder: Path) -> None:
    random_model.write_edgellama(shape, folder / "model.edgellama")


class Edgellama:
    def __init__(self, shape: str, folder: Path, n_threads: int, n_ctx: int):
        self.version = f"edgellama {edgellama.__version__}"
        self._backend = CpuBackend(open_model(folder / "model.edgellama"), n_ctx, 1, n_threads)
        self._rng = np.random.default_rng(0)

    def _forward(self, tokens: np.ndarray, start: int) -> int:
        n = tokens.size
        logits = self._backend.forward(tokens, np.arange(start, start + n), np.zeros(n, np.int32), np.array([n - 1]))
        return int(logits[-1].argmax())

    def _random(self, n: int) -> np.ndarray:
        return self._rng.integers(3, self._backend.config.vocab_size, n)

    def prefill(self, n: int, depth: int) -> float:
        if depth:
            self._forward(self._random(depth), 0)
        tokens = self._random(n)
        started = time.perf_counter()
        self._forward(tokens, depth)
        return time.perf_counter() - started

    def decode(self, n: int, depth: int) -> float:
        if depth:
            self._forward(self._random(depth), 0)
        token = int(self._random(1)[0])
        started = time.perf_counter()
        for step in range(n):
            token = self._forward(np.array([token]), depth + step)
        return time.perf_counter() - started


if __name__ == "__main__":
    engine.main(make, Edgellama)
