"""Architectures that compute what a Llama does and call it otherwise: their configs and tensors in Llama's terms.

Each is accepted because its forward pass, written out, is Llama's: RMS norm, half-split rotary embedding, grouped
attention over all earlier positions, a gated MLP. What differs are names, defaults, fused matrices and which biases
exist; those are translated here, and what remains of the config is read by `edgellama.config`, as strictly as ever.
Anything else is refused by name, here where the reason is known.

Knows configs as JSON and tensors as `derived.Part`s. The model file never hears of it: it holds a Llama.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgellama.config import LlamaConfig
from edgellama.config_reader import show
from edgellama.errors import ConfigError, ConvertError, FormatError
from edgellama.format.strict_json import parse_object
from edgellama.tokenizer.settings import parse_json_object

from .checkpoint import SourceTensor, read_small
from .derived import Derive, DerivedCheckpoint, Part, Rows, Span, Zeros
from .source import CONFIG_FILE

MAX_CONFIG_BYTES = 1 << 20

Raw = dict[str, Any]


@dataclass(frozen=True)
class Sibling:
    """One architecture. `defaults`: its config class's, where they are not Llama's and a key is absent."""

    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    translate: Callable[[Raw], None] = lambda raw: None
    """Turns its own keys into Llama's, in place."""
    derive: Callable[[Mapping[str, SourceTensor], LlamaConfig], tuple[dict[str, Part], list[str]]] | None = None
    aliases: list[str] | None = None
    """`architectures` that mean the same beside this model_type."""
    tokenizer_as_it_is: bool = False
    """transformers runs its tokenizer.json unchanged, whatever class tokenizer_config.json names."""


def _refuse(key: str, problem: str) -> ConfigError:
    return ConfigError(f"config.json: {key}: {problem}")


# -- configs ---------------------------------------------------------------------------------------------------------


def _qwen2(raw: Raw) -> None:
    """Biases on q, k, v alone; a window only where `use_sliding_window` says so."""
    if raw.get("use_sliding_window"):
        raise _refuse("use_sliding_window", "attention with a sliding window is not supported")
    if raw.pop("use_mrope", False):
        raise _refuse("use_mrope", "multimodal rotary embedding is not supported")
    raw.pop("sliding_window", None)
    raw["attention_bias"] = True


def _phi3(raw: Raw) -> None:
    """transformers reads "su" and "yarn" as longrope."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name)
        if isinstance(rope, dict):
            raw[name] = {
                key: "longrope" if key in ("type", "rope_type") and value in ("su", "yarn") else value
                for key, value in rope.items()
            }
    raw.pop("attention_bias", None)  # its code never reads it


def _internlm(raw: Raw) -> None:
    """`bias` is that of q, k, v and o; `rotary` is RoPE's type ("origin" or "dynamic"), base and factor."""
    raw["attention_bias"] = raw.pop("bias")
    rotary = raw.pop("rotary", None)
    if rotary is None:
        return
    if not isinstance(rotary, dict) or rotary.get("type") not in ("origin", "dynamic"):
        raise _refuse("rotary", f'must be an object of type "origin" or "dynamic", got {show(rotary)}')
    raw["rope_theta"] = rotary.get("base", 10000)
    if rotary["type"] == "dynamic":
        raw["rope_scaling"] = {"type": "dynamic", "factor": rotary.get("scaling_factor", 1.0)}


def _internlm2(raw: Raw) -> None:
    raw["attention_bias"] = raw.pop("bias")


def _internlm3(raw: Raw) -> None:
    """`qkv_bias` is that of q, k and v, `bias` that of o and the MLP; transformers has them equal, too."""
    qkv = raw.pop("qkv_bias", raw.get("attention_bias", False))
    others = raw.pop("bias", raw.get("mlp_bias", False))
    if qkv != others:
        raise _refuse("qkv_bias", f"{show(qkv)} with bias {show(others)} is not supported: a Llama has them equal")
    raw["attention_bias"], raw["mlp_bias"] = qkv, others


# -- tensors ---------------------------------------------------------------------------------------------------------

_LAYER = r"(model\.layers\.\d+\.)"


def _renamed(
    rules: Sequence[tuple[str, str]], tensors: Mapping[str, SourceTensor]
) -> tuple[dict[str, Part], list[str]]:
    """Every tensor whose whole name matches a rule's pattern, under the name that the rule makes of it."""
    made: dict[str, Part] = {}
    used = []
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            match = re.fullmatch(pattern, name)
            if match:
                made[match.expand(replacement)] = Rows(tensor)
                used.append(name)
    return made, used


_YI_NAMES = [(_LAYER + r"ln1\.weight", r"\1input_layernorm.weight")]
_YI_NAMES += [(_LAYER + r"ln2\.weight", r"\1post_attention_layernorm.weight")]

