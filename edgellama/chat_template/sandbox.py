"""Jinja for chat templates that nobody vouches for: what cannot be reached, and what every step costs.

Two lines of defence. **Reach**: a template sees plain data and the few functions below; attributes come from a list of
allowed names (`methods`), only our own functions and its own macros can be called, and there is no loader, so nothing
can be imported or included. **Cost**: Jinja compiles templates to Python; our code generator (`codegen`) puts a hook
wherever that Python could run long or make something large: loops, calls, attributes, operators, comparisons, `~`,
slices, literals, output, filters and tests (`filters`), methods (`methods`). Nothing is computed while compiling.

Settings and extras are transformers': trim_blocks, lstrip_blocks, loop controls, `raise_exception`, `strftime_now`,
`tojson`, the `generation` block. Left out: `autoescape` blocks, `self`, `lipsum`. Texts and numbers that no chat needs
are refused: ranges above 100,000, integers above 4,096 bits.
"""

from datetime import datetime
from typing import Any, cast

from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.ext import loopcontrols
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace
from markupsafe import Markup

from edgellama.chat_template.budget import MAX_DEPTH, Budget, Iteration, TooMuch
from edgellama.chat_template.codegen import Generation, GuardedCode
from edgellama.chat_template.filters import guarded_filters, guarded_tests
from edgellama.chat_template.methods import (
    STR,
    Method,
    attribute,
    charge_result,
    check_length,
    check_percent,
    check_spec,
    str_method,
)

MAX_SOURCE = 1 << 16
"""Characters of a template; the longest in use have some 20,000."""
_MAX_RANGE = 100_000
_MAX_BITS = 4096
_MAX_TIME_FORMAT = 100

_SIMPLE = frozenset({str, int, bool, float, type(None)})
_INDEXED = (str, list, tuple, dict, range)


class RaisedByTemplate(TemplateError):
    """The template called `raise_exception`: it does not want this conversation."""


