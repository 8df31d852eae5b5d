"""The user's stored models: names, sources and files, and the conversion of a source on its first use.

One folder (`paths.models_dir`) holds `NAME.edgellama` files that anybody may add to or take from. Where a model comes
from is written in the file itself, for those of the hub; for a checkpoint folder a small `NAME.source.json` beside it
says which folder, and what its files were, so that a changed checkpoint is converted again. Does not know how a model
is converted (it is handed a function), nor any command line.
"""

import contextlib
import difflib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellama.errors import EdgellamaError
from edgellama.paths import SUFFIX, is_checkpoint, models_dir

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+", re.ASCII)
_SNAPSHOT = re.compile(r"models--(.+)")  # a model's folder in the Hugging Face cache, over snapshots/<commit>
_SOURCE_SUFFIX = ".source.json"
_MAX_SOURCE_BYTES = 1 << 20
_CHECKPOINT_SUFFIXES = (".json", ".model", ".jinja", ".safetensors")
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class StoredModel:
    """`modified` is a POSIX time; `source` is a hub id or a folder, None where the file does not say."""

    name: str
    path: Path
    size: int
    modified: float
    source: str | None


def is_hub_id(text: str) -> bool:
    """Whether `text` looks like `org/name` and like nothing on the disk.

    >>> is_hub_id("meta-llama/Llama-2-7b-hf"), is_hub_id("./llama"), is_hub_id("models/llama.edgellama")
    (True, False, False)
    """
    return bool(_HUB_ID.fullmatch(text)) and ".." not in text and not text.endswith(SUFFIX)


def list_models() -> list[StoredModel]:
    """All of them, by name. A file that vanishes meanwhile is left out."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(models_dir().glob(f"*{SUFFIX}"), key=lambda each: each.name.lower()):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if not path.name.startswith(".") and path.is_file():
                    name = path.name.removesuffix(SUFFIX)
                    found.append(StoredModel(name, path, status.st_size, status.st_mtime, _source(path)))
    return found


def find(model: str) -> Path | None:
    """The file of a stored model by its name, or by its source: a hub id, or a folder unchanged since then."""
    folder = _folder(model)
    if folder is not None and is_checkpoint(folder):
        return _of_folder(folder)
    path = _named(model)
    if path is not None and path.is_file():
        return path
    return _of_hub(model) if is_hub_id(model) else None


def obtain(source: str, convert: Callable[[Path], object], waiting: Callable[[], None] = lambda: None) -> Path:
    """The stored model of `source`, a hub id or a checkpoint folder, made with `convert(path)` if there is none.

    `convert` writes the whole file or nothing. While another process converts a source of this name `waiting` is
    called once, and its file is then used: of two processes one converts.
    """
    found = find(source)
    if found is not None:
        return found
    models_dir().mkdir(parents=True, exist_ok=True)
    with _lock(models_dir() / f".{_base_name(source)}.lock", waiting):
        found = find(source)
        if found is None:
            found = _place(source)
            _convert(source, found, convert)
    return found


def remove(path: Path) -> None:
    """Delete a stored model that `find` or `list_models` gave."""
    path.unlink()
    _source_file(path).unlink(missing_ok=True)


def close_names(model: str) -> list[str]:
    """Names of stored models similar to `model`, at most two."""
    wanted = model.rsplit("/", 1)[-1].removesuffix(SUFFIX).lower()
    try:
        names = {path.name.removesuffix(SUFFIX).lower(): path for path in sorted(models_dir().glob(f"*{SUFFIX}"))}
    except OSError:
        return []
    close = difflib.get_close_matches(wanted, names, n=2, cutoff=0.6)
    return [names[name].name.removesuffix(SUFFIX) for name in close]


# -- names and sources -------------------------------------------------------------------------------------------------


def _named(name: str) -> Path | None:
    """Where a model of this name would lie; None for what is no name (it must not lead out of the folder)."""
    if not name or name.startswith(".") or any(mark in name for mark in ("/", "\\", ":", "\0")):
        return None
    return models_dir() / f"{name.removesuffix(SUFFIX)}{SUFFIX}"


def _folder(source: str) -> Path | None:
    """The folder that `source` names; None for a hub id."""
    path = Path(source).expanduser()
    return path.resolve() if path.is_dir() else None


def _base_name(source: str) -> str:
    """The name that a source would like to have."""
    folder = _folder(source)
    if folder is None:
        return _hub_names(source)[0]
    snapshot = _SNAPSHOT.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    name = snapshot[1].rsplit("--", 1)[-1] if snapshot else folder.name
    return name.lstrip(".") or "model"


def _of_hub(hub_id: str) -> Path | None:
    for path in (models_dir() / f"{name}{SUFFIX}" for name in _hub_names(hub_id)):
        if path.is_file() and _source(path) == hub_id:
            return path
    return None


def _hub_names(hub_id: str) -> tuple[str, str]:
    """The names that a hub id gets: the short one, or the long one where another model has the short one."""
    return hub_id.rsplit("/", 1)[-1], hub_id.replace("/", "--")


def _of_folder(folder: Path) -> Path | None:
    for path, record in _records(folder):
        if path.is_file() and record.get("files") == _stamps(folder):
            return path
    return None


def _records(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The stored models that were made from `folder`, whatever was in it then."""
    for file in sorted(models_dir().glob(f"*{_SOURCE_SUFFIX}")):
        record = _read_record(file)
        if record.get("folder") == str(folder):
            yield file.with_name(file.name.removesuffix(_SOURCE_SUFFIX) + SUFFIX), record


