"""A forward pass over a batch, as transformers' Llama models take one: masks, positions, caches, states, hooks.

**Padding.** Columns that the mask leaves out are not computed: a sequence's other tokens lie side by side in the cache
("places"), while their RoPE positions are those of the columns or the caller's. So what padding holds does not matter
at all, and where transformers gives it some output, 0 is given here.

**Two ways.** The backend's own program gives logits. What asks for more (states, attentions, hooks, embeddings or
positions of the caller's) goes layer by layer, where the backend can (`backends.layerwise`): the same bits, slower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgellama import rope
from edgellama.config import LlamaConfig
from edgellama.errors import ContextError, DeviceError
from edgellama.generate.cancel import CancelToken
from edgellama.generate.engine import Engine
from edgellama.generate.slots import Slot

Hook = Callable[[int, np.ndarray], np.ndarray | None]
"""(layer, its residual stream float32 [B, T, hidden_size]) -> another in its place; None: this one, changed or not."""
Hooks = Hook | Mapping[int, Callable[[np.ndarray], np.ndarray | None]]
MAX_POSITION = 1 << 24  # float32 knows no whole numbers beyond


@dataclass(frozen=True)
class Inputs:
    """A checked batch. `ids` int32 [B, T] or `embeds` float32 [B, T, hidden_size]; `kept` bool [B, T], False where a
    column is padding; `positions` int64 [B, T]; `past` bool [B, P]: the same of the columns that the cache holds."""

    ids: np.ndarray | None
    embeds: np.ndarray | None
    kept: np.ndarray
    positions: np.ndarray
    past: np.ndarray
    given_ids: np.ndarray | None
    """int64 [B, T]: the ids as they came, padding included."""

    @property
    def mask(self) -> np.ndarray:
        """bool [B, P + T]"""
        return np.concatenate([self.past, self.kept], axis=1)


@dataclass(frozen=True)
class Wanted:
    """What a pass is to give: `columns` int [K], whose logits; or `last` int [B], one column of each sequence."""

    columns: np.ndarray | None = None
    last: np.ndarray | None = None
    hidden_states: bool = False
    attentions: bool = False
    hooks: Hook | None = None

    def columns_of(self, batch: int) -> np.ndarray:
        """int [B, K]"""
        if self.last is not None:
            return self.last[:, None]
        assert self.columns is not None
        return np.broadcast_to(self.columns, (batch, len(self.columns)))

    @property
    def more_than_logits(self) -> bool:
        return self.hidden_states or self.attentions or self.hooks is not None


@dataclass(frozen=True)
class Results:
    """`logits` float32 [B, K, n_outputs] ([B, n_outputs] for `last`); see `outputs` for the others."""

    logits: np.ndarray
    hidden_states: tuple[np.ndarray, ...] | None = None
    attentions: tuple[np.ndarray, ...] | None = None


def read_inputs(
    config: LlamaConfig,
    input_ids: Any = None,
    inputs_embeds: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    cache_position: Any = None,
    past: np.ndarray | None = None,
) -> Inputs:
    """A batch from what a caller gives; ValueError or TypeError names what is wrong. `past`: the cache's mask."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    ids = given_ids = embeds = None
    if inputs_embeds is None:
        ids = _whole_numbers("input_ids", input_ids)
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(f"input_ids must have the shape [batch, tokens], got {list(ids.shape)}")
        shape = ids.shape
    else:
        embeds = _array("inputs_embeds", inputs_embeds).astype(np.float32)
        embeds = embeds[None] if embeds.ndim == 2 else embeds
        if embeds.ndim != 3 or embeds.size == 0 or embeds.shape[2] != config.hidden_size:
            raise ValueError(
                f"inputs_embeds must have the shape [batch, tokens, {config.hidden_size}], got {list(embeds.shape)}"
            )
        shape = embeds.shape[:2]
    before = np.zeros((shape[0], 0), bool) if past is None else past
    if len(before) != shape[0]:
        raise ValueError(f"the cache has {len(before)} sequences, the batch {shape[0]}")
    kept = _mask(attention_mask, shape, before)
    if ids is not None:
        bad = kept & ((ids < 0) | (ids >= config.vocab_size))
        if bad.any():
            b, t = (int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"input_ids[{b}, {t}] is {ids[b, t]}, outside the vocabulary of {config.vocab_size} tokens"
            )
        given_ids, ids = ids, np.where(kept, ids, 0).astype(np.int32)
    columns = np.arange(before.shape[1], before.shape[1] + shape[1])
    if cache_position is not None and _whole_numbers("cache_position", cache_position).tolist() != columns.tolist():
        raise ValueError(
            f"cache_position must be {columns[0]} to {columns[-1]}, the columns behind those of the cache; "
            "past_key_values.crop() takes some away"
        )
    positions = np.broadcast_to(columns, shape)
    if position_ids is not None:
        given = _whole_numbers("position_ids", position_ids)
        if (
            given.ndim not in (1, 2)
            or given.shape[-1] != shape[1]
            or (given.ndim == 2 and len(given) not in (1, shape[0]))
        ):
            raise ValueError(f"position_ids must have the shape {list(shape)}, got {list(given.shape)}")
        positions = np.broadcast_to(given, shape)
        bad = kept & ((positions < 0) | (positions >= MAX_POSITION))
        if bad.any():
            raise ValueError(f"position_ids must be from 0 to {MAX_POSITION - 1}, got {positions[bad][0]}")
    return Inputs(ids, embeds, kept, positions.astype(np.int64), before, given_ids)


