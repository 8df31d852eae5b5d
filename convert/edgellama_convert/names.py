"""The one place that maps Hugging Face tensor names to ours, and decides what to do with every tensor of a source.

Knows: the names of a `LlamaForCausalLM` (or `LlamaForSequenceClassification`) state dict and of an `.edgellama` file.
Does not read data. A tensor of the
source is mapped, ignored for a stated reason, or refused by name; a tensor that the config demands is there with its
shape, or refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.format.schema import TensorSpec

from .checkpoint import STORED, SourceTensor

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
SCORE = "score.weight"
# Buffers that old versions of transformers saved; the config says the same.
_ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def source_name(spec_name: str) -> str:
    """Hugging Face's name of the tensor that our tensor `spec_name` comes from.

    >>> source_name("model.layers.0.self_attn.q_proj.scales")
    'model.layers.0.self_attn.q_proj.weight'
    """
    for suffix in (".qweight", ".scales"):
        if spec_name.endswith(suffix):
            return spec_name.removesuffix(suffix) + ".weight"
    return spec_name


@dataclass(frozen=True)
class Plan:
    """`sources`: our names, all of the schema's -> tensors of the source. `ignored`: its other names -> why."""

    sources: dict[str, SourceTensor]
    ignored: dict[str, str]
    must_equal: tuple[SourceTensor, SourceTensor] | None = None
    """(lm_head, embedding) of a tied model that stores both: to be compared, since only one is kept."""


def plan_tensors(config: LlamaConfig, specs: Sequence[TensorSpec], tensors: Mapping[str, SourceTensor]) -> Plan:
    """Account for every tensor on both sides; ConvertError names the first that cannot be."""
    sources: dict[str, SourceTensor] = {}
    for spec in specs:
        name = source_name(spec.name)
        tensor = tensors.get(name)
        if tensor is None:
            _refuse_missing(name, tensors)
        if tensor.shape != spec.shape:
            raise ConvertError(
                f"tensor {name}: config.json makes its shape {list(spec.shape)}, the file has {list(tensor.shape)}"
            )
        if tensor.dtype not in STORED:
            raise ConvertError(
                f"tensor {name}: dtype {tensor.dtype} is not supported (F32, F16 and BF16 are); quantized checkpoints "
                "(GPTQ, AWQ, FP8) cannot be converted, take the original"
            )
        sources[spec.name] = tensor

    used = {source_name(spec.name) for spec in specs}
    ignored: dict[str, str] = {}
    must_equal = None
    for name in sorted(set(tensors) - used):
        if _ROTARY_BUFFER.fullmatch(name):
            ignored[name] = "follows from config.json"
        elif name == LM_HEAD and config.tie_word_embeddings:
            ignored[name] = f"equals {EMBEDDING}, which it is tied to"
            must_equal = (tensors[LM_HEAD], tensors[EMBEDDING])
            if _form(must_equal[0]) != _form(must_equal[1]):
                raise ConvertError(_untied(f"their shapes or dtypes differ: {[_form(t) for t in must_equal]}"))
        else:
            raise ConvertError(f"tensor {name}{_why_unknown(name, config)}")
    return Plan(sources, ignored, must_equal)


def _form(tensor: SourceTensor) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tensor.shape


def _untied(problem: str) -> str:
    return (
        f"config.json ties {LM_HEAD} to {EMBEDDING}, but {problem}; "
        'set "tie_word_embeddings": false in config.json if lm_head is meant to be its own'
    )


def refuse_untied() -> ConvertError:
    """The error for a tied model whose two matrices hold different values."""
    return ConvertError(_untied("the checkpoint holds both with different values"))


def _refuse_missing(name: str, tensors: Mapping[str, SourceTensor]) -> NoReturn:
    if name == LM_HEAD:
        hint = 'set "tie_word_embeddings": true in config.json if the embedding is meant to be used'
    elif name == SCORE:
        hint = (
            'a classifier has it; "architectures": ["LlamaForCausalLM"] in config.json is for a model that writes text'
        )
    elif name.removeprefix("model.") in tensors:
        hint = f"there is {name.removeprefix('model.')}: save the whole LlamaForCausalLM, not only its base model"
    elif name.removesuffix("weight") + "qweight" in tensors:
        hint = "this is a GPTQ or AWQ checkpoint, take the original"
    else:
        hint = "the checkpoint is incomplete, or config.json is another model's"
    raise ConvertError(f"tensor {name} is missing; {hint}")


def _why_unknown(name: str, config: LlamaConfig) -> str:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return f": config.json has num_hidden_layers {config.num_hidden_layers} only"
    if name.endswith("_proj.bias"):
        key = "attention_bias" if ".self_attn." in name else "mlp_bias"
        return f" is there, but config.json's {key} is false"
    if ".lora_" in name or name.startswith("base_model."):
        return " belongs to an adapter: merge it into its base model first (peft's merge_and_unload)"
    if name == SCORE:
        return ' is a classifier\'s: it takes "architectures": ["LlamaForSequenceClassification"] in config.json'
    return f" is not part of a {config.architecture}; refused, since leaving it out could change every result"
