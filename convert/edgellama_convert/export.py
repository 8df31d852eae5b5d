"""Writes an `.edgellama` model back as a Hugging Face folder of dequantized weights: everyone's independent check.

Knows: how transformers lays out safetensors, shards and their index. The weights are exactly what our kernels multiply
with: `(code - zero) * scale` in float32, then rounded once if another dtype is asked for. Streams row slabs, so memory
does not grow with the model. The folder appears whole, by one rename, or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edgellama.errors import ConvertError
from edgellama.format import FILE_NAMES, ModelFile, open_model
from edgellama.quant import ROW_BLOCK, dequantize, unpack_f16, unpack_int4, unpack_int8, unpack_scales

from .checkpoint import INDEX_FILE, SINGLE_FILE, row_slabs
from .names import source_name
from .report import ExportReport
from .source import CONFIG_FILE

DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
"""dtype -> safetensors' name, bytes of a weight."""
MAX_SHARD_BYTES = 4 << 30
_SLAB_WEIGHTS = 4 << 20


@dataclass(frozen=True)
class _Tensor:
    """One tensor to be written: Hugging Face's name, and the name and layout of what is stored."""

    name: str
    stored: str
    layout: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


def export_hf(
    model: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExportReport:
    """Write `model` as a folder that `AutoModelForCausalLM.from_pretrained` (of a classifier:
    `AutoModelForSequenceClassification`) and `AutoTokenizer` load.

    dtype: "float32" (exact), "float16" or "bfloat16". `directory` must not exist, or be empty. Raises FormatError for a
    damaged model, ConvertError for everything else; nothing is left behind then.
    """
    started = time.perf_counter()
    if dtype not in DTYPES:
        raise ConvertError(f"dtype {dtype!r} is unknown: it is one of {', '.join(DTYPES)}")
    target = Path(directory)
    _check_target(target)
    with open_model(model) as file:
        tensors, is_classifier = _tensors(file), file.config.is_classifier
        shards = _plan_shards(tensors, DTYPES[dtype][1], max_shard_bytes)
        total = sum(tensor.size for tensor in tensors) * DTYPES[dtype][1]
        free = shutil.disk_usage(target.parent).free
        if total > free:
            raise ConvertError(f"{target.parent}: {total >> 20} MiB are needed, {free >> 20} MiB are free")
        try:
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
            try:
                temporary.chmod(0o777 & ~_umask())
                _write_folder(temporary, file, shards, dtype, total)
                _rename(temporary, target)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        except OSError as error:
            raise ConvertError(f"cannot write {target}: {error.strerror or error}") from None
    weights = sum(tensor.size for tensor in tensors)
    nbytes = sum(entry.stat().st_size for entry in target.iterdir())
    auto_class = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"
    return ExportReport(target, auto_class, dtype, len(shards), weights, nbytes, time.perf_counter() - started)


def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ConvertError(f"{target} exists and is not a folder; choose another name")
    if target.is_dir() and any(target.iterdir()):
        raise ConvertError(f"the folder {target} is not empty; choose another name, or empty it first")
    if not target.parent.is_dir():
        raise ConvertError(f"the folder {target.parent} does not exist; create it first")


def _tensors(file: ModelFile) -> list[_Tensor]:
    """Everything that Hugging Face has a name for; scales go with their codes. A tied lm_head is not stored there."""
    return [
        _Tensor(source_name(name), name, entry.layout, tuple(entry.shape))
        for name, entry in file.tensors.items()
        if entry.layout != "scales.g128"
    ]


def _plan_shards(tensors: list[_Tensor], itemsize: int, max_bytes: int) -> dict[str, list[_Tensor]]:
    """File name -> its tensors; a file is larger than `max_bytes` only if a single tensor is."""
    groups: list[list[_Tensor]] = [[]]
    room = max_bytes
    for tensor in tensors:
        nbytes = tensor.size * itemsize
        if groups[-1] and nbytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(tensor)
        room -= nbytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def _write_folder(folder: Path, file: ModelFile, shards: dict[str, list[_Tensor]], dtype: str, total: int) -> None:
    for name, tensors in shards.items():
        with open(folder / name, "xb") as out:
            _write_shard(out, file, tensors, dtype)
            out.flush()
            os.fsync(out.fileno())
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = dict(file.config.raw)
    for key in [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]:
        config[key] = dtype
    _write_json(folder / CONFIG_FILE, config)
    for name in FILE_NAMES:  # only these: a name from the file could lead out of the folder
        if name in file.files:
            (folder / name).write_bytes(file.files[name])


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def _write_shard(out: BinaryIO, file: ModelFile, tensors: list[_Tensor], dtype: str) -> None:
    code, itemsize = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.size * itemsize
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        for values in _float32_slabs(file, tensor):
            out.write(_cast(values, dtype, tensor.name).data)


def _float32_slabs(file: ModelFile, tensor: _Tensor) -> Iterator[np.ndarray]:
    """The tensor's values in order, float32[rows, in_features] at a time."""
    stored = file.array(tensor.stored)
    if tensor.layout == "f32":
        yield stored
        return
    out_features, in_features = tensor.shape
    scales = None
    if tensor.layout in ("int4.g128", "int8.g128"):
        scales = file.array(tensor.stored.removesuffix(".qweight") + ".scales")
    for first, last in row_slabs(out_features, max(1, _SLAB_WEIGHTS // (ROW_BLOCK * in_features)) * ROW_BLOCK):
        rows = last - first
        if tensor.layout == "f16":
            yield stored[first:last].astype(np.float32)
            continue
        blocks = slice(first // ROW_BLOCK, -(-last // ROW_BLOCK))
        if scales is None:
            yield unpack_f16(stored[blocks], rows, in_features).astype(np.float32)
            continue
        bits, unpack = (4, unpack_int4) if tensor.layout == "int4.g128" else (8, unpack_int8)
        yield dequantize(unpack(stored[blocks], rows, in_features), unpack_scales(scales[blocks], rows), bits)


def _cast(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Contiguous little-endian float32 values in `dtype`, rounded to nearest, ties to even."""
    values = np.ascontiguousarray(values, "<f4")
    if dtype == "float32":
        return values
    if dtype == "bfloat16":
        bits = values.view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        raise ConvertError(f"tensor {name} has values too large for float16; export it as float32 or bfloat16")
    return halves


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _rename(temporary: Path, target: Path) -> None:
    """Put the finished folder in place; `target` is absent or an empty folder."""
    if target.is_dir():
        target.rmdir()  # fails if something appeared in it meanwhile
    temporary.rename(target)
    if os.name == "posix":
        parent = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
