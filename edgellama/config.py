"""A Llama model's config: Hugging Face's `config.json`, read key by key.

Knows: what every key means to transformers (5.23), its defaults, and which values this project computes. Each key is
honoured here, listed in `config_keys.py` as harmless with its reason, or refused by name. The dict may come from a
hostile file: whatever it holds, the outcome is a `LlamaConfig` with every value in range or a one-line `ConfigError`.
Does not know: files, tensors, or how RoPE frequencies follow from their parameters (`rope.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgellama.config_keys import HARMLESS, NEUTRAL, ROPE_HARMLESS, ROPE_KEYS, ROPE_NEUTRAL, ROPE_TYPE_KEYS
from edgellama.config_reader import ConfigKeys, show
from edgellama.errors import ConfigError

ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM")  # the second is its first spelling, of early 2023
CLASSIFIER = "LlamaForSequenceClassification"
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")

MAX_SIZE = 2**24  # of any width; also of heads * head_dim
MAX_LAYERS = 4096
MAX_POSITIONS = 2**30
MAX_LABELS = 2**16
# RoPE parameters are kept where every intermediate value stays finite in float32.
MAX_NUMBER = 1e18
MIN_POSITIVE = 1e-6
DEFAULT_ROPE_THETA = 10000.0


@dataclass(frozen=True)
class RopeConfig:
    """The parameters of one RoPE type, transformers' defaults filled in; those a type does not have stay as below.

    `attention_factor` None means that the type's own formula gives it.
    """

    rope_type: str = "default"
    rope_theta: float = DEFAULT_ROPE_THETA
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class LlamaConfig:
    """Every config value that the forward pass or generation needs, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope: RopeConfig
    bos_token_id: int | None  # ids may lie outside the vocabulary: published configs have such
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    id2label: tuple[str, ...]
    """A classifier's labels, by their ids; empty for a model that writes text."""
    problem_type: str | None
    """A classifier's: one of `PROBLEM_TYPES`, or None for what the labels of a call suggest."""
    raw: Mapping[str, Any] = field(repr=False, compare=False)
    """config.json as read, verbatim."""
    ignored: Mapping[str, str] = field(repr=False, compare=False)
    """Keys of `raw` that have no effect -> why."""

    @property
    def is_classifier(self) -> bool:
        """Whether this is a LlamaForSequenceClassification: its output is a score for each label."""
        return bool(self.id2label)

    @property
    def architecture(self) -> str:
        """Hugging Face's name of the model's class."""
        return CLASSIFIER if self.is_classifier else ARCHITECTURES[0]

    @property
    def head(self) -> str:
        """The name, without suffix, of the matrix behind the last norm: the output layer."""
        if self.is_classifier:
            return "score"
        return "model.embed_tokens" if self.tie_word_embeddings else "lm_head"

    @property
    def n_outputs(self) -> int:
        """Rows of that matrix: the vocabulary, or a classifier's labels."""
        return len(self.id2label) or self.vocab_size

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> LlamaConfig:
        """Read a parsed `config.json`; ConfigError names the first key that is missing, wrong or not supported.

        A key that is absent or null has transformers' default, but the five sizes that every model has are required.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"config.json: must be an object, got {show(raw)}")
        keys = ConfigKeys(raw)
        id2label, problem_type = _labels(keys) if _check_architecture(keys) == CLASSIFIER else ((), None)
        hidden_size = keys.integer("hidden_size", 1, MAX_SIZE)
        num_hidden_layers = keys.integer("num_hidden_layers", 1, MAX_LAYERS)
        heads, kv_heads, head_dim = _heads(keys, hidden_size)
        max_positions = keys.integer("max_position_embeddings", 1, MAX_POSITIONS, default=2048)
        _check_attention_pattern(keys, num_hidden_layers, max_positions)
        config = cls(
            vocab_size=keys.integer("vocab_size", 1, MAX_SIZE),
            hidden_size=hidden_size,
            intermediate_size=keys.integer("intermediate_size", 1, MAX_SIZE),
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            hidden_act=keys.choice("hidden_act", ACTIVATIONS, default="silu"),
            max_position_embeddings=max_positions,
            rms_norm_eps=keys.number("rms_norm_eps", 1e-30, 1.0, default=1e-6),
            tie_word_embeddings=_is_tied(keys, bool(id2label)),
            attention_bias=keys.flag("attention_bias", default=False),
            mlp_bias=keys.flag("mlp_bias", default=False),
            rope=_rope(keys, head_dim, max_positions),
            bos_token_id=keys.token_id("bos_token_id", default=1),
            eos_token_ids=keys.token_ids("eos_token_id", default=2),
            pad_token_id=keys.token_id("pad_token_id", default=None),
            id2label=id2label,
            problem_type=problem_type,
            raw=dict(raw),
            ignored=keys.ignored,
        )
        keys.account_for_the_rest(HARMLESS, NEUTRAL)
        return config


def _check_architecture(keys: ConfigKeys) -> str:
    """`LlamaForCausalLM` or `LlamaForSequenceClassification`: what merely resembles them may mean other arithmetic."""
    model_type, architectures = keys.take("model_type"), keys.take("architectures")
    if model_type is None and not architectures:
        keys.refuse("model_type", "is missing, and so is architectures: this is not a model's config")
    if model_type not in (None, "llama"):
        keys.refuse("model_type", f"{show(model_type)} is not supported (llama is)")
    if not architectures:  # transformers goes by model_type then
        return ARCHITECTURES[0]
    if not isinstance(architectures, list) or len(architectures) != 1:
        keys.refuse("architectures", f'must be ["LlamaForCausalLM"], got {show(architectures)}')
    if architectures[0] == CLASSIFIER:
        return CLASSIFIER
    if architectures[0] not in ARCHITECTURES:
        keys.refuse(
            "architectures", f"{show(architectures[0])} is not supported (LlamaForCausalLM and {CLASSIFIER} are)"
        )
    return ARCHITECTURES[0]


def _labels(keys: ConfigKeys) -> tuple[tuple[str, ...], str | None]:
    """A classifier's labels by their ids, and its problem type. Without `id2label`: LABEL_0, LABEL_1, ... as there."""
    n = keys.integer("num_labels", 1, MAX_LABELS, default=None)
    names = keys.take("id2label")
    keys.take("label2id")  # the same the other way round
    if names is None:
        labels = tuple(f"LABEL_{i}" for i in range(2 if n is None else n))
    else:
        if not isinstance(names, Mapping) or not 1 <= len(names) <= MAX_LABELS:
            keys.refuse("id2label", f"must be an object of 1 to {MAX_LABELS} labels, got {show(names)}")
        if n not in (None, len(names)):
            keys.refuse("num_labels", f"{n} contradicts id2label, which has {len(names)} labels")
        labels = tuple(names.get(str(i), "") for i in range(len(names)))
        for i, label in enumerate(labels):
            if not isinstance(label, str) or str(i) not in names:
                keys.refuse("id2label", f"must have a text for each of 0 to {len(names) - 1}; {i} has {show(label)}")
    problem_type = keys.choice("problem_type", PROBLEM_TYPES, default=None)
    if problem_type == "single_label_classification" and len(labels) == 1:
        keys.refuse("problem_type", "single_label_classification needs more than one label")
    return labels, problem_type


