"""Guesses for speculative decoding: where the next tokens may be known, the model checks several in one forward pass.

A wrong guess costs time, never a token: what is said is what the model's own logits and sampler say at each place, one
after the other, and a guess only decides which of them are computed together (`generate.speculate`). So the result is
that of plain decoding, greedy or sampled, to the last random number: stricter than the rejection sampling of Leviathan
et al., "Fast Inference from Transformers via Speculative Decoding" (2023), which keeps the distribution.

Knows ids. Does not know how guesses are checked.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from edgellama.sampling import log_softmax

NGRAMS = (3, 2)
"""How many of the last ids are looked up, tried in this order. One alone is found everywhere and says little."""
DRAFT_TOKENS = 5
"""Guesses of a draft model at a time."""
MIN_PROBABILITY = 0.4
"""A draft model that is less sure of a token stops guessing: transformers' `assistant_confidence_threshold`."""


class Draft(Protocol):
    """Guesses at how one sequence goes on."""

    def propose(self, ids: Sequence[int], limit: int) -> list[int]:
        """Up to `limit` ids that may come after `ids`, which are the same as last time and more."""


class PromptLookup:
    """What came after the last few ids where they stood before, in the prompt or in the reply (Saxena, "Prompt Lookup
    Decoding", 2023). Costs next to nothing; helps where a text repeats parts of its prompt.

    >>> PromptLookup(4).propose([7, 1, 2, 3, 4, 5, 1, 2], 8)
    [3, 4, 5, 1]
    """

    def __init__(self, num_tokens: int):
        self._num_tokens = num_tokens
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest occurrence ends
        self._known = 0

    def propose(self, ids: Sequence[int], limit: int) -> list[int]:
        """See `Draft`."""
        n_ids = len(ids)
        for end in range(self._known + 1, n_ids):  # not the last n-grams, which have nothing after them yet
            for n in NGRAMS:
                if end >= n:
                    self._next[tuple(ids[end - n : end])] = end
        self._known = max(n_ids - 1, 0)
        for n in NGRAMS:
            start = self._next.get(tuple(ids[n_ids - n :])) if n_ids >= n else None
            if start is not None:
                guess: list[int] = []
                for i in range(start, start + min(self._num_tokens, limit)):
                    guess.append(ids[i] if i < n_ids else guess[i - n_ids])  # it may run into itself
                return guess
        return []


class DraftStep(Protocol):
    """A draft model as `ModelDraft` sees it."""

    def __call__(self, ids: Sequence[int], /) -> np.ndarray | None:
        """Logits float32 [vocab_size] after `ids`, which begin as the last call's did; None where it cannot."""


class ModelDraft:
    """The most probable ids of a smaller model with the same vocabulary, as long as it is sure of them."""

    def __init__(self, step: DraftStep, num_tokens: int = DRAFT_TOKENS, min_probability: float = MIN_PROBABILITY):
        self._step, self._num_tokens, self._least = step, num_tokens, math.log(min_probability)

    def propose(self, ids: Sequence[int], limit: int) -> list[int]:
        """See `Draft`."""
        guess: list[int] = []
        while len(guess) < min(self._num_tokens, limit):
            logits = self._step([*ids, *guess])
            if logits is None:
                break
            best = int(logits.argmax())
            if not log_softmax(logits)[best] >= self._least:
                break
            guess.append(best)
        return guess
