"""Compiled kernels on disk: found again, mended when damaged, not believed when others may write them (N1)."""

import importlib
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")
from edgellama.backends.cpu import code_cache
from edgellama.backends.cpu.jit import entry_point, prepare


def triple(x):
    return 3 * x


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(code_cache, "cache_folder", lambda: tmp_path / "kernels")
    return tmp_path / "kernels"


def start() -> bool:
    """As a new process does: whether the kernel came from the cache. Its result must be right either way."""
    kernel = entry_point(triple)
    assert kernel(np.int64(14)) == 42
    return sum(kernel.stats.cache_hits.values()) > 0


def files(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.rglob(f"*.{suffix}"))


def test_the_second_start_compiles_nothing(folder):
    assert not start()
    assert start()


def overwrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)


DAMAGES = {
    "data cut": ("nbc", lambda path: overwrite(path, path.read_bytes()[:1000])),
    "data cut to its digest": ("nbc", lambda path: overwrite(path, path.read_bytes()[:16])),
    "data empty": ("nbc", lambda path: overwrite(path, b"")),
    "data of another kind": ("nbc", lambda path: overwrite(path, b"\x80\x04N." * 100)),
    "a bit of the code flipped": ("nbc", lambda path: overwrite(path, flipped(path.read_bytes()))),
    "data gone": ("nbc", Path.unlink),
    "index cut": ("nbi", lambda path: overwrite(path, path.read_bytes()[:30])),
    "index empty": ("nbi", lambda path: overwrite(path, b"")),
    "index no pickle": ("nbi", lambda path: overwrite(path, os.urandom(200))),
    "index gone": ("nbi", Path.unlink),
}


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_compiled_and_mended(folder, damage):
    suffix, do = DAMAGES[damage]
    start()
    (path,) = files(folder, suffix)
    do(path)
    assert not start()
    assert start()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_a_folder_that_others_may_write_is_not_used(folder):
    start()
    folder.chmod(0o777)
    assert not start()
    folder.chmod(0o700)
    assert start()


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(code_cache, "cache_folder", lambda: tmp_path / "file" / "kernels")
    assert not start()


def test_a_disk_that_is_full_is_done_without(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(code_cache._CheckedFile, "_open_for_write", full)
    assert not start()
    assert not start()


def test_prepare_compiles_what_the_call_then_uses(folder):
    kernel = entry_point(triple)
    prepare(kernel, np.int64(1))
    assert len(kernel.overloads) == 1
    assert kernel(np.int64(2)) == 6 and len(kernel.overloads) == 1


def test_another_packages_kernels_are_compiled_anew_when_any_of_its_sources_changes(tmp_path, monkeypatch):
    """A helper in another module of that package is compiled in; Numba looks at the kernel's own file alone."""
    package = tmp_path / "somewhere" / "guest_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("def f():\n    return 1\n")
    monkeypatch.syspath_prepend(package.parent)
    importlib.import_module("guest_kernels")
    names = []
    for text in ("def f():\n    return 1\n", "def f():\n    return 2\n"):
        (package / "helper.py").write_text(text)
        code_cache._sources_of.cache_clear()
        names.append(code_cache._sources_of("guest_kernels"))
    assert names[0] != names[1] and all(name.startswith("guest_kernels-") for name in names)
    assert code_cache._sources_of("edgellama") == ""  # whose sources are in the folder's own name
    assert code_cache._sources_of("not_imported") == ""
