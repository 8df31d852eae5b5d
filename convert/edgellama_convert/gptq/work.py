"""The folder beside a destination where a calibrated conversion keeps what it has done, to go on after a kill.

    .<destination>.gptq/
        lock              held while a conversion works here
        state.json        what the work belongs to; anything else is thrown away
        own-text.npz      token ids that the model itself wrote
        layer-00003.npz   codes, scales and errors of a layer that is done
        x-00004.*         the residual streams that go into the next layer

A file is either whole or not there: it is written under another name, flushed and renamed. A layer's file comes last,
after the streams that the next one needs. Knows names and bytes, not what the numbers mean.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from edgellama.errors import ConvertError
from edgellama.format import storage

_LOCK, _STATE = "lock", "state.json"


class Stream:
    """A file of float32 rows [rows, width], written and read in pieces: it may be larger than memory."""

    def __init__(self, path: Path, width: int):
        self.path, self.width = path, width
        self._file = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115 (closed by `close`)

    def read(self, first: int, last: int) -> np.ndarray:
        out = np.empty((last - first, self.width), np.float32)
        self._file.seek(4 * self.width * first)
        data, done = out.reshape(-1).view(np.uint8).data, 0
        while done < len(data):
            n = self._file.readinto(data[done : done + (1 << 30)])
            if not n:
                raise ConvertError(f"{self.path}: ends too early; remove its folder and convert again")
            done += n
        return out

    def write(self, first: int, rows: np.ndarray) -> None:
        assert rows.dtype == np.float32 and rows.shape[1:] == (self.width,)
        self._file.seek(4 * self.width * first)
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        with _writing(self.path):
            while data:
                data = data[self._file.write(data[: 1 << 30]) :]

    def flush(self) -> None:
        """Bring everything to the disk."""
        with _writing(self.path):
            storage.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def work_folder_of(destination: Path) -> Path:
    """Where work for this file is kept."""
    return destination.with_name(f".{destination.name}.gptq")


class WorkFolder:
    """See the module. A context manager that holds the lock; `remove()` when all is done.

    Left with an error, the folder stays if there is something in it to go on with.
    """

    def __init__(self, destination: Path, state: Mapping[str, object]):
        self.destination = Path(os.path.realpath(destination))
        self.path = work_folder_of(self.destination)
        self._lock = self._take_lock()
        try:
            text = json.dumps(state, sort_keys=True)
            if not self._belongs_to(text):
                self._empty()
                self.save(_STATE, text.encode())
            for leftover in self.path.glob("*.part"):
                leftover.unlink()
        except BaseException:
            self._leave()
            raise

    def _take_lock(self) -> int:
        path = self.path / _LOCK
        while True:
            with contextlib.suppress(FileExistsError):
                self.path.mkdir()
            with contextlib.suppress(FileNotFoundError):  # a conversion has just ended, and taken its folder away
                with contextlib.suppress(FileExistsError):
                    storage.close(storage.create(path))
                fd = storage.open_existing(path)
                if storage.try_lock(fd) is False:
                    storage.close(fd)
                    raise ConvertError(
                        f"{self.destination}: another conversion to it is running; wait for it, or name another file"
                    )
                if path.exists() and os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd
                storage.close(fd)

    def _belongs_to(self, text: str) -> bool:
        path = self.path / _STATE
        return path.exists() and path.read_bytes() == text.encode()

    def _empty(self) -> None:
        (self.path / _STATE).unlink(missing_ok=True)  # first: what is left belongs to nothing
        for entry in self.path.iterdir():
            if entry.name != _LOCK:
                entry.unlink()

    def stream(self, name: str, width: int) -> Stream:
        return Stream(self.path / name, width)

    def discard(self, pattern: str) -> None:
        """Remove the files of that glob pattern."""
        for path in self.path.glob(pattern):
            path.unlink()

    def nbytes(self, name: str) -> int | None:
        """Of a file; None if there is none."""
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None

    def held(self) -> int:
        """Bytes of all files."""
        return sum(entry.stat().st_size for entry in self.path.iterdir())

    def save(self, name: str, data: bytes) -> None:
        """A whole file of bytes."""
        with self._whole_file(name) as file:
            file.write(data)

    def save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """A whole .npz file."""
        with self._whole_file(name) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _whole_file(self, name: str) -> Iterator[BinaryIO]:
        path = self.path / name
        part = self.path / f"{name}.part"
        with _writing(path):
            try:
                with open(part, "wb") as file:
                    yield file
                    file.flush()
                    storage.fsync(file.fileno())
                storage.replace(part, path)
            except BaseException:
                storage.quietly(storage.unlink, part)
                raise
            storage.fsync_folder(self.path)

    def is_whole(self, name: str, keys: Iterable[str]) -> bool:
        """Whether there is an .npz file with these arrays and the checksums it should have; reads all of it."""
        try:
            with np.load(self.path / name, allow_pickle=False) as arrays:
                return all(isinstance(arrays[key], np.ndarray) for key in keys)
        except Exception:  # NumPy and zipfile tell of damage in a dozen ways
            return False

    def load_array(self, name: str, key: str) -> np.ndarray:
        """One array of an .npz file; the others are not read."""
        with np.load(self.path / name, allow_pickle=False) as arrays:
            return arrays[key]

    def remove(self) -> None:
        """All of it, the conversion being done. What cannot be removed stays: the result is there."""
        with contextlib.suppress(OSError):
            self._empty()
            if storage.WINDOWS:  # an open file cannot be removed
                self._release()
            storage.unlink(self.path / _LOCK)  # last, held until now: nobody else has begun here meanwhile
            self.path.rmdir()
        self._release()

    def _leave(self) -> None:
        if self._lock >= 0 and not any(self.path.glob("*.npz")):
            self.remove()
        self._release()

    def _release(self) -> None:
        fd, self._lock = self._lock, -1
        if fd >= 0:
            storage.close(fd)

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """An OSError, of a full disk say, becomes one line."""
    try:
        yield
    except OSError as error:
        raise ConvertError(
            f"{path}: cannot be written: {error.strerror or error}; the same command goes on where this one ended"
        ) from None
