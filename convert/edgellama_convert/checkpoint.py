"""Reads tensors of a safetensors checkpoint, single or sharded, rows at a time, with plain reads into given buffers.

The files are untrusted: every name, dtype, shape and offset of a header is checked against the file's size before a
byte of data is read, and an index may only name files of its own folder. Reads go through `readinto`, never a memory
map: the source's pages never count as this process's memory, and a file cut meanwhile is an error, not a crash.

Does not know what the tensors mean. Every failure is a ConvertError that names the file and the tensor.

A file's hash here is xxh3-128 over its header (with the length) followed by the xxh3-128 digests of its tensors in
file order, so that tensors can be hashed as they are read, in any order, and every byte is read once.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from edgellama.errors import ConvertError, FormatError
from edgellama.format.strict_json import parse_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 16 << 20
"""A 405B model in one file has a header of 200 KB."""
MAX_INDEX_BYTES = 16 << 20
MAX_SHARDS = 10_000
_MAX_DIMENSIONS = 8
_READ_BYTES = 8 << 20

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Size of every dtype that safetensors knows."""

STORED: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""The dtypes that can be converted, and how their raw values are read (bfloat16 as its bits)."""


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the checkpoint. `begin` is the absolute offset of its data in the file `file`."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def to_float32(raw: np.ndarray, out: np.ndarray) -> None:
    """Exact values of raw elements (any dtype of `STORED`) into the float32 array `out` of the same shape."""
    if raw.dtype == STORED["BF16"]:
        np.left_shift(raw, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, raw)


class SafetensorsFile:
    """One open safetensors file with a validated header.

    `tensors` maps names to `SourceTensor`s, in file order.
    """

    def __init__(self, path: Path):
        self.name = path.name
        self._file = _open_regular(path)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            header = self._read_header()
            self.tensors = self._validate(header)
        except BaseException:
            self._file.close()
            raise
        self._hashes: dict[str, bytes] = {}

    def _fail(self, problem: str) -> ConvertError:
        return ConvertError(f"{self.name}: {problem}; the file is damaged, or not a safetensors file")

    def _read_header(self) -> dict[str, object]:
        prefix = self._file.read(8)
        if len(prefix) < 8:
            raise self._fail(f"only {self.size} bytes long")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES or 8 + length > self.size:
            raise self._fail(
                f"declares a header of {length} bytes, the file has {self.size} (limit {MAX_HEADER_BYTES})"
            )
        data = self._file.read(length)
        if len(data) != length:
            raise self._fail("ends inside its header")
        self._header_bytes = prefix + data
        try:
            return parse_object(data.rstrip(b" "), "header", 8)
        except FormatError as error:
            raise self._fail(str(error)) from None

    def _validate(self, header: dict[str, object]) -> dict[str, SourceTensor]:
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._fail("__metadata__ is not a map of strings")
        base = len(self._header_bytes)
        found = [self._entry(name, entry, base) for name, entry in header.items()]
        found.sort(key=lambda tensor: (tensor.begin, tensor.nbytes))
        position = base
        for tensor in found:
            if tensor.begin != position:
                kind = "overlaps the tensor before it" if tensor.begin < position else "leaves a hole before it"
                raise self._fail(f"tensor {_quote(tensor.name)} {kind} (starts at byte {tensor.begin}, not {position})")
            position += tensor.nbytes
        if position != self.size:
            raise self._fail(f"its tensors end at byte {position}, the file at {self.size}")
        return {tensor.name: tensor for tensor in found}

    def _entry(self, name: str, entry: object, base: int) -> SourceTensor:
        what = f"tensor {_quote(name)}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._fail(f"{what}: needs exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise self._fail(f"{what}: unknown dtype {_quote(dtype)}")
        if not _sizes(shape) or len(shape) > _MAX_DIMENSIONS:
            raise self._fail(f"{what}: shape {_quote(shape)} is not a list of sizes")
        if not _sizes(offsets) or len(offsets) != 2:
            raise self._fail(f"{what}: data_offsets {_quote(offsets)} is not a pair of offsets")
        begin, end = offsets
        bits = math.prod(shape) * _BITS[dtype]
        if begin > end or base + end > self.size:
            raise self._fail(f"{what}: data_offsets {offsets} lie outside the file of {self.size} bytes")
        if bits != 8 * (end - begin):
            raise self._fail(f"{what}: {dtype} {shape} does not take the {end - begin} bytes of its data_offsets")
        return SourceTensor(name, self.name, dtype, tuple(shape), base + begin, end - begin)

    def read_into(self, tensor: SourceTensor, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from byte `start` of its data on."""
        assert start + len(buffer) <= tensor.nbytes
        try:
            self._file.seek(tensor.begin + start)
            done = 0
            while done < len(buffer):
                n = self._file.readinto(buffer[done:])
                if not n:
                    raise ConvertError(f"{self.name}: ended inside tensor {_quote(tensor.name)}; was it cut meanwhile?")
                done += n
        except OSError as error:
            raise ConvertError(f"{self.name}: cannot read tensor {_quote(tensor.name)}: {error.strerror}") from None

    def identity(self) -> list[object]:
        """JSON values that change when the file does, without reading it: header, size, time of the last change."""
        return [xxhash.xxh3_128_hexdigest(self._header_bytes), self.size, os.fstat(self._file.fileno()).st_mtime_ns]

    def set_hash(self, name: str, digest: bytes) -> None:
        self._hashes[name] = digest

    def digest(self) -> str:
        """Hexadecimal xxh3-128 of the whole file as the module describes; reads what was not hashed before."""
        whole = xxhash.xxh3_128(self._header_bytes)
        for name, tensor in self.tensors.items():
            if name not in self._hashes:
                self._hashes[name] = self._hash(tensor)
            whole.update(self._hashes[name])
        return whole.hexdigest()

    def _hash(self, tensor: SourceTensor) -> bytes:
        hasher = xxhash.xxh3_128()
        buffer = memoryview(bytearray(min(_READ_BYTES, tensor.nbytes)))
        for start in range(0, tensor.nbytes, _READ_BYTES):
            part = buffer[: min(_READ_BYTES, tensor.nbytes - start)]
            self.read_into(tensor, start, part)
            hasher.update(part)
        return hasher.digest()

    def close(self) -> None:
        self._file.close()


