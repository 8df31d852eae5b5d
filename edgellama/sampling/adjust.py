"""Penalties and bans: functions that change logits (float32 [vocab_size]) in place, from what has been said.

They touch only the ids that they are about. Semantics of transformers' logits processors of the same names, and
OpenAI's for presence and frequency.
"""

import math
from collections.abc import Iterable

import numpy as np

from edgellama.sampling.history import History


def penalize_repetition(logits: np.ndarray, ids: np.ndarray, penalty: float) -> None:
    """`ids`, each once: a positive logit is divided by `penalty`, a negative one multiplied (arXiv:1909.05858)."""
    values = logits[ids]
    logits[ids] = np.where(values < 0, values * penalty, values / penalty)


def penalize_counts(logits: np.ndarray, ids: np.ndarray, counts: np.ndarray, frequency: float, presence: float) -> None:
    """`ids`, each once, have occurred `counts` times."""
    logits[ids] -= (counts * frequency + presence).astype(np.float32)


def ban_repeated_ngrams(logits: np.ndarray, ids: np.ndarray, size: int) -> None:
    """No token may complete an n-gram of `size` that `ids` (prompt and reply) already has."""
    prefix = size - 1
    if ids.size < size:
        return
    ends = np.arange(prefix, ids.size)  # where a token follows that many
    for back in range(1, size):
        ends = ends[ids[ends - back] == ids[ids.size - back]]
    logits[ids[ends]] = -np.inf


class BannedSequences:
    """`bad_words_ids`: the last token of a sequence is banned where the others have just been said.

    As in transformers, a sequence that is an end-of-text token alone does not count.
    """

    def __init__(self, sequences: Iterable[tuple[int, ...]], eos_ids: frozenset[int]):
        alone: set[int] = set()
        self._longer: dict[int, list[tuple[tuple[int, ...], int]]] = {}  # by the token before the last
        self.largest = -1
        for sequence in sequences:
            self.largest = max(self.largest, *sequence)
            if len(sequence) > 1:
                self._longer.setdefault(sequence[-2], []).append((sequence[:-1], sequence[-1]))
            elif sequence[0] not in eos_ids:
                alone.add(sequence[0])
        self._alone = np.array(sorted(alone), np.int64)

    def apply(self, logits: np.ndarray, history: History) -> None:
        logits[self._alone] = -np.inf
        if self._longer and history.size:
            for prefix, last in self._longer.get(int(history.ids[-1]), ()):
                if history.ends_with(prefix):
                    logits[last] = -math.inf