def _is_tied(keys: ConfigKeys, is_classifier: bool) -> bool:
    tied = keys.flag("tie_word_embeddings", default=False)
    if tied and is_classifier:
        keys.ignored["tie_word_embeddings"] = "a classifier has no output layer over the vocabulary"
    return tied and not is_classifier


def _heads(keys: ConfigKeys, hidden_size: int) -> tuple[int, int, int]:
    """(num_attention_heads, num_key_value_heads, head_dim)"""
    heads = keys.integer("num_attention_heads", 1, MAX_SIZE)
    kv_heads = keys.integer("num_key_value_heads", 1, MAX_SIZE, default=heads)
    if heads % kv_heads:
        keys.refuse("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads, {heads}")
    head_dim = keys.integer("head_dim", 1, MAX_SIZE, default=None)
    if head_dim is None:
        if hidden_size % heads:
            keys.refuse("num_attention_heads", f"{heads} does not divide hidden_size, {hidden_size}")
        head_dim = hidden_size // heads
    if head_dim % 2:
        keys.refuse("head_dim", f"{head_dim} is odd, but rotary embedding turns pairs")
    if heads * head_dim > MAX_SIZE:
        keys.refuse("head_dim", f"{head_dim} times num_attention_heads, {heads}, is more than {MAX_SIZE}")
    return heads, kv_heads, head_dim


def _check_attention_pattern(keys: ConfigKeys, num_hidden_layers: int, max_position_embeddings: int) -> None:
    """Refuse what would hide earlier positions from some layers."""
    window = keys.integer("sliding_window", 1, MAX_POSITIONS, default=None)
    if window is not None:
        if window < max_position_embeddings:
            keys.refuse("sliding_window", f"{window}: attention with a sliding window is not supported")
        keys.ignored["sliding_window"] = "is as long as the context"
    layer_types = keys.take("layer_types")
    if layer_types is not None:
        if layer_types != ["full_attention"] * num_hidden_layers:
            keys.refuse("layer_types", 'must be "full_attention" for each layer; no other kind is supported')
        keys.ignored["layer_types"] = "full attention is what a Llama has"


