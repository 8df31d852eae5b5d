"""Penalties and bans: functions that change logits (float32 [vocab_size]) in place, from what has been said.

They touch only the ids that they are about. Semantics of transformers' logits processors of the same names, and
OpenAI's for presence and frequency.
"""

import math
from collections.abc import Iterable, Mapping

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


class SequenceBiases:
    """`sequence_bias`: a sequence's bias is added to the logit of its last token where the others have just been said.

    Several that end in the same token add up. To the last bit as in transformers.
    """

    def __init__(self, biases: Mapping[tuple[int, ...], float]):
        lasts = sorted({sequence[-1] for sequence in biases})
        row_of = {index: row for row, index in enumerate(lasts)}
        self.largest = max((max(sequence) for sequence in biases), default=-1)
        self._ids = np.array(lasts, np.int64)
        self._alone = np.zeros(len(lasts), np.float32)
        # By the token before the last: (all but the last, the last one's row, bias), the order being that of addition.
        self._longer: dict[int, list[tuple[tuple[int, ...], int, np.float32]]] = {}
        lengths = list(dict.fromkeys(map(len, biases)))
        for sequence, bias in sorted(biases.items(), key=lambda each: lengths.index(len(each[0]))):
            row = row_of[sequence[-1]]
            if len(sequence) == 1:
                self._alone[row] = bias
            else:
                self._longer.setdefault(sequence[-2], []).append((sequence[:-1], row, np.float32(bias)))

    @classmethod
    def bans(cls, sequences: Iterable[tuple[int, ...]], eos_ids: frozenset[int]) -> "SequenceBiases":
        """`bad_words_ids`: as in transformers, a sequence that is an end-of-text token alone does not count."""
        kept = (each for each in sequences if len(each) > 1 or each[0] not in eos_ids)
        return cls(dict.fromkeys(kept, -math.inf))

    def apply(self, logits: np.ndarray, history: History) -> None:
        biases = self._alone
        if self._longer and history.size:
            for prefix, row, bias in self._longer.get(int(history.ids[-1]), ()):
                if history.ends_with(prefix):
                    if biases is self._alone:
                        biases = biases.copy()
                    biases[row] += bias
        logits[self._ids] += biases
