"""JSON from an untrusted file: parsed strictly, in bounded time and memory, or refused with a byte offset.

Knows JSON, not what the documents mean. Python's `json.loads` alone accepts duplicate keys, NaN, 1e999, lone surrogates
and a million digits, and deep nesting ends in a RecursionError; all of these are refused here.

Cost: a scan of the bytes for depth and item count first (regular expressions without backtracking), then the C parser.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import FormatError

MAX_DEPTH = 32
MAX_ITEMS = 50_000
"""Brackets, braces and commas in one document: Llama-3.1-405B's header has 2,000 tensors of 11 each."""
MAX_QUOTES = 4 * MAX_ITEMS
MAX_INTEGER = 2**63 - 1
_MAX_NUMBER_LENGTH = 40

# Possessive, and the closing quote is optional: one pass, whatever the bytes.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_WHITESPACE = re.compile(r"[ \t\n\r]*+")
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{},"))


class _Refused(Exception):
    """Raised by the parser's hooks, which do not know where they are. `text` helps to find the place."""

    def __init__(self, problem: str, text: str):
        super().__init__(problem)
        self.text = text


def parse_object(data: bytes, field: str, base: int) -> dict[str, Any]:
    """The JSON object in `data`, which lies at byte `base` of the file; FormatError(field, ...) if not strictly valid.

    >>> parse_object(b'{"a": 1, "a": 2}', "header", 64)
    Traceback (most recent call last):
    edgellama.errors.FormatError: header (byte 73): duplicate key "a"
    """
    _check_structure(data, field, base)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(field, base + error.start, f"not UTF-8: {error.reason}") from None
    try:
        value = _DECODER.decode(text)
    except _Refused as error:
        raise FormatError(field, base + max(data.rfind(error.text.encode("utf-8", "replace")), 0), str(error)) from None
    except json.JSONDecodeError as error:
        raise FormatError(field, base + len(text[: error.pos].encode()), f"not JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise FormatError(field, base, "must be a JSON object")
    escape = re.search(rb"\\u[dD][89a-fA-F]", data)
    if escape:  # only an escape can make a surrogate; paired ones are fine
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise FormatError(field, base + escape.start(), "a lone surrogate in a string") from None
    return value


def dump(value: Mapping[str, Any], what: str) -> bytes:
    """`value` as compact UTF-8 JSON, keys in their given order; FormatError if `parse_object` would refuse it."""
    try:
        data = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise FormatError(what, None, f"cannot be stored as JSON: {error}") from None
    if parse_object(data, what, 0) != value:
        raise FormatError(what, None, "changes when stored as JSON (keys must be strings, sequences lists)")
    return data


def locate(data: bytes, path: tuple[str | int, ...]) -> int | None:
    """The byte offset in `data`, a valid document, of the value at `path`; None if it is not there.

    >>> locate(b'{"tensors": [{"name": "a"}]}', ("tensors", 0, "name"))
    22
    """
    text = data.decode("utf-8")
    pos = _skip(text, 0)
    for step in path:
        found = _enter(text, pos, step)
        if found is None:
            return None
        pos = found
    return len(text[:pos].encode())


def _enter(text: str, pos: int, step: str | int) -> int | None:
    """The position of member `step` of the object or array that starts at `pos`."""
    if text[pos] != ("{" if isinstance(step, str) else "["):
        return None
    pos = _skip(text, pos + 1)
    index = 0
    while text[pos] not in "}]":
        key: str | int = index
        if isinstance(step, str):
            key, pos = json.decoder.scanstring(text, pos + 1, True)  # type: ignore[attr-defined]
            pos = _skip(text, _skip(text, pos) + 1)
        if key == step:
            return pos
        pos = _skip(text, _DECODER.raw_decode(text, pos)[1])
        if text[pos] == ",":
            pos = _skip(text, pos + 1)
        index += 1
    return None


def _skip(text: str, pos: int) -> int:
    match = _WHITESPACE.match(text, pos)
    assert match is not None
    return match.end()


def _check_structure(data: bytes, field: str, base: int) -> None:
    """Bound the depth and the number of values before the recursive parser runs."""
    if data.count(b'"') > MAX_QUOTES:
        raise FormatError(field, base, f"more than {MAX_QUOTES} quotes")
    structure = _STRING.sub(b"", data).translate(None, _NOT_STRUCTURE)
    if len(structure) > MAX_ITEMS:
        raise FormatError(field, base, f"more than {MAX_ITEMS} brackets and commas")
    depth = 0
    for byte in structure.replace(b",", b""):
        depth += 1 if byte in b"[{" else -1
        if depth > MAX_DEPTH:
            raise FormatError(field, base, f"nested deeper than {MAX_DEPTH}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"duplicate key {_short(json.dumps(key))}", f'"{key}"')
            seen.add(key)
    return value


def _integer(text: str) -> int:
    value = int(text) if len(text) <= _MAX_NUMBER_LENGTH else None
    if value is None or not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise _Refused(f"the integer {_short(text)} is out of range", text)
    return value


def _float(text: str) -> float:
    value = float(text) if len(text) <= _MAX_NUMBER_LENGTH else math.inf
    if not math.isfinite(value):
        raise _Refused(f"the number {_short(text)} is out of range", text)
    return value


def _constant(text: str) -> NoReturn:
    raise _Refused(f"{text} is not JSON", text)


def _short(text: str) -> str:
    return text if len(text) <= _MAX_NUMBER_LENGTH else f"{text[:20]}... ({len(text)} characters)"


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)