class GuardedEnvironment(ImmutableSandboxedEnvironment):
    """A Jinja environment for one template; not to be used by two threads at once. `budget` counts."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        self.budget = Budget()
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], cache_size=0)
        self.code_generator_class = GuardedCode
        self.optimized = False
        self.finalize = self._output
        self.concat = self._concat  # type: ignore[method-assign]
        self.filters = cast(Any, guarded_filters(self))
        self.tests = cast(Any, guarded_tests(self))
        self.globals = {
            "cycler": Method(Cycler),
            "dict": Method(self._dict),
            "joiner": Method(Joiner),
            "namespace": Method(self._namespace),
            "raise_exception": Method(self._raise_exception),
            "range": Method(self._range),
            "strftime_now": Method(self._strftime_now),
        }

    def handle_exception(self, source: str | None = None) -> Any:
        """Errors stay as they are: nobody is shown a template's traceback."""
        raise  # noqa: PLE0704  # called from except blocks only

    # -- hooks that the generated code calls ---------------------------------------------------------------------

    def iterate(self, values: Any) -> Iteration:
        """What a `for` loop goes through."""
        return self.budget.iterate(values)

    def comparable(self, value: Any) -> Any:
        """An operand of a comparison."""
        kind = type(value)
        if kind is str:
            self.budget.read(len(value))
        elif kind not in _SIMPLE:
            self.budget.weigh(value)
        return value

    def literal(self, value: Any, *, length: int) -> Any:
        """A list, tuple or dict with more than a few items, just made."""
        self.budget.tick(length)
        return value

    def joined(self, values: tuple) -> str:
        """`a ~ b`"""
        check_length(self.budget, sum(self.budget.weigh(value) for value in values))
        return charge_result(self.budget, "".join(map(str, values)))

    def sliced(self, obj: Any, start: Any, stop: Any, step: Any) -> Any:
        """`obj[start:stop:step]`"""
        if isinstance(obj, Undefined):
            return obj[start:stop:step]
        if not isinstance(obj, str | list | tuple | range):
            raise TypeError(f"{type(obj).__name__!r} object cannot be sliced")
        self.budget.tick(1 if isinstance(obj, range) else len(obj) // 16)
        return charge_result(self.budget, obj[start:stop:step])

    def getattr(self, obj: Any, attribute: Any) -> Any:
        """`obj.attribute`: an attribute first, else an item, as in Jinja."""
        self.budget.tick()
        value = self._lookup(obj, attribute)
        if value is not _NOTHING:
            return value
        try:
            return obj[attribute] if isinstance(obj, _INDEXED) else self.undefined(obj=obj, name=attribute)
        except (TypeError, LookupError):
            return self.undefined(obj=obj, name=attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`: an item first, else an attribute."""
        self.budget.tick()
        if isinstance(obj, Undefined):
            return obj[argument]
        if type(argument) not in _SIMPLE:
            self.budget.weigh(argument)
        if isinstance(obj, _INDEXED):
            try:
                return obj[argument]
            except (TypeError, LookupError):
                pass
        if isinstance(argument, str):
            value = self._lookup(obj, str(argument))
            if value is not _NOTHING:
                return value
        return self.undefined(obj=obj, name=argument)

    def attribute_of(self, obj: Any, name: str) -> Any:
        """An attribute, never an item."""
        self.budget.tick()
        value = self._lookup(obj, name)
        return self.undefined(obj=obj, name=name) if value is _NOTHING else value

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """`obj(...)`"""
        budget = self.budget
        budget.tick(1 + len(args) + len(kwargs))
        if isinstance(obj, LoopContext):
            args = tuple(map(budget.iterate, args))
        elif not isinstance(obj, Method | Macro | BlockReference | Joiner | Undefined):
            raise SecurityError(f"{type(obj).__name__!r} object cannot be called")
        budget.depth += 1
        if budget.depth > MAX_DEPTH:
            raise TooMuch(f"macros more than {MAX_DEPTH} deep")
        try:
            return context.call(obj, *args, **kwargs)
        finally:
            budget.depth -= 1

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`"""
        budget = self.budget
        if isinstance(left, Undefined) or isinstance(right, Undefined):
            budget.tick()
        elif isinstance(left, int | float) and isinstance(right, int | float):
            self._check_numbers(operator, left, right)
        elif operator == "%" and isinstance(left, str):
            check_percent(budget, left, right)
        elif operator == "*":
            count, values = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int) and isinstance(values, str | list | tuple):
                length = max(count, 0) * len(values)
                check_length(budget, length)
                budget.tick(0 if isinstance(values, str) else length)
        elif isinstance(left, str) and isinstance(right, str):
            check_length(budget, len(left) + len(right))
        elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
            budget.tick(1 + (len(left) + len(right)) // 16)
        else:
            budget.weigh(left)
            budget.weigh(right)
        return charge_result(budget, self.binop_table[operator](left, right))

    def _output(self, value: Any) -> Any:
        """`{{ value }}`"""
        if type(value) is not str:
            self.budget.weigh(value)
            value = str(value)
        self.budget.text(len(value))
        return value

    def _concat(self, parts: Any) -> str:
        """The text of a macro, a `set` or `call` block."""
        parts = list(parts)
        self.budget.text(sum(map(len, parts)))
        return "".join(parts)

    # -- within --------------------------------------------------------------------------------------------------

    def _lookup(self, obj: Any, name: str) -> Any:
        """An allowed attribute, an undefined for one that is not, `_NOTHING` where there is none."""
        if isinstance(obj, Undefined):
            return self.unsafe_undefined(obj, name) if name.startswith("_") else getattr(obj, name)  # UndefinedError
        if isinstance(obj, str):
            if name in STR or name == "join":
                return str_method(self.budget, obj, name)
            if name in ("format", "format_map"):
                return self._format_method(obj, mapping=name == "format_map")
        elif isinstance(obj, _Namespace):
            if name.startswith("_"):
                return self.unsafe_undefined(obj, name)
            return getattr(obj, name, _NOTHING)
        else:
            try:
                return attribute(self.budget, obj, name)
            except KeyError:
                pass
        return self.unsafe_undefined(obj, name) if hasattr(type(obj), name) else _NOTHING

    def _format_method(self, text: str, *, mapping: bool) -> Method:
        formatter = (_EscapeFormatter if isinstance(text, Markup) else _Formatter)(self)

        def run(*args: Any, **kwargs: Any) -> str:
            self.budget.read(len(text))
            if mapping:
                (kwargs,), args = args, ()
            return charge_result(self.budget, type(text)(formatter.vformat(text, args, kwargs)))

        return Method(run)

    def _check_numbers(self, operator: str, left: Any, right: Any) -> None:
        """Integers must not grow for ever."""
        self.budget.tick()
        if isinstance(left, int) and isinstance(right, int):
            bits = max(left.bit_length(), right.bit_length()) + 1
            if operator == "*":
                bits = left.bit_length() + right.bit_length()
            elif operator == "**":
                bits = left.bit_length() * max(right, 0)
            if bits > _MAX_BITS:
                raise TooMuch(f"an integer of more than {_MAX_BITS} bits")

    # -- functions -----------------------------------------------------------------------------------------------

    def _dict(self, *args: Any, **kwargs: Any) -> dict:
        for value in args:
            self.budget.weigh(value)
        return dict(*args, **kwargs)

    def _namespace(self, *args: Any, **kwargs: Any) -> "_Namespace":
        return _Namespace(self._dict(*args, **kwargs))

    def _raise_exception(self, message: Any) -> None:
        self.budget.weigh(message)
        raise RaisedByTemplate(str(message))

    def _range(self, *args: Any) -> range:
        values = range(*args)
        if len(values) > _MAX_RANGE:
            raise TooMuch(f"a range of more than {_MAX_RANGE}")
        return values

    def _strftime_now(self, format: Any) -> str:
        if not isinstance(format, str) or len(format) > _MAX_TIME_FORMAT:
            raise TemplateRuntimeError(f"strftime_now takes a format of at most {_MAX_TIME_FORMAT} characters")
        return charge_result(self.budget, datetime.now().strftime(format))


_NOTHING: Any = object()


class _Namespace(Namespace):
    """`namespace()`: its text does not show its values (which may contain itself); names with "_" are ours."""

    def __init__(self, values: dict):
        for name in values:
            _Namespace._check_name(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check_name(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name[:40]!r}")

    def __repr__(self) -> str:
        return "<namespace>"


class _Bounded:
    """The part of a `str.format` formatter that watches its fields."""

    _env: Any

    def format_field(self, value: Any, format_spec: str) -> Any:
        budget = self._env.budget
        budget.weigh(value)
        check_spec(budget, format_spec)
        return charge_result(budget, super().format_field(value, format_spec))  # type: ignore[misc]

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._env.budget.weigh(value)
        return super().convert_field(value, conversion)  # type: ignore[misc]


class _Formatter(_Bounded, SandboxedFormatter):
    pass


class _EscapeFormatter(_Bounded, SandboxedEscapeFormatter):
    pass
