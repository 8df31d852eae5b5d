"""DRY ("don't repeat yourself"): a penalty on tokens that would continue a repetition, growing with its length.

If the end of the text, n >= `allowed_length` tokens, has occurred before and was followed by token t, then t's logit
loses `multiplier * base ** (n - allowed_length)`. n does not reach across a breaker (a line end, say), nor, by
`last_n`, across older text; a token that is a breaker by itself is never penalized. As in llama.cpp; the idea is
p-e-w's (github.com/oobabooga/text-generation-webui, #5677).
"""

import copy
import math
from collections.abc import Iterable, Sequence

import numpy as np

from edgellama.sampling.history import History

_LARGEST_LOG = math.log(np.finfo(np.float32).max)  # llama.cpp's limit on the exponent: the penalty stays finite


DEFAULT_BREAKERS = ("\n", ":", '"', "*")
"""llama.cpp's."""


def breaker_ids(
    token_bytes: Sequence[bytes], breakers: Iterable[str] = DEFAULT_BREAKERS
) -> tuple[tuple[int, ...], ...]:
    """`dry_sequence_breaker_ids` for strings: every token with one of `breakers` in it.

    `token_bytes`: by id (`Tokenizer.token_bytes()`). A breaker that only several tokens spell together is not found.
    """
    spelt = [each.encode("utf-8") for each in breakers if each]
    return tuple((index,) for index, token in enumerate(token_bytes) if any(each in token for each in spelt))


class Dry:
    """The lengths of all repetitions that the text's end takes part in, updated with each token."""

    def __init__(
        self,
        history: History,
        *,
        multiplier: float,
        base: float,
        allowed_length: int,
        last_n: int,
        breakers: tuple[tuple[int, ...], ...],
    ):
        self._multiplier, self._base, self._allowed, self._last_n = multiplier, base, allowed_length, last_n
        self._most = int(_LARGEST_LOG / math.log(base)) if base > 1.000001 else 1  # a longer repetition costs no more
        self._breakers: dict[int, list[tuple[int, ...]]] = {}  # by last token
        for breaker in breakers:
            self._breakers.setdefault(breaker[-1], []).append(breaker)
        self._single = np.array(sorted({breaker[0] for breaker in breakers if len(breaker) == 1}), np.int64)
        # The text's last `length` tokens are also the ones before `ends`; both arrays are parallel, ends rising.
        self._ends = self._lengths = np.zeros(0, np.int64)
        self._since_breaker = 0
        # Only so many tokens back can matter, so the prompt's beginning need not be gone through.
        for size in range(max(1, history.size - self._most - allowed_length), history.size + 1):
            self._extend(history, size)

    def extend(self, history: History) -> None:
        """`history` has one more token."""
        self._extend(history, history.size)

    def _extend(self, history: History, size: int) -> None:
        """The text is the first `size` ids; one fewer the last time."""
        ids = history.ids[:size]
        token = int(ids[-1])
        start = 0 if self._last_n < 0 else max(0, size - self._last_n)
        ends = np.flatnonzero(ids[start:-1] == token) + (start + 1)
        lengths = np.ones(ends.size, np.int64)
        if self._ends.size and ends.size:  # a repetition that ended one token earlier goes on
            row = np.minimum(np.searchsorted(self._ends, ends - 1), self._ends.size - 1)
            lengths += np.where(self._ends[row] == ends - 1, self._lengths[row], 0)
        self._ends, self._lengths = ends, lengths
        self._since_breaker += 1
        for breaker in self._breakers.get(token, ()):
            if tuple(ids[-len(breaker) :].tolist()) == breaker:
                self._since_breaker = 0

    def apply(self, logits: np.ndarray, history: History) -> None:
        """Takes the penalties off `logits` float32 [vocab_size], in place."""
        start = 0 if self._last_n < 0 else max(0, history.size - self._last_n)
        lengths = np.minimum(np.minimum(self._lengths, self._ends - start), self._since_breaker)
        long = lengths >= self._allowed
        if not long.any():
            return
        tokens, row = np.unique(history.ids[self._ends[long]], return_inverse=True)
        longest = np.zeros(tokens.size, np.int64)
        np.maximum.at(longest, row, lengths[long])
        kept = ~np.isin(tokens, self._single)
        exponent = np.minimum(longest[kept] - self._allowed, self._most)
        with np.errstate(over="ignore"):  # infinite at worst: a ban
            logits[tokens[kept]] -= (self._multiplier * self._base**exponent).astype(np.float32)

    def fork(self) -> "Dry":
        return copy.copy(self)  # arrays are replaced, never changed
