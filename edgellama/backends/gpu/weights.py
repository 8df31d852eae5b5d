"""A model's weights on a torch device: the file's bytes as they are, and matrix products with them.

On a GPU the whole data region of the file is one allocation, filled from the map through two pinned buffers; every
tensor is a view of it, at the file's own offset, so matrices that lie side by side in the file do so here. On the CPU
the tensors are views of the map itself. Nothing is repacked. Knows layouts by bits, not layers or attention.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ...format import ModelFile
from . import dense as layouts

STAGE_BYTES = 32 << 20
"""One pinned buffer: large enough for the bus, small enough to be copied and sent in turns."""
COPY_THREADS = 4
SCRATCH_BYTES = 128 << 20
"""What a dequantized matrix may take on a GPU; a larger one is multiplied in pieces of its outputs."""
KEEP_BYTES = 2 << 30
"""Models up to this size stay dequantized on the CPU; of larger ones each matrix is anew when it is needed."""
_BITS = {"int4.g128": 4, "int8.g128": 8, "f16.r16": 16}
_DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Matrix:
    """A linear layer as stored. codes: uint8 [B, G, 1024 or 2048] or float16 [B, K, 16]; scales: float16 [B, G, 16]."""

    name: str
    bits: int
    out_features: int
    in_features: int
    codes: torch.Tensor
    scales: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def blocks(self) -> int:
        """Blocks of 16 rows."""
        return self.codes.shape[0]

    @property
    def groups(self) -> int:
        """Groups of 128 inputs."""
        return self.codes.shape[1] if self.bits != 16 else self.codes.shape[1] // 128


Dequantize = Callable[[torch.Tensor, torch.Tensor | None, int, torch.Tensor], torch.Tensor]


class Weights:
    """Every tensor of an open model file on `device`.

    `dtype` is what `matmul` computes in; `dequantize` replaces `dense.dense` by something faster with equal results.
    """

    def __init__(
        self, file: ModelFile, device: torch.device, dtype: torch.dtype, dequantize: Dequantize = layouts.dense
    ):
        self.device, self.dtype = device, dtype
        self._tensors = upload(file, device) if device.type == "cuda" else views(file)
        self._layouts = {name: entry.layout for name, entry in file.tensors.items()}
        self._shapes = {name: entry.shape for name, entry in file.tensors.items()}
        self._dequantize = dequantize
        size = sum(4 * math.prod(shape) for shape in self._shapes.values())
        self._kept: dict[tuple[str, torch.dtype], torch.Tensor] | None = {} if _keep(device, size) else None
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)
        self.head = self.matrix(file.config.head)
        self.tied = file.config.tie_word_embeddings

    def vector(self, name: str) -> torch.Tensor:
        """A norm's weight, float32 [n]."""
        return self._tensors[name]

    def matrix(self, name: str) -> Matrix:
        """A linear layer by its name without suffix."""
        stored = f"{name}.qweight" if f"{name}.qweight" in self._tensors else f"{name}.weight"
        out_features, in_features = self._shapes[stored]
        return Matrix(
            name,
            _BITS[self._layouts[stored]],
            out_features,
            in_features,
            self._tensors[stored],
            self._tensors.get(f"{name}.scales"),
            self._tensors.get(f"{name}.bias"),
        )

    @property
    def embedding(self) -> torch.Tensor | None:
        """The untied embedding, float16 [vocab_size, hidden_size]; None where it is the head's matrix."""
        return None if self.tied else self._tensors["model.embed_tokens.weight"]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [T] -> float32 [T, hidden_size]"""
        if self.embedding is not None:
            return self.embedding[tokens].to(torch.float32)
        head = self.head
        return layouts.rows(head.codes, head.scales, head.bits, tokens)[:, : head.in_features]

    def linear(self, x: torch.Tensor, matrix: Matrix, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[T, in] -> [T, out] in `dtype` (default: the one of this object), bias included."""
        dtype = dtype or self.dtype
        x = x.to(dtype)
        parts = [x @ weights for weights in self._dense(matrix, dtype)]
        y = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))[:, : matrix.out_features]
        return y if matrix.bias is None else y + matrix.bias.to(dtype)

    def _dense(self, matrix: Matrix, dtype: torch.dtype):
        """The weights as [in, N] in pieces of N, each good until the next one is asked for."""
        if self._kept is not None:
            if (matrix.name, dtype) not in self._kept:
                whole = torch.empty(matrix.groups * 128, matrix.blocks * 16, dtype=dtype, device=self.device)
                self._kept[matrix.name, dtype] = self._dequantize(matrix.codes, matrix.scales, matrix.bits, whole)
            yield self._kept[matrix.name, dtype][: matrix.in_features]
            return
        inputs, size = matrix.groups * 128, dtype.itemsize
        step = max(1, SCRATCH_BYTES // (inputs * 16 * size))
        for first in range(0, matrix.blocks, step):
            codes = matrix.codes[first : first + step]
            scales = None if matrix.scales is None else matrix.scales[first : first + step]
            piece = self._scratch_of(inputs * len(codes) * 16 * size).view(dtype).view(inputs, len(codes) * 16)
            yield self._dequantize(codes, scales, matrix.bits, piece)[: matrix.in_features]

    def _scratch_of(self, nbytes: int) -> torch.Tensor:
        if self._scratch.numel() < nbytes:
            self._scratch = torch.empty(0, dtype=torch.uint8, device=self.device)  # the old one goes first
            self._scratch = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return self._scratch[:nbytes]


def _keep(device: torch.device, float32_bytes: int) -> bool:
    return device.type == "cpu" and float32_bytes <= KEEP_BYTES


def views(file: ModelFile) -> dict[str, torch.Tensor]:
    """The file's tensors as stored, views of its map, which lives as long as they do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {name: torch.from_numpy(file.array(name)) for name in file.tensors}


def upload(file: ModelFile, device: torch.device) -> dict[str, torch.Tensor]:
    """The file's tensors as stored, views of one copy on the GPU."""
    entries = list(file.tensors.values())
    begin, end = entries[0].offset, entries[-1].offset + entries[-1].nbytes
    data = torch.empty(end - begin, dtype=torch.uint8, device=device)
    tensors = {}
    with _Stage(device) as stage:
        for entry in entries:
            stored = file.array(entry.name)
            target = data[entry.offset - begin : entry.offset - begin + entry.nbytes]
            stage.copy(stored.reshape(-1).view(np.uint8), target)
            tensors[entry.name] = target.view(_DTYPES[stored.dtype.name]).view(stored.shape)
    return tensors


class _Stage:
    """Copies from pageable memory to the GPU: one pinned buffer is filled while the other one is sent."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.current_stream(device)
        self._buffers = [torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._sent = [torch.cuda.Event() for _ in range(2)]
        self._turn = 0
        self._pool = ThreadPoolExecutor(COPY_THREADS)

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stream.synchronize()  # the buffers are in use until then
        self._pool.shutdown()

    def copy(self, source: np.ndarray, target: torch.Tensor) -> None:
        """uint8 [n] each."""
        for start in range(0, source.size, STAGE_BYTES):
            piece = source[start : start + STAGE_BYTES]
            buffer, sent = self._buffers[self._turn], self._sent[self._turn]
            self._turn ^= 1
            sent.synchronize()  # returns at once where nothing was recorded
            self._fill(buffer[: piece.size].numpy(), piece)
            target[start : start + piece.size].copy_(buffer[: piece.size], non_blocking=True)
            sent.record(self._stream)

    def _fill(self, target: np.ndarray, source: np.ndarray) -> None:
        """Pages of the map are faulted in and copied by several threads: NumPy leaves the GIL meanwhile."""
        step = max(1 << 20, -(-source.size // COPY_THREADS))
        spans = [slice(start, start + step) for start in range(0, source.size, step)]
        list(self._pool.map(lambda span: np.copyto(target[span], source[span]), spans))
