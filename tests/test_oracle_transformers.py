"""The forward pass against transformers itself, on checkpoints that transformers saved: one call and token by token."""

import json

import numpy as np
import pytest

from closeness import (
    MAX_KL,
    MIN_GREEDY_AGREEMENT,
    ORACLE_TOLERANCE,
    all_logits,
    greedy_agreement,
    kl_divergence,
    relative_error,
    stepwise_logits,
)
from edgellama.backends.cpu import CpuBackend
from edgellama.backends.reference import ReferenceBackend

BASE = {
    "vocab_size": 203,
    "hidden_size": 160,
    "intermediate_size": 272,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 64,
    "initializer_range": 0.08,  # 1 / sqrt(160): the default of 0.02 would leave tiny models with flat logits
}
ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1 + i / 9 for i in range(16)],
        "long_factor": [1 + i for i in range(16)],
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
# name -> (config, dtype saved, shards, lm_head_bits)
CASES = {
    "mha float32": ({}, "float32", 1, 8),
    "gqa bfloat16": ({"num_attention_heads": 10, "num_key_value_heads": 2}, "bfloat16", 1, 8),
    "mqa float16 tied three shards": ({"num_key_value_heads": 1, "tie_word_embeddings": True}, "float16", 3, 8),
    "biases head_dim gelu": (
        {"attention_bias": True, "mlp_bias": True, "head_dim": 48, "hidden_act": "gelu"},
        "float16",
        1,
        16,
    ),
    "hidden 576": (
        {"hidden_size": 576, "intermediate_size": 640, "num_attention_heads": 9, "num_key_value_heads": 3},
        "bfloat16",
        3,
        8,
    ),
    "hidden 288": ({"hidden_size": 288, "num_attention_heads": 6, "num_key_value_heads": 6}, "float32", 1, 4),
    **{
        name: ({"rope_parameters": {**rope, "rope_theta": 10000.0}, "max_position_embeddings": 24}, "float32", 1, 8)
        for name, rope in ROPE.items()
    },
}


def save_random_llama(directory, config: dict, dtype: str, shards: int) -> None:
    """A LlamaForCausalLM with seeded weights, biases and norms that are not ones, written by `save_pretrained`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(len(str(config)))
    model = LlamaForCausalLM(LlamaConfig(**json.loads(json.dumps({**BASE, **config}))))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith(".bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
        model.lm_head.weight.mul_(2.5)
    model.to(getattr(torch, dtype))
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=total // shards + total // 20)
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) == shards or shards == 3 <= len(files), files


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_reference_equals_transformers(name, tmp_path):
    import torch
    from transformers import LlamaForCausalLM

    from edgellama.format import open_model
    from edgellama_convert import convert, export_hf

    torch.set_num_threads(1)
    config, dtype, shards, lm_head_bits = CASES[name]
    save_random_llama(tmp_path / "saved", config, dtype, shards)
    convert(tmp_path / "saved", tmp_path / "model.edgellama", lm_head_bits=lm_head_bits, method="search")
    export_hf(tmp_path / "model.edgellama", tmp_path / "exported", dtype="float32")
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "exported", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = np.arange(36) * 37 % BASE["vocab_size"]
    with open_model(tmp_path / "model.edgellama") as model_file, torch.no_grad():
        backend = ReferenceBackend(model_file, n_ctx=64)
        expected = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
        assert relative_error(all_logits(backend, tokens), expected) < ORACLE_TOLERANCE

        # Token by token with transformers' own cache; this passes the original length in mid-sequence.
        output = model(torch.from_numpy(tokens[:10])[None], use_cache=True)
        steps = [output.logits[0].numpy()]
        for token in tokens[10:]:
            output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
            steps.append(output.logits[0].numpy())
        stepwise = stepwise_logits(backend, tokens, prefill=10)
        assert relative_error(stepwise, np.concatenate(steps)) < ORACLE_TOLERANCE


TEXT = """The capital of France is Paris. It lies on the river Seine, and about two million people live there. Many of
them take the train to work; others go by bicycle. In winter it rains often, but in spring the trees along the streets
are green, and the cafes put their tables outside. What would you like to see first: the museum, or the old market?"""


@pytest.fixture(scope="module")
def minimind(minimind_dir, tmp_path_factory):
    """(the converted file, 100 or so token ids of English text)"""
    from tokenizers import Tokenizer

    from edgellama_convert import convert

    path = tmp_path_factory.mktemp("minimind") / "minimind2-small.edgellama"
    convert(minimind_dir, path, method="search")
    tokens = np.array(Tokenizer.from_file(str(minimind_dir / "tokenizer.json")).encode(TEXT).ids)
    assert len(tokens) > 60
    return path, tokens


@pytest.mark.models
@pytest.mark.torch
def test_reference_equals_transformers_on_a_real_model(minimind, tmp_path):
    import torch
    from transformers import LlamaForCausalLM

    from edgellama.format import open_model
    from edgellama_convert import export_hf

    torch.set_num_threads(1)
    path, tokens = minimind
    export_hf(path, tmp_path / "exported", dtype="float32")
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "exported", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with open_model(path) as model_file, torch.no_grad():
        expected = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
        logits = all_logits(ReferenceBackend(model_file, n_ctx=len(tokens)), tokens)
    assert relative_error(logits, expected) < ORACLE_TOLERANCE


@pytest.mark.models
def test_cpu_is_close_to_reference_on_a_real_model(minimind):
    from edgellama.format import open_model

    path, tokens = minimind
    with open_model(path) as model_file:
        expected = all_logits(ReferenceBackend(model_file, n_ctx=len(tokens)), tokens)
        backend = CpuBackend(model_file, n_ctx=len(tokens))
        logits = stepwise_logits(backend, tokens, prefill=len(tokens) // 2)
        backend.close()
    assert kl_divergence(expected, logits) <= MAX_KL
    assert greedy_agreement(expected, logits) >= MIN_GREEDY_AGREEMENT
