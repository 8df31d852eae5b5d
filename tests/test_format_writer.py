"""The writer: deterministic, atomic, and at any failure the destination is what it was."""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgellama.errors import ConfigError, EdgellamaError, FormatError
from edgellama.format import ModelWriter, blocks, open_model, storage
from edgellama.format import writer as writer_module
from format_files import CONFIG, FILES, PROVENANCE, tensor_bytes, write_file

CALLS = ("create", "truncate", "seek", "write", "fsync", "link", "replace", "fsync_folder", "unlink", "close")


def temporary_files(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    a, b = write_file(tmp_path / "a.edgellama"), write_file(tmp_path / "b.edgellama")
    assert a.read_bytes() == b.read_bytes()
    assert write_file(tmp_path / "c.edgellama", seed=1).read_bytes() != a.read_bytes()


def test_pieces_and_kinds_of_data_give_the_same_bytes(tmp_path):
    whole = write_file(tmp_path / "a.edgellama").read_bytes()
    with ModelWriter(tmp_path / "b.edgellama", CONFIG, lm_head_bits=8, method="rtn") as writer:
        for i, spec in enumerate(writer.specs):
            array = tensor_bytes(spec)
            raw = array.tobytes()
            kinds = [
                raw,
                bytearray(raw),
                memoryview(array),
                iter([raw[:7], raw[7:]]),
                (array.reshape(-1)[j : j + 9] for j in range(0, array.size, 9)),
                np.asfortranarray(array),
                array.astype(array.dtype.newbyteorder(">")),
            ]
            entry = writer.write(spec.name, kinds[i % len(kinds)])
            assert entry.name == spec.name
        writer.finish(FILES, PROVENANCE)
    assert (tmp_path / "b.edgellama").read_bytes() == whole


def fill(writer: ModelWriter, count: int | None = None) -> None:
    for spec in writer.specs[:count]:
        writer.write(spec.name, tensor_bytes(spec))


@pytest.mark.parametrize(
    "mistake, problem",
    [
        (lambda w: w.write("lm_head.weight", b""), "must be model.embed_tokens.qweight"),
        (lambda w: w.write(w.specs[0].name, b"x"), "bytes, got 1"),
        (lambda w: w.write(w.specs[0].name, bytes(1 << 20)), "got more"),
        (lambda w: w.write(w.specs[0].name, np.zeros(10, np.float64)), "must be uint8, got float64"),
        (lambda w: w.finish({}, {}), "was not written, 19 tensors are missing"),
        (lambda w: (fill(w, 18), w.finish({}, {})), "model.norm.weight was not written, 1 tensors"),
        (lambda w: (fill(w), w.write("x", b"")), "tensor 19 must be None"),
        (lambda w: (w.abort(), fill(w)), "closed"),
        (lambda w: (fill(w), w.finish({}, {}), w.finish({}, {})), "closed"),
    ],
)
def test_mistakes_of_the_caller(tmp_path, mistake, problem):
    writer = ModelWriter(tmp_path / "m.edgellama", CONFIG, lm_head_bits=8, method="rtn")
    with pytest.raises(ValueError, match=problem):
        mistake(writer)
    assert not temporary_files(tmp_path)


@pytest.mark.parametrize(
    "files, provenance, receipt, field",
    [
        ({"evil.py": b""}, {}, None, "files"),
        ({}, {"x": float("nan")}, None, "metadata"),
        ({}, {"x": "\ud800"}, None, "metadata"),
        ({}, {"x": {1: 2}}, None, "metadata"),
        ({}, {"x": object()}, None, "metadata"),
        ({}, {}, {"x": (1, 2)}, "metadata"),
        ({}, {"x": "y" * (1 << 20)}, None, "metadata"),
        ({"tokenizer.json": bytes(41 << 20)}, {}, None, "trailer.section_offset"),
    ],
)
def test_metadata_that_no_reader_would_accept(tmp_path, files, provenance, receipt, field):
    with pytest.raises(FormatError) as caught, ModelWriter(tmp_path / "m.edgellama", CONFIG, method="rtn") as writer:
        fill(writer)
        writer.finish(files, provenance, receipt)
    assert caught.value.field == field
    assert os.listdir(tmp_path) == []


def test_a_bad_config_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError):
        ModelWriter(tmp_path / "m.edgellama", {**CONFIG, "hidden_size": -1}, method="rtn")
    with pytest.raises(ValueError, match="lm_head_bits"):
        ModelWriter(tmp_path / "m.edgellama", CONFIG, method="rtn", lm_head_bits=5)
    with pytest.raises(ValueError, match="method"):
        ModelWriter(tmp_path / "m.edgellama", CONFIG, method="a b")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["text", "empty", "folder", "missing-folder", "file-as-folder", "pipe"])
