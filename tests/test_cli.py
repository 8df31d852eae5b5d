"""The command as a user meets it: what goes to stdout and what to stderr, exit codes, no traceback."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pytest

import edgellama
from checkpoints import DEFAULTS, make_checkpoint, random_weights, state_dict_shapes, write_safetensors, write_weights
from edgellama.cli import console, main, options
from edgellama.cli.progress import Progress
from edgellama.errors import EdgellamaError
from edgellama.generate import Generation, Timings
from fakes import fake_llama

COMMAND = [sys.executable, "-m", "edgellama"]
VERBS = [
    "convert",
    "generate",
    "chat",
    "run",
    "list",
    "rm",
    "info",
    "verify",
    "export",
    "demo",
    "bench",
    "perplexity",
    "compare",
]


@pytest.fixture
def fake(monkeypatch):
    """`edgellama generate` gets this model, whatever the file."""
    llm = fake_llama()
    monkeypatch.setattr("edgellama.model.load", lambda *args, **kwargs: llm)
    return llm


def run(*argv, **kwargs):
    return subprocess.run([*COMMAND, *argv], capture_output=True, text=True, timeout=120, check=False, **kwargs)


# -- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_goes_to_stdout_with_an_example_and_fits_80_columns(argv, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "edgellama " + (argv[0] if argv[0] in VERBS else "generate") in out.split("example", 1)[-1]
    assert max(map(len, out.splitlines())) <= 80


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"edgellama {edgellama.__version__}\n"


def test_no_arguments_shows_help_and_is_wrong_usage(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "edgellama demo" in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["genrate"], "unknown verb 'genrate'; did you mean 'generate'?"),
        (["convrt", "x"], "did you mean 'convert'?"),
        (["xyzzy"], "unknown verb 'xyzzy'"),
        (["--versoin"], "did you mean '--version'?"),
        (["generate", "m", "-p", "a", "--temprature", "1"], "did you mean '--temperature'?"),
        (["generate", "m", "-p", "a", "--temp", "-1"], "--temperature"),
        (["generate", "m", "-p", "a", "--temperature", "hot"], "'hot' is not a number"),
        (["generate", "m", "-p", "a", "--top-p", "0"], "--top-p: must be above 0"),
        (["generate", "m", "-p", "a", "--top-p", "2"], "from 0 to 1"),
        (["generate", "m", "-p", "a", "-n", "0"], "too small"),
        (["generate", "m", "-p", "a", "-n", "many"], "whole number"),
        (["generate", "m", "-p", "a", "-s", str(2**64)], "too large"),
        (["generate", "m"], "-p/--prompt"),
        (["generate", "-p", "a"], "give one MODEL"),
        (["generate", "m", "-m", "m", "-p", "a"], "MODEL was given twice"),
        (["generate", "m", "-p", "a", "--device", "tpu"], "--device"),
        (["info"], "give one MODEL"),
        (["convert"], "SOURCE"),
        (["convert", "x", "--lm-head-bits", "5"], "--lm-head-bits"),
        (["convert", "x", "--max-ram", "lots"], "'lots' is not a size"),
        (["export", "m", "--to", "gguf", "d"], "--to hf DIR"),
        (["export", "m"], "--to"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(argv, says, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
    assert err.startswith("edgellama: ")


def test_sizes_of_options():
    assert options.byte_size("1.5G") == 1_500_000_000
    assert options.byte_size("2GiB") == 2 << 30
    assert options.byte_size(" 800 MB ") == 800_000_000


# -- generate --------------------------------------------------------------------------------------------------------


def test_the_text_goes_to_stdout_and_the_rest_to_stderr(fake, capsys):
    assert main(["generate", "m", "-p", "a", "-n", "3", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out == "bcd\n"
    assert "3 new at " in err
    assert err.count("\n") == 1
    assert fake.backend.closed


def test_quiet_says_nothing(fake, capsys):
    assert main(["generate", "-m", "m", "-p", "a", "-n", "3", "--temp", "0", "-q"]) == 0
    assert capsys.readouterr() == ("bcd\n", "")


def test_json_is_one_object(fake, capsys):
    assert main(["generate", "m", "-p", "a", "-n", "3", "--temperature", "0", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert set(value) == {each.name for each in fields(Generation)}
    assert set(value["timings"]) == {each.name for each in fields(Timings)}
    assert (value["text"], value["token_ids"], value["finish_reason"]) == ("bcd", [3, 4, 5], "length")


def test_notes_of_the_model_are_shown(fake, capsys):
    fake.notes = ("context cut to 512",)
    main(["generate", "m", "-p", "a", "-n", "1"])
    assert "note: context cut to 512" in capsys.readouterr().err


@pytest.mark.parametrize("text", [b"a\n", b"a\r\n", b"a", b"\xef\xbb\xbfa\n"])
def test_prompt_from_stdin_without_its_last_line_break(fake, capsys, monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert main(["generate", "m", "-p", "-", "-n", "2", "--temp", "0"]) == 0
    assert capsys.readouterr().out == "bc\n"
    assert fake.backend.calls[0][0] == [0, 2]


def test_stdin_that_is_not_utf8(fake, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert main(["generate", "m", "-p", "-"]) == 1
    assert "byte 2 is 0xff" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [[], ["--json"]])
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (EdgellamaError("the one\nline"), "the one line"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: no space left on the disk"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: permission denied"),
        (MemoryError(), "out of memory"),
        (EdgellamaError("evil \x1b[2J name"), "evil ?[2J name"),
    ],
)
def test_errors_are_one_line_and_exit_1(fake, capsys, error, says, extra):
    def forward(*_):
        raise error

    fake.backend.forward = forward
    assert main(["generate", "m", "-p", "a", *extra]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"edgellama: error: {err.removeprefix('edgellama: error: ')}"
    assert says in err
    assert err.count("\n") == 1


def test_a_bug_keeps_its_traceback(fake):
    def forward(*_):
        raise AssertionError("ours")

    fake.backend.forward = forward
    with pytest.raises(AssertionError, match="ours"):
        main(["generate", "m", "-p", "a"])


def test_ctrl_c_before_the_first_token(fake, capsys):
    def forward(*_):
        raise KeyboardInterrupt

    fake.backend.forward = forward
    assert main(["generate", "m", "-p", "a"]) == 130
    assert capsys.readouterr() == ("", "edgellama: interrupted\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_was_said(fake, capsys, as_json):
    forward = fake.backend.forward

    def interrupt_the_fourth(*args):
        if len(fake.backend.calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(*args)

    fake.backend.forward = interrupt_the_fourth
    before = signal.getsignal(signal.SIGINT)
    argv = ["generate", "m", "-p", "a", "-n", "20", "--temperature", "0"]
    assert main([*argv, "--json"] if as_json else argv) == 130
    out, err = capsys.readouterr()
    if as_json:
        assert json.loads(out)["finish_reason"] == "cancelled"
        assert json.loads(out)["text"] == "bcd"
    else:
        assert out == "bcd\n"
    assert err == "edgellama: interrupted after 3 tokens\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_text_for_a_terminal_has_no_escape_sequences(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    console.say("a\x1b]0;title\x07b\nc\u202e")
    assert capsys.readouterr().out == "a?]0;title?b\nc?\n"


@pytest.mark.parametrize(
    ("environment", "terminal", "coloured"),
    [
        ({}, True, True),
        ({"NO_COLOR": ""}, True, True),
        ({"NO_COLOR": "0"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({}, False, False),
    ],
)
def test_colours(monkeypatch, environment, terminal, coloured):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm", "WT_SESSION": "1"} | environment).items():
        monkeypatch.setenv(name, value)
    assert console.styled("x", "bold", sys.stderr) == ("\x1b[1mx\x1b[0m" if coloured else "x")


def test_a_note_is_broken_between_words_on_a_terminal_only(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    console.note("three little words, /a/very/long/path")
    assert capsys.readouterr().err == "three little words, /a/very/long/path\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    console.note("three little words, /a/very/long/path")
    assert capsys.readouterr().err == "three\nlittle\nwords,\n/a/very/long/path\n"


# -- progress --------------------------------------------------------------------------------------------------------


def test_progress_in_a_log_is_a_few_plain_lines(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("edgellama.cli.progress.time.monotonic", lambda: now[0])
    with Progress("convert", "weights") as progress:
        for done in range(0, 1001):
            now[0] += 0.1
            progress.update(done, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "convert: 10 %, 1 min 30 s left"
    assert lines[-1] == "convert: 100 %, 0 ms left"


def test_progress_on_a_terminal_is_a_bar_that_goes_away(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("convert", "weights") as progress:
        progress.update(0, 4)
        time.sleep(0.15)  # the bar is redrawn ten times a second at most
        progress.update(1, 4)
    err = capsys.readouterr().err
    assert "convert  25%" in err
    assert " left" in err
    assert "\n" not in err.rstrip("\n")


# -- real processes --------------------------------------------------------------------------------------------------


def test_importing_the_command_is_light():
    code = (
        "import sys; from edgellama.cli.parser import parse\n"
        "try: parse(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numba', 'numpy', 'tokenizers', 'tqdm', 'huggingface_hub', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_missing_file_in_a_real_process(tmp_path):
    done = run("info", str(tmp_path / "none.edgellama"), "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("edgellama: error: no such file: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", [["info"], ["verify"], ["generate", "-p", "a"], ["export", "--to", "hf", "x"]])
def test_a_file_that_is_none_of_ours(tmp_path, capsys, verb):
    path = tmp_path / "x.edgellama"
    path.write_bytes(b"not a model " * 1000)
    assert main([verb[0], str(path), *verb[1:]]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


def test_generate_and_json_agree(tiny_model, capsys):
    argv = ["generate", str(tiny_model), "-p", "Hi", "-n", "12", "--temperature", "0", "--device", "reference"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert text == value["text"] + "\n" * (not value["text"].endswith("\n"))
    assert value["prompt_token_ids"][0] == 1


@pytest.mark.parametrize("available", [["cpu"], ["cuda", "cpu"]])
def test_info_says_whose_memory_is_taken_at_once(tiny_model, capsys, monkeypatch, available):
    monkeypatch.setattr("edgellama.devices.available", lambda: available)
    assert main(["info", str(tiny_model)]) == 0
    assert ("cuda takes the cache of all n_slots at once" in capsys.readouterr().out) == ("cuda" in available)


def test_info(tiny_model, capsys):
    assert main(["info", str(tiny_model)]) == 0
    text = capsys.readouterr().out
    assert main(["info", str(tiny_model), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["size_bytes"] == tiny_model.stat().st_size
    assert facts["hidden_size"] == 192
    assert facts["layers"] == 2
    # 277*192 twice, 2 layers of attention 192*(192+64+64+192) and MLP 3*192*352, 5 norms of 192
    assert facts["parameters"] == 2 * 277 * 192 + 2 * (192 * 512 + 3 * 192 * 352) + 5 * 192
    assert "2 layers" in text
    assert str(tiny_model) in text


def test_verify(tiny_model, tmp_path, capsys):
    assert main(["verify", str(tiny_model)]) == 0
    assert "ok" in capsys.readouterr().out
    assert main(["verify", str(tiny_model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    from edgellama.format import open_model

    with open_model(tiny_model) as file:
        entry = list(file.tensors.values())[3]
    data = bytearray(tiny_model.read_bytes())
    data[entry.offset + 5] ^= 4
    bad = tmp_path / "bad.edgellama"
    bad.write_bytes(data)
    assert main(["verify", str(bad)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert entry.name in err
    assert err.count("\n") == 1


def test_convert_tells_and_keeps_stdout_for_the_answer(tiny_checkpoint, tmp_path, capsys):
    out_path = tmp_path / "t.edgellama"
    calibrated = ["--method", "gptq", "--calibration-tokens", "1024"]
    assert main(["convert", str(tiny_checkpoint), "-o", str(out_path), *calibrated]) == 0
    out, err = capsys.readouterr()
    assert out == f"{out_path}\n"
    for word in ("bits  ", "error  at most", "weights/s", f"edgellama generate {out_path}"):
        assert word in err
    assert main(["convert", str(tiny_checkpoint), "-o", str(out_path), "--json", *calibrated]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["file_bytes"] == out_path.stat().st_size


def test_convert_names_what_it_ignored_and_what_is_possible_next(tmp_path, capsys):
    config = make_checkpoint(tmp_path / "model")
    weights = random_weights(config, 0)
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.zeros(16, np.float32)
    write_safetensors(tmp_path / "model" / "model.safetensors", weights, "float16")
    assert main(["convert", str(tmp_path / "model"), "-o", str(tmp_path / "m.edgellama")]) == 0
    err = capsys.readouterr().err
    assert "ignored model.layers.0.self_attn.rotary_emb.inv_freq and 1 more (--json names all): follows from" in err
    assert "edgellama info " in err and "edgellama generate" not in err  # there is no tokenizer


@pytest.mark.parametrize("source", ["empty", "nowhere/at/all"])
def test_convert_of_nothing(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    assert main(["convert", source]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


def test_a_damaged_model_says_what_to_do(tiny_model, tmp_path, capsys):
    data = tiny_model.read_bytes()
    cases = {"cut": data[:5000], "damaged": data[:64] + b"!" + data[65:], "another kind": b"GGUF" * 2000}
    for name, content in cases.items():
        (tmp_path / "m.edgellama").write_bytes(content)
        assert main(["info", str(tmp_path / "m.edgellama")]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.endswith("download it again\n") != (name == "another kind"), err


def test_export(tiny_model, tmp_path, capsys):
    assert main(["export", str(tiny_model), "--to", "hf", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "config.json").is_file()
    assert capsys.readouterr().out == f"{tmp_path / 'hf'}\n"


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes and signals")
def test_a_closed_pipe_is_quiet(tiny_model):
    command = subprocess.list2cmdline([*COMMAND, "generate", str(tiny_model), "-p", "a", "--device", "reference", "-q"])
    done = subprocess.run(
        f"({command} -n 60; echo code $? >&2) | head -c 1", shell=True, capture_output=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.stderr == b"code 0\n"


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes and signals")
@pytest.mark.parametrize(("redirect", "code"), [(">&-", 0), ("2>&-", 0), ("<&- -p -", 1), (">/dev/full", 1)])
def test_closed_and_full_streams(tiny_model, redirect, code):
    if "/dev/full" in redirect and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    command = subprocess.list2cmdline([*COMMAND, "generate", str(tiny_model), "-n", "5", "--device", "reference"])
    done = subprocess.run(f"{command} -p a {redirect}", shell=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.count(b"\n") == (redirect != "2>&-")


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes and signals")
def test_sigint_ends_a_reply_with_what_it_has(tiny_checkpoint, tmp_path):
    """A real process and a real SIGINT, sent once text has appeared."""
    from edgellama_convert import convert

    checkpoint = tmp_path / "long"
    checkpoint.mkdir()
    for file in tiny_checkpoint.iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": []}')
    convert(checkpoint, tmp_path / "long.edgellama", method="search")
    argv = ["generate", str(tmp_path / "long.edgellama"), "-p", "a", "-n", "90000", "--device", "reference"]
    process = subprocess.Popen([*COMMAND, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.read(1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first + rest) > 1
    assert rest.endswith(b"\n")
    assert err.decode().splitlines()[-1].startswith("edgellama: interrupted after ")
    assert err.count(b"\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes and signals")
def test_sigint_during_convert_leaves_nothing(tmp_path):
    config = {**DEFAULTS, "hidden_size": 768, "num_hidden_layers": 2, "intermediate_size": 16384}
    weights = {name: np.full(shape, 0.5, np.float32) for name, shape in state_dict_shapes(config).items()}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    write_weights(tmp_path / "source", weights, dtype="float32")
    target = tmp_path / "out"
    target.mkdir()
    argv = ["convert", str(tmp_path / "source"), "-o", str(target / "m.edgellama"), "-t", "1"]
    process = subprocess.Popen([*COMMAND, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(target.iterdir()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)  # until the temporary file is there
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err == "edgellama: interrupted; nothing was written\n"
    assert list(target.iterdir()) == []
