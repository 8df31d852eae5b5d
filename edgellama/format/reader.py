"""Open a `.edgellama` file: validate, map, hand out read-only views.

Knows files and maps; the rules are `validate.py`'s. A file is proven against its size first and mapped afterwards, so
no view and no address exists for a file that is not well-formed. Tensor bytes are not hashed at open (that would read
gigabytes); `ModelFile.verify` does it. No `madvise`: measured on a cold file, the default read-ahead was as fast as
MADV_WILLNEED and twice as fast as MADV_SEQUENTIAL, and WILLNEED on 3.6 GB delays the opening.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import xxhash

from ..errors import EdgellamaError, FormatError
from .layout import LAYOUTS
from .metadata import check_zero
from .validate import Contents, TensorEntry, validate

_CHUNK = 4 << 20
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)


class FileSource:
    """The bytes of an open regular file, by descriptor. `size` is what `fstat` said; fewer bytes are an error."""

    def __init__(self, fd: int, size: int):
        self.fd, self.size = fd, size

    def read(self, offset: int, n: int) -> bytes:
        """Exactly `n` bytes at `offset`."""
        parts = []
        while n > 0:
            part = self._read_some(offset, n)
            if not part:
                raise FormatError("file", offset, "the file became shorter while it was read")
            parts.append(part)
            offset, n = offset + len(part), n - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_some(self, offset: int, n: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self.fd, n, offset)
        os.lseek(self.fd, offset, os.SEEK_SET)  # Windows
        return os.read(self.fd, n)


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """Validate the file at `path` and map it.

    FormatError: it is not a whole, valid file of a supported version (field, byte offset). EdgellamaError: there is no
    such file, it is not a regular file, or it cannot be read.
    """
    path = Path(path)
    fd = -1
    try:
        fd = open_regular(path)
        source = FileSource(fd, os.fstat(fd).st_size)
        contents = validate(source)
        return ModelFile(path, source, contents)
    except FormatError as error:
        _close(fd)
        raise at_path(error, path) from None
    except OSError as error:
        _close(fd)
        raise EdgellamaError(f"{path}: cannot be read: {error.strerror or error}") from None
    except BaseException:
        _close(fd)
        raise


def open_regular(path: Path, what: str = "an .edgellama file", maker: str = "`edgellama convert`") -> int:
    """A descriptor for reading a regular file; never waits for a pipe's other end, never touches a device.

    EdgellamaError otherwise, which says that it should have been `what`, and that `maker` makes one.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise EdgellamaError(f"{path}: is a {_kind(path)}, not {what}")
        fd = os.open(path, _FLAGS)
    except FileNotFoundError:
        raise EdgellamaError(f"{path}: there is no such file; {maker} makes one") from None
    except ValueError as error:  # a NUL character in the path
        raise EdgellamaError(f"{str(path)!r}: {error}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):  # swapped in between
        os.close(fd)
        raise EdgellamaError(f"{path}: is not a regular file")
    return fd


def at_path(error: FormatError, path: Path) -> FormatError:
    """The same error with the file named in front."""
    return FormatError(error.field, error.offset, error.problem, str(path))


class ModelFile:
    """An open, valid, mapped file. Read-only; a context manager that closes it.

    The map lives as long as any array from `array()`: `close()` gives up this object's hold, and the last array to go
    releases the file. Addresses from `address()` keep nothing alive: whoever uses them keeps the ModelFile open.
    """

    path: Path
    size: int
    """Bytes of the whole file."""

    def __init__(self, path: Path, source: FileSource, contents: Contents):
        self.path, self.size = path, source.size
        self.header: dict[str, Any] = contents.header
        self.config = contents.config
        self.quantization: dict[str, Any] = contents.quantization
        self.lm_head_bits: int = contents.quantization["lm_head_bits"]
        self.int8_units: tuple[str, ...] = tuple(contents.quantization.get("int8_units", ()))
        self.tensors: Mapping[str, TensorEntry] = MappingProxyType(contents.tensors)
        self.files: Mapping[str, bytes] = MappingProxyType(contents.metadata.files)
        self.provenance: dict[str, Any] = contents.metadata.provenance
        self.receipt: dict[str, Any] | None = contents.metadata.receipt
        self._contents = contents
        self._map: mmap.mmap | None = _map(path, source)
        self._address: int = np.frombuffer(self._map, np.uint8).ctypes.data
        self._source: FileSource | None = source  # last: from here on the descriptor is ours to close

    def array(self, name: str) -> np.ndarray:
        """A read-only view of a tensor as stored, padding included; the shape is the layout's `stored_shape`.

        KeyError for a name that is not in `tensors`.
        """
        entry = self.tensors[name]
        layout = LAYOUTS[entry.layout]
        shape = layout.stored_shape(entry.shape)
        count = entry.nbytes // layout.dtype.itemsize
        return np.frombuffer(self._open_map(), layout.dtype, count, entry.offset).reshape(shape)

    def address(self, name: str) -> int:
        """The address of a tensor's first byte, a multiple of 64; good until `close()`."""
        self._open_map()
        return self._address + self.tensors[name].offset

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Hash every tensor and check the gaps between them; FormatError names the first that is damaged.

        `progress(done, total)` is told bytes. Reads the file rather than the map, so that a failing disk or a file that
        someone has cut is an error and not a signal.
        """
        self._open_map()
        source = self._source
        assert source is not None
        prologue = self._contents.prologue
        at = prologue.data_offset
        try:
            for i, entry in enumerate(self.tensors.values()):
                check_zero(source.read(at, entry.offset - at), "data.padding", at)
                at = entry.offset + entry.nbytes
                hasher = xxhash.xxh3_128()
                for offset in range(entry.offset, at, _CHUNK):
                    hasher.update(source.read(offset, min(_CHUNK, at - offset)))
                    if progress is not None:
                        progress(min(offset + _CHUNK, at) - prologue.data_offset, prologue.data_length)
                if hasher.hexdigest() != entry.xxh3_128:
                    raise FormatError(
                        f"header.tensors[{i}].xxh3_128", entry.offset, f"the bytes of {entry.name} are damaged"
                    )
            check_zero(source.read(at, prologue.data_end - at), "data.padding", at)
        except FormatError as error:
            raise at_path(error, self.path) from None
        except OSError as error:
            raise EdgellamaError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        if progress is not None:
            progress(prologue.data_length, prologue.data_length)

    def read_ahead(self, progress: Callable[[int, int], None]) -> None:
        """Read the whole file once, so that it is in the system's memory when the map is used.

        `progress(done, total)` is told bytes, and may raise to end it. EdgellamaError: the disk fails.
        """
        self._open_map()
        source = self._source
        assert source is not None
        try:
            for offset in range(0, self.size, _CHUNK):
                source.read(offset, min(_CHUNK, self.size - offset))
                progress(min(offset + _CHUNK, self.size), self.size)
        except FormatError as error:
            raise at_path(error, self.path) from None
        except OSError as error:
            raise EdgellamaError(f"{self.path}: cannot be read: {error.strerror or error}") from None

    def close(self) -> None:
        """Release the map, or leave it to the last array that still uses it. Closing twice is fine."""
        source, self._source = self._source, None
        if source is not None:
            _close(source.fd)
        mapped, self._map = self._map, None
        if mapped is not None:
            with contextlib.suppress(BufferError):  # arrays exist; the last one releases it
                mapped.close()

    @property
    def header_hash(self) -> bytes:
        """xxh3-128 of the header, which holds the config and every tensor's hash: what sets one model from another."""
        return self._contents.prologue.header_hash

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._map is None

    def __enter__(self) -> ModelFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        source = getattr(self, "_source", None)
        if source is not None:
            _close(source.fd)

    def __repr__(self) -> str:
        return f"<ModelFile {str(self.path)!r}, {len(self.tensors)} tensors, {self.size} bytes>"

    def _open_map(self) -> mmap.mmap:
        if self._map is None:
            raise EdgellamaError(f"{self.path}: the model file is closed")
        return self._map


def _map(path: Path, source: FileSource) -> mmap.mmap:
    try:
        mapped = mmap.mmap(source.fd, source.size, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # what is not in memory yet comes in large pages, which stream faster
            with contextlib.suppress(OSError):
                mapped.madvise(mmap.MADV_HUGEPAGE)
        return mapped
    except (OverflowError, ValueError) as error:  # a 32-bit Python; a file that was cut after the check
        raise EdgellamaError(f"{path}: {source.size} bytes cannot be mapped into memory: {error}") from None


def _close(fd: int) -> None:
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)


def _kind(path: Path) -> str:
    mode = os.stat(path).st_mode
    kinds = [(stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket")]
    return next((name for test, name in kinds if test(mode)), "device")
