"""The tensors that a config demands: names, layouts, shapes and their order. Nothing else may be in a file.

This is a security boundary. Kernels compute addresses from the config's sizes and check no bounds; that is sound
because the reader accepts a file only if its tensor list equals, entry by entry, the one made here from its config.

Names are Hugging Face's without ".weight", plus `.qweight` and `.scales` for what is quantized.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ..config import LlamaConfig

LM_HEAD_BITS = (4, 8, 16)
_QUANTIZED = {4: "int4.g128", 8: "int8.g128"}
UNITS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""A layer's matrices by their input, in file order: those of a unit have the same bits."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name, the name of its layout, its logical shape (without padding)."""

    name: str
    layout: str
    shape: tuple[int, ...]


def unit_names(config: LlamaConfig) -> Iterator[str]:
    """The names of all units, in file order: "model.layers.0.self_attn.qkv_proj" and so on."""
    return (f"model.layers.{i}.{unit}" for i in range(config.num_hidden_layers) for unit in UNITS)


def model_tensors(config: LlamaConfig, lm_head_bits: int, int8_units: Collection[str] = ()) -> list[TensorSpec]:
    """Every tensor of the file, in file order. `lm_head_bits`: 4, 8 or 16, also of a tied embedding.

    `int8_units`: those of `unit_names` that have 8 bits; the others have 4.
    """
    return list(iter_tensors(config, lm_head_bits, int8_units))


def iter_tensors(config: LlamaConfig, lm_head_bits: int, int8_units: Collection[str] = ()) -> Iterator[TensorSpec]:
    """`model_tensors` one by one: a reader stops at the first that differs, and a hostile config may ask for 60,000.

    Matrices that are multiplied by the same input (q, k, v; gate, up) stand next to each other, codes beside codes and
    scales beside scales, so that a backend can read them as one.
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    vocab = (config.vocab_size, hidden)
    eight = frozenset(int8_units)

    def unit(layer: str, name: str, sizes: tuple[int, ...], in_features: int, bias: bool) -> list[TensorSpec]:
        shapes = [(f"{layer}.{part}", (size, in_features)) for part, size in zip(UNITS[name], sizes, strict=True)]
        return _matrices(shapes, 8 if f"{layer}.{name}" in eight else 4, bias)

    if config.tie_word_embeddings:
        yield from _matrices([("model.embed_tokens", vocab)], lm_head_bits, bias=False)
    else:
        yield TensorSpec("model.embed_tokens.weight", "f16", vocab)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        yield TensorSpec(f"{layer}.input_layernorm.weight", "f32", (hidden,))
        yield from unit(layer, "self_attn.qkv_proj", (q_size, kv_size, kv_size), hidden, config.attention_bias)
        yield from unit(layer, "self_attn.o_proj", (hidden,), q_size, config.attention_bias)
        yield TensorSpec(f"{layer}.post_attention_layernorm.weight", "f32", (hidden,))
        yield from unit(layer, "mlp.gate_up_proj", (intermediate, intermediate), hidden, config.mlp_bias)
        yield from unit(layer, "mlp.down_proj", (hidden,), intermediate, config.mlp_bias)
    yield TensorSpec("model.norm.weight", "f32", (hidden,))
    if config.is_classifier:
        yield TensorSpec("score.weight", "f16.r16", (config.n_outputs, hidden))
    elif not config.tie_word_embeddings:
        yield from _matrices([("lm_head", vocab)], lm_head_bits, bias=False)


def tensor_count(config: LlamaConfig, lm_head_bits: int) -> int:
    """`len(model_tensors(...))` without making it: a hostile config can ask for 4096 layers. Bits change nothing."""
    layer = 2 + 7 * 2 + 4 * config.attention_bias + 3 * config.mlp_bias
    head = 1 if lm_head_bits == 16 or config.is_classifier else 2
    return layer * config.num_hidden_layers + 1 + head + (not config.tie_word_embeddings)


def _matrices(matrices: list[tuple[str, tuple[int, int]]], bits: int, bias: bool) -> list[TensorSpec]:
    """Codes of all, then scales of all, then biases of all."""
    if bits == 16:
        return [TensorSpec(f"{name}.weight", "f16.r16", shape) for name, shape in matrices]
    specs = [TensorSpec(f"{name}.qweight", _QUANTIZED[bits], shape) for name, shape in matrices]
    specs += [TensorSpec(f"{name}.scales", "scales.g128", shape) for name, shape in matrices]
    if bias:
        specs += [TensorSpec(f"{name}.bias", "f32", (shape[0],)) for name, shape in matrices]
    return specs
