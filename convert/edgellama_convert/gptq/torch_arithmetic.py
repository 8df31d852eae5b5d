"""`Arithmetic` in torch on one device: what `torch_layer` and `torch_solve` compute, and the state of torch around it.

torch's settings belong to whoever uses the process: what is changed here is put back. Products are true float32: TF32,
which some users turn on, keeps 10 bits of each factor; a Hessian rounded so is no longer positive, or its factor wrong,
beyond what its damping covers.

Every operation used here has one fixed order of sums for given shapes (no atomic additions, one stream): the same
input gives the same bits on the same GPU and torch. torch.use_deterministic_algorithms is not needed for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError

from . import torch_solve
from .torch_layer import TorchLayerMath
from .work import Stream


class TorchArithmetic(TorchLayerMath):
    """See `arithmetic.Arithmetic`."""

    def array(self, values: np.ndarray) -> torch.Tensor:
        # A copy on the CPU, too: torch aligns what it makes, and a product's bits may depend on that.
        return torch.from_numpy(values).to(self.device, copy=True)

    def numpy(self, values: torch.Tensor) -> np.ndarray:
        return values.cpu().numpy()

    def stream(self, stream: Stream) -> TorchStream:
        return TorchStream(self, stream)

    def moments(self, in_features: int, lacking: int) -> torch_solve.Moments:
        return torch_solve.Moments.zeros(in_features, lacking, self.device)

    def count(self, moments: torch_solve.Moments, x: torch.Tensor, lacks: torch.Tensor) -> None:
        moments.add(x, lacks)

    def is_finite(self, moments: torch_solve.Moments) -> bool:
        return bool(moments.hessian.diagonal().isfinite().all() & moments.lack.isfinite().all())

    def shift(self, weights: torch.Tensor, lack: torch.Tensor, of_output: bool) -> torch.Tensor:
        return torch_solve.shift(weights, lack, of_output)

    def factor(self, hessian: torch.Tensor) -> torch_solve.Factor:
        return torch_solve.Factor(hessian)

    def solve(self, factor: torch_solve.Factor, b: torch.Tensor) -> None:
        factor.solve(b)

    def quantize(self, target: torch.Tensor, factor: torch_solve.Factor, bits: int) -> torch_solve.Codes:
        return torch_solve.quantize_matrix(target, factor, bits)

    def dequantize(self, codes: torch_solve.Codes, bits: int) -> torch.Tensor:
        return torch_solve.dequantize(codes, bits)

    def square_sum(self, values: torch.Tensor) -> float:
        """float64, a slab at a time."""
        return sum(float(part.double().square_().sum()) for part in values.reshape(-1).split(1 << 22))


class TorchStream:
    """A `Stream` whose rows are tensors."""

    def __init__(self, arithmetic: TorchArithmetic, stream: Stream):
        self._arithmetic, self._stream = arithmetic, stream

    def read(self, first: int, last: int) -> torch.Tensor:
        return self._arithmetic.array(self._stream.read(first, last))

    def write(self, first: int, rows: torch.Tensor) -> None:
        self._stream.write(first, self._arithmetic.numpy(rows))

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def torch_arithmetic(device: str, config: LlamaConfig, seq_len: int, n_threads: int) -> Iterator[TorchArithmetic]:
    """For "cuda" or "torch-cpu"; the memory that torch keeps for later is given back at the end."""
    place = _place(device)
    with ExitStack() as stack:
        stack.enter_context(_one_line_errors())
        stack.enter_context(torch.no_grad())
        stack.enter_context(_full_precision())
        if place.type == "cuda":
            stack.enter_context(torch.cuda.device(place))
            stack.callback(torch.cuda.empty_cache)
        else:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(n_threads)
        yield TorchArithmetic(config, seq_len, place)


def identity(device: str, n_threads: int) -> str:
    """See `arithmetic.identity_of`: a CPU's products are divided by its threads."""
    place = _place(device)
    where = torch.cuda.get_device_name(place) if place.type == "cuda" else f"the CPU, {n_threads} threads"
    return f"torch {torch.__version__} on {where}"


def _place(device: str) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")


@contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products of float32 numbers, whatever the process has been set to."""
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    if not all(hasattr(each, "fp32_precision") for each in backends):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    precisions = [each.fp32_precision for each in backends]
    for each in backends:
        each.fp32_precision = "ieee"
    try:
        yield
    finally:
        for each, precision in zip(backends, precisions, strict=True):
            each.fp32_precision = precision


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What torch says of its device in many lines."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ConvertError(
            "not enough memory on the GPU for calibrating; free some and give the same command, which goes on where "
            "this one ended, or begin anew with --device cpu"
        ) from None
    except RuntimeError as error:
        first = str(error).strip().split("\n")[0]
        if "DefaultCPUAllocator" in first:
            raise ConvertError(f"not enough memory for calibrating with torch ({first})") from None
        if not first.startswith(("CUDA error", "cuda runtime error")) and "CUBLAS_STATUS" not in first:
            raise
        raise ConvertError(
            f"the GPU failed ({first}); the same command goes on where this one ended, --device cpu begins anew"
        ) from None
