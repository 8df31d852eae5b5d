"""Typed reads of a JSON object from an untrusted file.

Knows: how to check a value's type and range, how to render any value in one short line, and which keys were read, so
that nothing is dropped in silence. Does not know what the keys mean (`config.py`, `config_keys.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, overload

from edgellama.errors import ConfigError

MAX_TOKEN_ID = 2**31 - 1
MAX_EOS_IDS = 1024


class Required:
    """The default of a key that must be there."""


REQUIRED = Required()


class ConfigKeys:
    """Typed reads of one JSON object. Null reads as absent; `path` prefixes the keys in messages.

    >>> ConfigKeys({"hidden_size": "64"}).integer("hidden_size", 1, 100)
    ConfigError: config.json: hidden_size: must be a whole number from 1 to 100, got '64'
    """

    def __init__(self, raw: Mapping[str, Any], path: str = "", ignored: dict[str, str] | None = None):
        self.raw, self.path = raw, path
        self.ignored: dict[str, str] = {} if ignored is None else ignored
        """Full key -> why its value has no effect; shared with nested objects."""
        self._taken: set[str] = set()

    def refuse(self, key: str, problem: str) -> NoReturn:
        raise ConfigError(f"config.json: {self.path}{key}: {problem}")

    def take(self, key: str) -> Any:
        """The value as it is, or None; the key counts as read."""
        self._taken.add(key)
        return self.raw.get(key)

    def nested(self, key: str) -> ConfigKeys | None:
        """The object under `key`; None if it is absent, null or empty."""
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.refuse(key, f"must be an object or null, got {show(value)}")
        return ConfigKeys(value, f"{self.path}{key}.", self.ignored) if value else None

    @overload
    def integer(self, key: str, low: int, high: int, default: int | Required = REQUIRED) -> int: ...
    @overload
    def integer(self, key: str, low: int, high: int, default: None) -> int | None: ...
    def integer(self, key: str, low: int, high: int, default: int | Required | None = REQUIRED) -> int | None:
        value = self.take(key)
        if value is None:
            return self._default(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(key, f"must be a whole number from {low} to {high}, got {show(value)}")
        return int(value)

    @overload
    def number(self, key: str, low: float, high: float, default: float | Required = REQUIRED) -> float: ...
    @overload
    def number(self, key: str, low: float, high: float, default: None) -> float | None: ...
    def number(self, key: str, low: float, high: float, default: float | Required | None = REQUIRED) -> float | None:
        value = self.take(key)
        if value is None:
            return self._default(key, default)
        return self._in_range(key, value, low, high)

    def numbers(self, key: str, count: int, low: float, high: float) -> tuple[float, ...]:
        """A required list of `count` numbers."""
        value = self.take(key)
        if not isinstance(value, (list, tuple)) or len(value) != count:
            got = f"a list of {len(value)}" if isinstance(value, (list, tuple)) else show(value)
            self.refuse(key, f"must be a list of {count} numbers, got {got}")
        return tuple(self._in_range(f"{key}[{i}]", x, low, high) for i, x in enumerate(value))

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(key, f"must be true or false, got {show(value)}")
        return value

    @overload
    def choice(self, key: str, choices: Iterable[str], default: str) -> str: ...
    @overload
    def choice(self, key: str, choices: Iterable[str], default: None) -> str | None: ...
    def choice(self, key: str, choices: Iterable[str], default: str | None) -> str | None:
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, str) or value not in choices:
            self.refuse(key, f"{show(value)} is not supported ({', '.join(choices)} are)")
        return value

    def token_ids(self, key: str, default: int | None) -> tuple[int, ...]:
        """A token id, a list of them or null. Absent is `default`; -1 is an old spelling of "none"."""
        value = self.take(key) if key in self.raw else default
        self._taken.add(key)
        ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if len(ids) > MAX_EOS_IDS:
            self.refuse(key, f"must be at most {MAX_EOS_IDS} token ids, got {len(ids)}")
        for i in ids:
            if isinstance(i, bool) or not isinstance(i, int) or not -1 <= i <= MAX_TOKEN_ID:
                self.refuse(key, f"must be a token id, got {show(i)}")
        return tuple(dict.fromkeys(int(i) for i in ids if i != -1))

    def token_id(self, key: str, default: int | None) -> int | None:
        """One token id or None."""
        if isinstance(self.raw.get(key), (list, tuple)):
            self.refuse(key, "must be one token id or null, got a list")
        return next(iter(self.token_ids(key, default)), None)

    def account_for_the_rest(
        self, harmless: Mapping[str, str], neutral: Mapping[str, tuple[tuple[Any, ...], str]]
    ) -> None:
        """Note every key not read so far as ignored, with its reason, or refuse it."""
        for key, value in self.raw.items():
            if key in self._taken:
                continue
            values, complaint = neutral.get(key, ((), ""))
            if key in harmless:
                reason = harmless[key]
            elif value is None:
                reason = "is null"
            elif any(_same(value, v) for v in values):
                reason = f"{show(value)} has no effect"
            elif key in neutral:
                self.refuse(key, complaint)
            else:
                self.refuse(show(key), "is not a key edgellama knows; remove it if it has no effect on the model")
            self.ignored[f"{self.path}{key}"] = reason

    def _default(self, key: str, default: Any) -> Any:
        if isinstance(default, Required):
            self.refuse(key, "is missing")
        return default

    def _in_range(self, key: str, value: Any, low: float, high: float) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:  # NaN is not
            self.refuse(key, f"must be a number from {low:g} to {high:g}, got {show(value)}")
        return float(value)


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and a bool only to a bool: JSON's `true` is not 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def show(value: Any) -> str:
    """A short one-line rendering of any JSON value for a message; never fails, never long."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**64:
        return "an integer of more than 64 bits"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    text = ascii(value) if isinstance(value, str) else type(value).__name__
    return text if len(text) <= 60 else text[:56] + "...'"
