"""The generation loop: prefill the prompt, then decode one token after the other.

Knows: a `decode` step (ids in, last logits out), a sampler, a stream decoder. Does not know: weights, devices,
files, or how a token is chosen. Python only dispatches here; what takes time runs in the backend.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from edgellama.errors import CancelledError


@dataclass(frozen=True)
class Timings:
    """Seconds (`_s`) and tokens a second (`_tps`).

    `load_s`: opening the model. `prefill_s`, `prefill_tps`: the forward pass over the prompt. `decode_tps`: the
    tokens after the first; None when there are none. `ttft_s`: from the call to the first token, None without one.
    What the caller does between the pieces of a stream does not count.
    """

    load_s: float
    prefill_s: float
    prefill_tps: float
    decode_tps: float | None
    ttft_s: float | None


@dataclass(frozen=True)
class Generation:
    """One reply.

    `token_ids` are the new ids, the end-of-text id included where `finish_reason` is "stop" (as in transformers);
    `text` is them decoded without special tokens. `finish_reason`: "stop" (an end-of-text token), "length"
    (`max_new_tokens` reached, or the context full) or "cancelled" (the stream was closed or interrupted).
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    timings: Timings

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class TextDecoder(Protocol):
    def push(self, token_id: int, /) -> str: ...
    def flush(self) -> str: ...


class NoText:
    """The TextDecoder of a model without a tokenizer."""

    def push(self, token_id: int, /) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Stream(Iterator[str]):
    """A running reply: iterate for its pieces of text, then (or at any time) read `.result`.

    A piece is never half a character. The model is busy until the stream is exhausted, closed or garbage;
    `with llm.generate(..., stream=True) as stream:` closes it. `cancel()` ends it from any thread.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        step: Callable[[np.ndarray], np.ndarray],
        sample: Callable[[np.ndarray], int],
        decoder: TextDecoder,
        *,
        max_new_tokens: int,
        eos_ids: frozenset[int],
        acquire: Callable[["Stream"], None],
        release: Callable[[], None],
        abort: Callable[[], None],
        load_s: float,
        started: float,
    ):
        """`step(ids int32[T]) -> float32[vocab_size]` runs the model on ids and returns the last one's logits.

        `acquire` and `release` bracket the model's use; `abort` makes a `step` that runs in another thread raise
        CancelledError, if it can; `started` is `time.perf_counter()` at the call.
        """
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._prompt_ids = list(prompt_ids)
        self._pieces: list[str] = []
        self.cancelled = False
        self._computing = False
        self._load_s, self._started = load_s, started
        self._prefill_s = self._decode_s = 0.0
        self._ttft_s: float | None = None
        self._acquire, self._release, self._abort = acquire, release, abort
        self._run = self._loop(step, sample, decoder, max_new_tokens, eos_ids)

    def _loop(
        self,
        step: Callable[[np.ndarray], np.ndarray],
        sample: Callable[[np.ndarray], int],
        decoder: TextDecoder,
        max_new_tokens: int,
        eos_ids: frozenset[int],
    ) -> Generator[str, None, None]:
        self._acquire(self)
        piece = ""
        try:
            begun = time.perf_counter()
            logits = self._compute(step, self._prompt_ids)
            self._prefill_s = time.perf_counter() - begun
            while logits is not None and not self.cancelled:
                token_id = sample(logits)
                self.token_ids.append(token_id)
                piece = "" if token_id in eos_ids else decoder.push(token_id)
                if self._ttft_s is None:
                    self._ttft_s = time.perf_counter() - self._started
                else:
                    self._decode_s += time.perf_counter() - begun
                if token_id in eos_ids:
                    self.finish_reason = "stop"
                elif len(self.token_ids) == max_new_tokens:
                    self.finish_reason = "length"
                if self.finish_reason:
                    break
                if piece:
                    self._pieces.append(piece)
                    yield piece
                    piece = ""
                if self.cancelled:
                    break
                begun = time.perf_counter()
                logits = self._compute(step, [token_id])
            last = piece + decoder.flush()
            if last:
                self._pieces.append(last)
                yield last
        finally:
            self._release()

    def _compute(self, step: Callable[[np.ndarray], np.ndarray], ids: list[int]) -> np.ndarray | None:
        """The logits after `ids`; None when `cancel` came in between."""
        self._computing = True
        try:
            return step(np.array(ids, np.int32))
        except CancelledError:
            if not self.cancelled:
                raise
            return None
        finally:
            self._computing = False

    def __next__(self) -> str:
        return next(self._run)

    def cancel(self) -> None:
        """Ask the running loop to stop, a long prefill included; the pieces until then stay valid."""
        self.cancelled = True
        if self._computing:
            self._abort()

    def close(self) -> None:
        """End the reply now and free the model for the next call. May be called twice."""
        self.cancel()
        # ValueError: another thread is inside the generator; it sees the flag and ends after its token.
        with contextlib.suppress(ValueError):
            self._run.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def result(self) -> Generation:
        """The reply so far; complete once iteration has ended."""
        decoded = len(self.token_ids) - 1
        timings = Timings(
            load_s=self._load_s,
            prefill_s=self._prefill_s,
            prefill_tps=len(self._prompt_ids) / self._prefill_s if self._prefill_s else 0.0,
            decode_tps=decoded / self._decode_s if decoded > 0 and self._decode_s else None,
            ttft_s=self._ttft_s,
        )
        reason = self.finish_reason or "cancelled"
        return Generation("".join(self._pieces), list(self.token_ids), list(self._prompt_ids), reason, timings)
