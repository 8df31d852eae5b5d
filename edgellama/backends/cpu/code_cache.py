"""Where compiled kernels are kept on disk, and how far they are believed.

Under the user's cache folder (`EDGELLAMA_HOME` moves it), in a folder named after a hash of the kernels' sources, of
the versions of Python, Numba and LLVM, and of the target: Numba's own index notices a change in the file of a kernel,
but not in a helper that was compiled into it. Another package's kernels have a folder in there, named after its own
sources. A damaged entry is compiled and written anew; a folder that belongs to someone else, or that others may write
to, is not used, because cached code is code. Numba's bookkeeping is reused (`numba.core.caching`); only what it lets
through is changed here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numba
import platformdirs
import xxhash
from numba.core import config
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache

from .target import TARGET

_DIGEST_BYTES = 16


@functools.cache
def cache_folder() -> Path:
    """Where compiled kernels of exactly these sources and versions go."""
    home = os.environ.get("EDGELLAMA_HOME")
    base = Path(home) / "cache" if home else platformdirs.user_cache_path("edgellama", appauthor=False)
    state = hashlib.sha256(f"{sys.version}|{numba.__version__}|{version('llvmlite')}|{TARGET}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        state.update(source.read_bytes())
    return base / "kernels" / state.hexdigest()[:16]


@functools.cache
def _sources_of(package: str) -> str:
    """A name for the sources of another package, which may be compiled into its kernels."""
    folders = getattr(sys.modules.get(package), "__path__", None)
    if folders is None or package == __name__.split(".", 1)[0]:
        return ""
    state = hashlib.sha256()
    for source in sorted(source for folder in folders for source in Path(folder).rglob("*.py")):
        state.update(source.read_bytes())
    return f"{package}-{state.hexdigest()[:16]}"


def new_cache(function: Callable) -> Any:
    """A cache for one kernel; one that keeps nothing where there is no place (a frozen app without source files, a
    folder that cannot be written or is not ours)."""
    try:
        folder = cache_folder() / _sources_of(function.__module__.split(".", 1)[0])
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(folder):
            return NullCache()
        with _numba_caches_in(folder):
            return _KernelCache(function)
    except (RuntimeError, OSError):  # RuntimeError is Numba's "no locator available"
        return NullCache()


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can have put code there."""
    if not hasattr(os, "getuid"):
        return True  # Windows: the user's profile is private
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


@contextlib.contextmanager
def _numba_caches_in(folder: Path) -> Iterator[None]:
    """Numba reads its setting when a cache is made; ours alone must move, not other packages'."""
    name = "CACHE_DIR"
    before = getattr(config, name)
    setattr(config, name, str(folder))
    try:
        yield
    finally:
        setattr(config, name, before)


class _CheckedFile(IndexDataCacheFile):
    """Numba's cache file, with a digest before the machine code: a flipped bit must not be run."""

    def _save_data(self, name: str, data: Any) -> None:
        dumped = self._dump(data)
        with self._open_for_write(self._data_path(name)) as f:
            f.write(xxhash.xxh3_128_digest(dumped))
            f.write(dumped)

    def _load_data(self, name: str) -> Any:
        raw = Path(self._data_path(name)).read_bytes()
        if xxhash.xxh3_128_digest(raw[_DIGEST_BYTES:]) != raw[:_DIGEST_BYTES]:
            raise ValueError(f"{name} is damaged")
        return pickle.loads(raw[_DIGEST_BYTES:])

    def _load_index(self) -> dict:
        try:
            return super()._load_index()
        except Exception:  # a damaged pickle can raise anything
            return {}


class _KernelCache(FunctionCache):
    """Numba's cache of one function, which never fails: what cannot be read is compiled, what cannot be saved, not."""

    def __init__(self, function: Callable):
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _CheckedFile(self._cache_path, self._impl.filename_base, locator.get_source_stamp())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(Exception):
            super().save_overload(sig, data)
