"""Tiny `.edgellama` files for tests: random tensors for any config, written through the public writer.

Does not need quantizers or checkpoints: the bytes are random, which every layout allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.format import LAYOUTS, ModelWriter, TensorSpec

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 48,
    "intermediate_size": 150,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Ragged on purpose: 16 and 128 divide nothing here."""

FILES = {"tokenizer_config.json": b'{"add_bos_token": true}', "chat_template.jinja": "{{ 'é' }}".encode()}
PROVENANCE = {"source": "test/tiny", "commit": None}


def tensor_bytes(spec: TensorSpec, seed: int = 0) -> np.ndarray:
    """Stored bytes of a tensor: random, but finite as float16 and float32."""
    layout = LAYOUTS[spec.layout]
    rng = np.random.default_rng([seed, *spec.name.encode()])
    shape = layout.stored_shape(spec.shape)
    if layout.dtype == np.uint8:
        return rng.integers(0, 256, shape, np.uint8)
    return rng.standard_normal(shape).astype(layout.dtype)


def write_file(
    path: str | Path,
    config: dict[str, Any] | None = None,
    *,
    lm_head_bits: int = 8,
    int8_units: Sequence[str] = (),
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a valid file; `overrides` replace keys of CONFIG."""
    raw = {**(config or CONFIG), **overrides}
    with ModelWriter(path, raw, lm_head_bits=lm_head_bits, method="rtn", int8_units=int8_units) as writer:
        for spec in writer.specs:
            writer.write(spec.name, tensor_bytes(spec, seed))
        writer.finish(FILES, PROVENANCE)
    return Path(path)
