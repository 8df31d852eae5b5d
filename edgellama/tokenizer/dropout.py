"""BPE dropout: the same text in other tokens, as SentencePiece samples it (`sp_model_kwargs`; Provilkov et al. 2020).

A merge that comes up is left out with probability alpha, for good. `tokenizers` has a dropout, too, but tries a dropped
merge again after the next one: in a Llama's text, which is one long word, hardly anything changes then. So the library
only cuts a text into the smallest symbols (its own dropout of 1), and the merging is done here.

Chance comes from Python's `random`: `random.seed` repeats it.
"""

import heapq
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers


@dataclass
class Merged:
    """What a `tokenizers.Encoding` tells, of tokens that were merged afterwards."""

    ids: list[int]
    tokens: list[str]
    type_ids: list[int]
    attention_mask: list[int]
    special_tokens_mask: list[int]
    offsets: list[tuple[int, int]]
    word_ids: list[int | None]
    sequence_ids: list[int | None]
    n_sequences: int

    def __len__(self) -> int:
        return len(self.ids)


class Merges:
    """The merges of a BPE. `backend`: the tokenizer that they are of, made to cut texts into symbols only."""

    def __init__(self, backend: "tokenizers.Tokenizer"):
        """`backend` is changed: it must be the caller's own."""
        self.backend = backend
        model = json.loads(backend.to_str())["model"]
        ids = model["vocab"]
        self._tokens = {index: token for token, index in ids.items()}
        self._merges: dict[tuple[int, int], tuple[int, int]] = {}
        """(left, right) -> (rank, merged)"""
        prefix = len(model.get("continuing_subword_prefix") or "")
        for rank, merge in enumerate(model["merges"]):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            self._merges.setdefault((ids[left], ids[right]), (rank, ids[left + right[prefix:]]))
        backend.model.dropout = 1.0

    def merge(self, symbols: "tokenizers.Encoding", alpha: float) -> Merged:
        """`symbols` merged within each word, each merge left out with probability `alpha`."""
        ids, words = list(symbols.ids), list(zip(symbols.sequence_ids, symbols.word_ids, strict=True))
        n = len(ids)
        before, after = list(range(-1, n - 1)), list(range(1, n + 1))  # the neighbours that are left
        ends = list(range(1, n + 1))  # of the symbols that each one holds; 0 once it was merged into another
        agenda: list[tuple[int, int, int, int, int]] = []  # rank, position, its end, the neighbour's end, merged

        def consider(left: int) -> None:
            right = after[left] if left >= 0 else n
            if right >= n or words[left] != words[right] or words[left][1] is None:
                return
            found = self._merges.get((ids[left], ids[right]))
            if found is not None:
                heapq.heappush(agenda, (found[0], left, ends[left], ends[right], found[1]))

        for left in range(n - 1):
            consider(left)
        while agenda:
            _, left, left_end, right_end, merged = heapq.heappop(agenda)
            right = after[left]
            if ends[left] != left_end or right >= n or ends[right] != right_end:
                continue  # one of the two has been merged otherwise
            if random.random() < alpha:
                continue
            ids[left], ends[left], ends[right] = merged, right_end, 0
            after[left] = after[right]
            if after[left] < n:
                before[after[left]] = left
            consider(before[left])
            consider(left)
        kept = [place for place in range(n) if ends[place]]
        offsets = symbols.offsets
        return Merged(
            ids=[ids[place] for place in kept],
            tokens=[self._tokens.get(ids[place]) or symbols.tokens[place] for place in kept],
            type_ids=[symbols.type_ids[place] for place in kept],
            attention_mask=[1] * len(kept),
            special_tokens_mask=[symbols.special_tokens_mask[place] for place in kept],
            offsets=[(offsets[place][0], offsets[ends[place] - 1][1]) for place in kept],
            word_ids=[words[place][1] for place in kept],
            sequence_ids=[words[place][0] for place in kept],
            n_sequences=symbols.n_sequences,
        )
