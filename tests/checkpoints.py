"""Tiny random Llama checkpoints in Hugging Face layout, written with NumPy alone.

Knows: the names and shapes of a `LlamaForCausalLM` (or `LlamaForSequenceClassification`) state dict, the bytes of a
safetensors file, how transformers splits one into shards. Does not know edgellama: it is an independent writer that
tests read back.

The weights are the same bits for the same arguments on every machine: they come from raw PCG64 words (a stream NumPy
promises to keep) through integer sums and single IEEE operations, never through a C library's `log` or `exp`. So the
golden logits in `tests/data/golden` need no stored weights.

>>> config = make_checkpoint(tmp_path, dtype="bfloat16", shards=3, tie_word_embeddings=True)
>>> sorted(p.name for p in tmp_path.iterdir())[:2]
['config.json', 'model-00001-of-00003.safetensors']
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Standard deviation of the logits: wide enough that the next token is neither fixed nor a coin toss.
LOGITS_STD = 2.5

DEFAULTS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 277,  # 16 does not divide it
    "hidden_size": 192,  # one and a half groups of 128
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def make_checkpoint(
    directory: str | Path, *, seed: int = 0, dtype: str = "float16", shards: int = 1, **config_overrides: Any
) -> dict[str, Any]:
    """Write config.json and random weights into `directory` (created if need be); return the config as written.

    `dtype` is "float16", "bfloat16" or "float32". With `shards` > 1 there are that many files and
    `model.safetensors.index.json`. Any other keyword replaces or adds a key of config.json; None is written as null.
    """
    config = {**DEFAULTS, "torch_dtype": dtype, **config_overrides}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_weights(directory, random_weights(config, seed), dtype=dtype, shards=shards)
    return config


def state_dict_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the checkpoint, in the order transformers saves them."""
    hidden, inter, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}

    def linear(name: str, out_features: int, in_features: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (out_features, in_features)
        if bias:
            shapes[f"{name}.bias"] = (out_features,)

    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        attention_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
        linear(f"{layer}.self_attn.q_proj", heads * head_dim, hidden, attention_bias)
        linear(f"{layer}.self_attn.k_proj", kv_heads * head_dim, hidden, attention_bias)
        linear(f"{layer}.self_attn.v_proj", kv_heads * head_dim, hidden, attention_bias)
        linear(f"{layer}.self_attn.o_proj", hidden, heads * head_dim, attention_bias)
        linear(f"{layer}.mlp.gate_proj", inter, hidden, mlp_bias)
        linear(f"{layer}.mlp.up_proj", inter, hidden, mlp_bias)
        linear(f"{layer}.mlp.down_proj", hidden, inter, mlp_bias)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if config["architectures"] == ["LlamaForSequenceClassification"]:
        labels = config.get("id2label") or range(config.get("num_labels", 2))
        shapes["score.weight"] = (len(labels), hidden)
    elif not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """float32 weights for every name of `state_dict_shapes`; each tensor depends on (seed, name, shape) only."""
    return {name: _random_tensor(name, shape, seed) for name, shape in state_dict_shapes(config).items()}


def _random_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    noise = _bell_noise(math.prod(shape), seed, name).reshape(shape)
    if name.endswith("norm.weight"):
        return (1.0 + 0.1 * noise).astype(np.float32)
    if name.endswith(".bias"):
        return (0.2 * noise).astype(np.float32)
    if name in {
        "lm_head.weight",
        "score.weight",
        "model.embed_tokens.weight",
    }:  # unit-RMS hidden states meet these rows
        return (noise * (LOGITS_STD / math.sqrt(shape[1]))).astype(np.float32)
    return (noise * (1.0 / math.sqrt(shape[1]))).astype(np.float32)  # keeps the scale of what it multiplies


def _bell_noise(n: int, seed: int, name: str) -> np.ndarray:
    """float64[n], mean 0, variance 1, near normal: each value is the sum of the four 16-bit parts of one PCG64 word."""
    words = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(n).astype("<u8")
    sums = words.view("<u2").reshape(n, 4).astype(np.int64).sum(axis=1)
    return (sums - 2.0 * 65535) / math.sqrt(4 * (65536.0**2 - 1) / 12)


def write_weights(directory: Path, weights: Mapping[str, np.ndarray], *, dtype: str, shards: int = 1) -> None:
    """Write float32 `weights` as one safetensors file, or as `shards` files and an index as transformers does."""
    if shards == 1:
        write_safetensors(directory / "model.safetensors", weights, dtype)
        return
    names = list(weights)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(directory / file, {name: weights[name] for name in part}, dtype)
        weight_map.update(dict.fromkeys(part, file))
    total = sum(w.size for w in weights.values()) * (4 if dtype == "float32" else 2)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, weights: Mapping[str, np.ndarray], dtype: str) -> None:
    """Write float32 `weights` rounded to `dtype`: u64 header length, JSON header padded with spaces to 8, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    blobs = []
    for name, weight in weights.items():
        blob = cast_bytes(weight, dtype)
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(weight.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(blobs)


def cast_bytes(weight: np.ndarray, dtype: str) -> bytes:
    """Little-endian bytes of a finite float32 array in `dtype`; bfloat16 rounds to nearest, ties to even."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(weight, "<f4").view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return weight.astype({"float32": "<f4", "float16": "<f2"}[dtype]).tobytes()
