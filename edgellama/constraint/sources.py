"""What a user gives (schema, expression, choice, grammar) as llguidance's Lark. Knows syntax, no tokens.

`no_forcing` is set throughout: where only one text can follow, llguidance would allow only that tokenization of it
which its tokenizer prefers; without, the model chooses among all.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from edgellama.constraint.gbnf import parse_gbnf
from edgellama.constraint.gbnf_to_lark import gbnf_to_lark, literal
from edgellama.errors import ConstraintError

Source = Any
"""A JSON schema: a dict, JSON text, a bool, or a class with `model_json_schema`."""

_OPTIONS = '%llguidance {"no_forcing": true}\n'
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
# Between JSON's tokens: at most a space, or a line break with its indentation. Small models would go on for ever.
_WHITESPACE = r" |\n[ \t]{0,20}"


def lark_grammar(name: str, value: Any) -> str:
    """`value` of the option `name` ("json_schema", "regex", "choice", "grammar") as a grammar for llguidance."""
    return {"json_schema": _schema, "regex": _regex, "choice": _choice, "grammar": _grammar}[name](value)


def _schema(schema: Source) -> str:
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise ConstraintError(f"json_schema: not JSON: {error}") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise TypeError(f"json_schema must be a dict, its JSON text or True, got {type(schema).__name__}")
    own = schema.get("x-guidance", {})
    if not isinstance(own, Mapping):
        raise ConstraintError("json_schema: x-guidance must be an object")
    try:
        text = json.dumps({**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE, **own}}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConstraintError(f"json_schema: not JSON: {error}") from None
    return f"{_OPTIONS}start: %json {text}\n"


def _regex(pattern: str) -> str:
    if not isinstance(pattern, str):
        raise TypeError(f"regex must be a string, got {type(pattern).__name__}")
    from llguidance import regex_to_lark

    return f"{_OPTIONS}start: /{regex_to_lark(pattern, '')}/\n"


def _choice(options: Iterable[str]) -> str:
    if isinstance(options, str) or not isinstance(options, Iterable):
        raise TypeError(f"choice must be a list of strings, got {type(options).__name__}")
    texts = list(options)
    for each in texts:
        if not isinstance(each, str):
            raise TypeError(f"choice must be a list of strings, but has {each!r:.40} in it")
    if not texts or "" in texts:
        raise ValueError("choice must have at least one string, and none that is empty")
    return f"{_OPTIONS}start: /{'|'.join(map(literal, texts))}/\n"


def _grammar(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"grammar must be a string, got {type(text).__name__}")
    if _GBNF_RULE.search(text):
        return _OPTIONS + gbnf_to_lark(parse_gbnf(text))
    if not re.search(r"^[ \t]*start\b", text, re.MULTILINE):
        raise ConstraintError("grammar: neither GBNF (`root ::= ...`) nor Lark (`start: ...`): it has no first rule")
    return f"{text}\n{_OPTIONS}"
