"""The models whose logits by transformers are stored in `tests/data/golden`, and how a test turns one into a file.

Only a seed and a config are stored of a model: `checkpoints.make_checkpoint` gives the same weights everywhere, and
the `rtn` quantizer the same codes. Each case is named for the one thing that sets it apart.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import make_checkpoint
from edgellama import quant

GOLDEN_DIR = Path(__file__).parent / "data" / "golden"
N_TOKENS = 40
KEPT_ROWS = 16  # the last positions: they depend on all before


@dataclass(frozen=True)
class Case:
    config: dict[str, Any] = field(default_factory=dict)  # changes to checkpoints.DEFAULTS
    dtype: str = "float32"
    shards: int = 1
    lm_head_bits: int = 8
    seed: int = 0
    n_tokens: int = N_TOKENS

    def tokens(self) -> np.ndarray:
        """int64 [n_tokens]: <bos> and then a walk through the vocabulary."""
        vocab_size = self.config.get("vocab_size", 277)
        walk = (np.arange(self.n_tokens) * 10007 + 31 * self.seed) % vocab_size
        walk[0] = 1
        return walk


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.02 * i for i in range(16)],
    "long_factor": [1.0 + 0.5 * i for i in range(16)],
    "original_max_position_embeddings": 24,
}

CASES: dict[str, Case] = {
    "mha": Case({"num_key_value_heads": 6}),
    "gqa": Case({"num_key_value_heads": 3}, dtype="float16"),
    "mqa": Case({"num_key_value_heads": 1}, dtype="bfloat16"),
    "no_num_key_value_heads": Case({"num_key_value_heads": None}, dtype="float16", seed=1),
    "head_dim_wider": Case({"head_dim": 48}),
    "head_dim_narrower": Case({"head_dim": 16, "num_key_value_heads": 6}),
    "biases": Case({"attention_bias": True, "mlp_bias": True}),
    "tied": Case({"tie_word_embeddings": True}),
    "tied_lm_head_4": Case({"tie_word_embeddings": True}, lm_head_bits=4, seed=1),
    "tied_lm_head_16": Case({"tie_word_embeddings": True}, lm_head_bits=16, seed=2),
    "lm_head_4": Case(lm_head_bits=4),
    "lm_head_16": Case(lm_head_bits=16),
    "shards_3": Case(shards=3),
    "shards_3_tied_bfloat16": Case({"tie_word_embeddings": True}, dtype="bfloat16", shards=3),
    "hidden_576": Case(
        {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
        dtype="bfloat16",
    ),
    "hidden_288": Case({"hidden_size": 288, "intermediate_size": 768, "num_key_value_heads": 6}),
    "vocab_256": Case({"vocab_size": 256}),
    "widths_below_a_group": Case(
        {
            "hidden_size": 6,
            "intermediate_size": 5,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "vocab_size": 17,
        }
    ),
    "gelu": Case({"hidden_act": "gelu"}),
    "gelu_pytorch_tanh": Case({"hidden_act": "gelu_pytorch_tanh"}),
    "relu": Case({"hidden_act": "relu"}),
    "rope_theta": Case({"rope_theta": 500000}),
    "linear": Case({"max_position_embeddings": 24, "rope_scaling": {"type": "linear", "factor": 2.5}}),
    "dynamic_below": Case({"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "dynamic_past": Case({"max_position_embeddings": 24, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "yarn": Case(
        {
            "rope_theta": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 24,
                "rope_theta": 20000.0,
            },
        }
    ),
    "yarn_mscale": Case(
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 24,
                "beta_fast": 1.5,
                "beta_slow": 0.25,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "truncate": False,
            },
        }
    ),
    "longrope_short": Case({"rope_scaling": LONGROPE}, n_tokens=24),
    "longrope_long": Case({"rope_scaling": LONGROPE}),
    "llama3": Case(
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 24,
            }
        }
    ),
}


def convert_case(case: Case, directory: Path) -> Path:
    """Write the case's checkpoint into `directory` and convert it; return the `.edgellama` file."""
    from edgellama_convert import convert

    source = directory / "checkpoint"
    make_checkpoint(source, seed=case.seed, dtype=case.dtype, shards=case.shards, **case.config)
    path = directory / "model.edgellama"
    convert(source, path, method="rtn", lm_head_bits=case.lm_head_bits)
    return path


def weights_sha256(model_file: Any) -> str:
    """Over the dequantized weights, so that a change of the converter is not taken for one of the forward pass."""
    digest = hashlib.sha256()
    for name in sorted(model_file.tensors):
        if name.endswith(".scales"):
            continue
        if name.endswith("norm.weight") or name.endswith(".bias"):
            weights = model_file.array(name)
        else:
            weights = quant.load_matrix(model_file, name.rsplit(".", 1)[0])
        digest.update(name.rsplit(".", 1)[0].encode())
        digest.update(np.ascontiguousarray(weights, "<f4").tobytes())
    return digest.hexdigest()
