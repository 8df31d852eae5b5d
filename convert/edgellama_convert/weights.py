"""Weights as float32, rows at a time, from a checkpoint, a model file, or a file that is still being written.

One interface over the three, so that a forward pass need not know whose weights it computes with. Names are the model
file's without suffixes: "model.layers.0.self_attn.q_proj". Reading is the caller's thread's; `Rows` can be turned into
float32 by any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import numpy as np

from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.format import ModelFile, ModelWriter, TensorSpec, model_tensors
from edgellama.quant import GROUP_SIZE, ROW_BLOCK

from .checkpoint import STORED, Checkpoint, to_float32
from .float_kernels import row_buffer, unpack
from .names import Plan, plan_tensors

Rows = Callable[[int, int], np.ndarray]
"""(first, last) of the rows that were read -> float32 [last - first, in]; `first` is a multiple of 16."""


class Weights(Protocol):
    """What a forward pass asks for."""

    config: LlamaConfig

    def shape(self, name: str) -> tuple[int, ...]:
        """[out, in] of a matrix."""
        ...

    def rows(self, name: str, first: int, last: int) -> Rows:
        """Read rows of a matrix; `first` is a multiple of 16."""
        ...

    def vector(self, name: str) -> np.ndarray | None:
        """float32 [n] of a norm ("....weight") or a bias ("....bias"); None for a bias that the model has not."""
        ...


class CheckpointWeights:
    """The weights of a Hugging Face checkpoint; ConvertError names a tensor that the config demands but is missing."""

    def __init__(self, config: LlamaConfig, checkpoint: Checkpoint, plan: Plan | None = None):
        self.config, self._checkpoint = config, checkpoint
        plan = plan or plan_tensors(config, model_tensors(config, 16), checkpoint.tensors)
        self._tensors = {tensor.name: tensor for tensor in plan.sources.values()}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[f"{name}.weight"].shape

    def rows(self, name: str, first: int, last: int) -> Rows:
        tensor = self._tensors[f"{name}.weight"]
        raw = np.empty((last - first, tensor.shape[1]), STORED[tensor.dtype])
        self._checkpoint.read_rows(tensor, first, raw)

        def convert(start: int, stop: int) -> np.ndarray:
            out = row_buffer(stop - start, raw.shape[1])
            to_float32(raw[start:stop], out)
            return out

        return convert

    def vector(self, name: str) -> np.ndarray | None:
        tensor = self._tensors.get(name)
        return None if tensor is None else self._checkpoint.read(tensor)


Stored = Callable[[str, int, int], np.ndarray]
"""(name, first, last) -> those entries of the first axis of a tensor as the file stores it."""


class StoredWeights:
    """The weights of an `.edgellama` file, dequantized."""

    def __init__(self, config: LlamaConfig, specs: Mapping[str, TensorSpec], stored: Stored):
        self.config, self._specs, self._stored = config, specs, stored

    @classmethod
    def of_file(cls, file: ModelFile) -> StoredWeights:
        specs = {entry.name: TensorSpec(entry.name, entry.layout, entry.shape) for entry in file.tensors.values()}
        return cls(file.config, specs, lambda name, first, last: file.array(name)[first:last])

    @classmethod
    def of_writer(cls, writer: ModelWriter) -> StoredWeights:
        """Of a file whose tensors have been written, before it is finished."""
        return cls(writer.config, {spec.name: spec for spec in writer.specs}, writer.read)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._specs[self._matrix(name)].shape

    def _matrix(self, name: str) -> str:
        return f"{name}.qweight" if f"{name}.qweight" in self._specs else f"{name}.weight"

    def rows(self, name: str, first: int, last: int) -> Rows:
        spec = self._specs[self._matrix(name)]
        if spec.layout == "f16":
            return partial(_plain, self._stored(spec.name, first, last))
        blocks = first // ROW_BLOCK, -(-last // ROW_BLOCK)
        stored = self._stored(spec.name, *blocks)
        if spec.layout == "f16.r16":
            return partial(_blocked, stored, spec.shape[1])
        return partial(_quantized, stored, self._stored(f"{name}.scales", *blocks), spec.shape[1])

    def vector(self, name: str) -> np.ndarray | None:
        spec = self._specs.get(name)
        return None if spec is None else np.array(self._stored(name, 0, spec.shape[0]))


def _plain(halves: np.ndarray, start: int, stop: int) -> np.ndarray:
    """`Rows` of the f16 layout."""
    out = row_buffer(stop - start, halves.shape[1])
    out[...] = halves[start:stop]
    return out


def _blocked(stored: np.ndarray, in_features: int, start: int, stop: int) -> np.ndarray:
    """`Rows` of the f16.r16 layout."""
    out = row_buffer(stop - start, in_features)
    blocks = stored[start // ROW_BLOCK : -(-stop // ROW_BLOCK), :in_features]
    out[...] = blocks.transpose(0, 2, 1).reshape(-1, in_features)[: stop - start]
    return out


def _quantized(packed: np.ndarray, scales: np.ndarray, in_features: int, start: int, stop: int) -> np.ndarray:
    """`Rows` of the int4.g128 and int8.g128 layouts."""
    blocks = slice(start // ROW_BLOCK, -(-stop // ROW_BLOCK))
    out = row_buffer(packed[blocks].shape[0] * ROW_BLOCK, packed.shape[1] * GROUP_SIZE)
    unpack(packed[blocks], scales[blocks], out)
    return out[: stop - start, :in_features]


def check_same_model(a: LlamaConfig, b: LlamaConfig, what_a: str, what_b: str) -> None:
    """ConvertError if two configs do not have the same matrices, so that nothing can be compared."""
    keys = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
        head_dim tie_word_embeddings attention_bias mlp_bias architecture"""
    for key in keys.split():
        if getattr(a, key) != getattr(b, key):
            raise ConvertError(
                f"{what_a} and {what_b} are not the same model: {key} is {getattr(a, key)} and {getattr(b, key)}"
            )
