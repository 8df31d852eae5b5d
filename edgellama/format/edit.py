"""Change the metadata of a file in place, without touching its gigabytes of weights.

Knows how an edit is appended and how a torn one is undone (FORMAT.md section 8). The weights' bytes and hashes stay.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import EdgellamaError, FormatError
from . import storage
from .container import (
    MAX_METADATA,
    MAX_SECTIONS,
    PROLOGUE_SIZE,
    SUPERSEDED_MAGIC,
    TENSOR_ALIGNMENT,
    TRAILER_MAGIC,
    TRAILER_SIZE,
    Prologue,
)
from .metadata import build_section, check_names, check_trailers
from .reader import FileSource, at_path, open_model, open_regular
from .validate import validate

KEEP: Any = object()
"""The receipt stays as it is."""


def append_metadata(
    path: str | os.PathLike[str],
    files: Mapping[str, bytes | None] | None = None,
    receipt: Mapping[str, Any] | None = KEEP,
) -> None:
    """Add, replace or remove (None) embedded files, and replace the receipt (None removes it).

    The file is whole before and after: any failure cuts it back to what it was. A kill or a power cut in the middle
    leaves a file that readers refuse; the next edit, or `recover`, cuts it back. EdgellamaError if it cannot be done.
    """
    path = Path(path)
    files = files or {}
    check_names(files.keys())
    with _locked(path) as fd:
        _recover(fd)
        size = os.fstat(fd).st_size
        contents = validate(FileSource(fd, size))
        metadata = contents.metadata
        new = {name: data for name, data in files.items() if data is not None}
        kept = [entry for entry in metadata.entries if entry.name not in files]
        section = build_section(size, new, kept, metadata.provenance, metadata.receipt if receipt is KEEP else receipt)
        if len(metadata.trailers) == MAX_SECTIONS or size + len(section) - contents.prologue.data_end > MAX_METADATA:
            raise EdgellamaError(f"{path}: has no room for more edits; convert the model again")
        try:
            storage.seek(fd, size)
            storage.write_all(fd, section)
            storage.fsync(fd)
            validate(FileSource(fd, size + len(section)))
            _supersede(fd, size)
            storage.fsync(fd)
            validate(FileSource(fd, size + len(section)))
        except BaseException:
            _restore(fd, size)
            raise


def recover(path: str | os.PathLike[str]) -> bool:
    """Cut a file whose last edit was interrupted back to its last whole state. True if anything was cut.

    A file that is whole, or not recoverable, is left alone; the latter is a FormatError from `open_model`.
    """
    path = Path(path)
    with _locked(path) as fd:
        cut = _recover(fd)
    open_model(path).close()
    return cut


@contextlib.contextmanager
def _locked(path: Path):
    """A descriptor for changing the file, with its lock held; errors name the file."""
    os.close(open_regular(path))
    try:
        fd = storage.open_existing(path)
        try:
            if storage.try_lock(fd) is False:
                raise EdgellamaError(f"{path}: another process is changing it; try again")
            yield fd
        finally:
            storage.quietly(storage.close, fd)
    except FormatError as error:
        raise at_path(error, path) from None
    except OSError as error:
        raise EdgellamaError(f"{path}: cannot be changed: {error.strerror or error}") from None


def _supersede(fd: int, end: int) -> None:
    """Mark the trailer before `end`, so that a file cut right there is not taken for whole."""
    storage.seek(fd, end - len(SUPERSEDED_MAGIC))
    storage.write_all(fd, SUPERSEDED_MAGIC)


def _restore(fd: int, size: int) -> None:
    """Back to the file of `size` bytes: its trailer counts again, what was appended goes."""
    storage.quietly(storage.seek, fd, size - len(TRAILER_MAGIC))
    storage.quietly(storage.write_all, fd, TRAILER_MAGIC)
    storage.quietly(storage.truncate, fd, size)
    storage.quietly(storage.fsync, fd)


def _recover(fd: int) -> bool:
    """Find the last whole trailer of a file that does not end with one, and cut behind it."""
    size = os.fstat(fd).st_size
    source = FileSource(fd, size)
    prologue = Prologue.parse(source.read(0, min(PROLOGUE_SIZE, size)).ljust(PROLOGUE_SIZE, b"\0"), size)
    with contextlib.suppress(FormatError):
        check_trailers(source, prologue.data_end)
        return False
    tail = source.read(prologue.data_end, min(size - prologue.data_end, MAX_METADATA))
    for end in range(len(tail) // TENSOR_ALIGNMENT * TENSOR_ALIGNMENT, TRAILER_SIZE, -TENSOR_ALIGNMENT):
        if tail[end - 8 : end] == TRAILER_MAGIC:
            whole = prologue.data_end + end
            with contextlib.suppress(FormatError):
                check_trailers(FileSource(fd, whole), prologue.data_end)
                storage.truncate(fd, whole)
                storage.fsync(fd)
                return True
    return False
