"""What a conversion changes in a model on purpose: a token to pad with, and fewer heads of keys and values.

Knows a Llama's config, its tensors' names and its tokenizer's files. The checkpoint itself is left alone: changed
tensors are derived while they are read (`derived`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.format import has_tokenizer
from edgellama.tokenizer import load_tokenizer
from edgellama.tokenizer.settings import parse_json_object

from .checkpoint import SourceTensor
from .derived import Derive, Part, PooledHeads, ZeroRow
from .names import EMBEDDING, LM_HEAD
from .siblings import edit_json

_KEYS_AND_VALUES = re.compile(r"model\.layers\.\d+\.self_attn\.[kv]_proj\.(weight|bias)")


@dataclass(frozen=True)
class Model:
    """A model on its way: config.json, what it means, the tokenizer's files, and how to derive its tensors."""

    raw: dict[str, Any]
    config: LlamaConfig
    files: Mapping[str, bytes]
    steps: tuple[Derive, ...] = ()
    changes: tuple[str, ...] = ()
    """What was done, a line each."""

    def _changed(self, step: Derive | None, change: str, files: Mapping[str, bytes], **keys: Any) -> Model:
        raw = {**self.raw, **keys}
        steps = self.steps if step is None else (*self.steps, step)
        return replace(
            self, raw=raw, config=LlamaConfig.from_dict(raw), files=files, steps=steps, changes=(*self.changes, change)
        )


def operate(model: Model, *, add_pad_token: str | None, num_key_value_heads: int | None) -> Model:
    """`model` with what is not None done to it; ConvertError where that cannot be."""
    if num_key_value_heads is not None:
        model = pool_heads(model, num_key_value_heads)
    if add_pad_token is not None:
        model = add_padding(model, add_pad_token)
    return model


def pool_heads(model: Model, heads: int) -> Model:
    """Each head of keys and of values becomes the mean of its neighbours, `heads` in all (Ainslie et al. 2023, GQA)."""
    have = model.config.num_key_value_heads
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or have % heads:
        raise ConvertError(f"num_key_value_heads {heads!r} must divide the checkpoint's {have}")
    if heads == have:
        return model
    head_dim, group = model.config.head_dim, have // heads

    def derive(tensors: Mapping[str, SourceTensor]) -> tuple[dict[str, Part], list[str]]:
        rows = have * head_dim
        names = [
            name
            for name, tensor in tensors.items()
            if _KEYS_AND_VALUES.fullmatch(name) and tensor.shape and tensor.shape[0] == rows
        ]  # one of another shape stays as it is, and is refused by name later on
        return {name: PooledHeads(tensors[name], head_dim, group) for name in names}, names

    change = f"the {have} heads of keys and values averaged to {heads}; fine-tune it, or expect it to be much worse"
    return model._changed(derive, change, model.files, num_key_value_heads=heads)


def add_padding(model: Model, token: str) -> Model:
    """A token to pad with, whose row of the embedding is zero, and of lm_head, too.

    A token that the tokenizer does not know gets its next free id, and the matrices a row if they have none to spare.
    """
    if not token or len(token) > 100:
        raise ConvertError("the pad token must have 1 to 100 characters")
    if not has_tokenizer(model.files):
        raise ConvertError("a pad token can only be added where there is a tokenizer; this checkpoint has none")
    before = load_tokenizer(model.files, model.config)
    known = before.token_to_id(token)
    if known is not None and known != before.token_to_id(before.special_tokens.get("pad_token", "")):
        raise ConvertError(f"the tokenizer knows {token!r} already, as id {known}; choose another pad token")
    files = edit_json(model.files, "tokenizer_config.json", pad_token=token)
    settings = parse_json_object("tokenizer_config.json", files["tokenizer_config.json"])
    if known is None and isinstance(settings.get("added_tokens_decoder"), dict):
        fields = {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        entry = {str(before.vocab_size): {**fields, "special": True}}
        files = edit_json(files, "tokenizer_config.json", added_tokens_decoder=settings["added_tokens_decoder"] | entry)
    pad_id = load_tokenizer(files, model.config).token_to_id(token)
    if pad_id is None:
        raise ConvertError(f"the tokenizer does not take {token!r} as a token; choose another pad token")
    if "generation_config.json" in files:
        files = edit_json(files, "generation_config.json", pad_token_id=pad_id)
    size = max(model.config.vocab_size, pad_id + 1)

    def derive(tensors: Mapping[str, SourceTensor]) -> tuple[dict[str, Part], list[str]]:
        names = [name for name in (EMBEDDING, LM_HEAD) if name in tensors and len(tensors[name].shape) == 2]
        return {name: ZeroRow(tensors[name], pad_id) for name in names}, names

    change = f"{token!r} is the pad token, id {pad_id}; its rows of the embedding and of the output layer are zero"
    return model._changed(derive, change, files, vocab_size=size, pad_token_id=pad_id)
