"""One conversation: what was said, the system text and the parameters; kept in a JSON file by `/save`.

A saved chat is a file that someone may have sent: it is parsed strictly and its every value is checked. Knows no
model and no terminal.
"""

import difflib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgellama.cli import parameters
from edgellama.errors import EdgellamaError, FormatError
from edgellama.paths import data_dir

_SUFFIX = ".json"
_KIND = "edgellama chat"
_VERSION = 1
_MAX_BYTES = 16 << 20
_NAME = re.compile(r"\w[\w .\-]*")


@dataclass
class Conversation:
    """`messages` are dicts with `role` and `content`, the system text not among them."""

    model: str = ""
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)

    def prompt(self) -> list[dict[str, str]]:
        """What the model is shown: the system text, if there is one, and all messages."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    @property
    def turns(self) -> int:
        return sum(message["role"] == "user" for message in self.messages)

    def save(self, path: Path) -> None:
        """Write it, whole or not at all. EdgellamaError rather than overwrite what is no saved chat."""
        if path.exists():
            try:
                load(path)
            except EdgellamaError:
                raise EdgellamaError(f"{path} exists and is no saved chat: take another name") from None
        value = {
            "kind": _KIND,
            "version": _VERSION,
            "model": self.model,
            "system": self.system,
            "parameters": self.parameters,
            "messages": self.messages,
        }
        if path.parent == chats_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            # What people say to a model is private.
            with open(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
                json.dump(value, file, ensure_ascii=False, indent=1)
                file.write("\n")
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def chats_dir() -> Path:
    """Where chats go that are saved under a mere name. Not created here."""
    return data_dir() / "chats"


def saved_names() -> list[str]:
    return sorted(path.name.removesuffix(_SUFFIX) for path in chats_dir().glob(f"[!.]*{_SUFFIX}"))


def path_of(name: str) -> Path:
    """The file of a saved chat: one in the user's folder for a name, else the path as it is."""
    if "/" in name or os.sep in name or name.endswith(_SUFFIX):
        return Path(name).expanduser()
    if not _NAME.fullmatch(name):
        raise EdgellamaError(f"{name!r} is no name for a chat: letters, digits, spaces, dots and dashes are")
    return chats_dir() / f"{name}{_SUFFIX}"


def load(path: Path) -> Conversation:
    """Read a saved chat. EdgellamaError: missing, with close names, or none of ours."""
    from edgellama.format.strict_json import parse_object

    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise EdgellamaError(f"no saved chat: {_shown(path)}{_what_instead(path)}") from None
    if len(data) > _MAX_BYTES:
        raise EdgellamaError(f"{path} is too large for a saved chat")
    try:
        value = parse_object(data, "chat", 0)
    except FormatError as error:
        raise EdgellamaError(f"{path} is no saved chat: {error}") from None
    if value.get("kind") != _KIND:
        raise EdgellamaError(f"{path} is no saved chat")
    if value.get("version") != _VERSION:
        raise EdgellamaError(f"{path} was saved by another version of edgellama")
    try:
        return Conversation(
            _text(value, "model"),
            None if value.get("system") is None else _text(value, "system"),
            [_message(each) for each in _typed(value, "messages", list)],
            _parameters(_typed(value, "parameters", dict)),
        )
    except ValueError as error:
        raise EdgellamaError(f"{path}: {error}") from None


def _message(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or value.get("role") not in ("user", "assistant"):
        raise ValueError("each message needs the role user or assistant")
    return {"role": value["role"], "content": _text(value, "content")}


def _parameters(values: dict[str, Any]) -> dict[str, Any]:
    """Known names only; what a value may be, the model says when it is used."""
    for name in values:
        if name not in parameters.SETTABLE:
            raise ValueError(f"unknown parameter {name!r}")
    return values


def _text(value: dict[str, Any], key: str) -> str:
    return _typed(value, key, str)


def _typed(value: dict[str, Any], key: str, kind: type) -> Any:
    if not isinstance(value.get(key), kind):
        raise ValueError(f"{key} must be {'text' if kind is str else f'a {kind.__name__}'}")
    return value[key]


def _shown(path: Path) -> str:
    return path.name.removesuffix(_SUFFIX) if path.parent == chats_dir() else str(path)


def _what_instead(path: Path) -> str:
    names = saved_names()
    close = difflib.get_close_matches(path.name.removesuffix(_SUFFIX), names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(names[:8])}" if names else "; /save NAME makes one"
