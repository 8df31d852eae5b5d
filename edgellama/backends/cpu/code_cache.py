"""Where compiled kernels are kept on disk, and how far they are believed.

Under the user's cache folder (`EDGELLAMA_HOME` moves it), in a folder named after a hash of the kernels' sources, of
the versions of Python, Numba and LLVM, and of the target. Another package's kernels have a folder in there, named after
its own sources. Machine code lies behind a digest: what is damaged is compiled and written anew. A folder that belongs
to someone else, or that others may write to, is not used, because cached code is code. Does not know what wrote it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
from importlib.metadata import version
from pathlib import Path

import platformdirs
import xxhash

from .target import TARGET, host

_DIGEST_BYTES = 16


@functools.cache
def cache_folder() -> Path:
    """Where compiled kernels of exactly these sources and versions go."""
    home = os.environ.get("EDGELLAMA_HOME")
    base = Path(home) / "cache" if home else platformdirs.user_cache_path("edgellama", appauthor=False)
    versions = f"{sys.version}|{version('numba')}|{version('llvmlite')}"
    state = hashlib.sha256(f"{versions}|{TARGET}|{host()}".encode())
    for source in _own_sources():
        state.update(source.read_bytes())
    return base / "kernels" / state.hexdigest()[:16]


@functools.cache
def _own_sources() -> list[Path]:
    """All that can change a kernel; none in a frozen app, where kernels of another version would not be noticed."""
    here = Path(__file__).parent
    beside = [path for path in (here.parents[1] / "kv_cache.py", here.parents[1] / "quant.py") if path.exists()]
    return sorted(here.glob("*.py")) + beside


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


def trusted_folder(package: str = "") -> Path | None:
    """The folder for the kernels of a package, made if need be; None if nobody may rely on it. Raises OSError."""
    if not _own_sources():
        return None
    folder = cache_folder() / _sources_of(package)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder if _is_ours(folder) else None


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can have put code there."""
    if not hasattr(os, "getuid"):
        return True  # Windows: the user's profile is private
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def seal(data: bytes) -> bytes:
    """`data` behind its digest: a flipped bit must not be run."""
    return xxhash.xxh3_128_digest(data) + data


def unseal(raw: bytes) -> bytes:
    """What was sealed; ValueError if it is not as it was."""
    digest, data = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    if xxhash.xxh3_128_digest(data) != digest:
        raise ValueError("damaged")
    return data


def read(name: str) -> bytes | None:
    """What `write` kept under this name; None if there is nothing to rely on."""
    try:
        folder = trusted_folder()
        return None if folder is None else unseal((folder / name).read_bytes())
    except (OSError, ValueError):
        return None


def write(name: str, data: bytes) -> None:
    """Keep `data`, if there is a place for it; whoever reads meanwhile sees the old or the new."""
    with contextlib.suppress(OSError):
        folder = trusted_folder()
        if folder is None:
            return
        temporary = folder / f"{name}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(seal(data))
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)
