"""Write a `.edgellama` file so that the destination is the old file (or none) or the new one, never anything else.

Knows the order of steps that makes this so (FORMAT.md section 7); `storage.py` makes the system calls. Does not
quantize.

    temporary file beside the destination -> tensor data -> metadata and trailer -> header -> prologue
    -> validate -> fsync -> rename over -> fsync the folder

>>> with ModelWriter("tiny.edgellama", config, lm_head_bits=8, method="rtn") as writer:
...     for spec in writer.specs:
...         writer.write(spec.name, tensors[spec.name])
...     writer.finish(files={}, provenance={})
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from ..config import LlamaConfig
from ..errors import EdgellamaError, FormatError
from . import storage, strict_json
from .container import (
    DATA_ALIGNMENT,
    MAGIC,
    MAX_JSON,
    PROLOGUE_SIZE,
    TENSOR_ALIGNMENT,
    Prologue,
    align,
    hash128,
)
from .layout import GROUP_SIZE, LAYOUTS, ROW_BLOCK
from .metadata import build_section, check_names
from .reader import FileSource
from .schema import LM_HEAD_BITS, TensorSpec, model_tensors
from .validate import SCHEME, TensorEntry, validate

Data = bytes | bytearray | memoryview | np.ndarray

_NO_HASH = "0" * 32
_STALE_SECONDS = 3600


class ModelWriter:
    """Writes one file; a context manager that leaves the destination as it was unless `finish()` returned.

    The same arguments and data give the same bytes. `raw_config` is the checkpoint's config.json, stored verbatim;
    `extra` are further JSON values for the header's `quantization`. EdgellamaError if the destination exists and is not
    an `.edgellama` file, if its folder is missing, or if the disk has not enough room.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        raw_config: Mapping[str, Any],
        *,
        lm_head_bits: int = 8,
        method: str,
        **extra: Any,
    ):
        self.path = Path(path)
        if lm_head_bits not in LM_HEAD_BITS:
            raise EdgellamaError(f"lm_head_bits must be 4, 8 or 16, got {lm_head_bits!r}")
        self.config = LlamaConfig.from_dict(raw_config)
        self.specs: list[TensorSpec] = model_tensors(self.config, lm_head_bits)
        """What to write, in this order."""
        self._header: dict[str, Any] = {
            "required_features": [],
            "quantization": {
                "scheme": SCHEME,
                "group_size": GROUP_SIZE,
                "row_block": ROW_BLOCK,
                "method": method,
                "lm_head_bits": lm_head_bits,
                **extra,
            },
            "config": dict(raw_config),
        }
        self._offsets, self._data_length = _tile(self.specs)
        self._hashes: list[str] = []
        header = self._header_json()
        if len(header) > MAX_JSON:
            raise FormatError("header", None, f"{len(header)} bytes of config and tensor list, at most {MAX_JSON}")
        self._header_length = len(header)  # hashes have a fixed length, so this does not change
        self._data_offset = align(PROLOGUE_SIZE + len(header), DATA_ALIGNMENT)
        self._destination = Path(os.path.realpath(self.path))  # a symbolic link stays, its target is replaced
        self._fd = -1
        self._temp: Path | None = None
        try:
            self._start()
        except BaseException as error:
            self.abort()
            raise self._explain(error) from None

    @property
    def file_size(self) -> int:
        """Bytes of the file without its metadata."""
        return self._data_offset + self._data_length

    def write(self, name: str, data: Data | Iterable[Data]) -> TensorEntry:
        """Write the next tensor: its stored bytes, whole or in pieces. Arrays must have the layout's dtype.

        The order is that of `specs`. ValueError for a wrong name, dtype or size: the caller's bug.
        """
        spec = self._next_spec(name)
        layout = LAYOUTS[spec.layout]
        nbytes = layout.nbytes(spec.shape)
        offset = self._data_offset + self._offsets[len(self._hashes)]
        pieces = [data] if isinstance(data, (bytes, bytearray, memoryview, np.ndarray)) else data
        hasher, written = xxhash.xxh3_128(), 0
        try:
            storage.seek(self._fd, offset)  # the gap before it stays a hole, which reads as zeros
            for piece in pieces:
                raw = _raw(piece, layout.dtype, name)
                written += len(raw)
                if written > nbytes:
                    break
                hasher.update(raw)
                storage.write_all(self._fd, raw)
        except BaseException as error:
            self.abort()
            raise self._explain(error) from None
        if written != nbytes:
            self.abort()
            raise ValueError(f"{name}: {spec.layout} {spec.shape} has {nbytes} bytes, got {written}")
        self._hashes.append(hasher.hexdigest())
        return TensorEntry(spec.name, spec.layout, spec.shape, offset, nbytes, self._hashes[-1])

    def finish(
        self, files: Mapping[str, bytes], provenance: Mapping[str, Any], receipt: Mapping[str, Any] | None = None
    ) -> Path:
        """Write metadata and header, check the file as a reader would, and rename it over the destination."""
        if len(self._hashes) != len(self.specs):
            missing = self.specs[len(self._hashes)].name
            self.abort()
            raise ValueError(f"{missing} was not written, {len(self.specs) - len(self._hashes)} tensors are missing")
        try:
            self._finish(files, provenance, receipt)
        except BaseException as error:
            self.abort()
            raise self._explain(error) from None
        return self.path

    def abort(self) -> None:
        """Give up: remove the temporary file. Nothing to do after `finish()`; calling it twice is fine."""
        fd, self._fd = self._fd, -1
        temp, self._temp = self._temp, None
        if temp is not None and os.name != "nt":  # removed while still locked, so that nobody else takes it for stale
            storage.quietly(storage.unlink, temp)
        if fd >= 0:
            storage.quietly(storage.close, fd)
        if temp is not None and os.name == "nt":  # Windows cannot remove an open file
            storage.quietly(storage.unlink, temp)

    def __enter__(self) -> ModelWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.abort()

    def _start(self) -> None:
        folder = self._destination.parent
        if not folder.is_dir():
            raise EdgellamaError(f"{self.path}: the folder {folder} does not exist; create it first")
        check_replaceable(self._destination)
        remove_stale(self._destination)
        needed, free = self.file_size, shutil.disk_usage(folder).free
        if free < needed:
            raise EdgellamaError(
                f"{self.path}: needs {_size(needed)} of disk space, {folder} has {_size(free)} free: make room"
            )
        while self._fd < 0:
            self._temp = temp_path(self._destination)
            self._fd = storage.create(self._temp)
            if storage.try_lock(self._fd) is False or not _same_file(self._fd, self._temp):
                self.abort()  # another convert took it for stale in the instant before the lock
        if self.file_size:  # the file has its size from the start, and gaps are zero
            storage.truncate(self._fd, self.file_size)

    def _next_spec(self, name: str) -> TensorSpec:
        if self._fd < 0:
            raise ValueError("the writer is closed")
        i = len(self._hashes)
        expected = self.specs[i].name if i < len(self.specs) else None
        if name != expected:
            self.abort()
            raise ValueError(f"tensor {i} must be {expected}, got {name}")
        return self.specs[i]

    def _header_json(self) -> bytes:
        tensors = [
            {
                "name": spec.name,
                "layout": spec.layout,
                "shape": list(spec.shape),
                "offset": offset,
                "nbytes": LAYOUTS[spec.layout].nbytes(spec.shape),
                "xxh3_128": xxh3_128,
            }
            for spec, offset, xxh3_128 in zip(
                self.specs, self._offsets, self._hashes or [_NO_HASH] * len(self.specs), strict=True
            )
        ]
        return strict_json.dump({**self._header, "tensors": tensors}, "header")

    def _finish(self, files: Mapping[str, bytes], provenance: Mapping[str, Any], receipt: Mapping[str, Any] | None):
        if self._fd < 0:
            raise ValueError("the writer is closed")
        check_names(files)
        section = build_section(self.file_size, files, [], provenance, receipt)
        storage.seek(self._fd, self.file_size)
        storage.write_all(self._fd, section)
        header = self._header_json()
        assert len(header) == self._header_length
        prologue = Prologue(len(header), self._data_offset, self._data_length, hash128(header))
        storage.seek(self._fd, 0)
        storage.write_all(self._fd, prologue.pack() + header)
        validate(FileSource(self._fd, os.fstat(self._fd).st_size))
        storage.fsync(self._fd)
        check_replaceable(self._destination)
        self._publish()

    def _publish(self) -> None:
        """Rename over the destination; if the folder cannot be flushed afterwards, undo that."""
        assert self._temp is not None
        temp, destination = self._temp, self._destination
        if os.name == "nt":  # Windows cannot rename an open file
            fd, self._fd = self._fd, -1
            storage.close(fd)
        backup: Path | None = None
        existed = destination.exists()
        if existed:
            backup = temp_path(destination)
            try:
                storage.link(destination, backup)
            except OSError:  # no hard links here: then there is no undoing
                backup = None
        try:
            storage.replace(temp, destination)
            try:
                storage.fsync_folder(destination.parent)
            except OSError:
                if backup is not None:
                    storage.replace(backup, destination)
                elif not existed:
                    storage.unlink(destination)
                raise
            self._temp = None
        finally:
            if backup is not None:
                storage.quietly(storage.unlink, backup)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            storage.quietly(storage.close, fd)

    def _explain(self, error: BaseException) -> BaseException:
        """An OSError as one line for the user; anything else as it is."""
        if not isinstance(error, OSError):
            return error
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({_size(shutil.disk_usage(self._destination.parent).free)} free, {_size(self.file_size)} needed)"
        return EdgellamaError(f"{self.path}: cannot be written: {error.strerror or error}{free}")


