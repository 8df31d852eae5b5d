"""A small file of ours, written so that the destination is the old file (or none) or the new one.

For files whose content is at hand; `writer.py` is for models, which are made piece by piece.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import EdgellamaError
from . import storage
from .temporary import create_locked, remove_stale, temp_path
from .writer import check_replaceable


def write_file(path: str | os.PathLike[str], pieces: Iterable[bytes | memoryview], magic: bytes, what: str) -> None:
    """Write `pieces` to `path`: temporary file, fsync, rename.

    EdgellamaError where something else is in the way (a file that does not begin with `magic`, so is not `what`), or
    the folder is missing or full; then the destination is as it was, and the temporary file gone.
    """
    destination = Path(os.path.realpath(path))  # a symbolic link stays, its target is replaced
    if not destination.parent.is_dir():
        raise EdgellamaError(f"{path}: the folder {destination.parent} does not exist; create it first")
    temp: Path | None = None
    fd: int | None = None
    try:
        check_replaceable(destination, magic, what)
        remove_stale(destination)
        while fd is None:
            temp = temp_path(destination)
            fd = create_locked(temp)
        for piece in pieces:
            storage.write_all(fd, piece)
        storage.fsync(fd)
        if storage.WINDOWS:  # an open file cannot be renamed; elsewhere its lock guards it until the end
            closing, fd = fd, None
            storage.close(closing)
        assert temp is not None
        storage.replace(temp, destination)
        temp = None
        storage.fsync_folder(destination.parent)
    except OSError as error:
        raise EdgellamaError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temp is not None:
            with contextlib.suppress(OSError):
                storage.unlink(temp)
        if fd is not None:
            storage.quietly(storage.close, fd)