def _rope(keys: ConfigKeys, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """RoPE in either spelling: `rope_theta` beside `rope_scaling` (old), or all in `rope_parameters` (new)."""
    theta = keys.number("rope_theta", 1.0, MAX_NUMBER, default=None)
    original = keys.integer("original_max_position_embeddings", 1, MAX_POSITIONS, default=None)
    found = []
    for name in ("rope_scaling", "rope_parameters"):
        parameters = keys.nested(name)
        if parameters is not None:
            found.append(_rope_parameters(parameters, theta, original, head_dim, max_position_embeddings))
    if len(found) == 2 and found[0] != found[1]:
        keys.refuse("rope_scaling", "contradicts rope_parameters; remove the one that is wrong")
    rope = found[0] if found else RopeConfig(rope_theta=DEFAULT_ROPE_THETA if theta is None else theta)
    if original is not None and rope.original_max_position_embeddings is None:
        keys.ignored["original_max_position_embeddings"] = f"rope_type {rope.rope_type!r} does not use it"
    return rope


def _rope_parameters(
    keys: ConfigKeys, top_theta: float | None, top_original: int | None, head_dim: int, max_position_embeddings: int
) -> RopeConfig:
    """One dict of RoPE parameters; the `top_` values are those of the same names beside it, which must not differ."""
    old_type = keys.choice("type", ROPE_TYPE_KEYS, default=None)
    rope_type = keys.choice("rope_type", ROPE_TYPE_KEYS, default=old_type or "default")
    if old_type not in (None, rope_type):
        keys.refuse("type", f"{old_type!r} contradicts rope_type {rope_type!r}")
    theta = keys.number("rope_theta", 1.0, MAX_NUMBER, DEFAULT_ROPE_THETA if top_theta is None else top_theta)
    if top_theta not in (None, theta):
        keys.refuse("rope_theta", f"{theta} contradicts the top-level rope_theta, {top_theta}")

    def original() -> int:
        default = max_position_embeddings if top_original is None else top_original
        value = keys.integer("original_max_position_embeddings", 1, MAX_POSITIONS, default)
        if top_original not in (None, value):
            keys.refuse("original_max_position_embeddings", f"{value} contradicts the top-level {top_original}")
        return value

    def positive(key: str, **default: Any) -> Any:
        return keys.number(key, MIN_POSITIVE, MAX_NUMBER, **default)

    def at_least_zero(key: str) -> float | None:
        return keys.number(key, 0.0, MAX_NUMBER, default=None)

    own: dict[str, Any] = {}  # what this type has beyond rope_theta
    match rope_type:
        case "linear" | "dynamic":
            own["factor"] = positive("factor")
            if rope_type == "dynamic" and head_dim == 2:
                keys.refuse("rope_type", "'dynamic' divides by head_dim - 2, which is 0 here")
        case "yarn":
            if theta == 1.0:
                keys.refuse("rope_theta", "1.0 does not go with rope_type 'yarn', which divides by its logarithm")
            own["original_max_position_embeddings"] = original()
            own["factor"] = positive("factor", default=max_position_embeddings / original())
            own["attention_factor"] = positive("attention_factor", default=None)
            own["beta_fast"] = at_least_zero("beta_fast") or 32.0  # 0 is "not given" to transformers, too
            own["beta_slow"] = at_least_zero("beta_slow") or 1.0
            own["mscale"] = at_least_zero("mscale")
            own["mscale_all_dim"] = at_least_zero("mscale_all_dim")
            own["truncate"] = keys.flag("truncate", default="truncate" not in keys.raw)  # null is false, absent is true
        case "longrope":
            own["original_max_position_embeddings"] = original()
            own["factor"] = positive("factor", default=max_position_embeddings / original())
            own["attention_factor"] = positive("attention_factor", default=None)
            own["short_factor"] = keys.numbers("short_factor", head_dim // 2, MIN_POSITIVE, MAX_NUMBER)
            own["long_factor"] = keys.numbers("long_factor", head_dim // 2, MIN_POSITIVE, MAX_NUMBER)
            if own["original_max_position_embeddings"] == 1:
                keys.refuse("original_max_position_embeddings", "must be above 1: its logarithm is a divisor")
        case "llama3":
            own["original_max_position_embeddings"] = original()
            own["factor"] = positive("factor")
            own["low_freq_factor"] = positive("low_freq_factor")
            own["high_freq_factor"] = positive("high_freq_factor")
            if own["high_freq_factor"] <= own["low_freq_factor"]:
                keys.refuse("high_freq_factor", f"{own['high_freq_factor']} must be above low_freq_factor")

    unused = dict.fromkeys(ROPE_KEYS - ROPE_TYPE_KEYS[rope_type], f"rope_type {rope_type!r} does not use it")
    keys.account_for_the_rest({**ROPE_HARMLESS, **unused}, ROPE_NEUTRAL)
    return RopeConfig(rope_type=rope_type, rope_theta=theta, **own)
