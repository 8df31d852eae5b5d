"""The user's model folder: names, sources, one conversion for each source, nothing outside it touched."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from edgellama import store
from edgellama.errors import EdgellamaError
from edgellama.paths import find_model, models_dir


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The user's data folder (not EDGELLAMA_HOME, which holds the compiled kernels as well)."""
    monkeypatch.setattr("edgellama.paths.data_dir", lambda: tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def hub(tiny_model, monkeypatch):
    """A converter whose files say which hub id they are from."""
    made = []
    sources = {}
    monkeypatch.setattr(
        store, "_source", lambda path: sources.get(path) or store._read_record(store._source_file(path)).get("folder")
    )

    def convert(hub_id):
        def write(path):
            made.append(path.name)
            sources[path] = hub_id
            shutil.copyfile(tiny_model, path)

        return write

    convert.made = made
    return convert


def checkpoint(folder, text="{}"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_bytes(b"weights")
    return str(folder)


def writer(made, content=b"model"):
    def write(path):
        made.append(path.name)
        path.write_bytes(content)

    return write


# -- the hub ---------------------------------------------------------------------------------------------------------


def test_a_hub_id_gets_a_readable_name_and_is_converted_once(hub):
    path = store.obtain("meta-llama/Llama-2-7b-hf", hub("meta-llama/Llama-2-7b-hf"))
    assert path == models_dir() / "Llama-2-7b-hf.edgellama"
    assert store.obtain("meta-llama/Llama-2-7b-hf", hub("x")) == path
    assert hub.made == ["Llama-2-7b-hf.edgellama"]
    assert [entry.name for entry in models_dir().iterdir()] == ["Llama-2-7b-hf.edgellama"]


def test_two_hub_ids_with_the_same_last_part(hub):
    first = store.obtain("one/llama", hub("one/llama"))
    second = store.obtain("two/llama", hub("two/llama"))
    assert (first.name, second.name) == ("llama.edgellama", "two--llama.edgellama")
    assert store.find("one/llama") == first
    assert store.find("two/llama") == second
    assert store.obtain("two/llama", hub("x")) == second
    assert store.find("three/llama") is None
    assert [(each.name, each.source) for each in store.list_models()] == [
        ("llama", "one/llama"),
        ("two--llama", "two/llama"),
    ]


def test_the_source_is_read_from_the_file(tiny_model, tiny_checkpoint):
    models_dir().mkdir(parents=True)
    shutil.copyfile(tiny_model, models_dir() / "by-hand.edgellama")
    (models_dir() / "damaged.edgellama").write_bytes(b"nothing")
    assert [(each.name, each.source) for each in store.list_models()] == [
        ("by-hand", tiny_checkpoint.name),
        ("damaged", None),
    ]


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("meta-llama/Llama-2-7b-hf", True),
        ("org/name.v2", True),
        ("name", False),
        ("./name", False),
        ("../name", False),
        ("a/../b", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("models/x.edgellama", False),
        ("a/b c", False),
    ],
)
def test_what_a_hub_id_looks_like(text, is_one):
    assert store.is_hub_id(text) is is_one


# -- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_converted_once_and_again_when_it_changes(tmp_path):
    source, made = checkpoint(tmp_path / "llama"), []
    path = store.obtain(source, writer(made))
    assert path == models_dir() / "llama.edgellama"
    assert store.obtain(source + "/", writer(made)) == path
    assert store.list_models()[0].source == source
    assert len(made) == 1
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"trained")  # the same size
    os.utime(tmp_path / "llama" / "model.safetensors", ns=(1, 1))  # and older than the model
    assert store.find(source) is None
    assert store.obtain(source, writer(made, b"new")) == path
    assert path.read_bytes() == b"new"
    assert len(made) == 2


def test_two_folders_of_the_same_name(tmp_path):
    first, second, made = checkpoint(tmp_path / "a" / "llama"), checkpoint(tmp_path / "b" / "llama"), []
    paths = [store.obtain(each, writer(made)) for each in (first, second, first, second)]
    assert [path.name for path in paths] == ["llama.edgellama", "llama-2.edgellama"] * 2
    assert len(made) == 2


def test_a_snapshot_of_the_hub_cache_is_not_named_after_its_hash(tmp_path):
    source = checkpoint(tmp_path / "models--org--Llama-3" / "snapshots" / "0123abcd")
    assert store.obtain(source, writer([])).name == "Llama-3.edgellama"


def test_a_hidden_folder_gets_a_visible_name(tmp_path):
    assert store.obtain(checkpoint(tmp_path / ".llama"), writer([])).name == "llama.edgellama"