class Checkpoint:
    """The tensors of a folder's `model.safetensors`, or of the shards its index names. A context manager."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, SafetensorsFile] = {}
        try:
            weight_map = read_index(folder) if (folder / INDEX_FILE).exists() else None
            for name in shard_names(weight_map) if weight_map is not None else [SINGLE_FILE]:
                if not (folder / name).exists():
                    raise ConvertError(f"{INDEX_FILE} names the shard {name}, which is missing: download it again")
                self.files[name] = SafetensorsFile(folder / name)
            self.tensors = self._merge(weight_map)
        except BaseException:
            self.close()
            raise
        self._hashers: dict[str, tuple[int, xxhash.xxh3_128]] = {}

    def _merge(self, weight_map: Mapping[str, str] | None) -> dict[str, SourceTensor]:
        tensors: dict[str, SourceTensor] = {}
        for file in self.files.values():
            for name, tensor in file.tensors.items():
                if name in tensors:
                    raise ConvertError(f"tensor {_quote(name)} is in both {tensors[name].file} and {file.name}")
                tensors[name] = tensor
        for name, shard in (weight_map or {}).items():
            if name not in tensors or tensors[name].file != shard:
                raise ConvertError(f"{INDEX_FILE}: tensor {_quote(name)} is not in {shard}, where the index has it")
        return tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def read_rows(self, tensor: SourceTensor, first: int, raw: np.ndarray) -> None:
        """Fill `raw`, contiguous, of a dtype of `STORED`, with whole rows of `tensor`, from row `first` on.

        A tensor is hashed by the way if its rows are read in order from the first to the last.
        """
        row_bytes = tensor.nbytes // tensor.shape[0] if tensor.shape[0] else 0
        start = first * row_bytes
        data = raw.reshape(-1).view(np.uint8).data
        file = self.files[tensor.file]
        file.read_into(tensor, start, data)
        position, hasher = self._hashers.get(tensor.name, (0, None)) if start else (0, None)
        if position != start:
            return
        hasher = hasher or xxhash.xxh3_128()
        hasher.update(data)
        self._hashers[tensor.name] = (start + len(data), hasher)
        if start + len(data) == tensor.nbytes:
            file.set_hash(tensor.name, hasher.digest())
            del self._hashers[tensor.name]

    def read(self, tensor: SourceTensor, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows first..last-1 of a tensor, by default a small one whole, as float32."""
        shape = ((tensor.shape[0] if last is None else last) - first, *tensor.shape[1:])
        raw = np.empty(shape, STORED[tensor.dtype])
        self.read_rows(tensor, first, raw)
        values = np.empty(shape, np.float32)
        to_float32(raw, values)
        return values

    def look_up(self, tensor: SourceTensor, ids: np.ndarray) -> np.ndarray:
        """float32 [n, width]: rows of an embedding for int [n], each distinct one read once."""
        distinct, places = np.unique(ids, return_inverse=True)
        rows = np.empty((len(distinct), tensor.shape[1]), np.float32)
        for i, row in enumerate(distinct.tolist()):
            rows[i] = self.read(tensor, row, row + 1)
        return rows[places]

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_index(folder: Path) -> dict[str, str]:
    """The `weight_map` of the folder's index: tensor name -> file name, every file name proven to be a plain one."""
    data = read_small(folder / INDEX_FILE, MAX_INDEX_BYTES)
    try:
        index = parse_object(data, INDEX_FILE, 0)
    except FormatError as error:
        raise ConvertError(f"{error}; download the checkpoint again") from None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{INDEX_FILE}: has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _PLAIN_FILE.fullmatch(shard):
            raise ConvertError(
                f"{INDEX_FILE}: tensor {_quote(name)} is said to be in {_quote(shard)}; "
                "shards must be .safetensors files of the same folder"
            )
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise ConvertError(f"{INDEX_FILE}: names more than {MAX_SHARDS} shards")
    return weight_map


# No separators, no drive letters, no leading dot: such a name cannot leave its folder on any system.
_PLAIN_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors")


def shard_names(weight_map: Mapping[str, str]) -> list[str]:
    """The shards of a `weight_map`, sorted, each once."""
    return sorted(set(weight_map.values()))


def read_small(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes."""
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ConvertError(f"{path.name}: {size} bytes, more than the {limit} that such a file may have")
        data = bytearray()
        while part := file.read(limit + 1 - len(data)):
            data += part
        if len(data) > limit:
            raise ConvertError(f"{path.name}: grew beyond {limit} bytes while it was read")
        return bytes(data)


def row_slabs(n_rows: int, rows: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of slabs of `rows` rows that cover `n_rows`."""
    for first in range(0, n_rows, rows):
        yield first, min(first + rows, n_rows)


def _open_regular(path: Path) -> io.FileIO:
    """Open for unbuffered reading; a folder, a pipe or a device is refused before it can block."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConvertError(f"{path.name}: not a regular file")
        file = open(path, "rb", buffering=0)  # noqa: SIM115 (the caller's to close)
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror}") from None
    return file


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**62 for item in value)


def _quote(value: object) -> str:
    """`value` for a message: on one line, printable, not longer than 100 characters."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
