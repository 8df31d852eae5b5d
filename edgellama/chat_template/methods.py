"""The methods and attributes that a chat template may use, and what each may cost.

A list of what is allowed, not of what is forbidden: whatever is not named here does not exist for a template. Values
are plain data (`str`, `dict`, `list`, ...), so this is all that can be reached. What changes a value (`append`,
`update`) is left out, as in Jinja's ImmutableSandboxedEnvironment.
"""

import re
from collections.abc import Callable
from typing import Any

from jinja2.runtime import LoopContext
from jinja2.utils import Cycler
from markupsafe import Markup

from edgellama.chat_template.budget import Budget, TooMuch

ESCAPED = 6
"""Markup replaces a character by up to so many."""
# A width or precision of %-formatting stands before one of these; other digits of the text may be any number.
_PERCENT_NUMBER = re.compile(r"\d+(?=[hlL]*[.%diouxXeEfFgGcrsa])")
_SPEC_NUMBER = re.compile(r"\d+")


class Method:
    """A bound method that pays before it runs; opaque to templates."""

    __slots__ = ("_run",)

    def __init__(self, run: Callable[..., Any]):
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def __repr__(self) -> str:
        return "<function>"


def charge_result(budget: Budget, result: Any) -> Any:
    """Pays for what a method or filter made; what may be larger than its arguments is checked before."""
    if isinstance(result, str):
        budget.text(len(result))
    elif isinstance(result, list | tuple):
        budget.tick(len(result))
    return result


# -- str: each check gets the string and the arguments, and raises if the result would be too large -------------------


def _cheap(budget: Budget, text: str, *args: Any, **kwargs: Any) -> None:
    """Linear in the string and what it is compared with."""
    for arg in args:
        budget.weigh(arg)


def _search_back(budget: Budget, text: str, part: Any = None, *args: Any, **kwargs: Any) -> None:
    """From the right CPython searches naively: length times length in the worst case."""
    part = kwargs.get("sep", part)
    if isinstance(part, str):
        budget.read(len(text) * len(part))


def _strip(budget: Budget, text: str, characters: Any = None) -> None:
    if isinstance(characters, str):
        budget.read(len(text) * len(characters) // 8)


def _width(budget: Budget, text: str, width: Any = 0, *args: Any) -> None:
    if isinstance(width, int):
        check_length(budget, width)


def _expandtabs(budget: Budget, text: str, tabsize: Any = 8) -> None:
    if isinstance(tabsize, int):
        check_length(budget, len(text) + text.count("\t") * abs(tabsize))


def check_replace(budget: Budget, text: str, old: Any, new: Any, count: Any = None) -> None:
    """TooMuch if replacing would make too long a text."""
    if isinstance(old, str) and isinstance(new, str):
        budget.read(len(text))
        longer = (ESCAPED if isinstance(text, Markup) else 1) * len(new) - len(old)
        check_length(budget, len(text) + text.count(old) * max(longer, 0))


def check_length(budget: Budget, length: int) -> None:
    """TooMuch if a text of that length may not be made."""
    if length > budget.max_text:
        budget.text(length)


STR: dict[str, Callable[..., None]] = {
    **dict.fromkeys(
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower "
        "isnumeric isprintable isspace istitle isupper lower partition removeprefix removesuffix split splitlines "
        "startswith swapcase title upper".split(),
        _cheap,
    ),
    **dict.fromkeys(("rfind", "rindex", "rpartition", "rsplit"), _search_back),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), _strip),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _width),
    "expandtabs": _expandtabs,
    "replace": check_replace,
}


def str_method(budget: Budget, text: str, name: str) -> Method:
    """A method of STR, or "join"."""

    def run(*args: Any, **kwargs: Any) -> Any:
        budget.read(len(text))
        STR[name](budget, text, *args, **kwargs)
        return charge_result(budget, getattr(text, name)(*args, **kwargs))

    def join(values: Any) -> str:
        parts = list(budget.iterate(values))
        check_join(budget, text, parts)
        return charge_result(budget, text.join(parts))

    return Method(join if name == "join" else run)


def check_join(budget: Budget, separator: str, parts: list) -> None:
    """TooMuch if joining would make too long a text."""
    factor = ESCAPED if isinstance(separator, Markup) else 1
    length = len(separator) * len(parts) + factor * sum(budget.weigh(part) for part in parts)
    check_length(budget, length)


def check_percent(budget: Budget, text: str, values: Any) -> None:
    """TooMuch if `text % values` would make too long a text; exact enough for formats that anyone writes."""
    budget.read(len(text))
    longest = max((budget.weigh(value) for value in _format_values(values)), default=0)
    if "*" in text:
        longest += max((abs(value) for value in _format_values(values) if isinstance(value, int)), default=0)
    if isinstance(text, Markup):
        longest *= ESCAPED
    widths = _sum_of_widths(budget, _PERCENT_NUMBER.findall(text)) if "%" in text else 0
    check_length(budget, len(text) + text.count("%") * (longest + 24) + widths)


def _format_values(values: Any) -> list:
    if isinstance(values, dict):
        return list(values.values())
    return list(values) if isinstance(values, tuple) else [values]


def check_spec(budget: Budget, spec: str) -> None:
    """TooMuch for a format specification (`{:>80}`) with a width that no text may have."""
    _sum_of_widths(budget, _SPEC_NUMBER.findall(spec))


def _sum_of_widths(budget: Budget, numbers: list[str]) -> int:
    if any(len(number) > 9 for number in numbers):
        raise TooMuch("too long a text")
    total = sum(map(int, numbers))
    check_length(budget, total)
    return total


# -- other types ------------------------------------------------------------------------------------------------------

_LOOP_VALUES = frozenset("index index0 revindex revindex0 first last length depth depth0 previtem nextitem".split())


def attribute(budget: Budget, obj: Any, name: str) -> Any:
    """The value of an allowed attribute that is not a `str` method; KeyError if there is none of that name."""
    if isinstance(obj, dict):
        if name in ("items", "keys", "values"):
            return Method(getattr(obj, name))
        if name in ("get", "copy"):
            return _paying(budget, getattr(obj, name), len(obj) if name == "copy" else 0)
    elif isinstance(obj, list | tuple):
        if name in ("index", "count"):
            return _paying(budget, getattr(obj, name), 0, obj)
        if name == "copy" and isinstance(obj, list):
            return _paying(budget, obj.copy, len(obj))
        if name in getattr(type(obj), "_fields", ()):  # of `groupby`: grouper and list
            return getattr(obj, name)
    elif isinstance(obj, LoopContext):
        if name in _LOOP_VALUES:
            return getattr(obj, name)
        if name in ("cycle", "changed"):
            return _paying(budget, getattr(obj, name), 0)
    elif isinstance(obj, Cycler):
        if name == "current":
            return obj.current
        if name in ("next", "reset"):
            return Method(getattr(obj, name))
    raise KeyError(name)


def _paying(budget: Budget, method: Callable[..., Any], units: int, *compared: Any) -> Method:
    """`method`, after its arguments and what they are compared with have been weighed."""

    def run(*args: Any, **kwargs: Any) -> Any:
        budget.tick(units)
        for value in (*compared, *args, *kwargs.values()):
            budget.weigh(value)
        return method(*args, **kwargs)

    return Method(run)
