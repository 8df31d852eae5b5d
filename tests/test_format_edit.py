"""Editing metadata: the weights stay, a failure changes nothing, a torn append is refused and can be undone."""

from __future__ import annotations

import errno
import os

import pytest

from edgellama.errors import EdgellamaError, FormatError
from edgellama.format import append_metadata, open_model, recover
from edgellama.format.container import MAX_SECTIONS
from format_builder import Parts
from format_files import FILES, write_file
from test_format_writer import Failing, failures


def contents(path) -> tuple[dict[str, bytes], dict | None]:
    with open_model(path) as model:
        model.verify()
        return dict(model.files), model.receipt


def test_edits_add_replace_and_remove(tmp_path):
    path = write_file(tmp_path / "m.edgellama")
    size, original = path.stat().st_size, path.read_bytes()
    with open_model(path) as model:
        hashes = {name: entry.xxh3_128 for name, entry in model.tensors.items()}
        provenance = model.provenance
    append_metadata(path, {"chat_template.jinja": b"new"})
    assert contents(path) == ({**FILES, "chat_template.jinja": b"new"}, None)
    append_metadata(path, receipt={"kl": 0.25})
    assert contents(path) == ({**FILES, "chat_template.jinja": b"new"}, {"kl": 0.25})
    append_metadata(path, {"tokenizer_config.json": None, "generation_config.json": b"{}"})
    files = {"chat_template.jinja": b"new", "generation_config.json": b"{}"}
    assert contents(path) == (files, {"kl": 0.25})
    append_metadata(path, receipt=None)
    assert contents(path) == (files, None)
    with open_model(path) as model:
        assert {name: entry.xxh3_128 for name, entry in model.tensors.items()} == hashes
        assert model.provenance == provenance
    assert path.read_bytes()[: size - 8] == original[:-8]  # all but the magic of the superseded trailer
    assert path.stat().st_size < size + 4 * 1024


def test_an_unchanged_file_is_not_stored_again(tmp_path):
    path = write_file(tmp_path / "m.edgellama")
    append_metadata(path, {"tokenizer.json": b"x" * 100_000})
    size = path.stat().st_size
    append_metadata(path, {"chat_template.jinja": b"new"})
    assert path.stat().st_size < size + 2048
    assert contents(path)[0]["tokenizer.json"] == b"x" * 100_000


def test_an_open_reader_is_not_disturbed(tmp_path):
    path = write_file(tmp_path / "m.edgellama")
    with open_model(path) as model:
        append_metadata(path, {"chat_template.jinja": b"new"})
        assert model.files["chat_template.jinja"] == FILES["chat_template.jinja"]
        model.verify()


def test_a_file_cut_behind_an_earlier_section_is_refused(tmp_path):
    path = write_file(tmp_path / "m.edgellama")
    size = path.stat().st_size
    append_metadata(path, {"chat_template.jinja": b"new"})
    os.truncate(path, size)
    with pytest.raises(FormatError, match="cut or was not written"):
        open_model(path)


def test_edits_are_limited(tmp_path):
    path = write_file(tmp_path / "m.edgellama")
    for i in range(MAX_SECTIONS - 1):
        append_metadata(path, receipt={"i": i})
    before = path.read_bytes()
    with pytest.raises(EdgellamaError, match="no room for more edits"):
        append_metadata(path, receipt={"i": 64})
    assert path.read_bytes() == before
    assert contents(path)[1] == {"i": MAX_SECTIONS - 2}
    path = write_file(tmp_path / "n.edgellama")
    with pytest.raises(EdgellamaError, match="no room for more edits"):
        append_metadata(path, {"tokenizer.json": bytes(41 << 20)})
    assert contents(path)[0] == FILES


