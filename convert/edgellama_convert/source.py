"""From what a user typed for SOURCE, a hub id or a folder, to a local folder that holds a checkpoint's files.

Knows: huggingface_hub's ways to fail (its cache, token and offline mode stay its own), and which files a conversion
needs. Does not read any of them but the index that names the shards. Every failure is one ConvertError line that says
what to do.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from edgellama.errors import ConvertError
from edgellama.format import FILE_NAMES

from .checkpoint import INDEX_FILE, SINGLE_FILE, read_index, shard_names

CONFIG_FILE = "config.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHER_FORMATS = {".gguf": "GGUF", ".onnx": "ONNX", ".h5": "Keras", ".msgpack": "Flax", ".npz": "NumPy"}


@dataclass(frozen=True)
class Source:
    """A folder with config.json and all safetensors files; `name` is the hub id or the folder's own name."""

    folder: Path
    name: str
    commit: str | None = None
    """The hub commit, if it comes from there."""


def resolve(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None, offline: bool = False
) -> Source:
    """Find `source`, downloading it if it is a hub id that is not in the cache. ConvertError if that cannot be done."""
    text = os.fspath(source)
    path = Path(text).expanduser()
    if not text:
        raise ConvertError("the source is empty; give a folder, or a hub id like meta-llama/Llama-2-7b-hf")
    if path.is_dir():
        if revision is not None:
            raise ConvertError(f"{text} is a local folder, which has no revisions: leave --revision out")
        _check_folder(path, text)
        return Source(path, path.resolve().name)
    if path.exists():
        _refuse_file(path, text)
    suggestion = _close_folder(path)
    if suggestion is not None:
        raise ConvertError(f"no such folder: {text}; did you mean {suggestion}?")
    if not _HUB_ID.fullmatch(text) or ".." in text or "--" in text:
        raise ConvertError(f"{text}: neither a folder here nor a hub id (those look like meta-llama/Llama-2-7b-hf)")
    return _Hub(text, revision, token, offline).fetch()


class _Hub:
    """One download from the Hugging Face hub, or from its cache."""

    def __init__(self, repo: str, revision: str | None, token: str | None, offline: bool):
        # Half a second, needed by hub ids only. Submodules are not there before somebody imports them.
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors

        self.library = huggingface_hub
        self.repo, self.revision, self.token = repo, revision, token
        self.offline = offline or bool(huggingface_hub.constants.HF_HUB_OFFLINE)

    def fetch(self) -> Source:
        """Small files first; then exactly the weights that the index, or the absence of one, asks for."""
        folder = self._snapshot([CONFIG_FILE, *FILE_NAMES, INDEX_FILE], self.revision)
        commit = folder.name
        if not (folder / CONFIG_FILE).exists():
            self._incomplete(folder, [CONFIG_FILE])
        has_index = (folder / INDEX_FILE).exists()
        wanted = shard_names(read_index(folder)) if has_index else [SINGLE_FILE]
        folder = self._snapshot(wanted, commit)
        missing = [name for name in wanted if not (folder / name).exists()]
        if missing:
            self._incomplete(folder, missing)
        return Source(folder, self.repo, commit)

    def _snapshot(self, patterns: list[str], revision: str | None) -> Path:
        log = self.library.logging
        verbosity = log.get_verbosity()
        log.set_verbosity_error()  # its warnings about every retry would bury our one line
        try:
            return Path(
                self.library.snapshot_download(
                    self.repo,
                    revision=revision,
                    token=self.token,
                    local_files_only=self.offline,
                    allow_patterns=patterns,
                )
            )
        except Exception as error:
            # Everything: over its versions the library lets errors of three HTTP libraries through.
            self._refuse(error)
        finally:
            log.set_verbosity(verbosity)

    def _incomplete(self, folder: Path, missing: list[str]) -> NoReturn:
        """The snapshot lacks files: not downloaded yet, or not in the repository at all."""
        if self.offline:
            raise ConvertError(
                f"{self.repo}: {missing[0]} is not in the local Hugging Face cache; run once without offline mode"
            )
        try:
            names = self.library.HfApi(token=self.token).list_repo_files(self.repo, revision=folder.name)
        except Exception as error:
            self._refuse(error)
        if missing[0] in names:
            raise ConvertError(f"{self.repo}: {missing[0]} could not be downloaded; try again")
        _refuse_content(self.repo, names)

    def _refuse(self, error: Exception) -> NoReturn:
        errors = self.library.errors
        repo, at = self.repo, f" at revision {self.revision}" if self.revision else ""
        if isinstance(error, ConvertError):
            raise error
        if isinstance(error, errors.GatedRepoError):
            problem = (
                f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then log in with "
                "`hf auth login` or set HF_TOKEN"
            )
        elif isinstance(error, errors.RepositoryNotFoundError):
            problem = (
                f"{repo}: no such folder here, and no such model on the Hugging Face hub; "
                "check the spelling, or log in with `hf auth login` if it is private"
            )
        elif isinstance(error, errors.RevisionNotFoundError):
            problem = f"{repo} has no revision {self.revision!r}; leave --revision out for the newest"
        elif isinstance(error, errors.HFValidationError):
            problem = f"{repo} is not a valid hub id: {_one_line(error)}"
        elif isinstance(error, errors.OfflineModeIsEnabled) or (
            self.offline and isinstance(error, errors.LocalEntryNotFoundError)
        ):
            problem = (
                f"{repo}{at} is not (completely) in the local Hugging Face cache, and offline mode is on; "
                "run once without --offline and HF_HUB_OFFLINE"
            )
        elif isinstance(error, errors.HfHubHTTPError) and error.response is not None:
            status = error.response.status_code
            hint = "log in with `hf auth login`" if status in (401, 403) else "try again later"
            problem = f"{repo}: the Hugging Face hub answered {status}; {hint}"
        elif isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            problem = f"{repo}: cannot store the download: {error.filename}: {error.strerror}"
        else:
            problem = (
                f"{repo}: the Hugging Face hub cannot be reached ({_one_line(error)}); check the connection, "
                "or give a local folder"
            )
        raise ConvertError(problem) from None


