"""Config keys: what is honoured, what is known to be harmless, what is refused, and that nothing else can happen."""

import json
import math
import random

import pytest

from checkpoints import DEFAULTS
from edgellama.config import MAX_SIZE, LlamaConfig, RopeConfig
from edgellama.config_keys import HARMLESS, NEUTRAL, ROPE_KEYS
from edgellama.config_reader import show
from edgellama.errors import ConfigError

MINIMAL = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2] * 8}


def read(**keys) -> LlamaConfig:
    return LlamaConfig.from_dict({**MINIMAL, **keys})


def refusal(raw) -> str:
    with pytest.raises(ConfigError) as info:
        LlamaConfig.from_dict(raw)
    message = str(info.value)
    assert "\n" not in message
    assert len(message) < 250
    return message


def test_defaults_are_transformers():
    config = read()
    assert config.num_key_value_heads == 4
    assert config.head_dim == 16
    assert config.hidden_act == "silu"
    assert config.max_position_embeddings == 2048
    assert config.rms_norm_eps == 1e-6
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)
    assert config.rope == RopeConfig(rope_type="default", rope_theta=10000.0)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), None)


def test_null_reads_as_absent():
    nullable = [
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
    ]
    nullable += [
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "rope_scaling",
        "rope_parameters",
        "pretraining_tp",
    ]
    nullable += ["sliding_window", "layer_types", "quantization_config", "architectures", "some_future_key"]
    assert read(**dict.fromkeys(nullable)) == read()


def test_every_honoured_key():
    config = read(
        num_key_value_heads=2,
        head_dim=24,
        hidden_act="relu",
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_theta=5e5,
        bos_token_id=7,
        eos_token_id=[8, 9, 8],
        pad_token_id=0,
    )
    assert (config.num_key_value_heads, config.head_dim, config.hidden_act) == (2, 24, "relu")
    assert (config.max_position_embeddings, config.rms_norm_eps) == (4096, 1e-5)
    assert config.tie_word_embeddings and config.attention_bias and config.mlp_bias
    assert config.rope.rope_theta == 5e5
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (7, (8, 9), 0)
    assert config.ignored == {}


def test_raw_is_kept_verbatim_and_apart():
    raw = {**MINIMAL, "torch_dtype": "float16"}
    config = LlamaConfig.from_dict(raw)
    assert config.raw == raw
    raw["vocab_size"] = 5
    assert config.raw["vocab_size"] == 100
    json.dumps(config.raw)
    hash(config)


def test_ignored_keys_are_named_with_a_reason():
    config = read(torch_dtype="bfloat16", use_cache=True, some_future_key=None, use_sliding_window=False)
    assert set(config.ignored) == {"torch_dtype", "use_cache", "some_future_key", "use_sliding_window"}
    assert all(config.ignored.values())


@pytest.mark.parametrize("key", HARMLESS)
def test_harmless_keys_change_nothing_whatever_their_value(key):
    for value in ["x", 3, True, [1], {"a": 1}]:
        assert read(**{key: value}) == read()


@pytest.mark.parametrize("key", NEUTRAL)
def test_keys_with_an_effect_are_refused_by_name(key):
    neutral, _ = NEUTRAL[key]
    for value in [None, *neutral]:
        assert read(**{key: value}) == read()
    for value in ["x", 3, {"a": 1}, not neutral[0] if neutral and isinstance(neutral[0], bool) else 0.5]:
        assert f"config.json: {key}: " in refusal({**MINIMAL, key: value})


def test_json_true_is_not_one():
    assert "partial_rotary_factor" in refusal({**MINIMAL, "partial_rotary_factor": True})
    assert read(partial_rotary_factor=1) == read()


@pytest.mark.parametrize("value", [True, False, 0, "x", [], {}])
def test_unknown_keys_are_refused_by_name(value):
    assert "'logit_scale'" in refusal({**MINIMAL, "logit_scale": value})
    assert "rope_scaling.'beta_medium'" in refusal(
        {**MINIMAL, "rope_scaling": {"type": "default", "beta_medium": value}}
    )


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_sizes_are_required_and_checked(key):
    missing = dict(MINIMAL)
    del missing[key]
    assert f"{key}: is missing" in refusal(missing)
    assert f"{key}: is missing" in refusal({**MINIMAL, key: None})
    for bad in [0, -1, MAX_SIZE + 1, 2**70, 10**5000, 64.0, "64", True, [64], {}, math.nan, math.inf]:
        assert f"{key}: must be a whole number" in refusal({**MINIMAL, key: bad})


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"model_type": "mistral"}, "model_type: 'mistral' is not supported"),
        ({"model_type": ["llama"]}, "model_type: a list"),
        ({"architectures": ["MistralForCausalLM"]}, "architectures: 'MistralForCausalLM' is not supported"),
        ({"architectures": ["LlamaForCausalLM", "X"]}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": [{}]}, "architectures"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide"),
        ({"num_attention_heads": 7}, "num_attention_heads: 7 does not divide hidden_size, 64"),
        ({"head_dim": 15}, "head_dim: 15 is odd"),
        ({"head_dim": 2**23}, "head_dim"),
        ({"hidden_size": 36}, "head_dim: 9 is odd"),
        ({"hidden_act": "swiglu"}, "hidden_act: 'swiglu' is not supported (silu, gelu, gelu_pytorch_tanh, relu are)"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers: must be a whole number from 1 to 4096"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: must be true or false, got 1"),
        ({"sliding_window": 1024}, "sliding_window: 1024"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: the checkpoint is already quantized"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [1, [2]]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"eos_token_id": 2**31}, "eos_token_id"),
        ({"eos_token_id": list(range(2000))}, "eos_token_id"),
        ({"bos_token_id": [1]}, "bos_token_id"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"rope_scaling": []}, "rope_scaling: must be an object or null"),
        ({"rope_scaling": "linear"}, "rope_scaling: must be an object or null"),
    ],
)
def test_refusals(keys, words):
    assert words in refusal({**MINIMAL, **keys})