def check_replaceable(destination: Path) -> None:
    """EdgellamaError if something is there that is not an `.edgellama` file: we never overwrite anything else."""
    try:
        mode = os.stat(destination).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise EdgellamaError(f"{destination}: is a folder; name a file to write")
    magic = b""
    if stat.S_ISREG(mode):
        with open(destination, "rb") as file:
            magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise EdgellamaError(f"{destination}: exists and is not an .edgellama file; choose another name or remove it")


def temp_path(destination: Path) -> Path:
    """A new name beside `destination`, hidden, with our process id for the curious."""
    return destination.with_name(f".{destination.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_stale(destination: Path) -> None:
    """Remove temporary files of conversions to `destination` that were killed: those whose lock nobody holds.

    Where there are no locks: Windows refuses to remove an open file, and an hour's rest covers the instant between
    closing and renaming; elsewhere they stay.
    """
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.\d+-[0-9a-f]{{8}}\.tmp")
    for name in os.listdir(destination.parent):
        path = destination.with_name(name)
        if pattern.fullmatch(name):
            with contextlib.suppress(OSError):
                _remove_if_stale(path)


def _remove_if_stale(path: Path) -> None:
    if os.name == "nt":
        if abs(_now() - path.stat().st_mtime) > _STALE_SECONDS:
            storage.unlink(path)
        return
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return
    fd = storage.open_existing(path)
    try:
        if storage.try_lock(fd) is True and _same_file(fd, path):
            storage.unlink(path)
    finally:
        storage.close(fd)


def _now() -> float:
    import time

    return time.time()


def _same_file(fd: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _tile(specs: list[TensorSpec]) -> tuple[list[int], int]:
    """Each tensor's offset in the data region, and the region's length."""
    offsets, end = [], 0
    for spec in specs:
        offsets.append(align(end, TENSOR_ALIGNMENT))
        end = offsets[-1] + LAYOUTS[spec.layout].nbytes(spec.shape)
    return offsets, align(end, TENSOR_ALIGNMENT)


def _raw(piece: Data, dtype: np.dtype, name: str) -> memoryview:
    """The bytes of a piece, little-endian, without a copy where possible."""
    if isinstance(piece, np.ndarray):
        if piece.dtype != dtype and piece.dtype.newbyteorder("<") != dtype:
            raise ValueError(f"{name}: must be {dtype}, got {piece.dtype}")
        piece = np.ascontiguousarray(piece, dtype).reshape(-1).view(np.uint8).data
    return memoryview(piece).cast("B")


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"