_INTERNLM2_NAMES = [
    (r"model\.tok_embeddings\.weight", "model.embed_tokens.weight"),
    (r"output\.weight", "lm_head.weight"),
    (_LAYER + r"attention_norm\.weight", r"\1input_layernorm.weight"),
    (_LAYER + r"ffn_norm\.weight", r"\1post_attention_layernorm.weight"),
    (_LAYER + r"attention\.wo\.(weight|bias)", r"\1self_attn.o_proj.\2"),
    (_LAYER + r"feed_forward\.w1\.weight", r"\1mlp.gate_proj.weight"),
    (_LAYER + r"feed_forward\.w3\.weight", r"\1mlp.up_proj.weight"),
    (_LAYER + r"feed_forward\.w2\.weight", r"\1mlp.down_proj.weight"),
]


def _derive_yi(tensors: Mapping[str, SourceTensor], config: LlamaConfig) -> tuple[dict[str, Part], list[str]]:
    return _renamed(_YI_NAMES, tensors)


def _derive_internlm2(tensors: Mapping[str, SourceTensor], config: LlamaConfig) -> tuple[dict[str, Part], list[str]]:
    """`wqkv` holds, for each head of keys, its query heads, then its keys, then its values."""
    made, used = _renamed(_INTERNLM2_NAMES, tensors)
    size = config.head_dim
    share = config.num_attention_heads // config.num_key_value_heads
    group = (share + 2) * size
    starts = [group * head for head in range(config.num_key_value_heads)]
    spans = {
        "q_proj": [(start, start + share * size) for start in starts],
        "k_proj": [(start + share * size, start + (share + 1) * size) for start in starts],
        "v_proj": [(start + (share + 1) * size, start + group) for start in starts],
    }
    _split(_LAYER + r"attention\.wqkv\.(weight|bias)", "self_attn", spans, tensors, made, used)
    return made, used


def _derive_phi3(tensors: Mapping[str, SourceTensor], config: LlamaConfig) -> tuple[dict[str, Part], list[str]]:
    """`qkv_proj` holds q, k, v one after the other, `gate_up_proj` gate and up."""
    made: dict[str, Part] = {}
    used: list[str] = []
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    inner = config.intermediate_size
    qkv = {"q_proj": [(0, q)], "k_proj": [(q, q + kv)], "v_proj": [(q + kv, q + 2 * kv)]}
    _split(_LAYER + r"self_attn\.qkv_proj\.(weight)", "self_attn", qkv, tensors, made, used)
    gate_up = {"gate_proj": [(0, inner)], "up_proj": [(inner, 2 * inner)]}
    _split(_LAYER + r"mlp\.gate_up_proj\.(weight)", "mlp", gate_up, tensors, made, used)
    return made, used


def _derive_qwen2(tensors: Mapping[str, SourceTensor], config: LlamaConfig) -> tuple[dict[str, Part], list[str]]:
    """A Llama with attention biases has one on o_proj, too; there it is zero."""
    names = (f"model.layers.{i}.self_attn.o_proj.bias" for i in range(config.num_hidden_layers))
    return {name: Zeros((config.hidden_size,)) for name in names if name not in tensors}, []


def _split(
    pattern: str,
    block: str,
    spans: Mapping[str, list[Span]],
    tensors: Mapping[str, SourceTensor],
    made: dict[str, Part],
    used: list[str],
) -> None:
    """Cut every tensor that matches (layer, "weight" or "bias") into those that `spans` names."""
    rows = max(last for each in spans.values() for _, last in each)
    for name, tensor in tensors.items():
        match = re.fullmatch(pattern, name)
        if not match:
            continue
        if not tensor.shape or tensor.shape[0] != rows:
            raise ConvertError(f"tensor {name}: config.json makes it {rows} rows, its shape is {list(tensor.shape)}")
        for part, where in spans.items():
            made[f"{match[1]}{block}.{part}.{match[2]}"] = Rows(tensor, tuple(where))
        used.append(name)


# -- the list --------------------------------------------------------------------------------------------------------

SIBLINGS: dict[str, Sibling] = {
    "mistral": Sibling(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": Sibling(
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None},
        _qwen2,
        _derive_qwen2,
        tokenizer_as_it_is=True,
    ),
    "phi3": Sibling(
        "Phi3ForCausalLM",
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 32000,
        },
        _phi3,
        _derive_phi3,
        tokenizer_as_it_is=True,
    ),
    "Yi": Sibling(
        "YiForCausalLM",
        {"num_key_value_heads": 4, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 5e6},
        derive=_derive_yi,
    ),
    "internlm": Sibling("InternLMForCausalLM", {"bias": True}, _internlm),
    "internlm2": Sibling(
        "InternLM2ForCausalLM", {"bias": True}, _internlm2, _derive_internlm2, tokenizer_as_it_is=True
    ),
    "internlm3": Sibling(
        "InternLM3ForCausalLM",
        {"num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "head_dim": 128},
        _internlm3,
        aliases=["LlamaForCausalLM"],  # transformers runs it as a Llama, and saves that name
        tokenizer_as_it_is=True,
    ),
}
"""model_type -> what to do. SmolLM2, TinyLlama, Code Llama, Vicuna and today's Yi say "llama" themselves."""

