"""Speed of the quantizers on one core, by CPU time (so other processes hardly matter), and their error.

python benchmarks/quantizers.py
"""

import time

import numpy as np

from edgellama_convert.quantizers import METHODS, quantize

SHAPE = (512, 4096)


def main() -> None:
    weights = (np.random.default_rng(0).standard_normal(SHAPE, np.float32) * 0.02).astype(np.float32)
    for bits in (4, 8):
        for method in METHODS:
            quantize(weights[:16, :128], bits, method)
            best = float("inf")
            for _ in range(7):
                started = time.thread_time()
                result = quantize(weights, bits, method)
                best = min(best, time.thread_time() - started)
            error = (result.squared_error / result.squared_sum) ** 0.5
            speed = weights.size / best / 1e6
            print(f"{method:6} int{bits}: {speed:6.1f} M weights/s/core, relative rms error {error:.5f}")


if __name__ == "__main__":
    main()
