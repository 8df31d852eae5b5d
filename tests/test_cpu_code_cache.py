"""Compiled kernels on disk: found again, mended when damaged, not believed when others may write them (N1)."""

import functools
import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")
from numba import types

import edgellama
from edgellama.backends.cpu import code_cache, native, numba_cache
from edgellama.backends.cpu.jit import Native, entry_point
from edgellama.backends.cpu.simd import load_i64, store_i64


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
    "data cut": ("nbc", lambda path: overwrite(path, path.read_bytes()[: path.stat().st_size // 2])),
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

    monkeypatch.setattr(numba_cache._CheckedFile, "_open_for_write", full)
    assert not start()
    assert not start()


@Native
def doubled(source, target):
    store_i64(target, 2 * load_i64(source))


@functools.partial(Native, result=types.int64)
def total(a, b):
    return a + b


class Started:
    """As a new process does: kernels by name, and which of them had to be compiled."""

    def __init__(self, monkeypatch):
        self.compiled = []
        monkeypatch.setattr(native, "_addresses", {})
        monkeypatch.setattr(native, "_source", {each.name: each for each in (doubled, total)}.__getitem__)
        compile_ = Native.compile
        monkeypatch.setattr(Native, "compile", lambda kernel: (self.compiled.append(kernel.name), compile_(kernel))[1])

    def __call__(self) -> list[str]:
        native._addresses.clear()
        self.compiled.clear()
        x, y = np.array([21]), np.array([0])
        assert native.function(doubled.name, 2)(x.ctypes.data, y.ctypes.data) == 0 and y[0] == 42
        assert native.function(total.name, 2)(40, 2) == 42
        assert native.address(total.name) == total.address
        return [*self.compiled]


@pytest.fixture
def start_natives(folder, monkeypatch):
    return Started(monkeypatch)


def test_native_kernels_are_compiled_once(start_natives):
    assert start_natives() == [doubled.name, total.name]
    assert start_natives() == []


@pytest.mark.parametrize(
    "damage", ["data cut", "data cut to its digest", "data empty", "a bit of the code flipped", "data gone"]
)
def test_a_damaged_native_kernel_is_compiled_and_mended(start_natives, folder, damage):
    start_natives()
    DAMAGES[damage][1](folder / f"{total.name}.o")
    assert start_natives() == [total.name]
    assert start_natives() == []


def test_native_kernels_without_a_place(start_natives, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(code_cache, "cache_folder", lambda: tmp_path / "file" / "kernels")
    assert len(start_natives()) == 2
    assert len(start_natives()) == 2


def test_a_disk_that_is_full_leaves_no_half_of_a_native_kernel(start_natives, folder, monkeypatch):
    def full(path, data):
        with path.open("wb") as f:
            f.write(data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert len(start_natives()) == 2
    assert list(folder.iterdir()) == []
    assert len(start_natives()) == 2


def test_a_frozen_app_without_sources_keeps_nothing(start_natives, folder, monkeypatch):
    """Nothing would tell the kernels of one version of the app from those of the next."""
    monkeypatch.setattr(code_cache, "_own_sources", list)
    assert len(start_natives()) == 2
    assert len(start_natives()) == 2
    assert not start() and not start()
    assert not folder.exists()


def test_what_kernels_are_made_of_names_their_folder(monkeypatch):
    sources = code_cache._own_sources()
    assert {"program.py", "tiles.py", "shapes.py", "kv_cache.py", "quant.py"} <= {path.name for path in sources}
    code_cache.cache_folder.cache_clear()
    before = code_cache.cache_folder()
    monkeypatch.setattr(code_cache, "_own_sources", lambda: sources[:-1])
    code_cache.cache_folder.cache_clear()
    assert code_cache.cache_folder() != before
    code_cache.cache_folder.cache_clear()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_native_kernels_that_others_may_write_are_not_run(start_natives, folder):
    start_natives()
    folder.chmod(0o777)
    assert len(start_natives()) == 2
    folder.chmod(0o700)
    assert start_natives() == []


def test_a_kernel_that_needs_more_than_the_c_library_is_refused():
    def needs_numba(x):
        math.gamma(x)

    with pytest.raises(AssertionError, match="is not there without Numba"):
        Native(needs_numba).compile()


def test_prepare_leaves_nothing_for_the_first_call(tiny_model, monkeypatch):
    with edgellama.load(tiny_model, n_threads=2) as llm:
        llm.prepare()
        monkeypatch.setattr(native, "address", lambda name: pytest.fail(f"{name} was not ready"))
        llm.forward([1, 5])
    with edgellama.load(tiny_model, "reference") as llm:
        llm.prepare()  # nothing to do
    with pytest.raises(edgellama.EdgellamaError, match="closed"):
        llm.prepare()


def test_a_warm_start_imports_no_compiler(tiny_model):
    program = f"""
import sys, edgellama
with edgellama.load({str(tiny_model)!r}, n_threads=2) as llm:
    print(llm.generate([1, 5, 9], max_new_tokens=4, temperature=0).token_ids, "numba" in sys.modules)
"""
    first, second = (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert second.endswith(" False\n")
    assert first.split("]")[0] == second.split("]")[0]


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
