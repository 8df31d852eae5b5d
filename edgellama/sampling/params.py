"""`SamplingParams`: how to choose a token, in numbers that are checked once. Knows nothing of logits."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict, Unpack

import numpy as np

from edgellama.errors import ConfigError

# What transformers takes for a key that generation_config.json leaves out, once it has an opinion on sampling.
_HF_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
# What transformers applies to greedy search, too. Their defaults are ours: off.
_HF_PROCESSORS = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "min_new_tokens")

_NATURAL = ("top_k", "no_repeat_ngram_size", "min_new_tokens")
_LAST_N = ("penalty_last_n", "dry_penalty_last_n")


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token. Every default but the first four and `mirostat`'s and `dry`'s details switches it off.

    `temperature` 0 is greedy: the most probable token, after penalties, bans and the constraint. `seed` None: another
    result each time. `top_k`, `top_p`, `min_p`, `typical_p`, `top_n_sigma`, `xtc_probability`: see `filters`;
    off at 0, 1, 0, 1, -1 and 0.

    `repetition_penalty` divides positive logits of tokens in prompt and reply and multiplies negative ones (CTRL,
    arXiv:1909.05858); `frequency_penalty` times the number of times that the reply has a token and `presence_penalty`
    are subtracted. `penalty_last_n` limits all three to the last tokens, -1 to none. `dry_*`: see `dry`.
    `logit_bias` adds to the logits of single ids, `sequence_bias` to the last id's of sequences whose other ids have
    just been said: a dict by tuples of ids, or a list of [ids, bias]. No n-gram of `no_repeat_ngram_size` comes twice,
    none of `bad_words_ids` is completed, no end-of-text token comes before `min_new_tokens`.

    `mirostat` 2 (arXiv:2007.14966) aims at `mirostat_tau` bits of surprise with the learning rate `mirostat_eta`; top_k
    and the other filters are then left out.

    The defaults (llama.cpp's) hold for a model without sampling values of its own. Raises ValueError or TypeError for a
    value out of range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breaker_ids: tuple[tuple[int, ...], ...] = ()
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    repetition_penalty: float = 1.0
    penalty_last_n: int = -1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    sequence_bias: Mapping[tuple[int, ...], float] = field(default_factory=dict, hash=False)
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.type is float:
                _check_number(each.name, getattr(self, each.name))
        for name in _NATURAL:
            _check_int(name, getattr(self, name), 0)
        for name in _LAST_N:
            _check_int(name, getattr(self, name), -1)
        if self.seed is not None:
            _check_int("seed", self.seed, 0)
        for name, least in (("temperature", 0), ("xtc_threshold", 0), ("dry_multiplier", 0), ("dry_base", 1)):
            _check(getattr(self, name) >= least, name, f"at least {least}", getattr(self, name))
        for name in ("top_p", "typical_p"):
            _check(0 < getattr(self, name) <= 1, name, "above 0 and at most 1", getattr(self, name))
        for name in ("min_p", "xtc_probability", "xtc_threshold"):
            _check(0 <= getattr(self, name) <= 1, name, "from 0 to 1", getattr(self, name))
        for name in ("repetition_penalty", "mirostat_tau", "mirostat_eta"):
            _check(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        _check_int("dry_allowed_length", self.dry_allowed_length, 1)
        _check_int("mirostat", self.mirostat, 0)
        _check(self.mirostat in (0, 2), "mirostat", "0 (off) or 2", self.mirostat)
        # Lists, as JSON has them, are welcome; what is kept can be shared between threads and never changes.
        object.__setattr__(self, "bad_words_ids", _sequences("bad_words_ids", self.bad_words_ids))
        breakers = _sequences("dry_sequence_breaker_ids", self.dry_sequence_breaker_ids, single=True)
        object.__setattr__(self, "dry_sequence_breaker_ids", breakers)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "sequence_bias", _sequence_biases(self.sequence_bias))

    @classmethod
    def from_generation_config(cls, raw: Mapping[str, object]) -> "SamplingParams":
        """A model's own defaults, from its generation_config.json.

        A file that says nothing about sampling leaves our defaults; `do_sample: false` is greedy; otherwise the
        keys it leaves out mean what they mean in transformers (temperature 1, top_k 50, top_p 1, min_p 0, typical_p 1).
        A file with a temperature but without `do_sample` (early Llama-2) means to sample. `repetition_penalty`,
        `no_repeat_ngram_size`, `bad_words_ids`, `sequence_bias` and `min_new_tokens` are taken in each case.

        >>> params = SamplingParams.from_generation_config({"do_sample": True, "temperature": 0.6, "top_p": 0.9})
        >>> params.temperature, params.top_k, params.top_p, params.min_p
        (0.6, 50, 0.9, 0.0)
        """
        values: dict[str, Any] = {name: raw[name] for name in _HF_PROCESSORS if raw.get(name) is not None}
        sampling = {name: raw[name] for name in _HF_SAMPLING if raw.get(name) is not None}
        if raw.get("do_sample") is False:
            values["temperature"] = 0.0
        elif sampling or raw.get("do_sample") is not None:
            values |= _HF_SAMPLING | sampling
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"generation_config.json: {error}") from None

    def override(self, **values: Unpack["SamplingOptions"]) -> "SamplingParams":
        """A copy with the values that are not None.

        >>> SamplingParams().override(temperature=0, top_k=None).temperature
        0
        """
        unknown = set(values) - SamplingOptions.__annotations__.keys()
        if unknown:
            raise TypeError(f"unknown sampling options: {', '.join(sorted(unknown))}")
        return replace(self, **{name: value for name, value in values.items() if value is not None})  # type: ignore[arg-type]


class SamplingOptions(TypedDict, total=False):
    """What a caller may ask for in place of a model's defaults; None or absent: the default."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    typical_p: float | None
    top_n_sigma: float | None
    xtc_probability: float | None
    xtc_threshold: float | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_penalty_last_n: int | None
    dry_sequence_breaker_ids: Iterable[int | Iterable[int]] | None
    mirostat: int | None
    mirostat_tau: float | None
    mirostat_eta: float | None
    repetition_penalty: float | None
    penalty_last_n: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    no_repeat_ngram_size: int | None
    logit_bias: Mapping[int, float] | None
    sequence_bias: Mapping[tuple[int, ...], float] | Iterable[tuple[Iterable[int], float]] | None
    bad_words_ids: Iterable[Iterable[int]] | None
    min_new_tokens: int | None


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    _check(bool(value >= least), name, f"at least {least}", value)


