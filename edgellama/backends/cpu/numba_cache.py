"""Numba's own cache, for kernels that Python calls with arrays: in our folder, checked, and never an error.

Numba's index notices a change in the file of a kernel, but not in a helper that was compiled into it: that is why the
folder is named after all sources (see `code_cache`). Numba's bookkeeping is reused (`numba.core.caching`); only what it
lets through is changed here.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numba.core import config
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache

from .code_cache import seal, trusted_folder, unseal


def new_cache(function: Callable) -> Any:
    """A cache for one kernel; one that keeps nothing where there is no place (a frozen app without source files, a
    folder that cannot be written or is not ours)."""
    try:
        folder = trusted_folder(function.__module__.split(".", 1)[0])
        if folder is None:
            return NullCache()
        with _numba_caches_in(folder):
            return _KernelCache(function)
    except (RuntimeError, OSError):  # RuntimeError is Numba's "no locator available"
        return NullCache()


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
    """Numba's cache file, with a digest before the machine code."""

    def _save_data(self, name: str, data: Any) -> None:
        with self._open_for_write(self._data_path(name)) as f:
            f.write(seal(self._dump(data)))

    def _load_data(self, name: str) -> Any:
        return pickle.loads(unseal(Path(self._data_path(name)).read_bytes()))

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