def test_not_a_config():
    assert "must be an object" in refusal([1])
    assert "must be an object" in refusal(None)
    assert "model_type: is missing" in refusal({})
    assert "hidden_size: is missing" in refusal({"architectures": ["LlamaForCausalLM"]})


def test_attention_patterns_without_effect():
    assert read(sliding_window=2048) == read()
    assert read(layer_types=["full_attention"] * 2) == read()


def test_token_ids():
    assert read(eos_token_id=None).eos_token_ids == ()
    assert read(eos_token_id=[]).eos_token_ids == ()
    assert read(eos_token_id=[128001, 128008]).eos_token_ids == (128001, 128008)
    assert read(pad_token_id=-1).pad_token_id is None
    assert read(bos_token_id=None).bos_token_id is None


# --- RoPE -----------------------------------------------------------------------------------------------------------


def test_old_and_new_spelling_are_one():
    old = read(rope_theta=5e5, rope_scaling=LLAMA3)
    older = read(rope_theta=5e5, rope_scaling={**LLAMA3, "type": "llama3"})
    new = read(rope_parameters={**LLAMA3, "rope_theta": 5e5})
    both = read(rope_theta=5e5, rope_scaling=LLAMA3, rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert old == older == new == both
    assert new.rope == RopeConfig("llama3", 5e5, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert read(rope_scaling={"type": "linear", "factor": 2}) == read(rope_scaling={"rope_type": "linear", "factor": 2})
    assert read(rope_parameters={"rope_theta": 7e4}).rope == RopeConfig("default", 7e4)
    assert read(rope_parameters={}, rope_scaling={}).rope == RopeConfig()


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "rope_scaling.type: 'linear' contradicts"),
        (
            {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}},
            "rope_parameters.rope_theta: 10000.0 contradicts",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "linear", "factor": 3}},
            "rope_scaling: contradicts rope_parameters",
        ),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096},
            "rope_scaling.original_max_position_embeddings: 8192 contradicts",
        ),
        ({"rope_scaling": {"type": "su"}}, "rope_scaling.type: 'su' is not supported (default, linear, dynamic, yarn"),
        ({"rope_scaling": {"rope_type": {}}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.'full_attention'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": math.nan}}, "rope_scaling.factor"),
        (
            {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2}},
            "rope_scaling.rope_type: 'dynamic' divides",
        ),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "rope_scaling.high_freq_factor: 1.0 must be above"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "rope_scaling.low_freq_factor: is missing"),
        (
            {"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 7}},
            "short_factor: must be a list of 8 numbers, got a list of 7",
        ),
        ({"rope_scaling": {**LONGROPE, "long_factor": None}}, "long_factor: must be a list of 8 numbers, got null"),
        ({"rope_scaling": {**LONGROPE, "long_factor": [1.0] * 7 + [0]}}, "long_factor[7]: must be a number"),
        ({"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 1}}, "above 1"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "rope_theta": 1.0}},
            "rope_scaling.rope_theta: 1.0 does not go",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": 1}}, "rope_scaling.truncate"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": -1}}, "rope_scaling.beta_fast"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "attn_factor": 0.5}}, "rope_scaling.attn_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_rope_refusals(keys, words):
    assert words in refusal({**MINIMAL, **keys})


def test_rope_defaults_follow_transformers():
    yarn = read(max_position_embeddings=4096, rope_scaling={"type": "yarn", "factor": 2.0}).rope
    assert yarn == RopeConfig("yarn", 10000.0, 2.0, 4096)
    assert read(rope_scaling={"type": "yarn", "factor": 2.0, "beta_fast": 0, "beta_slow": None}).rope.beta_fast == 32.0
    assert read(rope_scaling={"type": "yarn", "factor": 2.0, "truncate": None}).rope.truncate is False
    assert read(rope_scaling={"type": "yarn", "original_max_position_embeddings": 512}).rope.factor == 4.0
    assert read(rope_scaling=LONGROPE, original_max_position_embeddings=512).rope.factor == 4.0
    assert read(rope_scaling=LONGROPE).rope.short_factor == (1.0,) * 8


