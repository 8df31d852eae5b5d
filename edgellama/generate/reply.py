"""One reply in the making: chosen tokens become text, and it knows when it ends.

Knows: ids, one row of logits at a time, a sampler, a decoder, stop strings. Does not know: the model, the cache, other
replies. Work per token is constant.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from edgellama.generate.logprobs import LogprobRecorder
from edgellama.generate.results import FinishReason, Generation, Timings, TokenLogprob
from edgellama.generate.slots import Slot
from edgellama.generate.stops import StopFinder

SINKS = 4
"""Positions at the beginning that sliding keeps: attention rests on them (StreamingLLM, Xiao et al. 2023)."""


class TextDecoder(Protocol):
    def push(self, token_id: int, /) -> str: ...
    def flush(self) -> str: ...


class NoText:
    """The TextDecoder of a model without a tokenizer."""

    def push(self, token_id: int, /) -> str:
        return ""

    def flush(self) -> str:
        return ""


class TokenSource(Protocol):
    """What chooses tokens: `edgellama.sampling.Sampler`."""

    def __call__(self, logits: np.ndarray, /) -> int: ...
    def accept(self, token_id: int, /) -> None: ...


class Reply:
    """A prompt and what has been said after it.

    `ids`: what the model is to have seen, the prompt at first (sliding takes some out). `token_ids`: the new ones.
    `slot`: where in the cache it lies, once it does. `finish_reason`: None while it runs. The engine adds to
    `prefill_s`, `decode_s` and sets `cached_tokens`.
    """

    def __init__(
        self,
        prompt: np.ndarray,
        sampler: TokenSource,
        decoder: TextDecoder,
        *,
        max_new_tokens: int,
        eos_ids: frozenset[int] = frozenset(),
        stops: Sequence[str] = (),
        logprobs: LogprobRecorder | None = None,
        echo: str | None = None,
        is_complete: Callable[[], bool] | None = None,
        index: int = 0,
        load_s: float = 0.0,
        started: float | None = None,
    ):
        """`prompt` int32 [T]. `echo`: the prompt's text, to begin with; with `logprobs` its tokens get theirs, too.

        `is_complete`: True once nothing may follow (a grammar has come to its end). `started`: `time.perf_counter()`
        at the call.
        """
        self.prompt, self.sampler, self.index = prompt, sampler, index
        self.ids: list[int] = prompt.tolist()
        self.token_ids: list[int] = []
        self.slot: Slot | None = None
        self.finish_reason: FinishReason | None = None
        self.slid = False
        self.prefill_s = self.decode_s = 0.0
        self.cached_tokens = 0
        self.proposed_tokens = self.accepted_tokens = 0  # of speculative decoding
        self.logprobs: list[TokenLogprob] = []
        self._decoder, self._stops = decoder, StopFinder(stops)
        self.max_new_tokens, self.eos_ids, self._is_complete = max_new_tokens, eos_ids, is_complete
        self._recorder = logprobs
        self.scores_prompt = echo is not None and logprobs is not None
        if self.scores_prompt and logprobs is not None:
            self.logprobs.append(logprobs.of(self.ids[0], None))
        self._pieces = [echo] if echo else []
        self._n_taken = 0  # pieces that `new_text` has handed out
        self._load_s = load_s
        self._started = time.perf_counter() if started is None else started
        self._ttft_s: float | None = None

    def take(self, logits: np.ndarray) -> int:
        """Choose the next token from float32 [vocab_size] and append it."""
        token_id = self.sampler(logits)
        self.append(token_id, logits)
        return token_id

    @property
    def note(self) -> Callable[[int, np.ndarray], TokenLogprob] | None:
        """What makes an entry of `logprobs` of a token and the logits that it was chosen from; None: nobody asked."""
        return None if self._recorder is None else self._recorder.of

    def append(self, token_id: int, logits: np.ndarray | None = None, *, noted: TokenLogprob | None = None) -> None:
        """The next token is `token_id`, chosen from `logits`, of which `noted` may have been made already.

        Sets `finish_reason` where it is the last one.
        """
        self.sampler.accept(token_id)
        self.ids.append(token_id)
        self.token_ids.append(token_id)
        if self._ttft_s is None:
            self._ttft_s = time.perf_counter() - self._started
        if self._recorder is not None:
            self.logprobs.append(noted or self._recorder.of(token_id, logits))
        if token_id in self.eos_ids:
            self.finish("stop")
            return
        self._say(self._decoder.push(token_id))
        if self._stops.found is not None or (self._is_complete is not None and self._is_complete()):
            self.finish("stop")
        elif len(self.token_ids) >= self.max_new_tokens:
            self.finish("length")

    def score_prompt(self, start: int, rows: np.ndarray) -> None:
        """`rows` float32 [R, vocab_size]: the logits after the prompt's positions from `start` on."""
        assert self._recorder is not None
        following = self.prompt[start + 1 : start + 1 + len(rows)].tolist()
        self.logprobs += [self._recorder.of(token_id, row) for token_id, row in zip(following, rows, strict=False)]

    def finish(self, reason: FinishReason) -> None:
        """It ends here, unless it has ended; what was held back is said."""
        if self.finish_reason is not None:
            return
        self.finish_reason = reason
        self._say(self._decoder.flush())
        if self._stops.found is not None:
            self.finish_reason = "stop"  # the last token's last characters spelled it
        else:
            self._say_now(self._stops.flush())

    def slide(self, n_ctx: int) -> None:
        """Make room in `ids`: keep the first few and the later half of the rest, the last one included."""
        sinks = min(SINKS, n_ctx // 2)
        recent = max(1, (n_ctx - sinks) // 2)
        self.ids = self.ids[:sinks] + self.ids[-recent:]
        self.slid = True

    def new_text(self) -> str:
        """What has been said since the last call; no half character, nothing that may become a stop string."""
        if self._n_taken == len(self._pieces):
            return ""
        text = "".join(self._pieces[self._n_taken :])
        self._n_taken = len(self._pieces)
        return text

    @property
    def result(self) -> Generation:
        """The reply so far."""
        computed = self.prompt.size - self.cached_tokens
        decoded = len(self.token_ids) - 1
        timings = Timings(
            load_s=self._load_s,
            prefill_s=self.prefill_s,
            prefill_tps=computed / self.prefill_s if self.prefill_s else 0.0,
            decode_tps=decoded / self.decode_s if decoded > 0 and self.decode_s else None,
            ttft_s=self._ttft_s,
            cached_tokens=self.cached_tokens,
            acceptance_rate=self.accepted_tokens / self.proposed_tokens if self.proposed_tokens else None,
        )
        return Generation(
            text="".join(self._pieces),
            token_ids=list(self.token_ids),
            prompt_token_ids=self.prompt.tolist(),
            finish_reason=self.finish_reason or "cancelled",
            timings=timings,
            logprobs=None if self._recorder is None else list(self.logprobs),
            stop=self._stops.found,
            index=self.index,
        )

    def _say(self, text: str) -> None:
        if text:
            self._say_now(self._stops.push(text))

    def _say_now(self, text: str) -> None:
        if text:
            self._pieces.append(text)