def _place(source: str) -> Path:
    """The path at which to store `source`; with the lock held."""
    folder = _folder(source)
    if folder is not None:
        for path, _ in _records(folder):
            return path  # the same folder as before, changed: its model is replaced
    names = (_base_name(source),) if folder is not None else _hub_names(source)
    numbered = (f"{names[-1]}-{number}" for number in itertools.count(2))
    paths = (models_dir() / f"{name}{SUFFIX}" for name in itertools.chain(names, numbered))
    return next(path for path in paths if not path.exists())


def _convert(source: str, path: Path, convert: Callable[[Path], object]) -> None:
    folder = _folder(source)
    if folder is None:
        _source_file(path).unlink(missing_ok=True)  # of a model that was deleted by hand
        convert(path)
        return
    where, stamps = str(folder), _stamps(folder)
    _write_record(path, {"folder": where})  # ours from now on; current only once it is complete
    try:
        convert(path)
    except BaseException:
        if not path.exists():
            _source_file(path).unlink(missing_ok=True)
        raise
    _write_record(path, {"folder": where, "files": stamps})


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Size and time of each file that may matter, as `make` would judge them."""
    stamps = {}
    for entry in sorted(folder.iterdir()):
        if entry.suffix in _CHECKPOINT_SUFFIXES and entry.is_file():
            status = entry.stat()
            stamps[entry.name] = [status.st_size, status.st_mtime_ns]
    return stamps


def _source(path: Path) -> str | None:
    folder = _read_record(_source_file(path)).get("folder")
    if isinstance(folder, str):
        return folder
    from edgellama.format import open_model

    try:
        with open_model(path) as file:
            source = file.provenance.get("source")
    except (EdgellamaError, OSError):
        return None
    return source if isinstance(source, str) else None


def _source_file(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(SUFFIX) + _SOURCE_SUFFIX)


def _read_record(path: Path) -> dict[str, Any]:
    """What the file says; nothing if it is not there, or not ours."""
    try:
        if path.stat().st_size > _MAX_SOURCE_BYTES:
            return {}
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_record(model: Path, record: dict[str, Any]) -> None:
    path = _source_file(model)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


# -- one at a time -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _lock(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Held by one process; it ends with the process. Where the system has no such locks nobody waits: the conversion
    is written aside and renamed, so the worst is that the work is done twice."""
    from edgellama.format import storage

    told = False
    while True:
        fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        # Whoever had the lock removes the file: one that lost its name meanwhile locks nothing.
        if storage.try_lock(fd) is not False and _is_named(path, fd):
            break
        os.close(fd)
        if not told:
            told = True
            waiting()
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        if not storage.WINDOWS:
            storage.quietly(storage.unlink, path)
        storage.quietly(storage.close, fd)
        if storage.WINDOWS:
            storage.quietly(storage.unlink, path)


def _is_named(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