@pytest.mark.parametrize("error", [*failures(), KeyboardInterrupt()], ids=["ENOSPC", "EIO", "interrupt"])
def test_a_failure_at_every_call(tmp_path, monkeypatch, error):
    """Whatever fails, the file is the old or the new one, byte for byte; after an OSError the old one."""
    path = write_file(tmp_path / "m.edgellama")
    append_metadata(path, receipt={"kl": 1})
    old = path.read_bytes()

    def attempt(fail_at):
        path.write_bytes(old)
        with monkeypatch.context() as patch:
            failing = Failing(patch, fail_at, error)
            try:
                append_metadata(path, {"chat_template.jinja": b"new"})
            except (EdgellamaError, KeyboardInterrupt) as raised:
                return failing.calls, raised
        return failing.calls, None

    total, raised = attempt(None)
    new = path.read_bytes()
    assert raised is None and {"write", "fsync", "seek"} <= set(total)
    for fail_at, name in enumerate(total):
        _, raised = attempt(fail_at)
        if raised is None:
            assert name == "close" and path.read_bytes() == new
        elif isinstance(raised, KeyboardInterrupt):
            assert path.read_bytes() in (old, new)
        else:
            assert path.read_bytes() == old, (fail_at, name)
            assert "\n" not in str(raised) and str(path) in str(raised)


def test_a_torn_append_at_every_length_is_refused_and_recovered(tmp_path):
    path = write_file(tmp_path / "m.edgellama")
    append_metadata(path, {"chat_template.jinja": b"first"})
    old = path.read_bytes()
    append_metadata(path, {"chat_template.jinja": b"second"})
    new = path.read_bytes()
    appended = new[len(old) :]
    for length in range(1, len(appended), 37):
        path.write_bytes(old + appended[:length])  # before the old trailer is superseded
        with pytest.raises(FormatError, match="trailer"):
            open_model(path)
        assert recover(path) is True
        assert path.read_bytes() == old
        assert recover(path) is False
    path.write_bytes(old + appended[:-1])
    append_metadata(path, {"chat_template.jinja": b"second"})  # an edit recovers by itself
    assert path.read_bytes() == new


def test_recover_leaves_other_damage_alone(tmp_path):
    path = write_file(tmp_path / "m.edgellama")
    raw = path.read_bytes()
    for damaged in (raw[:-1], raw[: len(raw) // 2], b"\0" + raw[1:], b"", raw[:40], raw[:-100] + b"x" + raw[-99:]):
        path.write_bytes(damaged)
        with pytest.raises(FormatError):
            recover(path)
        assert path.read_bytes() == damaged
        with pytest.raises(FormatError):
            append_metadata(path, receipt={})
        assert path.read_bytes() == damaged


def test_what_cannot_be_edited(tmp_path):
    with pytest.raises(EdgellamaError, match="no such file"):
        append_metadata(tmp_path / "missing.edgellama", receipt={})
    path = write_file(tmp_path / "m.edgellama")
    before = path.read_bytes()
    with pytest.raises(FormatError, match=r"evil\.py"):
        append_metadata(path, {"evil.py": b""})
    with pytest.raises(FormatError, match="JSON"):
        append_metadata(path, receipt={"x": float("inf")})
    assert path.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="flock")
def test_two_edits_at_once(tmp_path, monkeypatch):
    path = write_file(tmp_path / "m.edgellama")
    from edgellama.format import storage

    fd = storage.open_existing(path)
    assert storage.try_lock(fd)
    with pytest.raises(EdgellamaError, match="another process"):
        append_metadata(path, receipt={})
    storage.close(fd)
    append_metadata(path, receipt={})


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everything")
def test_read_only_file(tmp_path):
    path = write_file(tmp_path / "m.edgellama")
    path.chmod(0o444)
    with pytest.raises(EdgellamaError, match=os.strerror(errno.EACCES)):
        append_metadata(path, receipt={})


def test_old_sections_are_hashed_too(tmp_path):
    path = write_file(tmp_path / "m.edgellama")
    append_metadata(path, {"chat_template.jinja": b"new"})
    raw = bytearray(path.read_bytes())
    at = raw.index(FILES["chat_template.jinja"])  # in the first section, no longer listed
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="section_hash"):
        open_model(path)


def test_the_independent_builder_reads_an_edited_file(tmp_path):
    path = write_file(tmp_path / "m.edgellama")
    append_metadata(path, {"chat_template.jinja": b"new"})
    append_metadata(path, receipt={"kl": 1})
    assert Parts.take_apart(path.read_bytes()).build() == path.read_bytes()
