"""The tensors that a config demands: names, layouts, shapes and their order. Nothing else may be in a file.

This is a security boundary. Kernels compute addresses from the config's sizes and check no bounds; that is sound
because the reader accepts a file only if its tensor list equals, entry by entry, the one made here from its config.

Names are Hugging Face's without ".weight", plus `.qweight` and `.scales` for what is quantized.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..config import LlamaConfig

LM_HEAD_BITS = (4, 8, 16)
_QUANTIZED = {4: "int4.g128", 8: "int8.g128"}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name, the name of its layout, its logical shape (without padding)."""

    name: str
    layout: str
    shape: tuple[int, ...]


def model_tensors(config: LlamaConfig, lm_head_bits: int) -> list[TensorSpec]:
    """Every tensor of the file, in file order. `lm_head_bits`: 4, 8 or 16, also of a tied embedding."""
    return list(iter_tensors(config, lm_head_bits))


def iter_tensors(config: LlamaConfig, lm_head_bits: int) -> Iterator[TensorSpec]:
    """`model_tensors` one by one: a reader stops at the first that differs, and a hostile config may ask for 60,000.

    Matrices that are multiplied by the same input (q, k, v; gate, up) stand next to each other, codes beside codes and
    scales beside scales, so that a backend can read them as one.
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    vocab = (config.vocab_size, hidden)

    if config.tie_word_embeddings:
        yield from _matrices([("model.embed_tokens", vocab)], lm_head_bits, bias=False)
    else:
        yield TensorSpec("model.embed_tokens.weight", "f16", vocab)
    for i in range(config.num_hidden_layers):
        layer, attention, mlp = f"model.layers.{i}", f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        yield TensorSpec(f"{layer}.input_layernorm.weight", "f32", (hidden,))
        qkv = [("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)]
        yield from _matrices([(f"{attention}.{name}", (size, hidden)) for name, size in qkv], 4, config.attention_bias)
        yield from _matrices([(f"{attention}.o_proj", (hidden, q_size))], 4, config.attention_bias)
        yield TensorSpec(f"{layer}.post_attention_layernorm.weight", "f32", (hidden,))
        gate_up = [(f"{mlp}.gate_proj", (intermediate, hidden)), (f"{mlp}.up_proj", (intermediate, hidden))]
        yield from _matrices(gate_up, 4, config.mlp_bias)
        yield from _matrices([(f"{mlp}.down_proj", (hidden, intermediate))], 4, config.mlp_bias)
    yield TensorSpec("model.norm.weight", "f32", (hidden,))
    if config.is_classifier:
        yield TensorSpec("score.weight", "f16.r16", (config.n_outputs, hidden))
    elif not config.tie_word_embeddings:
        yield from _matrices([("lm_head", vocab)], lm_head_bits, bias=False)


def tensor_count(config: LlamaConfig, lm_head_bits: int) -> int:
    """`len(model_tensors(...))` without making it: a hostile config can ask for 4096 layers."""
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
