"""What a caller asks of `generate`: the options' names and types, and one place that checks them. Knows no model."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from edgellama.generate.cancel import CancelToken
from edgellama.sampling import SamplingOptions

LogitsProcessor = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(ids int32 [T], prompt and reply so far; logits float32 [vocab_size], a copy) -> logits."""


class GenerateOptions(SamplingOptions, total=False):
    """The options of `generate`, `chat` and `astream` beside the sampling options; None or absent: the default."""

    stop: str | Sequence[str] | None
    logprobs: bool | None
    top_logprobs: int | None
    echo: bool | None
    num_return_sequences: int | None
    max_time: float | None
    eos_token_id: int | Sequence[int] | None
    on_full: Literal["length", "slide"] | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    prompt_lookup_num_tokens: int | None
    draft_model: Any  # a Llama: this module is below it
    json_schema: Any  # a dict, JSON text, True, or a class with `model_json_schema`
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None
    cancel: CancelToken | None
    progress: Callable[[int, int], None] | None
    # transformers' own names: see `config`.
    generation_config: Any  # a dict or a GenerationConfig
    do_sample: bool | None
    max_length: int | None
    min_length: int | None
    stop_strings: str | Sequence[str] | None
    suppress_tokens: Sequence[int] | None
    cache_implementation: str | None
    use_cache: bool | None


@dataclass(frozen=True)
class Request:
    """Checked options. Raises ValueError or TypeError that names the one that is wrong."""

    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    echo: bool = False
    num_return_sequences: int = 1
    max_time: float | None = None
    eos_token_id: frozenset[int] | None = None
    on_full: Literal["length", "slide"] = "length"
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    prompt_lookup_num_tokens: int | None = None
    draft_model: Any = None
    json_schema: Any = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    logits_processor: tuple[LogitsProcessor, ...] = ()
    cancel: CancelToken | None = None
    progress: Callable[[int, int], None] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Request":
        """From `generate`'s keyword arguments; what is no option of ours is taken for one of sampling."""
        names = {each.name for each in fields(cls)} - {"sampling"}
        given = {name: value for name, value in options.items() if name in names and value is not None}
        for name, read in _READERS.items():
            if name in given:
                given[name] = read(name, given[name])
        if given.get("top_logprobs"):
            given["logprobs"] = True
        request = cls(**given, sampling={name: value for name, value in options.items() if name not in names})
        request._check_combination()
        return request

    @property
    def constraint(self) -> dict[str, Any]:
        """The one of json_schema, regex, choice and grammar that was given, by name; or nothing."""
        all_kinds = {name: getattr(self, name) for name in ("json_schema", "regex", "choice", "grammar")}
        return {name: value for name, value in all_kinds.items() if value is not None}

    def _check_combination(self) -> None:
        if len(self.constraint) > 1:
            raise ValueError(f"{' and '.join(self.constraint)} exclude each other; give one of them")
        speculative = [name for name in ("prompt_lookup_num_tokens", "draft_model") if getattr(self, name) is not None]
        if len(speculative) > 1:
            raise ValueError("prompt_lookup_num_tokens and draft_model exclude each other; give one of them")
        if self.num_beams > 1 and speculative:
            raise ValueError(f"num_beams and {speculative[0]} exclude each other; give one of them")
        if self.num_beams > 1 and self.logprobs and self.echo:
            raise ValueError("logprobs of an echoed prompt do not go with num_beams; leave one of the three out")
        if self.on_full == "slide" and (self.num_beams > 1 or speculative):
            raise ValueError('on_full="slide" does not go with num_beams or speculative decoding')


def _text_list(name: str, value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else None
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a string or a list of them, got {value!r}")
    if not all(texts):
        raise ValueError(f"{name} has an empty string: every text would end before it begins")
    return texts


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def integer(name: str, value: object, least: int) -> int:
    """`value` as an int of at least `least`, else ValueError or TypeError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def _natural(name: str, value: object) -> int:
    return integer(name, value, 0)


def _positive(name: str, value: object) -> int:
    return integer(name, value, 1)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _seconds(name: str, value: object) -> float:
    seconds = _number(name, value)
    if seconds <= 0:
        raise ValueError(f"{name} must be above 0 seconds, got {value}")
    return seconds


def id_set(name: str, value: object) -> frozenset[int]:
    """One id or several; an empty list is no id at all."""
    values: Any = value if isinstance(value, Sequence | frozenset | set | np.ndarray) else [value]
    try:
        if any(isinstance(each, bool | str) for each in values):
            raise TypeError
        return frozenset(operator.index(each) for each in values)
    except TypeError:
        raise TypeError(f"{name} must be an integer or a list of them, got {value!r}") from None


def _processors(name: str, value: object) -> tuple[LogitsProcessor, ...]:
    processors = (value,) if callable(value) else tuple(value) if isinstance(value, Sequence) else (None,)
    if not all(callable(each) for each in processors):
        raise TypeError(f"{name} must be a function (ids, logits) -> logits or a list of them, got {value!r}")
    return processors


def _one_of(*choices: object) -> Callable[[str, object], Any]:
    def read(name: str, value: object) -> object:
        if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
            raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
        return value

    return read


def _token(name: str, value: object) -> CancelToken:
    if not isinstance(value, CancelToken):
        raise TypeError(f"{name} must be an edgellama.CancelToken, got {type(value).__name__}")
    return value


def _function(name: str, value: object) -> object:
    if not callable(value):
        raise TypeError(f"{name} must be a function (done, total), got {value!r}")
    return value


_READERS: dict[str, Callable[[str, object], Any]] = {
    "stop": _text_list,
    "logprobs": _flag,
    "top_logprobs": _natural,
    "echo": _flag,
    "num_return_sequences": _positive,
    "max_time": _seconds,
    "eos_token_id": id_set,
    "on_full": _one_of("length", "slide"),
    "num_beams": _positive,
    "length_penalty": _number,
    "early_stopping": _one_of(True, False, "never"),
    "prompt_lookup_num_tokens": _positive,
    "logits_processor": _processors,
    "cancel": _token,
    "progress": _function,
}
