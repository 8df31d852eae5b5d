"""From logits to the next token: greedy, top-k, top-p, min-p, temperature.

Knows: one row of logits and the numbers in `SamplingParams`. Does not know: models, tokenizers, text.

The order is llama.cpp's: top_k, top_p, min_p, temperature (so top_p and min_p judge the model's own
distribution, whatever the temperature). Every filter takes candidates (`ids`, `logits`, sorted by falling logit,
equal logits by rising id) and returns fewer of them; a new filter is one more such function in `Sampler.__call__`.
Results do not depend on how a NumPy version partitions equal values: ties always go to the lower id.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

import numpy as np

from edgellama.errors import ConfigError, EdgellamaError

# What transformers takes for a key that generation_config.json leaves out, once it has an opinion on sampling.
_HF_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch a filter off.

    The defaults (llama.cpp's) hold for a model without sampling values of its own. `seed` None: another
    result each time. Raises ValueError or TypeError for a value out of range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            _check_number(name, getattr(self, name))
        _check_int("top_k", self.top_k)
        if self.seed is not None:
            _check_int("seed", self.seed)
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, got {self.min_p}")

    @classmethod
    def from_generation_config(cls, raw: Mapping[str, object]) -> "SamplingParams":
        """A model's own defaults, from its generation_config.json.

        A file that says nothing about sampling leaves our defaults; `do_sample: false` is greedy; otherwise the
        keys it leaves out mean what they mean in transformers (temperature 1, top_k 50, top_p 1, min_p 0).
        A file with a temperature but without `do_sample` (early Llama-2) means to sample.

        >>> SamplingParams.from_generation_config({"do_sample": True, "temperature": 0.6, "top_p": 0.9})
        SamplingParams(temperature=0.6, top_k=50, top_p=0.9, min_p=0.0, seed=None)
        """
        given = {name: raw[name] for name in _HF_DEFAULTS if raw.get(name) is not None}
        if raw.get("do_sample") is False:
            return cls(temperature=0.0)
        if not given and raw.get("do_sample") is None:
            return cls()
        try:
            return cls(**{**_HF_DEFAULTS, **given})  # type: ignore[arg-type]
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


class Sampler:
    """Draws tokens; `sampler(logits) -> id`. Two samplers with the same params and seed draw the same tokens."""

    def __init__(self, params: SamplingParams):
        self.params = params
        self._rng = None if params.temperature == 0 else np.random.Generator(np.random.PCG64(params.seed))

    def __call__(self, logits: np.ndarray) -> int:
        """`logits` float32 [vocab_size], left as it is. Raises EdgellamaError when it has NaN or infinity on top."""
        best = int(logits.argmax())  # the first NaN, if there is one
        if not math.isfinite(logits[best]):
            raise EdgellamaError(
                "the model's logits are not finite: its weights are damaged or overflow; `edgellama verify` tells which"
            )
        if self._rng is None or self.params.top_k == 1:
            return best
        params = self.params
        ids, kept = top_k(logits, params.top_k)
        ids, kept = top_p(ids, kept, params.top_p)
        ids, kept = min_p(ids, kept, params.min_p)
        return draw(ids, kept, params.temperature, self._rng.random())


def top_k(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k candidates with the highest logits, as (ids, logits), sorted; k 0 keeps all.

    >>> top_k(np.array([0.5, 2.0, 1.0, 2.0], np.float32), 2)[0].tolist()
    [1, 3]
    """
    if 0 < k < logits.size:
        threshold = np.partition(logits, logits.size - k)[logits.size - k]
        above = np.flatnonzero(logits > threshold)
        equal = np.flatnonzero(logits == threshold)[: k - above.size]
        ids = np.sort(np.concatenate([above, equal]))
    else:
        ids = np.arange(logits.size)
    kept = logits[ids]
    order = np.argsort(-kept, kind="stable")
    return ids[order], kept[order]


def top_p(ids: np.ndarray, logits: np.ndarray, p: float) -> tuple[np.ndarray, np.ndarray]:
    """The shortest head of the sorted candidates whose probabilities reach p; at least one."""
    if p >= 1 or ids.size == 1:
        return ids, logits
    cumulative = np.cumsum(_softmax(logits))
    keep = int(np.searchsorted(cumulative, p)) + 1
    return ids[:keep], logits[:keep]


def min_p(ids: np.ndarray, logits: np.ndarray, p: float) -> tuple[np.ndarray, np.ndarray]:
    """The candidates at least p times as probable as the first."""
    if p <= 0:
        return ids, logits
    keep = int(np.count_nonzero(logits >= logits[0] + math.log(p)))
    keep = max(keep, 1)
    return ids[:keep], logits[:keep]


def draw(ids: np.ndarray, logits: np.ndarray, temperature: float, u: float) -> int:
    """The candidate at quantile `u` (0 <= u < 1) of softmax(logits / temperature)."""
    # Subtract before dividing: a temperature near 0 must not turn large logits into inf - inf.
    with np.errstate(over="ignore"):
        weights = np.exp((logits.astype(np.float64) - float(logits[0])) / temperature)
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return int(ids[min(index, ids.size - 1)])


def _softmax(logits: np.ndarray) -> np.ndarray:
    """float64, of logits sorted by falling value."""
    weights = np.exp(logits.astype(np.float64) - float(logits[0]))
    return weights / weights.sum()


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
