"""`chat`, `run`, `list` and `rm` as commands: one message in, one answer out; a model from anywhere."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from edgellama import store
from edgellama.cli import console, main, parameters
from edgellama.generate import GenerateOptions
from edgellama.paths import models_dir
from fakes import fake_llama, hash_llama

ANSWER = ["-n", "3", "--temperature", "0"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for module in ("paths", "cli.conversation", "cli.repl"):
        monkeypatch.setattr(f"edgellama.{module}.data_dir", lambda: tmp_path / "home")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "home"


@pytest.fixture
def fake(monkeypatch):
    """What any file holds: a model without a chat template."""
    llm = fake_llama()
    monkeypatch.setattr("edgellama.model.load", lambda *args, **kwargs: llm)
    return llm


def stdin(monkeypatch, data):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


# -- parameters ------------------------------------------------------------------------------------------------------


def test_every_parameter_is_one_of_generate():
    names = set(GenerateOptions.__annotations__) | {"max_new_tokens"}
    assert set(parameters.BY_NAME) <= names


@pytest.mark.parametrize(
    ("option", "value", "name", "means"),
    [
        ("--typical-p", "0.9", "typical_p", 0.9),
        ("--repetition-penalty", "1.1", "repetition_penalty", 1.1),
        ("--presence-penalty", "-0.5", "presence_penalty", -0.5),
        ("--no-repeat-ngram-size", "3", "no_repeat_ngram_size", 3),
        ("--top-n-sigma", "-1", "top_n_sigma", -1.0),
        ("--mirostat", "2", "mirostat", 2),
        ("--stop", "a\\nb\\\\n", "stop", ["a\nb\\n"]),
        ("--choice", "yes", "choice", ["yes"]),
        ("--json-schema", ' {"type": "object"}', "json_schema", {"type": "object"}),
        ("--regex", "[a-c]+", "regex", "[a-c]+"),
        ("--prompt-lookup", "4", "prompt_lookup_num_tokens", 4),
    ],
)
def test_options_reach_generate_under_its_names(fake, monkeypatch, capsys, option, value, name, means):
    given = {}
    generate = fake.generate

    def spy(prompt, *args, **options):
        given.update(options)
        return generate(prompt, max_new_tokens=1, stream=True)

    monkeypatch.setattr(fake, "generate", spy)
    assert main(["generate", "m", "-p", "a", option, value]) == 0
    assert given.pop("stream") is True
    assert given == {name: means}


def test_a_schema_and_a_grammar_come_from_files(fake, monkeypatch, tmp_path, capsys):
    schema, grammar = tmp_path / "schema.json", tmp_path / "x.gbnf"
    schema.write_text('{"type": "string"}')
    grammar.write_text('root ::= "a"')
    args = {}
    monkeypatch.setattr(fake, "close", lambda: None)  # it is opened twice
    monkeypatch.setattr(
        fake, "generate", lambda prompt, **options: args.update(options) or fake_llama().generate("a", 1, stream=True)
    )
    assert main(["generate", "m", "-p", "a", "--json-schema", str(schema)]) == 0
    assert args["json_schema"] == {"type": "string"}
    assert main(["generate", "m", "-p", "a", "--grammar", str(grammar)]) == 0
    assert args["grammar"] == 'root ::= "a"'


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--json-schema", "none.json"], "none.json: no such file or directory"),
        (["--json-schema", "{"], "not JSON"),
        (["--grammar", "none"], "none: no such file"),
        (["--regex", "a", "--choice", "b"], "not allowed with"),
        (["--mirostat", "1"], "0 (off) or 2 is meant"),
        (["--stop", ""], "must not be empty"),
        (["--repetition-penalty", "0"], "must be above 0"),
        (["--logprobs", "3"], "--logprobs needs --json"),
        (["--draft"], "--draft"),
    ],
)
def test_a_bad_value_is_wrong_usage(capsys, argv, says):
    assert main(["generate", "m", "-p", "a", *argv]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_what_generate_refuses_is_one_line(fake, capsys):
    assert main(["generate", "m", "-p", "a", "--prompt-lookup", "3", "--num-beams", "2"]) == 1
    assert "num_beams" in capsys.readouterr().err


def test_logprobs_in_json(fake, capsys):
    assert main(["generate", "m", "-p", "a", *ANSWER, "--json", "--logprobs", "2"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [each["token_id"] for each in value["logprobs"]] == [3, 4, 5]
    assert len(value["logprobs"][0]["top"]) == 2


def test_a_stop_text_ends_it(fake, capsys):
    assert main(["generate", "m", "-p", "a", "-n", "9", "--temperature", "0", "--stop", "de", "--stop", "x"]) == 0
    assert capsys.readouterr().out == "bc\n"


def test_beams_come_in_one_piece_and_get_their_slots(monkeypatch, capsys):
    monkeypatch.setattr("edgellama.model.load", lambda model, n_slots, **_: hash_llama(n_slots=n_slots))
    assert main(["generate", "m", "-p", "a", "-n", "5", "--num-beams", "3", "-q"]) == 0
    text = hash_llama(n_slots=3).generate("a", 5, num_beams=3).text
    assert text
    assert capsys.readouterr() == (f"{text}\n", "")


# -- one message -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["chat", "run"])
@pytest.mark.parametrize("data", [b"ab\n", b"ab", b"\xef\xbb\xbfab\r\n"])
def test_all_of_stdin_is_one_message_and_only_the_reply_is_printed(fake, tmp_path, capsys, monkeypatch, verb, data):
    (tmp_path / "m.edgellama").touch()
    stdin(monkeypatch, data)
    assert main([verb, str(tmp_path / "m.edgellama"), *ANSWER, "-q"]) == 0
    assert capsys.readouterr() == ("cde\n", "")
    assert fake.backend.calls[0][0] == [0, 2, 3]
    assert fake.backend.closed


def test_a_prompt_leaves_stdin_alone(fake, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert main(["chat", "m", "-p", "a", *ANSWER]) == 0
    out, err = capsys.readouterr()
    assert out == "bcd\n"
    assert "no chat template" in err
    assert err.count("\n") == 1


def test_json_and_verbose(fake, capsys):
    assert main(["chat", "m", "-p", "a", *ANSWER, "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "bcd"
    fake.backend.closed = fake._closed = False
    assert main(["chat", "m", "-p", "a", *ANSWER, "--verbose", "-q"]) == 0
    assert "3 new at" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"", b"\n", b" \n\n"])
def test_an_empty_message(fake, capsys, monkeypatch, data):
    stdin(monkeypatch, data)
    assert main(["chat", "m"]) == 1
    assert "the message is empty" in capsys.readouterr().err


def test_json_on_a_terminal_needs_a_message(fake, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["chat", "m", "--json"]) == 2
    assert "--json needs -p" in capsys.readouterr().err


def test_a_system_text_needs_a_template(fake, capsys):
    assert main(["chat", "m", "-p", "a", "--system", "Be brief."]) == 1
    assert "no chat template" in capsys.readouterr().err.splitlines()[-1]


def test_a_reply_may_be_as_long_as_the_context(fake, capsys):
    assert main(["chat", "m", "-p", "a", "--temperature", "0", "--json", "-q"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["finish_reason"] == "stop" or len(value["token_ids"]) == 62


# -- run -------------------------------------------------------------------------------------------------------------


def test_a_folder_is_converted_on_first_use_and_answers(tiny_checkpoint, capsys):
    argv = ["run", str(tiny_checkpoint), "-p", "Hi", "-n", "5", "--temperature", "0", "--device", "reference"]
    assert main(argv) == 0
    first, err = capsys.readouterr()
    assert f"first use of {tiny_checkpoint}" in err
    assert "stored as tiny (" in err
    assert [each.name for each in store.list_models()] == ["tiny"]
    assert main(argv) == 0
    second, err = capsys.readouterr()
    assert "first use" not in err
    assert second == first
    assert main(["run", "tiny", *argv[2:]]) == 0
    assert capsys.readouterr().out == first
    for verb in ("info", "verify"):
        assert main([verb, "tiny"]) == 0


@pytest.fixture
def no_network(monkeypatch):
    import huggingface_hub

    def download(*_, **__):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_a_stored_hub_model_needs_no_network(fake, tiny_model, monkeypatch, no_network, capsys):
    models_dir().mkdir(parents=True)
    shutil.copyfile(tiny_model, models_dir() / "llama.edgellama")
    monkeypatch.setattr(store, "_source", lambda path: "org/llama")
    assert main(["run", "org/llama", "-p", "a", *ANSWER]) == 0
    assert main(["generate", "org/llama", "-p", "a", *ANSWER]) == 1  # the fake is closed; but it was found
    assert capsys.readouterr().out == "bcd\n"


def test_offline_without_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main(["run", "org/none", "-p", "a", "--offline"]) == 1
    err = capsys.readouterr().err
    assert "offline mode is on" in err
    assert err.splitlines()[-1].startswith("edgellama: error: org/none")
    assert list(models_dir().iterdir()) == []


def test_a_hub_id_near_a_stored_name_is_hinted_at(tmp_path, tiny_model, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    models_dir().mkdir(parents=True)
    shutil.copyfile(tiny_model, models_dir() / "Llama-2-7b-hf.edgellama")
    assert main(["run", "meta-llama/Llama-2-7b-fh", "-p", "a", "--offline"]) == 1
    assert "similar name: Llama-2-7b-hf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("nothing", "no such file or stored model: nothing; "),
        ("tini", "no such file or stored model: tini; did you mean tiny?"),
        ("some/where.edgellama", "no such file: some/where.edgellama"),
        ("./not/here", "no such file: ./not/here; `edgellama convert` makes"),
        ("empty", "empty is a folder"),
        ("x.gguf", "is a .gguf file"),
    ],
)
def test_what_cannot_be_run(tmp_path, monkeypatch, tiny_model, capsys, model, says):
    monkeypatch.chdir(tmp_path)
    models_dir().mkdir(parents=True)
    shutil.copyfile(tiny_model, models_dir() / "tiny.edgellama")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.gguf").touch()
    assert main(["run", model, "-p", "a"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1


def test_an_interrupted_conversion_stores_nothing(tiny_checkpoint, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("edgellama_convert.convert", interrupt)
    assert main(["run", str(tiny_checkpoint), "-p", "a"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "edgellama: interrupted; nothing was stored"
    assert list(models_dir().iterdir()) == []


# -- list and rm -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_models(tiny_model):
    models_dir().mkdir(parents=True)
    for name in ("one", "two"):
        shutil.copyfile(tiny_model, models_dir() / f"{name}.edgellama")
    os.utime(models_dir() / "two.edgellama", (0, 0))
    return models_dir()


def test_list(two_models, capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "MODIFIED", "SOURCE"]
    assert lines[1].split()[0] == "one"
    assert "just now" in lines[1]
    assert "years ago" in lines[2]
    assert all(line.endswith("tiny") for line in lines[1:])
    column = lines[0].index("MODIFIED")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)


def test_list_as_json(two_models, capsys):
    assert main(["list", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in value] == ["one", "two"]
    assert Path(value[0]["path"]).is_file()
    assert value[0]["size_bytes"] == (two_models / "one.edgellama").stat().st_size
    assert value[1]["modified"].startswith(("1970-01-01T", "1969-12-31T"))
    assert value[0]["source"] == "tiny"


def test_list_of_nothing(capsys):
    assert main(["list"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "no models in" in err
    assert main(["list", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"


def test_rm(two_models, capsys):
    assert main(["rm", "one"]) == 0
    assert "deleted one (" in capsys.readouterr().err
    assert [each.name for each in store.list_models()] == ["two"]


@pytest.mark.parametrize(("answer", "left"), [("y", 0), ("YES", 0), ("n", 2), ("", 2), ("x", 2)])
def test_rm_asks_on_a_terminal(two_models, capsys, monkeypatch, answer, left):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{answer}\n{answer}\n"))
    monkeypatch.setattr(console, "is_terminal", lambda stream: True)
    assert main(["rm", "one", "two"]) == 0
    assert len(store.list_models()) == left
    assert "delete one (" in capsys.readouterr().err
    assert main(["rm", "-y", *[each.name for each in store.list_models()]] if left else ["list"]) == 0
    assert store.list_models() == []


def test_rm_of_a_wrong_name_deletes_nothing(two_models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.edgellama").touch()
    for name, says in (
        ("tow", "no stored model 'tow'; did you mean two?"),
        ("xyzzy", "`edgellama list` shows them"),
        ("mine.edgellama", "rm deletes stored models only"),
        ("../models/one", "no stored model"),
    ):
        assert main(["rm", "one", name]) == 1
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
    assert len(store.list_models()) == 2
