"""Jinja's filters and tests for chat templates, each behind a check of what it may cost.

Left out, by name: what no chat template needs and what is slow or long-winded by design (urlize, pprint, xmlattr,
striptags, wordwrap, filesizeformat). `tojson` is transformers': plain JSON, no HTML escapes.
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from jinja2 import defaults
from jinja2.utils import _PassArg
from markupsafe import Markup

from edgellama.chat_template.budget import Budget, TooMuch
from edgellama.chat_template.methods import (
    charge_result,
    check_join,
    check_length,
    check_percent,
    check_replace,
)

if TYPE_CHECKING:
    from edgellama.chat_template.sandbox import GuardedEnvironment

_MAX_INDENT = 100
_MAX_COLUMNS = 10_000
_MAX_DIGITS = 1000

# Each check gets the filter's own arguments and returns the value to filter: the same one, or one that ticks.
Check = Callable[..., Any]


def _free(budget: Budget, value: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Costs the same for every value."""
    return value


def _text(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Linear in the value's text, which grows by a small factor at most."""
    budget.weigh(value)
    return value


def _number(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Reading a long row of digits is quadratic."""
    if isinstance(value, str) and len(value) > _MAX_DIGITS:
        raise TooMuch(f"a number of more than {_MAX_DIGITS} digits")
    return value


def _deep(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Compares or hashes the values within, some of them several times."""
    if isinstance(value, str):
        budget.tick(len(value) * len(value).bit_length() // 2)  # its letters
    elif not isinstance(value, list | tuple | dict):
        value = list(budget.iterate(value))
    for each in (value, *args, *kwargs.values()):
        weight = budget.weigh(each)
        budget.tick(weight.bit_length() * weight // 64)
    return value


def _lazy(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes one value after the other."""
    return budget.iterate(value)


def _reverse(budget: Budget, value: Any) -> Any:
    if hasattr(value, "__len__"):
        budget.tick(len(value))
    return value


def _columns(budget: Budget, value: Any, count: Any, fill_with: Any = None) -> Any:
    """batch(linecount) and slice(slices) make as many values as the template says."""
    if isinstance(count, int):
        if count > _MAX_COLUMNS:
            raise TooMuch(f"more than {_MAX_COLUMNS} columns")
        budget.tick(abs(count))
    return budget.iterate(value)


def _center(budget: Budget, value: Any, width: Any = 80) -> Any:
    check_length(budget, budget.weigh(value) + (width if isinstance(width, int) else 0))
    return value


def _indent(budget: Budget, s: Any, width: Any = 4, first: Any = False, blank: Any = False) -> Any:
    if isinstance(s, str) and isinstance(width, int | str):
        budget.read(len(s))
        lines = len(s.splitlines()) + 2
        check_length(budget, len(s) + lines * ((width if isinstance(width, int) else len(width)) + 1))
    return s


def _replace(budget: Budget, s: Any, old: Any, new: Any, count: Any = None) -> Any:
    budget.weigh(s)
    check_replace(budget, s if isinstance(s, str) else str(s), old, new)
    return s


def _join(budget: Budget, value: Any, d: Any = "", attribute: Any = None) -> Any:
    values = list(budget.iterate(value))
    budget.weigh(d)
    check_join(budget, d if isinstance(d, Markup) else str(d), values)
    return values


def _format(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> Any:
    budget.weigh(value)
    check_percent(budget, value if isinstance(value, str) else str(value), kwargs or args)
    return value


def _round(budget: Budget, value: Any, precision: Any = 0, method: Any = "common") -> Any:
    if isinstance(precision, int) and abs(precision) > 300:
        raise TooMuch("rounding to more than 300 places")
    return value


def _sum(budget: Budget, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    """Adds one after the other: for lists that is quadratic."""
    values = list(budget.iterate(iterable))
    if not isinstance(start, int | float) or not all(isinstance(each, int | float | dict) for each in values):
        budget.tick(len(values) * (budget.weigh(values) + budget.weigh(start)) // 16)
    return values


def _trim(budget: Budget, value: Any, chars: Any = None) -> Any:
    length = budget.weigh(value)
    if isinstance(chars, str):
        budget.read(length * len(chars) // 8)
    return value


CHECKS: dict[str, Check] = {
    **dict.fromkeys("abs count d default first items last length random safe".split(), _free),
    **dict.fromkeys(
        "capitalize e escape forceescape lower string title truncate upper urlencode wordcount".split(), _text
    ),
    **dict.fromkeys("dictsort groupby max min sort unique".split(), _deep),
    **dict.fromkeys("list map reject rejectattr select selectattr".split(), _lazy),
    **dict.fromkeys(("batch", "slice"), _columns),
    **dict.fromkeys(("float", "int"), _number),
    "center": _center,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "reverse": _reverse,
    "round": _round,
    "sum": _sum,
    "trim": _trim,
}

# Tests that look into their values; all others cost the same for every value.
_DEEP_TESTS = frozenset(
    "!= < <= == > >= divisibleby eq equalto filter ge greaterthan gt in le lessthan lower lt ne sameas test "
    "upper".split()
)


def guarded_filters(environment: "GuardedEnvironment") -> dict[str, Callable[..., Any]]:
    """The filters of `environment`, by name."""
    budget = environment.budget
    filters = {name: _guard(budget, defaults.DEFAULT_FILTERS[name], check) for name, check in CHECKS.items()}
    for name in ("batch", "slice"):  # lists of lists, however few values come in
        filters[name] = _ticking(budget, filters[name])

    def attr(value: Any, name: Any) -> Any:
        return environment.attribute_of(value, str(name))

    def tojson(
        x: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
    ) -> str:
        size = budget.weigh(x)
        width = len(indent) if isinstance(indent, str) else indent
        if isinstance(width, int) and width > _MAX_INDENT:
            raise TooMuch(f"an indent of more than {_MAX_INDENT}")
        check_length(budget, size + size * (sum(map(len, separators)) if separators else 0) // 4)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        if indent is None:
            return charge_result(budget, encoder.encode(x))
        parts = []
        for part in encoder.iterencode(x):  # each level of nesting adds to every line
            budget.text(len(part))
            parts.append(part)
        return charge_result(budget, "".join(parts))

    return {**filters, "attr": attr, "tojson": tojson}


def guarded_tests(environment: "GuardedEnvironment") -> dict[str, Callable[..., Any]]:
    """The tests of `environment` (`is ...`), by name."""
    budget = environment.budget

    def weigh_all(budget: Budget, value: Any = None, *args: Any, **kwargs: Any) -> Any:
        for each in (value, *args, *kwargs.values()):
            budget.weigh(each)
        return value

    return {
        name: _guard(budget, cast(Any, test), weigh_all if name in _DEEP_TESTS else _free)
        for name, test in defaults.DEFAULT_TESTS.items()
    }


def _guard(budget: Budget, function: Callable[..., Any], check: Check) -> Callable[..., Any]:
    """`function` behind `check`; Jinja goes on passing it what it passes `function`."""
    pass_arg = _PassArg.from_obj(function)

    def run(*args: Any, **kwargs: Any) -> Any:
        budget.tick()
        own = 0 if pass_arg is None else 1
        if len(args) > own:
            value = check(budget, *args[own:], **kwargs)
            args = (*args[:own], value, *args[own + 1 :])
        return charge_result(budget, function(*args, **kwargs))

    if pass_arg is not None:
        run.jinja_pass_arg = pass_arg  # type: ignore[attr-defined]
    return run


def _ticking(budget: Budget, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return budget.iterate(function(*args, **kwargs))

    run.jinja_pass_arg = _PassArg.from_obj(function)  # type: ignore[attr-defined]
    return run