@pytest.mark.parametrize("error", [KeyboardInterrupt, EdgellamaError])
def test_a_failed_conversion_leaves_nothing(tmp_path, error):
    source = checkpoint(tmp_path / "llama")

    def fail(path):
        raise error("no")

    with pytest.raises(error):
        store.obtain(source, fail)
    assert list(models_dir().iterdir()) == []
    assert store.obtain(source, writer([])).name == "llama.edgellama"


def test_a_failed_second_conversion_keeps_the_first_and_is_not_taken_for_current(tmp_path):
    source, made = checkpoint(tmp_path / "llama"), []
    path = store.obtain(source, writer(made))
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"other weights")

    def fail(_):
        raise EdgellamaError("no")

    with pytest.raises(EdgellamaError):
        store.obtain(source, fail)
    assert path.read_bytes() == b"model"
    assert store.find("llama") == path
    assert store.find(source) is None
    store.obtain(source, writer(made))
    assert len(made) == 2


def test_a_change_during_the_conversion_is_noticed(tmp_path):
    source = checkpoint(tmp_path / "llama")

    def write(path):
        (tmp_path / "llama" / "model.safetensors").write_bytes(b"written meanwhile")
        path.write_bytes(b"model")

    store.obtain(source, write)
    assert store.find(source) is None


def test_a_damaged_record_is_no_record(tmp_path):
    source = checkpoint(tmp_path / "llama")
    store.obtain(source, writer([]))
    for text in ("", "[]", "[" * 100_000, '{"folder": 3}', '{"folder": ["x"]}', "\udcff"):
        (models_dir() / "llama.source.json").write_text(text, errors="surrogateescape")
        assert store.find(source) is None
        assert store.list_models()[0].source is None


# -- names -----------------------------------------------------------------------------------------------------------


def test_a_name_never_leads_out_of_the_folder(tmp_path):
    models_dir().mkdir(parents=True)
    outside = tmp_path / "home" / "outside.edgellama"
    outside.write_bytes(b"x")
    (models_dir() / ".hidden.edgellama").write_bytes(b"x")
    for name in (
        "../outside",
        "../outside.edgellama",
        str(outside),
        "",
        ".",
        "..",
        ".hidden",
        "a/../../outside",
        "a\\b",
        "\0",
    ):
        assert store.find(name) is None
    assert store.list_models() == []


def test_every_verb_finds_a_stored_model_by_its_name_and_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = checkpoint(tmp_path / "src" / "llama")
    path = store.obtain(source, writer([]))
    for name in ("llama", "llama.edgellama", source, "src/llama", path):
        assert find_model(name) == path
    (tmp_path / "llama").mkdir()  # a folder, but no checkpoint
    assert find_model("llama") == path
    (tmp_path / "llama.edgellama").touch()  # a file of this name goes first
    assert find_model("llama.edgellama").resolve() == tmp_path / "llama.edgellama"
    with pytest.raises(EdgellamaError, match=r"^no such file or stored model: lama; did you mean llama"):
        find_model("lama")


def test_remove_takes_the_record_along(tmp_path):
    path = store.obtain(checkpoint(tmp_path / "llama"), writer([]))
    store.remove(path)
    assert list(models_dir().iterdir()) == []


# -- several processes -----------------------------------------------------------------------------------------------

_OBTAIN = """
import sys, time
from pathlib import Path
from edgellama import store
source, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def tell(word):
    with log.open("a") as file: file.write(word + " ")
def convert(path):
    tell("converts")
    time.sleep(seconds)
    path.write_bytes(b"model")
print(store.obtain(str(source), convert, lambda: tell("waits")))
"""


def obtain_elsewhere(tmp_path, source, seconds):
    environment = {**os.environ, "EDGELLAMA_HOME": str(tmp_path / "home")}
    argv = [sys.executable, "-c", _OBTAIN, source, str(tmp_path / "log"), str(seconds)]
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name == "nt", reason="no lock there: both convert, the file is whole all the same")
def test_of_several_processes_one_converts(tmp_path):
    source = checkpoint(tmp_path / "llama")
    processes = [obtain_elsewhere(tmp_path, source, 0.4) for _ in range(3)]
    outs = {process.communicate(timeout=60)[0] for process in processes}
    assert outs == {f"{models_dir() / 'llama.edgellama'}\n"}
    assert (tmp_path / "log").read_text().split().count("converts") == 1
    assert {each.name for each in models_dir().iterdir()} == {"llama.edgellama", "llama.source.json"}


@pytest.mark.skipif(os.name == "nt", reason="no lock there")
def test_a_killed_process_blocks_nobody(tmp_path):
    source = checkpoint(tmp_path / "llama")
    process = obtain_elsewhere(tmp_path, source, 60)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    made = []
    assert store.obtain(source, writer(made)).name == "llama.edgellama"
    assert made == ["llama.edgellama"]
    assert {each.name for each in models_dir().iterdir()} == {"llama.edgellama", "llama.source.json"}
