"""Typed access to a parsed JSON document; an error names the field's path and its byte in the file.

Knows types, not meanings. `True` is not an integer here, and 1.0 is not one either.

>>> header = Fields.parse(b'{"tensors": [{"nbytes": "x"}]}', "header", 64)
>>> header.object("tensors", 0).integer("nbytes")
Traceback (most recent call last):
edgellama.errors.FormatError: header.tensors[0].nbytes (byte 88): must be an integer of at least 0, got 'x'
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import FormatError
from . import strict_json

HASH128 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Fields:
    """One JSON object of the document `data`, which lies at byte `base` of the file."""

    value: dict[str, Any]
    data: bytes
    name: str
    base: int
    path: tuple[str | int, ...] = ()

    @classmethod
    def parse(cls, data: bytes, name: str, base: int) -> Fields:
        """The outermost object of a document."""
        return cls(strict_json.parse_object(data, name, base), data, name, base)

    def get(self, key: str) -> Any:
        """The value of a key that must be there."""
        if key not in self.value:
            self.fail((), f"{key!r} is missing")
        return self.value[key]

    def object(self, key: str, index: int | None = None) -> Fields:
        """An object below `key`, or item `index` of the list below it."""
        value = self.get(key)
        path: tuple[str | int, ...] = (key,)
        if index is not None:
            value, path = value[index], (key, index)
        if not isinstance(value, dict):
            self.fail(path, f"must be an object, got {show(value)}")
        return Fields(value, self.data, self.name, self.base, self.path + path)

    def list_length(self, key: str) -> int:
        """The length of a list."""
        value = self.get(key)
        if not isinstance(value, list):
            self.fail((key,), f"must be a list, got {show(value)}")
        return len(value)

    def integer(self, key: str) -> int:
        """An integer >= 0."""
        value = self.get(key)
        if type(value) is not int or value < 0:
            self.fail((key,), f"must be an integer of at least 0, got {show(value)}")
        return value

    def string(self, key: str) -> str:
        """A string."""
        value = self.get(key)
        if not isinstance(value, str):
            self.fail((key,), f"must be a string, got {show(value)}")
        return value

    def hash128(self, key: str) -> str:
        """32 lower-case hexadecimal digits."""
        value = self.string(key)
        if not HASH128.fullmatch(value):
            self.fail((key,), f"must be 32 hexadecimal digits, got {show(value)}")
        return value

    def expect(self, key: str, expected: Any) -> None:
        """Exactly this value, of exactly this type."""
        value = self.get(key)
        if value != expected or type(value) is not type(expected) or _loose(value):
            self.fail((key,), f"must be {expected!r}, got {show(value)}")

    def fail(self, path: tuple[str | int, ...], problem: str) -> NoReturn:
        """Raise FormatError for the value at `path` below this object."""
        path = self.path + path
        offset = strict_json.locate(self.data, path)
        name = self.name + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
        raise FormatError(name, self.base + (offset or 0), problem)


def _loose(value: Any) -> bool:
    """Whether a list holds what `==` takes for an integer but JSON does not: 1.0, true."""
    return isinstance(value, list) and any(type(item) is not int and not isinstance(item, str) for item in value)


def show(value: Any) -> str:
    """A value from the file for an error message: short, and on one line whatever it holds."""
    text = ascii(value) if not isinstance(value, (dict, list)) else f"{type(value).__name__} of {len(value)}"
    return text if len(text) <= 80 else f"{text[:77]}..."