def test_destinations_that_are_refused(tmp_path, kind):
    path = tmp_path / "m.edgellama"
    match kind:
        case "text":
            path.write_text("my only copy")
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "missing-folder":
            path = tmp_path / "a" / "m.edgellama"
        case "file-as-folder":
            path.write_text("x")
            path = path / "m.edgellama"
        case "pipe":
            if not hasattr(os, "mkfifo"):
                pytest.skip("no pipes here")
            os.mkfifo(path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(EdgellamaError) as caught:
        ModelWriter(path, CONFIG, method="rtn")
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before
    assert kind != "text" or path.read_text() == "my only copy"


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "m.edgellama"
    with pytest.raises(EdgellamaError, match="is not an"), ModelWriter(path, CONFIG, method="rtn") as writer:
        fill(writer)
        path.write_text("notes")
        writer.finish({}, {})
    assert path.read_text() == "notes"
    assert not temporary_files(tmp_path)


def test_too_little_disk_space(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(EdgellamaError, match=r"needs 0\.05 MB of disk space, .* has 0\.00 MB: make room"):
        ModelWriter(tmp_path / "m.edgellama", CONFIG, method="rtn")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights there")
def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "m.edgellama"
    link.symlink_to(tmp_path / "disk" / "m.edgellama")
    write_file(link)
    assert link.is_symlink() and os.listdir(tmp_path / "disk") == ["m.edgellama"]
    old = link.read_bytes()
    write_file(link, seed=1)
    assert link.is_symlink() and link.read_bytes() != old


class Failing:
    """Replaces the functions of `storage`; lets `fail_at` calls pass and raises `error` at the next one."""

    def __init__(self, monkeypatch, fail_at: int | None, error: BaseException | None = None):
        self.calls: list[str] = []
        self.fail_at, self.error = fail_at, error
        for name in CALLS:
            monkeypatch.setattr(storage, name, self._wrap(name, getattr(storage, name)))

    def _wrap(self, name, function):
        def call(*args):
            self.calls.append(name)
            if len(self.calls) - 1 == self.fail_at:
                if name == "write" and isinstance(self.error, OSError) and self.error.errno == errno.ENOSPC:
                    function(args[0], args[1][: len(args[1]) // 2])  # a full disk takes what fits
                raise self.error
            return function(*args)

        return call


def failures() -> list[BaseException]:
    return [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(errno.EIO, os.strerror(errno.EIO))]


@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("error", [*failures(), KeyboardInterrupt()], ids=["ENOSPC", "EIO", "interrupt"])
def test_a_failure_at_every_call(tmp_path, monkeypatch, existing, error):
    """C2: at each system call of the writer in turn. Absent or old, temporary file gone; or else success."""
    path = tmp_path / "m.edgellama"
    old = write_file(tmp_path / "old", seed=1).read_bytes()
    new = write_file(tmp_path / "new").read_bytes()

    def attempt(fail_at: int | None) -> tuple[list[str], BaseException | None]:
        path.unlink(missing_ok=True)
        if existing:
            path.write_bytes(old)
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "BLOCK", 1 << 10)  # many writes
            failing = Failing(patch, fail_at, error)
            try:
                write_file(path)
            except (EdgellamaError, KeyboardInterrupt) as raised:
                return failing.calls, raised
        return failing.calls, None

    total, raised = attempt(None)
    assert raised is None and len(total) > 40
    assert {"create", "truncate", "write", "fsync", "replace", "fsync_folder"} <= set(total)
    for fail_at, name in enumerate(total):
        calls, raised = attempt(fail_at)
        assert calls[fail_at] == name
        left = path.read_bytes() if path.exists() else None
        if raised is None:  # the step was not needed: a backup's name, a close after the work
            assert name in ("link", "unlink", "close") and left == new, (fail_at, name)
        elif isinstance(raised, KeyboardInterrupt):  # before or after the rename
            assert left in (new, old if existing else None)
        else:
            assert left == (old if existing else None), (fail_at, name)
            assert "\n" not in str(raised) and str(path) in str(raised)
        leftovers = temporary_files(tmp_path)
        if name != "unlink":
            assert not leftovers, (fail_at, name)
        for leftover in leftovers:
            (tmp_path / leftover).unlink()


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """After a power cut a name must not lead to bytes that never arrived."""
    failing = Failing(monkeypatch, None)
    write_file(tmp_path / "m.edgellama")
    steps = [name for name in failing.calls if name in ("write", "fsync", "replace", "fsync_folder")]
    assert steps[-4:] == ["write", "fsync", "replace", "fsync_folder"]
    assert steps.count("fsync") == steps.count("replace") == 1


def test_an_error_of_the_data_is_passed_on(tmp_path):
    """A source that cannot be read must not be reported as a destination that cannot be written."""

    def pieces():
        yield b"x"
        raise OSError(errno.EIO, "source disk")

    with pytest.raises(OSError, match="source disk"), ModelWriter(tmp_path / "m", CONFIG, method="rtn") as writer:
        writer.write(writer.specs[0].name, pieces())
    assert os.listdir(tmp_path) == []


def test_leaving_without_finish_leaves_nothing(tmp_path):
    path = write_file(tmp_path / "m.edgellama")
    old = path.read_bytes()
    with ModelWriter(path, CONFIG, method="rtn") as writer:
        fill(writer)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["m.edgellama"]


@pytest.mark.skipif(os.name == "nt", reason="a mapped file cannot be replaced on Windows")
def test_a_writer_that_is_dropped_leaves_nothing(tmp_path):
    """As when Ctrl-C strikes between the constructor and `with`."""
    writer = ModelWriter(tmp_path / "a.edgellama", CONFIG, lm_head_bits=8, method="rtn")
    assert temporary_files(tmp_path)
    del writer
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_replacing_a_file_under_an_open_reader(tmp_path):
    """C4: the reader keeps the bytes it has mapped."""
    path = write_file(tmp_path / "m.edgellama")
    with open_model(path) as model:
        before = {name: model.array(name).copy() for name in model.tensors}
        write_file(path, seed=1, vocab_size=100)
        for name, array in before.items():
            assert np.array_equal(model.array(name), array)
        model.verify()
        with open_model(path) as new:
            assert new.config.vocab_size == 100


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from format_files import write_file
from edgellama.format import open_model
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[3])):
    write_file(sys.argv[2], hidden_size=256, intermediate_size=2048)
    with open_model(sys.argv[2]) as model:
        model.verify()
"""


def start(path: Path, count: int) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(path), str(count)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.mark.skipif(os.name == "nt", reason="a mapped file cannot be replaced on Windows")
def test_two_writers_to_one_destination(tmp_path):
    """C3: 20 writes each at the same time; whoever wins, the file is whole, and no live writer loses its file."""
    path = tmp_path / "m.edgellama"
    expected = write_file(tmp_path / "expected", hidden_size=256, intermediate_size=2048).read_bytes()
    processes = [start(path, 20) for _ in range(2)]
    for process in processes:
        go(process)
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert path.read_bytes() == expected
    assert not temporary_files(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="needs kill -9")
@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_writers(tmp_path, kills):
    """kill -9 at random moments: absent or whole; the next writer cleans up and makes the same bytes."""
    path = tmp_path / "m.edgellama"
    expected = write_file(tmp_path / "expected", hidden_size=256, intermediate_size=2048).read_bytes()
    rng = random.Random(7)
    for _ in range(kills):
        process = start(path, 1000)
        go(process)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if path.exists():
            assert path.read_bytes() == expected
        for name in temporary_files(tmp_path):
            if (tmp_path / name).read_bytes() != expected:  # not even under its own name is a partial file accepted
                with pytest.raises(FormatError):
                    open_model(tmp_path / name)
    write_file(path, hidden_size=256, intermediate_size=2048)
    assert path.read_bytes() == expected
    assert not temporary_files(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="flock")
def test_a_stale_temporary_file_goes_and_a_live_one_stays(tmp_path):
    path = tmp_path / "m.edgellama"
    stale = tmp_path / ".m.edgellama.4242-0123abcd.tmp"
    stale.write_bytes(b"partial")
    others = [
        tmp_path / ".m.edgellama.tmp",
        tmp_path / ".other.edgellama.1-0123abcd.tmp",
        tmp_path / ".m.edgellama.1-x.tmp",
    ]
    for other in others:
        other.write_bytes(b"not ours")
    with ModelWriter(path, CONFIG, method="rtn") as live:
        fill(live, 3)
        write_file(path, seed=1)
        assert not stale.exists()
        assert all(other.exists() for other in others)
        for spec in live.specs[3:]:
            live.write(spec.name, tensor_bytes(spec))
        live.finish({}, {})
    with open_model(path) as model:
        model.verify()


@pytest.mark.parametrize("system", ["windows", "no-locks"])
def test_systems_without_locks(tmp_path, monkeypatch, system):
    """The steps for Windows (close before rename or removal, age instead of locks) and for network disks, run here."""
    monkeypatch.setattr(storage, "fcntl", None)
    monkeypatch.setattr(storage, "WINDOWS", system == "windows")
    path = tmp_path / "m.edgellama"
    fresh, stale = (tmp_path / f".m.edgellama.1-0000000{i}.tmp" for i in range(2))
    for file in (fresh, stale):
        file.touch()
    os.utime(stale, (1, 1))
    write_file(path)
    assert fresh.exists() and stale.exists() == (system == "no-locks")
    old = path.read_bytes()
    with ModelWriter(path, CONFIG, method="rtn") as writer:
        fill(writer, 3)
    write_file(path, seed=1)
    assert path.read_bytes() != old
    assert set(os.listdir(tmp_path)) <= {"m.edgellama", fresh.name, stale.name}


def test_what_was_written_can_be_read_before_it_is_published(tmp_path):
    whole = write_file(tmp_path / "a.edgellama").read_bytes()
    with ModelWriter(tmp_path / "b.edgellama", CONFIG, lm_head_bits=8, method="rtn") as writer:
        for spec in writer.specs:
            with pytest.raises(ValueError, match="was not written yet"):
                writer.read(spec.name, 0, 1)
            writer.write(spec.name, tensor_bytes(spec))
            stored = writer.read(spec.name, 0, len(tensor_bytes(spec)))
            np.testing.assert_array_equal(stored, tensor_bytes(spec))
        for spec in writer.specs:
            array = tensor_bytes(spec)
            half = len(array) // 2
            np.testing.assert_array_equal(writer.read(spec.name, half, len(array)), array[half:])
            assert writer.read(spec.name, half, half).shape == (0, *array.shape[1:])
            with pytest.raises(ValueError, match=r"is not within its"):
                writer.read(spec.name, 0, len(array) + 1)
        writer.finish(FILES, PROVENANCE)
    assert (tmp_path / "b.edgellama").read_bytes() == whole
    with pytest.raises(ValueError, match="closed"):
        writer.read(writer.specs[0].name, 0, 1)
