"""How probable texts are, and vectors that stand for them. Knows an engine and ids; text only through `encode`.

**Where a choice begins.** Tokens may reach across the border between prompt and choice, so the whole text is encoded,
not the choice alone, and what is scored begins where its ids first differ from the prompt's own. All choices of a call
begin at the same place, the first where one of them differs: only so can their log-probabilities be compared. (A prompt
has the ids a b, its texts a b c and a bc: both are scored from behind a.) Where no token reaches across, which is the
rule, that is the choice itself. Special tokens that the tokenizer puts behind a text are scored with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgellama.errors import ContextError
from edgellama.generate.cancel import CancelToken
from edgellama.generate.engine import Engine
from edgellama.generate.prompts import Ids
from edgellama.generate.slots import Slot, common_prefix
from edgellama.logprob import token_logprobs

MAX_ROWS = 64
"""Rows of logits at a time: 33 MB with a vocabulary of 128k."""


@dataclass(frozen=True)
class Score:
    """A choice after a prompt: `token_ids` are those that were scored, `logprob` is the natural logarithm of their
    probability, `logprob_per_token` that divided by their number."""

    logprob: float
    logprob_per_token: float
    token_ids: list[int]


@dataclass(frozen=True)
class Choices:
    """`texts`: ids int32 [T] of prompt and choice each; the first `n_shared` are those of the prompt in all."""

    texts: list[np.ndarray]
    n_shared: int


def read_choices(
    prompt: str | Ids,
    choices: Sequence[str] | Sequence[Ids],
    encode: Callable[[str], np.ndarray],
    check: Callable[[object], np.ndarray],
) -> Choices:
    """Texts or ids as ids, and where the choices begin. `encode` and `check` make int32 [T] of a text and of ids.

    ValueError or TypeError for a choice that is none: no tokens, or a text after a prompt of ids.
    """
    if isinstance(choices, str):
        raise TypeError("choices must be a list of texts or of lists of ids, got one text")
    if not len(choices):
        raise ValueError("there are no choices")
    ids = encode(prompt) if isinstance(prompt, str) else check(prompt)
    texts = []
    for i, choice in enumerate(choices):
        if not isinstance(choice, str):
            texts.append(np.concatenate([ids, check(choice)]))
        elif isinstance(prompt, str):
            texts.append(encode(prompt + choice))
        else:
            raise TypeError(f"choice {i} is a text, but the prompt is not: give both as text, or the choices as ids")
    n_shared = min(common_prefix(ids, text) for text in texts)
    for i, text in enumerate(texts):
        if text.size == n_shared:
            raise ValueError(f"choice {i} adds no token to the prompt: there is nothing to score")
    if n_shared == 0:
        raise ValueError(
            "the prompt and the choices have no token in common at the beginning: nothing comes before them"
        )
    return Choices(texts, n_shared)


def score_choices(engine: Engine, choices: Choices, cancel: CancelToken | None = None) -> list[Score]:
    """The score of each, in order; what they share is computed once.

    As many at a time as the cache has slots; the numbers are those of each alone. ContextError for one that does not
    fit. Where RoPE depends on the length of the call, a choice counts as computed in one call.
    """
    for i, text in enumerate(choices.texts):
        if text.size > engine.backend.n_ctx:
            raise ContextError(
                f"choice {i} with its prompt has {text.size} tokens, the context {engine.backend.n_ctx}; "
                "shorten it or raise n_ctx"
            )
    start = choices.n_shared - 1  # the logits of this position are about the first token that is scored
    of = engine.slots.length_class
    together = [i for i, text in enumerate(choices.texts) if of(max(start, 1)) == of(text.size - 1) == of(text.size)]
    logprobs: dict[int, np.ndarray] = {}
    if together:
        prefix = choices.texts[together[0]][: choices.n_shared]
        first = engine.slots.take(prefix)
        assert first is not None
        if first.n < start:
            engine.extend(first, prefix[first.n : start], 0, cancel)
        slots = [first]
        if engine.slots.copies:
            slots += [slot for slot in engine.slots.slots if slot is not first]
        for group in _groups([choices.texts[i].size - 1 - start for i in together], len(slots)):
            members = [together[i] for i in group]
            texts = [choices.texts[i] for i in members]
            for i, values in zip(members, _score_group(engine, slots, texts, start, cancel), strict=True):
                logprobs[i] = values
        engine.slots.release(first)
    for i, text in enumerate(choices.texts):
        if i not in logprobs:
            logprobs[i] = _score_alone(engine, text, start, cancel)
    scores = []
    for i, text in enumerate(choices.texts):
        total = float(logprobs[i].sum())
        scores.append(Score(total, total / logprobs[i].size, text[choices.n_shared :].tolist()))
    return scores


def _groups(sizes: list[int], n_slots: int) -> list[list[int]]:
    """Numbers of the choices to compute together: no more than there are slots, nor more rows than MAX_ROWS.

    >>> _groups([40, 20, 10, 90, 1], 4)
    [[0, 1], [2], [3], [4]]
    """
    groups: list[list[int]] = []
    rows = 0
    for i, size in enumerate(sizes):
        if not groups or len(groups[-1]) == n_slots or rows + size > MAX_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(i)
        rows += size
    return groups


def _score_group(
    engine: Engine, slots: Sequence[Slot], texts: Sequence[np.ndarray], start: int, cancel: CancelToken | None
) -> list[np.ndarray]:
    """float64 [tokens after `start`] of each text; `slots[0]` holds the positions before, and no more afterwards."""
    first = slots[0]
    if len(texts) == 1:  # it may be long
        parts = []
        for at in range(start, texts[0].size - 1, MAX_ROWS):
            ids = texts[0][at : min(at + MAX_ROWS, texts[0].size - 1)]
            logits = engine.extend(first, ids, ids.size, cancel)
            parts.append(token_logprobs(logits, texts[0][at + 1 : at + 1 + ids.size]))
        first.n = start
        return [np.concatenate(parts)]
    for slot in slots[1 : len(texts)]:
        engine.slots.copy(first, slot, start)
    tokens = np.concatenate([text[start:-1] for text in texts])
    positions = np.concatenate([np.arange(start, text.size - 1) for text in texts])
    places = np.repeat([slot.index for slot in slots[: len(texts)]], [text.size - 1 - start for text in texts])
    logits = engine.forward(tokens, positions, places, np.arange(tokens.size), cancel)
    values = token_logprobs(logits, np.concatenate([text[start + 1 :] for text in texts]))
    return np.split(values, np.cumsum([text.size - 1 - start for text in texts])[:-1])


def _score_alone(engine: Engine, text: np.ndarray, start: int, cancel: CancelToken | None) -> np.ndarray:
    """float64 [tokens after `start`], in one call from the beginning."""
    slot = engine.slots.take(text, reuse=False)
    assert slot is not None
    logits = engine.extend(slot, text, text.size - start, cancel)[:-1]
    engine.slots.release(slot)
    return token_logprobs(logits, text[start + 1 :])


def embed_texts(
    engine: Engine,
    texts: Sequence[np.ndarray],
    pooling: Literal["mean", "last"] = "mean",
    normalize: bool = True,
    cancel: CancelToken | None = None,
) -> np.ndarray:
    """float32 [N, hidden_size]: a vector for each of `texts`, ids int32 [T].

    The model's last hidden states, after its final norm: their mean over all positions, special tokens included, or the
    one of the last. `normalize`: to length 1. The bits do not depend on what else is in the call. ValueError for
    another pooling, ContextError for a text that does not fit.
    """
    if pooling not in ("mean", "last"):
        raise ValueError(f'pooling must be "mean" or "last", got {pooling!r}')
    n_ctx, table = engine.backend.n_ctx, engine.slots
    for i, text in enumerate(texts):
        if text.size > n_ctx:
            raise ContextError(f"text {i} has {text.size} tokens, the context {n_ctx}; shorten it or raise n_ctx")
    vectors = np.empty((len(texts), engine.config.hidden_size), np.float32)
    at = 0
    while at < len(texts):
        group = texts[at : at + len(table.slots)]
        slots = [table.take(text, reuse=False) for text in group]
        places = [slot.index for slot in slots if slot is not None]
        sizes = [text.size for text in group]
        ends = np.cumsum(sizes)
        states = engine.hidden(
            np.concatenate(group),
            np.concatenate([np.arange(size) for size in sizes]),
            np.repeat(places, sizes),
            np.arange(ends[-1]) if pooling == "mean" else ends - 1,
            cancel,
        )
        for i, (slot, text) in enumerate(zip(slots, group, strict=True)):
            assert slot is not None
            slot.record(text, table.length_class(text.size))
            table.release(slot)
            rows = states[ends[i] - sizes[i] : ends[i]] if pooling == "mean" else states[i : i + 1]
            vectors[at + i] = _pooled(rows, normalize)
        at += len(group)
    return vectors


def _pooled(rows: np.ndarray, normalize: bool) -> np.ndarray:
    vector = rows.mean(axis=0, dtype=np.float64)
    length = np.linalg.norm(vector)
    return vector / length if normalize and length > 0 else vector
