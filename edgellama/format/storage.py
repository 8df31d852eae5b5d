"""The operating-system calls that change files, each behind one function: the only place that touches the disk.

Knows files and folders, not the format. Tests replace these functions one call at a time to prove that a full disk or
an I/O error at any of them leaves the destination as it was.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock; see `try_lock`
    fcntl = None  # type: ignore[assignment]

WINDOWS = os.name == "nt"
"""There an open file can be neither removed nor renamed, and a mapped one not replaced."""

_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def create(path: Path) -> int:
    """Create a file that must not exist; a descriptor for reading and writing."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | _BINARY, 0o666)


def open_existing(path: Path) -> int:
    """A descriptor for reading and writing a file that must exist."""
    return os.open(path, os.O_RDWR | _BINARY)


def write(fd: int, data: memoryview) -> int:
    """Write some of `data` at the descriptor's position; the number of bytes written."""
    return os.write(fd, data)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data` at the descriptor's position."""
    view = memoryview(data).cast("B")
    while view:
        # Linux writes at most 2 GiB a call, Windows and macOS fail above that.
        view = view[write(fd, view[: 1 << 30]) :]


def seek(fd: int, offset: int) -> None:
    """Set the descriptor's position, from the start of the file."""
    os.lseek(fd, offset, os.SEEK_SET)


def fsync(fd: int) -> None:
    """Bring the file's bytes to the disk."""
    os.fsync(fd)


def truncate(fd: int, length: int) -> None:
    """Cut the file to `length` bytes."""
    os.ftruncate(fd, length)


def close(fd: int) -> None:
    """Close the descriptor."""
    os.close(fd)


def replace(source: Path, destination: Path) -> None:
    """Rename over: the destination is the old or the new file at any instant."""
    os.replace(source, destination)


def link(source: Path, name: Path) -> None:
    """Give a file a second name."""
    os.link(source, name)


def unlink(path: Path) -> None:
    """Remove a name."""
    os.unlink(path)


def fsync_folder(folder: Path) -> None:
    """Bring the folder's entries to the disk, so that a rename outlives a power cut. Windows cannot, and need not."""
    if WINDOWS:
        return
    fd = os.open(folder, os.O_RDONLY | _BINARY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool | None:
    """Take the file's lock, kept until the descriptor is closed. False: another has it. None: no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True


def quietly(function, *args) -> None:
    """Call `function`, a step of cleaning up that must not hide the error being cleaned up after."""
    with contextlib.suppress(OSError):
        function(*args)
