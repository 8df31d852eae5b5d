"""Write a `.edgellama` file so that the destination is the old file (or none) or the new one, never anything else.

Knows the order of steps that makes this so (FORMAT.md section 7); `storage.py` makes the system calls. Does not
quantize.

    temporary file beside the destination -> tensor data -> metadata and trailer -> prologue and header
    -> validate -> fsync -> rename over -> fsync the folder

>>> with ModelWriter("tiny.edgellama", config, lm_head_bits=8, method="rtn") as writer:
...     for spec in writer.specs:
...         writer.write(spec.name, tensors[spec.name])
...     writer.finish(files={}, provenance={})
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from ..config import LlamaConfig
from ..errors import EdgellamaError, FormatError
from . import storage, strict_json
from .blocks import BlockWriter
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
from .schema import LM_HEAD_BITS, TensorSpec, model_tensors, unit_names
from .temporary import create_locked, remove_stale, temp_path
from .validate import METHOD, MIXED_BITS, SCHEME, TensorEntry, validate

Data = bytes | bytearray | memoryview | np.ndarray

_NO_HASH = "0" * 32


class ModelWriter:
    """Writes one file; a context manager that leaves the destination as it was unless `finish()` returned.

    The same arguments and data give the same bytes. `raw_config` is the checkpoint's config.json, stored verbatim;
    `int8_units` are those of the layers' units that have 8 bits instead of 4 (`unit_names`, in that order); `extra` are
    further JSON values for the header's `quantization`. EdgellamaError if the destination exists and is not
    an `.edgellama` file, if its folder is missing, or if the disk has not enough room. After any error the writer is
    closed and its temporary file gone.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        raw_config: Mapping[str, Any],
        *,
        lm_head_bits: int = 8,
        method: str,
        int8_units: Sequence[str] = (),
        **extra: Any,
    ):
        self.path = Path(path)
        if lm_head_bits not in LM_HEAD_BITS:
            raise ValueError(f"lm_head_bits must be 4, 8 or 16, got {lm_head_bits!r}")
        if not METHOD.fullmatch(method):
            raise ValueError(f"method must match {METHOD.pattern}, got {method!r}")
        self.config = LlamaConfig.from_dict(raw_config)
        chosen = set(int8_units)
        if list(int8_units) != [unit for unit in unit_names(self.config) if unit in chosen]:
            raise ValueError(f"int8_units must be units of the config, each once and in file order, got {int8_units!r}")
        self.specs: list[TensorSpec] = model_tensors(self.config, lm_head_bits, chosen)
        """What to write, in this order."""
        self._header: dict[str, Any] = {
            "required_features": [MIXED_BITS] if chosen else [],
            "quantization": {
                "scheme": SCHEME,
                "group_size": GROUP_SIZE,
                "row_block": ROW_BLOCK,
                "method": method,
                "lm_head_bits": lm_head_bits,
                **({"int8_units": list(int8_units)} if chosen else {}),
                **extra,
            },
            "config": dict(raw_config),
        }
        self._offsets, self._data_length = _tile(self.specs)
        self._hashes: list[str] = []
        self._header_length = len(self._header_json())  # hashes have a fixed length, so this stays
        if self._header_length > MAX_JSON:
            raise FormatError("header", None, f"{self._header_length} bytes of config and tensors, at most {MAX_JSON}")
        self._data_offset = align(PROLOGUE_SIZE + self._header_length, DATA_ALIGNMENT)
        self._destination = Path(os.path.realpath(self.path))  # a symbolic link stays, its target is replaced
        self._blocks = BlockWriter()
        self._fd: int | None = None
        self._temp: Path | None = None
        with self._abort_on_error(), self._one_line_errors():
            self._start()

    @property
    def data_end(self) -> int:
        """Bytes of the file without its metadata."""
        return self._data_offset + self._data_length

    def write(self, name: str, data: Data | Iterable[Data]) -> TensorEntry:
        """Write the next tensor: its stored bytes, whole or in pieces. Arrays must have the layout's dtype.

        The order is that of `specs`. ValueError for a wrong name, dtype or size: the caller's bug.
        """
        with self._abort_on_error():
            i = len(self._hashes)
            expected = self.specs[i].name if i < len(self.specs) else None
            if name != expected:
                raise ValueError(f"tensor {i} must be {expected}, got {name}")
            spec, offset = self.specs[i], self._data_offset + self._offsets[i]
            layout = LAYOUTS[spec.layout]
            nbytes = layout.nbytes(spec.shape)
            pieces = [data] if isinstance(data, (bytes, bytearray, memoryview, np.ndarray)) else data
            hasher, written = xxhash.xxh3_128(), 0
            for piece in pieces:
                raw = _raw(piece, layout.dtype, name)
                if written + len(raw) > nbytes:
                    raise ValueError(f"{name}: {spec.layout} {spec.shape} has {nbytes} bytes, got more")
                hasher.update(raw)
                self._write_at(offset + written, raw)
                written += len(raw)
            if written != nbytes:
                raise ValueError(f"{name}: {spec.layout} {spec.shape} has {nbytes} bytes, got {written}")
        self._hashes.append(hasher.hexdigest())
        return TensorEntry(spec.name, spec.layout, spec.shape, offset, nbytes, self._hashes[-1])

    def read(self, name: str, first: int, last: int) -> np.ndarray:
        """Entries first..last-1 of the stored array's first axis (row blocks, rows, values) of a tensor written before.

        For measuring what was written before it is published. Reads the file: no mapping, nothing stays held.
        """
        i = next(i for i, spec in enumerate(self.specs) if spec.name == name)
        if i >= len(self._hashes):
            raise ValueError(f"{name} was not written yet")
        layout = LAYOUTS[self.specs[i].layout]
        shape = layout.stored_shape(self.specs[i].shape)
        if not 0 <= first <= last <= shape[0]:
            raise ValueError(f"{name}: {first}..{last} is not within its {shape[0]} entries")
        entry_bytes = layout.nbytes(self.specs[i].shape) // shape[0]
        with self._abort_on_error(), self._one_line_errors():
            fd = self._descriptor()
            self._blocks.flush(fd)
            source = FileSource(fd, self.data_end)
            offset = self._data_offset + self._offsets[i] + first * entry_bytes
            data = source.read(offset, (last - first) * entry_bytes)
        return np.frombuffer(data, layout.dtype).reshape(last - first, *shape[1:])

    def finish(
        self, files: Mapping[str, bytes], provenance: Mapping[str, Any], receipt: Mapping[str, Any] | None = None
    ) -> Path:
        """Write metadata and header, check the file as a reader would, and rename it over the destination."""
        with self._abort_on_error(), self._one_line_errors():
            missing = len(self.specs) - len(self._hashes)
            if missing:
                raise ValueError(f"{self.specs[-missing].name} was not written, {missing} tensors are missing")
            check_names(files)
            self._write_at(self.data_end, build_section(self.data_end, files, [], provenance, receipt))
            header = self._header_json()
            assert len(header) == self._header_length
            prologue = Prologue(len(header), self._data_offset, self._data_length, hash128(header))
            self._write_at(0, prologue.pack() + header)
            fd = self._descriptor()
            self._blocks.flush(fd)
            validate(FileSource(fd, os.fstat(fd).st_size))
            storage.fsync(fd)
            check_replaceable(self._destination)
            self._publish()
        return self.path

    def abort(self) -> None:
        """Give up: remove the temporary file. Nothing to do after `finish()`; calling it twice is fine."""
        fd, self._fd = self._fd, None
        temp, self._temp = self._temp, None
        if fd is not None and storage.WINDOWS:  # elsewhere the lock guards it until the end
            storage.quietly(storage.close, fd)
            fd = None
        if temp is not None:
            storage.quietly(storage.unlink, temp)
        if fd is not None:
            storage.quietly(storage.close, fd)

    def __del__(self) -> None:
        # Ctrl-C can strike between the constructor's last step and the `with` that would have cleaned up.
        if hasattr(self, "_temp"):
            self.abort()

    def __enter__(self) -> ModelWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.abort()

    def _start(self) -> None:
        """Check destination and disk space, make the temporary file."""
        folder = self._destination.parent
        if not folder.is_dir():
            raise EdgellamaError(f"{self.path}: the folder {folder} does not exist; create it first")
        check_replaceable(self._destination)
        remove_stale(self._destination)
        check_space(self.path, folder, self.data_end)
        while self._fd is None:
            self._temp = temp_path(self._destination)
            self._fd = create_locked(self._temp)
        storage.truncate(self._fd, self.data_end)  # gaps between tensors are holes from now on, and read as zeros

    def _publish(self) -> None:
        """Rename over the destination; if the folder cannot be flushed afterwards, undo that."""
        assert self._temp is not None
        if storage.WINDOWS:  # an open file cannot be renamed
            fd, self._fd = self._descriptor(), None
            storage.close(fd)
        destination = self._destination
        existed = destination.exists()
        backup = temp_path(destination) if existed else None
        if backup is not None:
            try:
                storage.link(destination, backup)
            except OSError:  # no hard links here: then there is no undoing
                backup = None
        try:
            storage.replace(self._temp, destination)
            try:
                storage.fsync_folder(destination.parent)
            except OSError:
                if backup is not None:
                    storage.replace(backup, destination)
                elif not existed:
                    storage.unlink(destination)
                raise
        finally:
            if backup is not None:
                storage.quietly(storage.unlink, backup)
        self._temp = None
        self.abort()

    def _header_json(self) -> bytes:
        hashes = self._hashes or [_NO_HASH] * len(self.specs)
        tensors = [
            {
                "name": spec.name,
                "layout": spec.layout,
                "shape": list(spec.shape),
                "offset": offset,
                "nbytes": LAYOUTS[spec.layout].nbytes(spec.shape),
                "xxh3_128": xxh3_128,
            }
            for spec, offset, xxh3_128 in zip(self.specs, self._offsets, hashes, strict=True)
        ]
        return strict_json.dump({**self._header, "tensors": tensors}, "header")

    def _write_at(self, offset: int, data: bytes | memoryview) -> None:
        with self._one_line_errors():
            self._blocks.write(self._descriptor(), offset, data)

    def _descriptor(self) -> int:
        if self._fd is None:
            raise ValueError("the writer is closed")
        return self._fd

    @contextlib.contextmanager
    def _abort_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abort()
            raise

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Tell of a full or failing disk in one line."""
        try:
            yield
        except OSError as error:
            room = ""
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(self._destination.parent).free
                room = f" ({_size(self.data_end)} needed, {_size(free)} free now)"
            raise EdgellamaError(f"{self.path}: cannot be written: {error.strerror or error}{room}") from error


def check_space(path: Path, folder: Path, needed: int, what: str = "needs", there: int = 0) -> None:
    """EdgellamaError if `folder` lacks room for the `needed` bytes of `path`, `there` of which are there already."""
    free = shutil.disk_usage(folder).free + there
    if free < needed:
        raise EdgellamaError(
            f"{path}: {what} {_size(needed)} of disk space, {folder} has {_size(free)}: make room there"
        )


def check_replaceable(destination: Path, magic: bytes = MAGIC, what: str = "an .edgellama file") -> None:
    """EdgellamaError if something is there that does not begin with `magic`: we never overwrite anything else."""
    try:
        mode = os.stat(destination).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise EdgellamaError(f"{destination}: is a folder; name a file to write")
    found = b""
    if stat.S_ISREG(mode):
        with open(destination, "rb") as file:
            found = file.read(len(magic))
    if found != magic:
        raise EdgellamaError(f"{destination}: exists and is not {what}; choose another name or remove it")


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
        if piece.dtype.newbyteorder("<") != dtype:
            raise ValueError(f"{name}: must be {dtype}, got {piece.dtype}")
        piece = np.ascontiguousarray(piece, dtype).reshape(-1).view(np.uint8).data
    return memoryview(piece).cast("B")


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"