def read_columns(keep: Any, n: int) -> np.ndarray:
    """int [K]: the columns of `logits_to_keep`: 0 is all of `n`, a number the last ones, a list those themselves."""
    if isinstance(keep, int | np.integer) and not isinstance(keep, bool):
        if keep < 0:
            raise ValueError(f"logits_to_keep must be at least 0, got {keep}")
        return np.arange(n - min(int(keep) or n, n), n)
    columns = _whole_numbers("logits_to_keep", keep)
    if columns.ndim != 1 or not columns.size or columns.min() < -n or columns.max() >= n:
        raise ValueError(f"logits_to_keep must be a number or a list of columns from 0 to {n - 1}, got {keep!r:.80}")
    return columns % n


def read_hooks(hooks: Hooks | None, n_layers: int) -> Hook | None:
    """One function of all layers, from a function or a dict of them by layer."""
    if hooks is None or (callable(hooks) and not isinstance(hooks, Mapping)):
        return hooks
    if not isinstance(hooks, Mapping) or not all(callable(each) for each in hooks.values()):
        raise TypeError("hooks must be a function (layer, states) or a dict: layer -> function (states)")
    for layer in hooks:
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or not 0 <= layer < n_layers:
            raise ValueError(f"there is no layer {layer!r} to hook: they are 0 to {n_layers - 1}")
    by_layer = dict(hooks)
    return lambda layer, x: by_layer[layer](x) if layer in by_layer else None


def run(engine: Engine, slots: list[Slot], inputs: Inputs, wanted: Wanted, cancel: CancelToken | None) -> Results:
    """One pass over the batch: sequence b goes on in `slots[b]`, where its `past` lies."""
    kept = inputs.kept
    places = inputs.past.sum(axis=1)[:, None] + np.cumsum(kept, axis=1) - 1
    n_ctx = engine.backend.n_ctx
    if kept.any() and int(places.max()) >= n_ctx:
        longest = int(places.max()) + 1
        raise ContextError(f"{longest} tokens do not fit into a context of {n_ctx}; load the model with a larger n_ctx")
    each = np.broadcast_to(np.array([slot.index for slot in slots])[:, None], kept.shape)
    positions = inputs.positions
    tokens = np.zeros(0, np.int32) if inputs.ids is None else inputs.ids[kept]
    length = 1 + int(positions[kept].max(initial=0))  # of the batch: transformers takes RoPE's length from all of it
    as_placed = bool((positions[kept] == places[kept]).all())
    same_rope = not rope.depends_on_length(engine.config) or bool((places.max(axis=1) + 1 == length).all())
    flat = places[kept].astype(np.int32), each[kept].astype(np.int32)
    if not kept.any():
        raise ValueError("the attention_mask leaves no token to compute")

    columns = wanted.columns_of(len(kept))
    rows = np.full(kept.shape, -1)
    rows[kept] = np.arange(len(flat[0]))
    at = np.take_along_axis(rows, columns, axis=1)  # [B, K]: the row of each wanted column, -1 of padding
    chosen = np.unique(at[at >= 0]).astype(np.int32)
    logits = np.zeros((*at.shape, engine.config.n_outputs), np.float32)

    if inputs.embeds is None and not wanted.more_than_logits and as_placed and same_rope:
        found = engine.forward(tokens, *flat, chosen, cancel)
        results = Results(logits)
    else:
        states, results = _by_layer(engine, inputs, wanted, tokens, flat, slots, positions[kept], length, cancel)
        found = engine.run(lambda: states.logits(chosen), cancel) if chosen.size else logits[:0, 0]
        results = replace(results, logits=logits)
    logits[at >= 0] = found[np.searchsorted(chosen, at[at >= 0])]
    return results if wanted.last is None else replace(results, logits=logits[:, 0])