_QK_NORM = "it normalizes queries and keys"
_EXPERTS = "it is a mixture of experts"
_VISION = "it sees images; only text models are supported"
_SCALES = "it scales embeddings, attention or residuals by factors of its own"

REASONS: dict[str, str] = {
    "mixtral": _EXPERTS,
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "deepseek_v2", "deepseek_v3"), _EXPERTS
    ),
    **dict.fromkeys(("llama4", "llama4_text", "gpt_oss", "dbrx"), _EXPERTS),
    **dict.fromkeys(("mllama", "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "internvl", "mistral3"), _VISION),
    **dict.fromkeys(("qwen3", "olmo2", "olmo3", "exaone4"), _QK_NORM),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "its norms and embeddings are scaled otherwise"),
    **dict.fromkeys(("granite", "minicpm", "minicpm3"), _SCALES),
    **dict.fromkeys(("cohere", "cohere2", "phi", "gpt_neox", "gptj", "falcon"), "attention and MLP run side by side"),
    **dict.fromkeys(("gpt2", "opt", "bloom", "mpt"), "it has no rotary embedding"),
    **dict.fromkeys(("mamba", "mamba2", "rwkv", "jamba", "recurrent_gemma"), "it is not an attention model"),
    **dict.fromkeys(("olmo", "stablelm", "starcoder2", "nemotron", "persimmon"), "its norm is not Llama's"),
    **dict.fromkeys(("glm", "glm4", "chatglm"), "it rotates interleaved pairs"),
    "smollm3": "some of its layers have no rotary embedding",
    "ministral": "some of its layers have a sliding window",
    "arcee": "its MLP is not gated",
    "baichuan": "its 13B has no rotary embedding and its second version normalizes lm_head; nothing tells them apart",
    "diffllama": "its attention is a difference of two",
}
"""model_type -> why it is not a Llama, of those that people try."""


def to_llama(raw: Mapping[str, Any]) -> Raw:
    """A parsed config.json as a Llama's own; ConfigError names an architecture that computes something else."""
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if not isinstance(model_type, str) or model_type == "llama":
        return dict(raw)
    sibling = SIBLINGS.get(model_type)
    if sibling is None:
        why = f": {REASONS[model_type]}" if model_type in REASONS else ""
        raise _refuse("model_type", f"{show(model_type)} is not supported{why} (llama, {', '.join(SIBLINGS)} are)")
    if architectures and architectures not in ([sibling.architecture], sibling.aliases):
        found = architectures[0] if isinstance(architectures, list) else architectures
        raise _refuse("architectures", f"{show(found)} is not supported ({sibling.architecture} is)")
    result = {**sibling.defaults, **raw}
    sibling.translate(result)
    return {**result, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def as_llama_files(files: Mapping[str, bytes], model_type: object) -> dict[str, bytes]:
    """The tokenizer's files, so that they mean for a Llama what they mean for `model_type`."""
    sibling = _sibling(model_type)
    if sibling is None or not sibling.tokenizer_as_it_is or "tokenizer.json" not in files:
        return dict(files)
    return edit_json(files, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def edit_json(files: Mapping[str, bytes], name: str, **changes: Any) -> dict[str, bytes]:
    """`files` with these keys of a JSON object set; the file is made if there is none."""
    value = parse_json_object(name, files[name]) if name in files else {}
    return {**files, name: (json.dumps({**value, **changes}, indent=2, ensure_ascii=False) + "\n").encode()}


def model_type_of(folder: Path) -> object:
    """`model_type` in the folder's config.json, as it stands there."""
    return read_raw_config(folder).get("model_type")


def read_raw_config(folder: Path) -> dict[str, Any]:
    """config.json verbatim."""
    try:
        return parse_object(read_small(folder / CONFIG_FILE, MAX_CONFIG_BYTES), CONFIG_FILE, 0)
    except FormatError as error:
        raise ConvertError(str(error)) from None


def open_checkpoint(folder: Path, config: LlamaConfig, further: Sequence[Derive] = ()) -> DerivedCheckpoint:
    """The tensors in `folder` under a Llama's names and in its shapes; `further` steps are applied to those."""
    sibling = _sibling(model_type_of(folder))
    derive = None if sibling is None else sibling.derive
    steps: list[Derive] = [] if derive is None else [lambda tensors: derive(tensors, config)]
    return DerivedCheckpoint(folder, [*steps, *further])


def _sibling(model_type: object) -> Sibling | None:
    return SIBLINGS.get(model_type) if isinstance(model_type, str) else None
