"""What a call to `generate` gives back: plain, immutable values. Knows nothing of how they come about."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

FinishReason = Literal["stop", "length", "time", "cancelled"]


@dataclass(frozen=True)
class Timings:
    """Seconds (`_s`) and tokens a second (`_tps`).

    `load_s`: opening the model. `prefill_s`, `prefill_tps`: the forward passes over the prompt, without the
    `cached_tokens` that an earlier call had left in the cache. `decode_tps`: the tokens after the first; None when
    there are none. `ttft_s`: from the call to the first token, None without one. `acceptance_rate`: of the tokens that
    speculative decoding proposed, the share that was right; None without it. In a batch, forward passes are shared: a
    sequence's seconds are those of the passes that it took part in. What the caller does between the pieces of a
    stream does not count.
    """

    load_s: float
    prefill_s: float
    prefill_tps: float
    decode_tps: float | None
    ttft_s: float | None
    cached_tokens: int = 0
    acceptance_rate: float | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability under the model itself: before penalties, filters and temperature.

    `text` is what the token says alone (U+FFFD for part of a character). `top`: the likeliest tokens at its place as
    (id, text, logprob), best first. `logprob` is None for the first token of an echoed prompt: nothing comes before it.
    """

    token_id: int
    text: str
    logprob: float | None
    top: list[tuple[int, str, float]]


@dataclass(frozen=True)
class Generation:
    """One reply.

    `token_ids` are the new ids, the end-of-text id included where that ended it (as in transformers), and the tokens
    that spelled a stop string. `text` is them decoded without special tokens, up to the stop string; with `echo` the
    prompt comes first. `finish_reason`: "stop" (an end-of-text token, or the string `stop`), "length"
    (`max_new_tokens` reached, or the context full), "time" (`max_time` is over) or "cancelled". `logprobs`: one for
    each of `token_ids`, where asked for; with `echo` one for each token of the prompt comes first. `index`: its place
    among the call's replies.
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: FinishReason
    timings: Timings
    logprobs: list[TokenLogprob] | None = None
    stop: str | None = None
    index: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
