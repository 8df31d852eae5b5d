"""Texts to scores of a classifier's labels. Knows an engine and ids; the head is the backend's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellama.config import LlamaConfig
from edgellama.errors import ContextError
from edgellama.generate.cancel import CancelToken
from edgellama.generate.engine import Engine


def last_tokens(config: LlamaConfig, ids: np.ndarray | None, batch: int, width: int) -> np.ndarray:
    """int [B]: the column whose scores count, as transformers chooses it: the rightmost id that is not `pad_token_id`.

    Without a `pad_token_id` it is the last column, and only a batch of one is possible (ValueError); likewise the last
    one where there are no ids (None), but embeddings.
    """
    if config.pad_token_id is None and batch != 1:
        raise ValueError("this model has no pad_token_id: it takes one sequence at a time, or texts (llm.classify)")
    if config.pad_token_id is None or ids is None:
        return np.full(batch, width - 1)
    return (np.arange(width) * (ids != config.pad_token_id)).argmax(axis=-1)


def classify(engine: Engine, texts: Sequence[np.ndarray], cancel: CancelToken | None = None) -> np.ndarray:
    """float32 [N, num_labels]: the scores of `texts`, ids int32 [T] each, whatever their lengths.

    As many at a time as the cache has slots; each as it would be alone. ContextError for one that does not fit.
    """
    n_ctx, table = engine.backend.n_ctx, engine.slots
    for i, text in enumerate(texts):
        if text.size > n_ctx:
            raise ContextError(f"text {i} has {text.size} tokens, the context {n_ctx}; shorten it or raise n_ctx")
    scores = np.empty((len(texts), engine.config.n_outputs), np.float32)
    for at in range(0, len(texts), len(table.slots)):
        group = texts[at : at + len(table.slots)]
        slots = [table.take(text, reuse=False) for text in group]
        sizes = [text.size for text in group]
        begins = np.cumsum([0, *sizes[:-1]])
        last = [int(last_tokens(engine.config, text[None], 1, text.size)[0]) for text in group]
        scores[at : at + len(group)] = engine.forward(
            np.concatenate(group),
            np.concatenate([np.arange(size) for size in sizes]),
            np.repeat([slot.index for slot in slots if slot is not None], sizes),
            begins + last,
            cancel,
        )
        for slot in slots:
            assert slot is not None
            table.release(slot)
    return scores
