"""Finding the source: local folders, and a hub played by an HTTP server on this machine (huggingface_hub is real)."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from checkpoints import make_checkpoint
from edgellama.errors import ConvertError
from edgellama.format import open_model
from edgellama_convert import convert
from edgellama_convert.source import resolve

REPO = "someone/Tiny-Llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves one repository as huggingface.co does, as far as downloads need it. `refuse`: status, error code."""

    def __init__(self, folder):
        self.folder = folder
        self.refuse = None
        self.requested = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self, body=True)

            def do_HEAD(self):
                hub.answer(self, body=False)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request, body):
        path = request.path.split("?")[0]
        status, headers, data = self.respond(path)
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body:
            request.wfile.write(data)

    def respond(self, path):
        if self.refuse is not None:
            status, code = self.refuse
            return status, {"X-Error-Code": code} if code else {}, b"{}"
        names = sorted(entry.name for entry in self.folder.iterdir())
        api = f"/api/models/{REPO}"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in names]
            return self._json({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "tags": []})
        if path.startswith(f"{api}/revision/"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if path.startswith(f"{api}/tree/{COMMIT}"):
            return self._json(
                [
                    {"type": "file", "path": n, "size": (self.folder / n).stat().st_size, "oid": self._etag(n)}
                    for n in names
                ]
            )
        if path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            name = path.rsplit("/", 1)[1]
            if name not in names:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            self.requested.append(name)
            headers = {"ETag": f'"{self._etag(name)}"', "X-Repo-Commit": COMMIT}
            return 200, headers, (self.folder / name).read_bytes()
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def _etag(self, name):
        return hashlib.sha1((self.folder / name).read_bytes()).hexdigest()

    @staticmethod
    def _json(value):
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _point_to(monkeypatch, url):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    folder = tmp_path / "server"
    make_checkpoint(folder, shards=2)
    (folder / "README.md").write_text("large and not needed")
    (folder / "pytorch_model.bin").write_bytes(b"\x80pickle")
    (folder / "consolidated.safetensors").write_bytes(b"another copy")
    (folder / "generation_config.json").write_text("{}")
    fake = FakeHub(folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    _point_to(monkeypatch, fake.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def refusal(source, **options):
    with pytest.raises(ConvertError) as error:
        resolve(source, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_hub_id_downloads_only_what_is_needed(hub):
    report = convert(REPO, method="search")
    assert set(hub.requested) == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert report.out == Path("Tiny-Llama.edgellama") and report.commit == COMMIT
    with open_model(report.out) as model:
        assert model.provenance["source"] == REPO and model.provenance["commit"] == COMMIT


def test_a_local_copy_gives_the_same_weights(hub, tmp_path):
    def hashes(out):
        with open_model(out) as model:
            return {name: entry.xxh3_128 for name, entry in model.tensors.items()}

    assert hashes(convert(REPO, "hub.edgellama", method="search").out) == hashes(
        convert(hub.folder, "local.edgellama", method="search").out
    )


def test_the_cache_serves_offline_and_without_a_network(hub, monkeypatch):
    from huggingface_hub import constants

    first = resolve(REPO)
    hub.requested.clear()
    assert resolve(REPO, offline=True) == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(REPO) == first
    assert hub.requested == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    _point_to(monkeypatch, "http://127.0.0.1:9")
    assert resolve(REPO) == first


def test_single_file_models(hub):
    for path in hub.folder.glob("model*"):
        path.unlink()
    make_checkpoint(hub.folder)
    assert (resolve(REPO).folder / "model.safetensors").is_file()
    assert "consolidated.safetensors" not in hub.requested


def test_offline_and_not_in_the_cache(hub):
    message = refusal(REPO, offline=True)
    assert REPO in message and "offline" in message and "run once without" in message
    assert hub.requested == []


def test_offline_with_a_shard_missing_from_the_cache(hub):
    folder = resolve(REPO).folder
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = refusal(REPO, offline=True)
    assert "offline" in message and REPO in message


def test_no_network(hub, monkeypatch):
    _point_to(monkeypatch, "http://127.0.0.1:9")
    message = refusal(REPO)
    assert "cannot be reached" in message and "check the connection, or give a local folder" in message


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ([], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hugging Face hub cannot be reached"),
        ([], {"HF_HUB_OFFLINE": "1"}, "offline mode is on"),
        (["--offline"], {}, "offline mode is on"),
    ],
)
def test_a_hub_id_in_a_process_of_its_own(tmp_path, options, environment, expected):
    """huggingface_hub imports its submodules lazily: whether they are there shows in a fresh process only."""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_TOKEN": "", **environment}
    command = [sys.executable, "-m", "edgellama", "convert", REPO, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"edgellama: error: {REPO}") and expected in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "GatedRepo", "is gated: accept its terms at https://huggingface.co/someone/Tiny-Llama"),
        (401, "RepoNotFound", "no such model on the Hugging Face hub"),
        (404, "RepoNotFound", "no such model on the Hugging Face hub"),
    ],
)
def test_refusals_of_the_hub_say_what_to_do(hub, status, code, expected):
    hub.refuse = (status, code)
    message = refusal(REPO)
    assert expected in message and "hf auth login" in message


def test_unknown_revision(hub):
    message = refusal(REPO, revision="v9")
    assert message == f"{REPO} has no revision 'v9'; leave --revision out for the newest"


def test_a_hub_repository_with_pickles_only(hub):
    for path in hub.folder.glob("*.safetensors*"):
        path.unlink()
    message = refusal(REPO)
    assert "has only pytorch_model.bin, a pickle, which could run code; re-save it as safetensors" in message
    assert "pytorch_model.bin" not in hub.requested


def test_a_hub_repository_that_is_no_model(hub):
    (hub.folder / "config.json").unlink()
    assert "has no config.json: not a transformers checkpoint" in refusal(REPO)


def test_a_hostile_index_on_the_hub_downloads_nothing(hub):
    (hub.folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../config.json"}}')
    assert "shards must be .safetensors files of the same folder" in refusal(REPO)


def test_typos_of_local_folders_never_reach_the_network(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "models" / "Tiny-Llama")
    assert "did you mean models/Tiny-Llama?" in refusal("models/TinyLlama").replace("\\", "/")
    assert "did you mean" in refusal(tmp_path / "models" / "tiny-llama2")
    for text in ("Tiny", "./models/none", "/no/such/folder", "../x", "a/b/c", "-x/y", "a b/c", "https://x/y"):
        assert "neither a folder here nor a hub id" in refusal(text)
    assert "is empty" in refusal("")


def test_folders_and_files_that_are_no_checkpoint(tmp_path):
    make_checkpoint(tmp_path / "model")
    assert f"did you mean {tmp_path / 'model'}?" in refusal(tmp_path)
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "weights.safetensors")
    assert "has weights.safetensors but neither" in refusal(tmp_path / "model")
    (tmp_path / "model" / "weights.safetensors").unlink()
    assert "has only pytorch_model.bin, a pickle" in refusal(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").unlink()
    assert "no weights to convert" in refusal(tmp_path / "model")
    for name, expected in {
        "model.safetensors": "give the folder that holds it",
        "model.gguf": "is a GGUF file",
        "pytorch_model.bin": "is a pickle",
        "m.edgellama": "is converted already",
        "notes.txt": "is a file, not a checkpoint folder",
    }.items():
        (tmp_path / name).write_bytes(b"x")
        assert expected in refusal(tmp_path / name)