def _check_folder(folder: Path, text: str) -> None:
    if not (folder / CONFIG_FILE).exists():
        inside = sorted(entry.parent.name for entry in folder.glob(f"*/{CONFIG_FILE}"))
        hint = f"did you mean {folder / inside[0]}?" if inside else "it must be a Hugging Face checkpoint folder"
        raise ConvertError(f"{text} has no {CONFIG_FILE}; {hint}")
    if not (folder / INDEX_FILE).exists() and not (folder / SINGLE_FILE).exists():
        _refuse_content(text, (entry.name for entry in folder.iterdir()))


def _refuse_content(where: str, names: Iterable[str]) -> NoReturn:
    """No safetensors where they should be: say what is there instead."""
    names = sorted(names)
    pickles = [name for name in names if name.endswith(_PICKLES) and not name.startswith("training_args")]
    others = [name for name in names if name.endswith(".safetensors")]
    if CONFIG_FILE not in names:
        problem = f"has no {CONFIG_FILE}: not a transformers checkpoint"
    elif others:
        problem = f"has {others[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}; re-save it with save_pretrained"
    elif pickles:
        problem = (
            f"has only {pickles[0]}, a pickle, which could run code; re-save it as safetensors: "
            'AutoModelForCausalLM.from_pretrained(...).save_pretrained("folder")'
        )
    else:
        problem = f"has neither {SINGLE_FILE} nor {INDEX_FILE}: no weights to convert"
    raise ConvertError(f"{where} {problem}")


def _refuse_file(path: Path, text: str) -> NoReturn:
    if path.suffix == ".safetensors":
        raise ConvertError(f"{text} is a file; give the folder that holds it and its {CONFIG_FILE}")
    if path.suffix in _PICKLES:
        raise ConvertError(f"{text} is a pickle, which could run code; re-save the model as safetensors")
    if path.suffix in _OTHER_FORMATS:
        raise ConvertError(f"{text} is a {_OTHER_FORMATS[path.suffix]} file; convert the original checkpoint's folder")
    if path.suffix == ".edgellama":
        raise ConvertError(f"{text} is converted already; run it: edgellama generate {text}")
    raise ConvertError(f"{text} is a file, not a checkpoint folder")


def _close_folder(path: Path) -> Path | None:
    """A checkpoint folder beside the missing `path` with a similar name."""
    try:
        names = [entry.parent.name for entry in path.parent.glob(f"*/{CONFIG_FILE}")]
    except OSError:
        return None
    lowered = {name.lower(): name for name in sorted(names)}
    close = difflib.get_close_matches(path.name.lower(), lowered, n=1, cutoff=0.75)
    return path.parent / lowered[close[0]] if close else None


def _one_line(error: Exception) -> str:
    """The first line of its message, which names the cause; huggingface_hub's advice follows it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = " ".join(lines[0].removeprefix("Got: ").split())
    return text if len(text) <= 150 else f"{text[:147]}..."
