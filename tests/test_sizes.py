"""The family's shapes: they convert and run, their files have the bytes that the table in the docs says."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from checkpoints import DEFAULTS, make_checkpoint, state_dict_shapes
from closeness import MAX_KL, all_logits, kl_divergence
from edgellama.backends.cpu import CpuBackend
from edgellama.backends.reference import ReferenceBackend
from edgellama.format import open_model
from edgellama.sizing import kv_bytes_per_token, memory_bytes, weight_bytes
from edgellama_convert import convert

DOCS = Path(__file__).resolve().parent.parent / "docs" / "transformers.md"


@pytest.fixture
def sizes(monkeypatch):
    monkeypatch.syspath_prepend(DOCS.parent.parent / "benchmarks")
    import sizes

    return sizes


def test_the_table_in_the_docs_is_what_the_code_computes(sizes):
    text = DOCS.read_text(encoding="utf-8")
    assert sizes.table() in text
    for name in sizes.FAMILY:  # as published, to the precision that the names have
        billions = sizes.parameters(sizes.config_of(name)) / 1e9
        said = name.split()[-1] if "v0" not in name else "7B"
        said = float(said[:-1]) / (1000 if said.endswith("M") else 1)
        assert abs(billions - said) < 0.08 * said + 0.25, name


def test_known_sizes(sizes):
    """Llama 2 7B's file was measured (benchmarks/README.md): 3.74 GB, with 13.48 GB of source; 70B has GQA's cache."""
    seven, seventy = sizes.config_of("Llama 2 7B"), sizes.config_of("Llama 2 70B")
    assert sizes.parameters(seven) == 6_738_415_616
    assert round(weight_bytes(seven) / 1e9, 2) == 3.74
    assert kv_bytes_per_token(seven) == 2 * 2 * 32 * 4096
    assert kv_bytes_per_token(seventy) == 2 * 2 * 80 * 8 * 128
    assert memory_bytes(seven, 4096) == weight_bytes(seven) + 4096 * kv_bytes_per_token(seven) + (256 << 20)
    assert memory_bytes(seven, 4096, kv_cache="int8") < memory_bytes(seven, 4096)


SHAPES = {  # head_dim 128 became 4 or 8: everything else is in the models' proportions
    "7B": {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 32, "num_key_value_heads": 32},
    "13B": {"hidden_size": 320, "intermediate_size": 864, "num_attention_heads": 40, "num_key_value_heads": 40},
    "70B": {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 64, "num_key_value_heads": 8},
    "Code Llama": {"rope_theta": 1e6, "max_position_embeddings": 16384, "vocab_size": 32016, "hidden_size": 64},
    "Llama 3.1": {
        "vocab_size": 128256,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "max_position_embeddings": 131072,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}


@pytest.mark.parametrize(("name", "tied"), [*((name, False) for name in SHAPES), ("70B", True)])
def test_the_familys_shapes_convert_and_run(name, tied, tmp_path):
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2} if name == "Code Llama" else {}
    config = make_checkpoint(tmp_path / "m", **{**shape, **SHAPES[name], "tie_word_embeddings": tied})
    convert(tmp_path / "m", tmp_path / "m.edgellama", receipt=False, method="rtn")
    tokens = np.arange(24) * 1237 % config["vocab_size"]
    with open_model(tmp_path / "m.edgellama") as file:
        first = min(entry.offset for entry in file.tensors.values())
        end = max(entry.offset + entry.nbytes for entry in file.tensors.values())
        assert 0 <= weight_bytes(file.config) - (end - first) < 64  # padded to the alignment
        assert file.config.eos_token_ids == tuple(np.atleast_1d(config["eos_token_id"]).tolist())
        backend = CpuBackend(file, n_ctx=64)
        logits = all_logits(backend, tokens)
        backend.close()
        assert kl_divergence(all_logits(ReferenceBackend(file, 64), tokens), logits) <= MAX_KL


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama 2 7B", "Llama 2 13B", "Llama 2 70B"])
def test_one_layer_of_true_shape_converts(sizes, name, tmp_path):
    """3 GB of disk for 70B's layer with its vocabulary: one block of random weights over and over."""
    values, _ = sizes.FAMILY[name]
    config = {**DEFAULTS, **dict(zip(sizes.KEYS, values, strict=True)), "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for tensor, shape in state_dict_shapes(config).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[tensor] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    block = (np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02).astype("<f2").tobytes()
    with open(tmp_path / "model.safetensors", "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(block)):
            out.write(block[: end - start])
    kv_heads = values[5]
    report = convert(tmp_path, tmp_path / "m.edgellama", receipt=False, method="rtn")
    with open_model(tmp_path / "m.edgellama") as file:
        file.verify()
        assert 0 < report.file_bytes - weight_bytes(file.config) < 1 << 20
        assert report.weights == sizes.parameters(file.config)
        assert file.config.num_key_value_heads == kv_heads
