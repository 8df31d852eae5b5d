"""Tool calls in a model's reply: found, read, and held back while a reply is streamed.

Knows the two common conventions: Hermes' and Qwen's `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and
Llama-3's reply that is nothing but `{"name": ..., "parameters": {...}}`. Does not know models, templates or OpenAI's
shapes.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_BETWEEN = re.compile(r"[\s;,]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Call:
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str


def parse_calls(text: str, names: Collection[str]) -> tuple[str, list[Call]]:
    """The reply's own words and its calls; (text, []) where it calls nothing.

    `names`: the tools that there are. JSON that nothing marks as a call is one only if it names one of them. A call
    that cannot be read leaves the whole reply as text: better shown than lost.
    """
    if _OPEN in text:
        words, _, rest = text.partition(_OPEN)
        calls = [_read(part.partition(_CLOSE)[0]) for part in rest.split(_OPEN)]
        found = [call for each in calls for call in each or []]
        return (words.strip(), found) if found and all(calls) else (text, [])
    bare = _read(text) if text.lstrip().startswith("{") else None
    if bare and all(call.name in names for call in bare):
        return "", bare
    return text, []


def _read(text: str) -> list[Call] | None:
    """The calls that `text` consists of; None if it is anything else."""
    calls = []
    at = _BETWEEN.match(text).end()  # type: ignore[union-attr]  # matches the empty text, too
    while at < len(text):
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        call = _call(value)
        if call is None:
            return None
        calls.append(call)
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
    return calls or None


def _call(value: Any) -> Call | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # JSON within JSON
        return Call(value["name"], arguments)
    if arguments is not None and not isinstance(arguments, dict):
        return None
    return Call(value["name"], json.dumps(arguments or {}, ensure_ascii=False))


class HoldBack:
    """For streaming: passes on what is certainly no call, keeps the rest until the reply is over."""

    def __init__(self) -> None:
        self._text = ""
        self._sent = 0
        self._holding = False

    def push(self, piece: str) -> str:
        """Takes a piece of the reply; returns what can be shown now."""
        self._text += piece
        if self._holding:
            return ""
        start = self._text.lstrip()
        at = self._text.find(_OPEN, self._sent)
        if start[:1] in ("", "{"):
            end, self._holding = self._sent, bool(start)
        elif at >= 0:
            end, self._holding = at, True
        else:
            end = len(self._text) - _overlap(self._text, _OPEN)
        shown = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return shown

    def finish(self, names: Collection[str]) -> tuple[str, list[Call]]:
        """The reply is over: what is still to be shown, and its calls."""
        _, calls = parse_calls(self._text, names)
        return ("" if calls else self._text[self._sent :]), calls


def _overlap(text: str, marker: str) -> int:
    """How much of `marker`'s beginning `text` ends with."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)


def forcing_schema(tools: Sequence[Mapping[str, Any]], arguments_key: str) -> dict[str, Any]:
    """The JSON schema of a reply that is a call of one of `tools` (functions: name, parameters)."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["name"]},
                arguments_key: tool.get("parameters") or {"type": "object"},
            },
            "required": ["name", arguments_key],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}