def test_parameters_of_other_rope_types_are_named_as_ignored():
    config = read(
        rope_scaling={"type": "linear", "factor": 2.0, "original_max_position_embeddings": 9, "finetuned": True},
        original_max_position_embeddings=4096,
    )
    assert config.rope == RopeConfig("linear", factor=2.0)
    assert set(config.ignored) == {
        "rope_scaling.original_max_position_embeddings",
        "rope_scaling.finetuned",
        "original_max_position_embeddings",
    }


# --- hostile input --------------------------------------------------------------------------------------------------


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE = [
    *[None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, -(2**63), 2**64, 10**400, 10**5000, -(10**5000)],
    *[0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, math.nan, math.inf, -math.inf],
    *["", "x", "llama", "yarn", "longrope", "1", "\n\x1b[31m", "\ud800", "x" * 10**6],
    *[[], [1], [None], [math.nan] * 8, [10**400] * 8, ["\ud800"], [1.0] * 8, [[]] * 2, nested(100_000)],
    *[{}, {"": 1}, {"type": "yarn"}, {"rope_type": "dynamic", "factor": 1e18}, {"\n": {}}, {1: 2}, {"rope_theta": 2}],
]


def test_hostile_values_give_a_config_or_a_one_line_config_error():
    """Every key with every value alone, then 3,000 random mixtures."""
    keys = [*DEFAULTS, *NEUTRAL, "rope_scaling", "rope_parameters", "sliding_window", "head_dim", "\n", "layer_types"]
    rope_keys = [*ROPE_KEYS, "type", "rope_type", "rope_theta", "partial_rotary_factor", "mrope_section"]
    chance = random.Random(0)
    raws = [{**MINIMAL, key: value} for key in keys for value in HOSTILE]
    for rope_type in ("default", "linear", "dynamic", "yarn", "longrope", "llama3"):
        base = {**LLAMA3, **LONGROPE, "rope_type": rope_type}
        raws += [{**MINIMAL, "rope_scaling": {**base, key: value}} for key in rope_keys for value in HOSTILE]
    for _ in range(3000):
        raw = {**MINIMAL, **{chance.choice(keys): chance.choice(HOSTILE) for _ in range(chance.randint(1, 4))}}
        if chance.random() < 0.5:
            raw["rope_parameters"] = {chance.choice(rope_keys): chance.choice(HOSTILE) for _ in range(3)}
        raws.append(raw)
    outcomes = {"read": 0, "refused": 0}
    for raw in raws:
        try:
            config = LlamaConfig.from_dict(raw)
        except ConfigError as error:
            assert "\n" not in str(error)
            assert str(error).isascii()
            assert len(str(error)) < 300
            outcomes["refused"] += 1
        else:
            assert 1 <= config.num_attention_heads * config.head_dim <= MAX_SIZE
            assert math.isfinite(config.rope.factor * config.rope.rope_theta)
            outcomes["read"] += 1
    assert min(outcomes.values()) > 300


def test_show_is_short_whatever_it_shows():
    for value in [*HOSTILE, object()]:
        text = show(value)
        assert text.isascii()
        assert "\n" not in text
        assert len(text) <= 70


@pytest.mark.torch
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"num_key_value_heads": 2, "head_dim": 24, "rope_theta": 5e5, "eos_token_id": [2, 3], "bos_token_id": None},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "max_position_embeddings": 131072},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 16}, "tie_word_embeddings": True},
        {"rope_parameters": {**LONGROPE, "rope_theta": 1e6, "original_max_position_embeddings": 64}},
    ],
)
def test_what_transformers_saves_reads_the_same(keys, tmp_path):
    """Our reading of a config.json, of transformers' rewriting of it, and transformers' own attributes agree."""
    from transformers import LlamaConfig as TransformersConfig

    theirs = TransformersConfig(**json.loads(json.dumps({**MINIMAL, **keys})))
    theirs.architectures = ["LlamaForCausalLM"]
    theirs.save_pretrained(tmp_path)
    rewritten = LlamaConfig.from_dict(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")))
    ours = read(**keys)
    assert rewritten == ours
    same = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"]
    same += ["num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"]
    same += ["attention_bias", "mlp_bias", "bos_token_id", "pad_token_id"]
    assert [getattr(ours, name) for name in same] == [getattr(theirs, name) for name in same]
    for name, value in theirs.rope_parameters.items():
        ours_value = getattr(ours.rope, name if name != "type" else "rope_type")
        assert ours_value == (tuple(value) if isinstance(value, list) else value), name
