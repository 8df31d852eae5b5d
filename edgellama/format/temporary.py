"""Temporary files beside a destination: created locked, told apart from stale ones, cleaned up after kills.

Knows names and locks, not the format. A temporary file's lock is held by the process that writes it and vanishes with
it, also on `kill -9`; so a file whose lock can be taken is stale, and a live writer's file is never touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import time
from pathlib import Path

from . import storage

_STALE_SECONDS = 3600


def temp_path(destination: Path) -> Path:
    """A new name beside `destination`, hidden, with our process id for the curious."""
    return destination.with_name(f".{destination.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def create_locked(path: Path) -> int | None:
    """Create `path` and take its lock; a descriptor. None: someone took it for stale in the instant before the lock."""
    fd = storage.create(path)
    try:
        if storage.try_lock(fd) is not False and _names(path, fd):
            return fd
    except BaseException:
        storage.quietly(storage.unlink, path)
        storage.quietly(storage.close, fd)
        raise
    storage.quietly(storage.close, fd)
    return None


def remove_stale(destination: Path) -> None:
    """Remove temporary files of writers to `destination` that were killed: those whose lock nobody holds.

    Windows has no such lock. There an open file cannot be removed, and an hour's grace covers the instant between
    closing and renaming. On file systems without locks stale files stay.
    """
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.\d+-[0-9a-f]{{8}}\.tmp")
    for name in os.listdir(destination.parent):
        if pattern.fullmatch(name):
            with contextlib.suppress(OSError):
                _remove_if_stale(destination.with_name(name))


def _remove_if_stale(path: Path) -> None:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        return
    if storage.WINDOWS:
        if time.time() - status.st_mtime > _STALE_SECONDS:
            storage.unlink(path)
        return
    fd = storage.open_existing(path)
    try:
        if storage.try_lock(fd) is True and _names(path, fd):
            storage.unlink(path)
    finally:
        storage.close(fd)


def _names(path: Path, fd: int) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
