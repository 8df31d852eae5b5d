"""RoPE frequencies against stored golden values and, under the marker `torch`, against transformers itself."""

import json
from pathlib import Path

import numpy as np
import pytest

from edgellama.config import LlamaConfig
from edgellama.rope import cos_sin, inverse_frequencies

GOLDEN = Path(__file__).parent / "data" / "golden" / "rope.json"

# Powers are correctly rounded here and within a unit in the last place in torch; a handful of float32 steps follow.
TOLERANCE = 4 * float(np.finfo(np.float32).eps)

BASE = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 192,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.03 * i for i in range(16)],
    "long_factor": [1.0 + 0.5 * i for i in range(16)],
}

# name -> (config keys, sequence length)
CASES = {
    "default": ({"rope_theta": 10000.0}, 50),
    "default theta 5e5 head_dim 128": ({"rope_theta": 500000, "head_dim": 128}, 50),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 50),
    "dynamic below": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 64),
    "dynamic above": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 65),
    "dynamic far": ({"rope_parameters": {"rope_type": "dynamic", "factor": 3.7, "rope_theta": 1e6}}, 1000),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}, 50),
    "yarn without original": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 50),
    "yarn without factor": (
        {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}},
        50,
    ),
    "yarn all": (
        {
            "head_dim": 96,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 24,
                "beta_slow": 2.0,
                "mscale": 0.707,
                "mscale_all_dim": 1.0,
                "truncate": False,
            },
        },
        50,
    ),
    "yarn attention_factor": (
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
                "attention_factor": 1.25,
                "beta_fast": 0,
                "truncate": None,
            }
        },
        50,
    ),
    "longrope short": ({"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 32}}, 32),
    "longrope long": ({"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 32}}, 33),
    "longrope factor": (
        {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 32, "factor": 16.0}},
        33,
    ),
    "longrope attention_factor": ({"rope_scaling": {**LONGROPE, "attention_factor": 1.5}}, 65),
    "longrope top-level original": (
        {"rope_scaling": {**LONGROPE}, "original_max_position_embeddings": 32},
        33,
    ),
    "llama3": (
        {"rope_theta": 500000.0, "rope_scaling": {**LLAMA31, "original_max_position_embeddings": 32}},
        50,
    ),
    "llama3 of 3.2": (
        {
            "rope_parameters": {
                **LLAMA31,
                "factor": 32.0,
                "rope_theta": 500000.0,
                "original_max_position_embeddings": 8192,
            },
            "head_dim": 64,
            "max_position_embeddings": 131072,
        },
        50,
    ),
}


def read(name: str) -> tuple[LlamaConfig, int]:
    keys, seq_len = CASES[name]
    return LlamaConfig.from_dict({**BASE, **keys}), seq_len


def transformers_frequencies(name: str) -> tuple[np.ndarray, float]:
    """What transformers' LlamaRotaryEmbedding uses in a forward pass over `seq_len` positions."""
    import torch
    from transformers import LlamaConfig as TransformersConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    keys, seq_len = CASES[name]
    config = TransformersConfig(**json.loads(json.dumps({**BASE, **keys})))
    if "original_max_position_embeddings" in keys:  # transformers sees a top-level one on its second look only
        config.standardize_rope_params()
    rotary = LlamaRotaryEmbedding(config)
    rotary(torch.zeros(1), torch.arange(seq_len)[None])
    return rotary.inv_freq.numpy(), float(rotary.attention_scaling)


@pytest.mark.parametrize("name", CASES)
def test_frequencies_equal_golden(name):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    frequencies, scaling = inverse_frequencies(*read(name))
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, np.asarray(golden["inv_freq"], np.float32), rtol=TOLERANCE)
    assert scaling == pytest.approx(golden["attention_scaling"], rel=TOLERANCE)


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_frequencies_equal_transformers(name):
    expected, expected_scaling = transformers_frequencies(name)
    frequencies, scaling = inverse_frequencies(*read(name))
    np.testing.assert_allclose(frequencies, expected, rtol=TOLERANCE)
    assert scaling == pytest.approx(expected_scaling, rel=TOLERANCE)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["default", "yarn all", "llama3"])
def test_cos_sin_equal_transformers(name):
    import torch
    from transformers import LlamaConfig as TransformersConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    keys, _ = CASES[name]
    positions = np.array([0, 1, 2, 63, 1000])
    rotary = LlamaRotaryEmbedding(TransformersConfig(**json.loads(json.dumps({**BASE, **keys}))))
    expected = rotary(torch.zeros(1), torch.from_numpy(positions)[None])
    config, seq_len = read(name)
    half = config.head_dim // 2
    # The angle's own rounding, 1000 radians * eps, dominates.
    for ours, theirs in zip(cos_sin(config, positions, seq_len), expected, strict=True):
        np.testing.assert_allclose(ours, theirs[0, :, :half].numpy(), atol=2000 * np.finfo(np.float32).eps)


def test_types_that_depend_on_length_switch_just_past_it():
    for below, above in [("dynamic below", "dynamic above"), ("longrope short", "longrope long")]:
        assert not np.array_equal(inverse_frequencies(*read(below))[0], inverse_frequencies(*read(above))[0])
    default, _ = read("default")
    dynamic, max_positions = read("dynamic below")
    np.testing.assert_array_equal(
        inverse_frequencies(dynamic, max_positions)[0], inverse_frequencies(default, max_positions)[0]
    )


def test_cos_sin_shapes_and_scaling():
    config, seq_len = read("longrope attention_factor")
    cos, sin = cos_sin(config, np.array([0, 3, 64]), seq_len)
    assert cos.shape == sin.shape == (3, 16)
    assert cos.dtype == sin.dtype == np.float32
    np.testing.assert_array_equal(cos[0], np.float32(1.5))
    np.testing.assert_array_equal(sin[0], np.float32(0))
