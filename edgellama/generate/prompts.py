"""What callers give as prompts, checked: texts or ids, one or several. Knows shapes and types, no model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from edgellama.errors import ContextError, EdgellamaError, TokenizerError

Ids = Sequence[int] | np.ndarray
Prompts = Sequence[str] | Sequence[Ids]
_KINDS = (TokenizerError, EdgellamaError, TypeError, ValueError)


@dataclass(frozen=True)
class Prompt:
    """`text` as it was given, None where only ids were; `ids` int32 [T]."""

    text: str | None
    ids: np.ndarray


def read_prompts(
    prompt: object, encode: Callable[[str], np.ndarray], check: Callable[[object], np.ndarray], n_ctx: int
) -> tuple[list[Prompt], bool]:
    """The prompts, and whether it was a list of them (a 2-dimensional array is one). Errors name the one that is wrong.

    `encode` and `check` make int32 [T] of a text and of ids. ContextError for a prompt that leaves no room for a token.
    """
    if getattr(prompt, "ndim", 1) == 2:
        several, each = True, list(cast(Any, prompt))
    elif isinstance(prompt, Sequence) and prompt and not isinstance(prompt, str):
        several = isinstance(prompt[0], str | Sequence | np.ndarray)
        each = list(prompt) if several else [prompt]
    else:
        several, each = False, [prompt]
    return [_read(one, f"prompt {i}" if several else "", encode, check, n_ctx) for i, one in enumerate(each)], several


def _read(
    prompt: object,
    name: str,
    encode: Callable[[str], np.ndarray],
    check: Callable[[object], np.ndarray],
    n_ctx: int,
) -> Prompt:
    text = prompt if isinstance(prompt, str) else None
    try:
        ids = check(prompt) if text is None else encode(text)
    except _KINDS as error:
        if not name:
            raise
        kind = next(kind for kind in _KINDS if isinstance(error, kind))
        raise kind(f"{name}: {error}") from None
    if ids.size >= n_ctx:
        raise ContextError(
            f"{name or 'the prompt'} has {ids.size} tokens, the context {n_ctx}: nothing would be left for an answer; "
            "shorten the prompt or raise n_ctx (-c)"
        )
    return Prompt(text, ids)


def check_ids(ids: object, vocab_size: int) -> np.ndarray:
    """`ids` as int32 [T], every one in the vocabulary; TypeError or ValueError that says which is not."""
    if isinstance(ids, str):
        raise TypeError("input_ids must be integers; encode text with llm.tokenizer.encode(text)")
    array = np.asarray(ids)
    if array.size == 0:
        raise ValueError("there are no tokens: the prompt is empty")
    if array.dtype.kind not in "iu":
        raise TypeError(f"input_ids must be integers, got {array.dtype}")
    if array.ndim == 2 and array.shape[0] == 1:  # a batch of one, as transformers' tokenizers return it
        array = array[0]
    if array.ndim != 1:
        raise ValueError(f"input_ids must have one dimension, got shape {array.shape}")
    bad = (array < 0) | (array >= vocab_size)
    if bad.any():
        where = int(bad.argmax())
        raise ValueError(f"input_ids[{where}] is {array[where]}, outside the vocabulary of {vocab_size} tokens")
    return array.astype(np.int32)
