"""What a calibrated conversion computes with: NumPy and compiled kernels, or torch on a GPU (or, slowly, a CPU).

The same arithmetic up to rounding: the parts of a layer's forward pass, sums over calibration tokens, the solution of
a matrix. `driver` asks for these and does not know who answers. Same input on the same device gives the same bits;
another device gives others, for its products are summed in another order.

Knows which arithmetic a device has. `layer` and `solve` do NumPy's, `torch_layer` and `torch_solve` torch's, which is
imported only when a device needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from edgellama.config import LlamaConfig
from edgellama.quant import dequantize

from .layer import Array, LayerMath, Linear
from .parts import each_part, threads
from .solve import PANEL, Codes, Factor, Moments, quantize_matrix, shift
from .work import Stream


class Arithmetic(Protocol):
    """The operations of `driver`; shapes and meanings are those of `layer.LayerMath` and of `solve`'s functions."""

    def array(self, values: np.ndarray) -> Array:
        """An array of NumPy's, to compute with."""

    def numpy(self, values: Array) -> np.ndarray:
        """The inverse of `array`."""

    def stream(self, stream: Stream) -> Any:
        """`stream`, whose rows are read and written as this arithmetic's arrays."""

    def linear(self, linear: Linear, x: Array) -> Array: ...
    def norm(self, x: Array, weight: Array) -> Array: ...
    def attention(self, q: Array, k: Array, v: Array) -> Array: ...
    def gated(self, gate: Array, up: Array) -> Array: ...

    def moments(self, in_features: int, lacking: int) -> Any:
        """`Moments` of nothing yet."""

    def count(self, moments: Any, x: Array, lacks: Array) -> None: ...
    def is_finite(self, moments: Any) -> bool: ...
    def shift(self, weights: Array, lack: Array, of_output: bool) -> Array: ...
    def factor(self, hessian: Array) -> Any: ...

    def solve(self, factor: Any, b: Array) -> None:
        """b H^-1 in place of `b`."""

    def quantize(self, target: Array, factor: Any, bits: int) -> Any:
        """`Codes`, in arrays of the arithmetic's own."""

    def dequantize(self, codes: Any, bits: int) -> Array: ...
    def square_sum(self, values: Array) -> float: ...


class NumpyArithmetic(LayerMath):
    """`Arithmetic` in NumPy and Numba, on the threads of a pool; bits do not depend on how many there are."""

    def array(self, values: np.ndarray) -> np.ndarray:
        return values

    numpy = array

    def stream(self, stream: Stream) -> Stream:
        return stream

    def moments(self, in_features: int, lacking: int) -> Moments:
        return Moments.zeros(in_features, lacking)

    def count(self, moments: Moments, x: np.ndarray, lacks: np.ndarray) -> None:
        moments.add(x, lacks, self._pool)

    def is_finite(self, moments: Moments) -> bool:
        return bool(np.isfinite(np.diagonal(moments.hessian)).all() and np.isfinite(moments.lack).all())

    def shift(self, weights: np.ndarray, lack: np.ndarray, of_output: bool) -> np.ndarray:
        shifts = np.empty_like(weights)

        def some(row: int, end: int) -> None:
            shifts[row:end] = shift(weights[row:end], lack[row:end] if of_output else lack, of_output)

        each_part(self._pool, len(shifts), PANEL, some)
        return shifts

    def factor(self, hessian: np.ndarray) -> Factor:
        return Factor(hessian, self._pool)

    def solve(self, factor: Factor, b: np.ndarray) -> None:
        each_part(self._pool, len(b), PANEL, lambda row, end: factor.solve(b[row:end]))

    def quantize(self, target: np.ndarray, factor: Factor, bits: int) -> Codes:
        return quantize_matrix(target, factor, bits, self._pool)

    def dequantize(self, codes: Codes, bits: int) -> np.ndarray:
        return dequantize(codes.codes, codes.scales, bits)

    def square_sum(self, values: np.ndarray) -> float:
        """float64, a slab at a time."""
        parts = np.array_split(values.reshape(-1), 1 + values.size // 2**20)
        return sum(float(np.square(part, dtype=np.float64).sum()) for part in parts)


@contextmanager
def arithmetic_on(device: str, config: LlamaConfig, seq_len: int, n_threads: int) -> Iterator[Arithmetic]:
    """What the resolved `device` ("cpu", "cuda" or "torch-cpu") computes with, for sequences of `seq_len` tokens.

    ConvertError where its memory runs out meanwhile.
    """
    if device == "cpu":
        # Overflow is not warned of: `driver` looks at what comes of it.
        with threads(n_threads) as pool, np.errstate(over="ignore", invalid="ignore"):
            yield NumpyArithmetic(config, seq_len, pool)
        return
    from .torch_arithmetic import torch_arithmetic

    with torch_arithmetic(device, config, seq_len, n_threads) as arithmetic:
        yield arithmetic


def identity_of(device: str, n_threads: int) -> str:
    """Equal for arithmetic that gives equal bits: what unfinished work must have been done with to be gone on with."""
    if device == "cpu":
        return "numpy"
    from .torch_arithmetic import identity

    return identity(device, n_threads)
