"""The attention of one text as numbers: its tokens, what each can see, and the weights of a layer and head.

The weights are those of the float32 reference, computed up to the layer that was asked for. Knows nothing of how they
are drawn.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import numpy as np

from edgellama.backends import check_batch
from edgellama.backends.reference import ReferenceBackend
from edgellama.errors import TokenizerError
from edgellama.rope import cos_sin
from edgellama.tokenizer import Tokenizer, load_tokenizer
from edgellama.tokenizer.token_bytes import token_bytes_function

if TYPE_CHECKING:
    from edgellama.format import ModelFile
    from edgellama.model import Llama

MAX_TOKENS = 1024
"""More could be computed, but nobody could read the picture."""


@dataclass(frozen=True)
class Attention:
    """Row i of `mask` (bool [T, T]) is what token i of a text can see, of `weights` (float32 [T, T]) how much it does.

    `labels`: the tokens as text for people: a space is ▁, and no character that a terminal would obey. `title`: what
    this is a picture of. `str()` is the picture for a terminal without colours.
    """

    title: str
    ids: list[int]
    labels: list[str]
    mask: np.ndarray
    weights: np.ndarray | None = None
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        from edgellama.visualize.text import render

        return render(self)

    def __repr__(self) -> str:
        return f"<Attention of {len(self.ids)} tokens: {self.title}>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a picture, of the kind that the name ends with (.png, .svg, .pdf). Needs the extra `plot`."""
        from edgellama.visualize.picture import draw

        draw(self, path)


def visualize_attention_mask(
    model_or_tokenizer: Llama | Tokenizer | str | os.PathLike[str],
    text: str | Sequence[int],
    *,
    layer: int | None = None,
    head: int | None = None,
    out: str | os.PathLike[str] | None = None,
    file: IO[str] | None = None,
) -> Attention:
    """Print what each token of `text` can see, or with `layer` how much it looks at each; returns the numbers.

    `model_or_tokenizer`: a loaded model, a tokenizer (for the mask, which is the same for every model here), or a model
    file's path. `text`: encoded with the model's special tokens, or ids as they are. `head` None: the mean of all.
    `out`: a picture is written there (.png, .svg) instead of anything printed. `file`: printed there, else to stdout,
    in colour where that is a terminal. ValueError for a layer or head that is not there, or too long a text.
    """
    if out is not None:
        from edgellama.visualize.picture import check_path

        check_path(out)
    result = attention_of(model_or_tokenizer, text, layer=layer, head=head)
    if out is not None:
        result.save(out)
    else:
        from edgellama.visualize.text import show

        show(result, sys.stdout if file is None else file)
    return result


def attention_of(
    model_or_tokenizer: Llama | Tokenizer | str | os.PathLike[str],
    text: str | Sequence[int],
    *,
    layer: int | None = None,
    head: int | None = None,
) -> Attention:
    """What `visualize_attention_mask` shows."""
    if layer is None and head is not None:
        raise ValueError("head needs a layer: a mask is the same for all heads")
    with ExitStack() as stack:
        model_file, tokenizer, name = _opened(model_or_tokenizer, stack)
        ids = tokenizer.encode(text) if isinstance(text, str) else [int(index) for index in text]
        if not 1 <= len(ids) <= MAX_TOKENS:
            raise ValueError(f"the text has {len(ids)} tokens; a picture shows 1 to {MAX_TOKENS}")
        labels = token_labels(tokenizer, ids)
        mask = np.tri(len(ids), dtype=bool)
        if layer is None:
            return Attention(f"{name}attention mask", ids, labels, mask)
        if model_file is None:
            raise ValueError("attention weights need a model, not its tokenizer alone")
        weights = attention_weights(model_file, ids, layer)
    if head is not None and not 0 <= head < len(weights):
        raise ValueError(f"head {head} is not there: layer {layer} has heads 0 to {len(weights) - 1}")
    shown = weights.mean(axis=0) if head is None else weights[head]
    what = f"layer {layer}, " + ("mean of all heads" if head is None else f"head {head}")
    return Attention(f"{name}attention, {what}", ids, labels, mask, shown, layer, head)


def _opened(
    source: Llama | Tokenizer | str | os.PathLike[str], stack: ExitStack
) -> tuple[ModelFile | None, Tokenizer, str]:
    """(the model file, unless there is only a tokenizer; the tokenizer; what titles begin with)"""
    if isinstance(source, Tokenizer):
        return None, source, ""
    if isinstance(source, str | os.PathLike):
        from edgellama.format import open_model
        from edgellama.paths import find_model

        model_file = stack.enter_context(open_model(find_model(source)))
        return model_file, load_tokenizer(model_file.files, model_file.config), f"{model_file.path.stem}: "
    return source.file, source.tokenizer, f"{source.file.path.stem}: "


def attention_weights(model_file: ModelFile, ids: Sequence[int], layer: int) -> np.ndarray:
    """float32 [heads, T, T]: how much each token looks at each, in one layer (0 is the first); rows sum to 1."""
    n_layers = model_file.config.num_hidden_layers
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer {layer} is not there: the model has layers 0 to {n_layers - 1}")
    n = len(ids)
    backend = ReferenceBackend(model_file, n)
    tokens, places, slots, _ = check_batch(
        ids, np.arange(n), np.zeros(n, np.int32), [], vocab_size=model_file.config.vocab_size, backend=backend
    )
    each = backend.layers(places, slots, *cos_sin(model_file.config, places, n))
    x = each.embed(tokens)
    for i in range(layer):
        x, _ = each.layer(i, x)
    _, weights = each.layer(layer, x, with_weights=True)
    return weights[0]


def token_labels(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token's own text, ▁ for a space, escapes for control characters, hexadecimal for a part of a character."""
    try:
        convert = token_bytes_function(tokenizer.decoder_fields)
    except TokenizerError:
        convert = str.encode
    labels = []
    for index in ids:
        token = tokenizer.convert_ids_to_tokens(index)
        if token is None:
            labels.append(f"<{index}>")
            continue
        data = token.encode("utf-8") if index in tokenizer.special_ids else convert(token)
        try:
            labels.append(_plain(data.decode("utf-8")))
        except UnicodeDecodeError:
            labels.append(f"<{data.hex(' ')}>")
    return labels


def _plain(text: str) -> str:
    text = text.replace(" ", "▁")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
