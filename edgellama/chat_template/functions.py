"""The JSON schema of a Python function, as transformers' `get_json_schema` makes it: tools may be plain functions.

Names and types come from the signature, descriptions from a docstring in Google's style ("Args:"). Whatever has no
schema is a ValueError that names the function and the argument.
"""

import enum
import inspect
import json
import re
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_SIMPLE: dict[Any, dict[str, str]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
_SCALARS = (int, float, str, bool, type(None))
_SECTION = re.compile(r"^[ \t]*(Args|Returns|Raises):[ \t]*$", re.MULTILINE)
_ARGUMENT = re.compile(r"^([ \t]*)(\w+):[ \t]*(.*)$")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def json_schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """`{"type": "function", "function": {"name", "description", "parameters"}}` of `function`."""
    name = getattr(function, "__name__", "operation")
    documentation = inspect.getdoc(function)
    if not documentation:
        raise ValueError(f"tool {name}: the function needs a docstring that describes it and its arguments")
    description, described, returned = _read_docstring(documentation.strip())
    hints = get_type_hints(function)
    properties: dict[str, Any] = {}
    required = []
    for index, (argument, parameter) in enumerate(inspect.signature(function).parameters.items()):
        if index == 0 and argument in ("self", "cls") and parameter.annotation is inspect.Parameter.empty:
            continue
        if argument not in hints:
            raise ValueError(f"tool {name}: argument {argument} has no type hint")
        schema = _schema(hints[argument], f"tool {name}: argument {argument}")
        if argument not in described:
            raise ValueError(f"tool {name}: the docstring does not describe argument {argument} (below 'Args:')")
        text = described[argument]
        choices = _CHOICES.search(text)
        if choices:
            schema["enum"] = [each.strip() if isinstance(each, str) else each for each in json.loads(choices.group(1))]
            text = text[: choices.start()].strip()
        properties[argument] = {**schema, "description": text}
        if parameter.default is inspect.Parameter.empty:
            required.append(argument)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    result: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    if "return" in hints:
        try:
            result["return"] = _schema(hints["return"], "")
        except ValueError:  # the model never writes it
            pass
        else:
            if returned is not None:
                result["return"]["description"] = returned
    return {"type": "function", "function": result}


def _schema(hint: Any, where: str) -> dict[str, Any]:
    origin, args = get_origin(hint), get_args(hint)
    if origin is None:
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return _choices([member.value for member in hint], where)
        if hint in _SIMPLE:
            return dict(_SIMPLE[hint])
    elif origin in (Union, types.UnionType):
        return _union(args, where)
    elif origin is Literal:
        return _choices(list(args), where)
    elif origin is list:
        return {"type": "array", "items": _schema(args[0], where)}
    elif origin is tuple and len(args) > 1 and ... not in args:
        return {"type": "array", "prefixItems": [_schema(each, where) for each in args]}
    elif origin is dict:
        return {"type": "object", "additionalProperties": _schema(args[1], where)}
    raise ValueError(f"{where}: no JSON schema for the type {hint}; pass the tool's schema as a dict")


def _union(args: tuple, where: str) -> dict[str, Any]:
    parts = [_schema(each, where) for each in args if each is not type(None)]
    if len(parts) == 1:
        result = parts[0]
    elif all(part.keys() == {"type"} and isinstance(part["type"], str) for part in parts):
        names = sorted({part["type"] for part in parts})
        result = {"type": names[0] if len(names) == 1 else names}
    else:
        result = {"anyOf": parts}
    return {**result, "nullable": True} if type(None) in args else result


def _choices(values: list, where: str) -> dict[str, Any]:
    if not values or any(type(value) not in _SCALARS for value in values):
        raise ValueError(f"{where}: choices must be texts, numbers, booleans or None, got {values!r:.80}")
    names = list(dict.fromkeys(_SIMPLE[type(value)]["type"] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}


def _read_docstring(text: str) -> tuple[str, dict[str, str], str | None]:
    """The description, the arguments' descriptions, and what is returned."""
    marks = list(_SECTION.finditer(text))
    description = text[: marks[0].start()].strip() if marks else text.strip()
    sections: dict[str, str] = {}
    for index, mark in enumerate(marks):
        end = marks[index + 1].start() if index + 1 < len(marks) else len(text)
        sections.setdefault(mark.group(1), text[mark.end() : end].strip("\n"))
    returned = sections.get("Returns")
    return description, _read_arguments(sections.get("Args", "")), returned.strip() if returned is not None else None


def _read_arguments(section: str) -> dict[str, str]:
    """`name: text`, where lines that are indented deeper go on with the text."""
    described: dict[str, list[str]] = {}
    indent = None
    lines: list[str] | None = None
    for line in section.splitlines():
        start = _ARGUMENT.match(line)
        if start and (indent is None or len(start.group(1)) <= indent):
            indent = len(start.group(1))
            lines = described.setdefault(start.group(2), [])
            line = start.group(3)
        if lines is not None and line.strip():
            lines.append(line.strip())
    return {name: " ".join(lines) for name, lines in described.items()}
