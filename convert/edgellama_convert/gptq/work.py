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

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from edgellama.errors import ConvertError
from edgellama.format import storage

_STATE = "state.json"
_LAYER = re.compile(r"layer-(\d{5})\.npz")


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
        while data:
            data = data[self._file.write(data[: 1 << 30]) :]

    def flush(self) -> None:
        """Bring everything to the disk."""
        storage.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class WorkFolder:
    """See the module. A context manager that holds the lock; `remove()` when all is done."""

    def __init__(self, destination: Path, state: Mapping[str, object]):
        destination = Path(os.path.realpath(destination))
        self.path = destination.with_name(f".{destination.name}.gptq")
        self.path.mkdir(exist_ok=True)
        self._lock = self._take_lock(destination)
        try:
            text = json.dumps(state, sort_keys=True)
            if not self._belongs_to(text):
                self._empty()
                self.save(_STATE, text.encode())
            for leftover in self.path.glob("*.part"):
                leftover.unlink()
        except BaseException:
            self._release()
            raise

    def _take_lock(self, destination: Path) -> int:
        path = self.path / "lock"
        fd = storage.open_existing(path) if path.exists() else storage.create(path)
        if storage.try_lock(fd) is False:
            storage.close(fd)
            raise ConvertError(f"{destination}: another conversion to it is running; wait for it, or name another file")
        return fd

    def _belongs_to(self, text: str) -> bool:
        path = self.path / _STATE
        return path.exists() and path.read_bytes() == text.encode()

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            if entry.name != "lock":
                entry.unlink()

    def layers_done(self) -> int:
        """How many layers, from the first on, have their files."""
        done = {int(match[1]) for entry in self.path.iterdir() if (match := _LAYER.fullmatch(entry.name))}
        return next(i for i in range(len(done) + 1) if i not in done)

    def stream(self, name: str, width: int) -> Stream:
        return Stream(self.path / name, width)

    def discard(self, pattern: str) -> None:
        """Remove the files of that glob pattern."""
        for path in self.path.glob(pattern):
            path.unlink()

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def save(self, name: str, data: bytes) -> None:
        """A whole file of bytes."""
        with open(self.path / f"{name}.part", "wb") as file:
            file.write(data)
            file.flush()
            storage.fsync(file.fileno())
        os.replace(self.path / f"{name}.part", self.path / name)

    def save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """A whole .npz file."""
        with open(self.path / f"{name}.part", "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            storage.fsync(file.fileno())
        os.replace(self.path / f"{name}.part", self.path / name)
        storage.fsync_folder(self.path)

    def load_array(self, name: str, key: str) -> np.ndarray:
        """One array of an .npz file; the others are not read."""
        with np.load(self.path / name, allow_pickle=False) as arrays:
            return arrays[key]

    def remove(self) -> None:
        """All of it, the conversion being done."""
        self._release()
        shutil.rmtree(self.path, ignore_errors=True)

    def _release(self) -> None:
        fd, self._lock = self._lock, -1
        if fd >= 0:
            storage.close(fd)

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()
