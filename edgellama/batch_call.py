"""`Llama.forward` with a batch: from checked inputs to transformers' output class, with its loss and its cache.

Knows which logits each kind of model gives and what becomes of the caller's cache. How a pass is computed: `forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellama.classification import last_tokens
from edgellama.config import LlamaConfig
from edgellama.forward import Hook, Inputs, Results, Wanted, run
from edgellama.generate.cancel import CancelToken
from edgellama.generate.engine import Engine
from edgellama.losses import IGNORE_INDEX, causal_lm_loss, classification_loss
from edgellama.outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast
from edgellama.past import Row, SequenceCache


@dataclass(frozen=True)
class BatchCall:
    """What a call asks for. `lend()`: the engine, all slots free; `exclusive()`: the model to oneself, for a cache."""

    config: LlamaConfig
    inputs: Inputs
    past: SequenceCache | None
    labels: Any
    use_cache: bool | None
    hidden_states: bool
    attentions: bool
    hook: Hook | None
    lend: Callable[[], AbstractContextManager[Engine]]
    exclusive: Callable[[], AbstractContextManager[object]]
    cancel: CancelToken | None

    def causal_lm(self, columns: np.ndarray) -> CausalLMOutputWithPast:
        """A LlamaForCausalLM's answer, with the logits of `columns`."""
        kept = self.inputs.kept
        labels = None if self.labels is None else np.asarray(self.labels)
        if labels is not None:
            if labels.dtype.kind not in "iu" or labels.size != kept.size:
                raise ValueError(f"labels must be {list(kept.shape)} integers, got {labels.dtype} {list(labels.shape)}")
            if columns.size != kept.shape[1]:
                raise ValueError("labels need the logits of every column: leave logits_to_keep out")
            labels = labels.reshape(kept.shape).astype(np.int64)
            if (labels[:, 1:][~kept[:, :-1]] != IGNORE_INDEX).any():
                raise ValueError(f"labels behind padding must be {IGNORE_INDEX}: nothing predicts them")
        wanted = Wanted(columns, None, self.hidden_states, self.attentions, self.hook)
        results, cache = self._run(wanted, default_cache=labels is None)
        loss = None if labels is None else causal_lm_loss(results.logits, labels)
        return CausalLMOutputWithPast(loss, results.logits, cache, results.hidden_states, results.attentions)

    def classifier(self) -> SequenceClassifierOutputWithPast:
        """A LlamaForSequenceClassification's."""
        kept = self.inputs.kept
        last = last_tokens(self.config, self.inputs.given_ids, *kept.shape)
        if not np.take_along_axis(kept, last[:, None], axis=1).all():
            raise ValueError("attention_mask leaves out a sequence's last token that is not pad_token_id")
        wanted = Wanted(None, last, self.hidden_states, self.attentions, self.hook)
        results, cache = self._run(wanted, default_cache=False)
        loss = None
        if self.labels is not None:
            loss = classification_loss(results.logits, np.asarray(self.labels), self.config.problem_type)
        return SequenceClassifierOutputWithPast(loss, results.logits, cache, results.hidden_states, results.attentions)

    def _run(self, wanted: Wanted, default_cache: bool) -> tuple[Results, SequenceCache | None]:
        inputs, past = self.inputs, self.past
        keeps = default_cache if self.use_cache is None else self.use_cache
        with self.lend() as engine:
            rows = past.rows if past is not None else [Row(engine) for _ in inputs.kept]
            results = run(engine, engine.slots.hold(rows), inputs, wanted, self.cancel)
            if past is None and not keeps:
                return results, None
            for row, kept in zip(rows, inputs.kept, strict=True):
                row.n += int(kept.sum())
            if past is not None:
                past.mask = inputs.mask
                return results, past
        return results, SequenceCache(engine, self.exclusive, rows, inputs.mask)
