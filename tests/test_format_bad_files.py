"""F1: handcrafted bad files, each refused with the field and the byte offset, in bounded time and memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgellama.errors import EdgellamaError, FormatError
from edgellama.format import open_model
from format_builder import Parts
from format_cases import cases
from format_files import write_file

GUARD = Path(__file__).with_name("format_guard.py")
MAX_MB = 64
MAX_SECONDS = 0.1
HANG_SECONDS = 5.0


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("bad")
    valid = write_file(folder / "valid.edgellama").read_bytes()
    files = {}
    for name, raw, field in cases(valid):
        path = folder / f"{name}.edgellama"
        path.write_bytes(raw)
        files[name] = (path, field)
    return files


def guard(paths: list[Path], timeout: float) -> list[dict]:
    command = [sys.executable, str(GUARD), *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, f"signal or crash: {result.returncode}\n{result.stderr[-2000:]}"
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(reports) == len(paths)
    return reports


def check(report: dict, path: Path, field: str) -> None:
    assert report["error"] == "FormatError", report
    assert re.fullmatch(field, report["field"]), report
    assert report["offset"] is not None and 0 <= report["offset"] <= path.stat().st_size, report
    assert "\n" not in report["message"] and len(report["message"]) < 500, report
    assert report["grown_mb"] < MAX_MB, report


def test_the_builder_agrees_with_the_writer(tmp_path):
    """Two writers from one specification: taking apart and building again gives the same bytes."""
    valid = write_file(tmp_path / "a.edgellama").read_bytes()
    assert Parts.take_apart(valid).build() == valid


def test_bad_files(bad_files):
    assert len(bad_files) >= 45
    reports = guard([path for path, _ in bad_files.values()], timeout=120)
    for (path, field), report in zip(bad_files.values(), reports, strict=True):
        check(report, path, field)
        assert report["seconds"] < HANG_SECONDS, report


@pytest.mark.slow
def test_bad_files_one_process_each(bad_files):
    """The full form: a process for each file. CPU time, the best of three, stays under the goal."""
    for path, field in bad_files.values():
        reports = guard([path] * 3, timeout=30)
        check(reports[0], path, field)
        assert min(report["seconds"] for report in reports) < MAX_SECONDS, reports


def test_the_error_names_the_file(bad_files):
    path, _ = bad_files["offset-hole"]
    with pytest.raises(FormatError) as caught:
        open_model(path)
    assert str(caught.value).startswith(f"{path}: header.tensors[3].offset (byte ")


def test_the_offset_is_that_of_the_value(bad_files):
    path, _ = bad_files["nbytes-huge"]
    with pytest.raises(FormatError) as caught:
        open_model(path)
    assert path.read_bytes()[caught.value.offset :].startswith(b"9223372036854775807")


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "device", "nul", "long", "socket"])
def test_what_is_not_a_file(tmp_path, monkeypatch, kind):
    path: Path | str = tmp_path / "x.edgellama"
    match kind:
        case "folder":
            Path(path).mkdir()
        case "fifo":
            if not hasattr(os, "mkfifo"):
                pytest.skip("no pipes here")
            os.mkfifo(path)
        case "device":
            path = os.devnull
        case "nul":
            path = "a\0b"
        case "long":
            path = tmp_path / ("x" * 5000)
        case "socket":
            if not hasattr(os, "mkfifo"):
                pytest.skip("no sockets here")
            import socket

            with socket.socket(socket.AF_UNIX) as server:
                monkeypatch.chdir(tmp_path)  # the address of a socket is short
                server.bind("x.edgellama")
    with pytest.raises(EdgellamaError) as caught:
        open_model(path)
    assert not isinstance(caught.value, FormatError)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(tmp_path):
    path = write_file(tmp_path / "x.edgellama")
    path.chmod(0)
    with pytest.raises(EdgellamaError, match="cannot be read"):
        open_model(path)