@dataclass(frozen=True)
class _States:
    """What a pass layer by layer ended with."""

    of: Any
    x: np.ndarray

    def logits(self, rows: np.ndarray) -> np.ndarray:
        return self.of.logits(self.x[rows])


def _by_layer(
    engine: Engine,
    inputs: Inputs,
    wanted: Wanted,
    tokens: np.ndarray,
    flat: tuple[np.ndarray, np.ndarray],
    slots: list[Slot],
    positions: np.ndarray,
    length: int,
    cancel: CancelToken | None,
) -> tuple[_States, Results]:
    layers = getattr(engine.backend, "layers", None)
    if layers is None:
        raise DeviceError(
            "hidden states, attentions, hooks, inputs_embeds and positions other than 0, 1, ... of each sequence's own "
            "tokens are for the devices cpu and reference (of a batch padded on the left, give "
            "position_ids=attention_mask.cumsum(-1) - 1)"
        )
    kept = inputs.kept
    cos, sin = rope.cos_sin(engine.config, positions, length)
    each = layers(*flat, np.ascontiguousarray(cos), np.ascontiguousarray(sin))
    if inputs.embeds is None:
        x = engine.run(lambda: each.embed(tokens), cancel)
    else:
        x = np.ascontiguousarray(inputs.embeds[kept])
    hidden_states, attentions = [_spread(x, kept)] if wanted.hidden_states else [], []
    for i in range(engine.config.num_hidden_layers):
        x, weights = engine.run(lambda i=i, x=x: each.layer(i, x, wanted.attentions), cancel)  # type: ignore[misc]
        if wanted.attentions:
            attentions.append(_attentions(weights, inputs, slots, engine.config.num_attention_heads))
        if wanted.hooks is not None:
            x = _hooked(wanted.hooks, i, x, kept)
        if wanted.hidden_states:
            hidden_states.append(_spread(x, kept))
    if wanted.hidden_states:
        hidden_states[-1] = _spread(engine.run(lambda: each.norm(x), cancel), kept)
    results = Results(
        x[:0],
        tuple(hidden_states) if wanted.hidden_states else None,
        tuple(attentions) if wanted.attentions else None,
    )
    return _States(each, x), results


def _spread(x: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """[tokens, ...] to [B, T, ...]; padding is 0."""
    out = np.zeros((*kept.shape, *x.shape[1:]), np.float32)
    out[kept] = x
    return out


def _hooked(hook: Hook, layer: int, x: np.ndarray, kept: np.ndarray) -> np.ndarray:
    stream = _spread(x, kept)
    given = hook(layer, stream)
    changed = stream if given is None else _array("what a hook returns", given)
    if changed.shape != stream.shape:
        raise ValueError(f"the hook of layer {layer} must return {list(stream.shape)}, got {list(changed.shape)}")
    return np.ascontiguousarray(changed[kept], np.float32)


def _attentions(weights: Mapping[int, np.ndarray], inputs: Inputs, slots: list[Slot], heads: int) -> np.ndarray:
    """float32 [B, heads, T, P + T]: from places to columns."""
    kept, mask = inputs.kept, inputs.mask
    out = np.zeros((len(kept), heads, kept.shape[1], mask.shape[1]), np.float32)
    for b, tokens in enumerate(kept):
        if tokens.any():
            mine = weights[slots[b].index]
            seen = np.flatnonzero(mask[b])[: mine.shape[2]]
            out[b][:, np.flatnonzero(tokens)[:, None], seen[None, :]] = mine
    return out


def _mask(given: Any, shape: tuple[int, ...], past: np.ndarray) -> np.ndarray:
    """bool [B, T] of the new columns."""
    if given is None:
        return np.ones(shape, bool)
    mask = _array("attention_mask", given)
    mask = mask[None] if mask.ndim == 1 else mask
    whole = (shape[0], past.shape[1] + shape[1])
    if mask.shape != whole:
        raise ValueError(f"attention_mask must have the shape {list(whole)}, got {list(mask.shape)}")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError("attention_mask must hold 0 and 1 only")
    mask = mask.astype(bool)
    if (mask[:, : past.shape[1]] != past).any():
        raise ValueError("attention_mask differs from the one that the cache was computed with")
    return mask[:, past.shape[1] :]


def _array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} has rows of different lengths: pad them, and say so in attention_mask") from None
    if array.dtype.kind not in "iufb":
        raise TypeError(f"{name} must be numbers, got {array.dtype}")
    return array


def _whole_numbers(name: str, value: Any) -> np.ndarray:
    if isinstance(value, str):
        raise TypeError(f"{name} must be integers; encode text with llm.tokenizer.encode(text)")
    array = _array(name, value)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    return array.astype(np.int64)