def _check(holds: bool, name: str, wanted: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {value}")


def _sequences(name: str, value: object, single: bool = False) -> tuple[tuple[int, ...], ...]:
    """Token sequences as tuples; `single`: a bare id is a sequence of one."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of lists of token ids, got {type(value).__name__}")
    made = []
    for sequence in value:
        if single and isinstance(sequence, int | np.integer):
            sequence = (sequence,)
        if isinstance(sequence, str | bytes | Mapping) or not isinstance(sequence, Iterable):
            raise TypeError(f"{name} must be a list of lists of token ids, but has {sequence!r:.40} in it")
        ids = tuple(sequence)
        for each in ids:
            _check_int(f"each id in {name}", each, 0)
        _check(bool(ids), f"each sequence in {name}", "at least one token long", "an empty one")
        made.append(tuple(map(int, ids)))
    return tuple(made)


def _biases(value: object) -> dict[int, float]:
    """-inf forbids a token; there is no +inf."""
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias must map token ids to numbers, got {type(value).__name__}")
    for index, bias in value.items():
        _check_int("each id in logit_bias", index, 0)
        if bias != -math.inf:
            _check_number(f"logit_bias[{index}]", bias)
    return {int(index): float(bias) for index, bias in value.items()}


def _sequence_biases(value: object) -> dict[tuple[int, ...], float]:
    """A dict by tuples of ids, or pairs (ids, bias), as JSON has them; -inf forbids."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"sequence_bias must be a dict or a list of [ids, bias], got {type(value).__name__}")
    pairs = list(value.items() if isinstance(value, Mapping) else value)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"sequence_bias must be a dict or a list of [ids, bias], but has {pair!r:.40} in it")
    sequences = _sequences("sequence_bias", [ids for ids, _ in pairs])
    for sequence, (_, bias) in zip(sequences, pairs, strict=True):
        if bias != -math.inf:
            _check_number(f"sequence_bias[{list(sequence)}]", bias)
    return {sequence: float(bias) for sequence, (_, bias) in zip(sequences, pairs, strict=True)}
