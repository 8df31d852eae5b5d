"""`edgellama demo`: one command, no network, one screen."""

import pytest

from edgellama.cli import main
from edgellama.cli.console import WordWrap
from edgellama.format import open_model


@pytest.fixture
def tiny_demo(tiny_checkpoint, tmp_path, monkeypatch):
    """The demo over a random checkpoint; returns its home folder."""
    monkeypatch.setattr("edgellama.cli.demo.checkpoint_dir", lambda: tiny_checkpoint)
    # Not EDGELLAMA_HOME: that would move the compiled kernels, too, and each test would wait for the compiler.
    monkeypatch.setattr("edgellama.paths.cache_dir", lambda: tmp_path / "home")
    return tmp_path / "home"


def test_it_converts_tells_and_streams(tiny_demo, capsys):
    assert main(["demo", "-n", "8", "--seed", "1", "--device", "reference"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Once upon a time")
    file = tiny_demo / "demo.edgellama"
    with open_model(file) as model:
        assert model.provenance
    for word in ("read ", "wrote ", "speed ", "next ", "8 tokens", str(file)):
        assert word in err
    assert "Once upon" not in err


def test_a_seed_repeats_and_a_second_run_replaces_the_file(tiny_demo, capsys):
    texts = []
    for _ in range(2):
        assert main(["demo", "-n", "8", "--device", "reference"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert [each.name for each in tiny_demo.iterdir()] == ["demo.edgellama"]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_words_are_not_broken(size):
    text = "Once upon a time\n\nthere was  a very-long-word-that-does-not-fit  x"
    written = []
    wrap = WordWrap(written.append, width=10)
    for start in range(0, len(text), size):
        wrap.push(text[start : start + size])
    wrap.flush()
    assert "".join(written).split() == text.split()
    assert "".join(written).splitlines()[:4] == ["Once upon", "a time", "", "there was "]
    assert all(len(line) <= 10 or "very-long" in line for line in "".join(written).splitlines())


def test_wide_characters_take_two_cells_and_may_begin_a_line():
    written = []
    wrap = WordWrap(written.append, width=10)
    wrap.push("再讲一个大海的 sea story")
    assert "".join(written).splitlines() == ["再讲一个大", "海的 sea"]  # the last word is not complete
    wrap.flush()
    assert "".join(written).splitlines() == ["再讲一个大", "海的 sea", "story"]


def test_options(tiny_demo, tmp_path, capsys):
    out = tmp_path / "mine.edgellama"
    argv = [
        "demo",
        "-p",
        "Hi",
        "-n",
        "3",
        "--temperature",
        "0",
        "--threads",
        "1",
        "--device",
        "reference",
        "-o",
        str(out),
    ]
    assert main(argv) == 0
    text, err = capsys.readouterr()
    assert text.startswith("Hi")
    assert str(out) in err
    assert out.is_file()
    assert not tiny_demo.exists()


def test_a_file_that_is_not_ours_is_not_replaced(tiny_demo, tmp_path, capsys):
    out = tmp_path / "letter.txt"
    out.write_text("dear")
    assert main(["demo", "-o", str(out)]) == 1
    assert out.read_text() == "dear"
    assert capsys.readouterr().err.count("\n") == 1


def test_a_home_that_cannot_be_made(tiny_demo, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr("edgellama.paths.cache_dir", lambda: tmp_path / "file" / "sub")
    assert main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


def test_the_shipped_model_writes_sentences_on_one_screen(tmp_path, capsys):
    assert main(["demo", "-o", str(tmp_path / "demo.edgellama")]) == 0
    out, err = capsys.readouterr()
    words = out.split()
    assert len(words) > 40
    assert len(set(words)) > 25  # no loop
    assert out.count(".") >= 4
    assert "\ufffd" not in out
    # On a terminal of 80 columns and 24 rows, with the command's own line and the next prompt.
    lines = []
    wrap = WordWrap(lines.append, width=80)
    wrap.push(out)
    wrap.flush()
    story_rows = "".join(lines).rstrip("\n").count("\n") + 1
    assert story_rows <= 15
    assert story_rows + len(err.splitlines()) <= 22
