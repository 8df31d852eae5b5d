"""Writes a model of a real one's shapes with random weights: what a speed measurement needs, without a download.

    python benchmarks/random_model.py smollm2-135m -o smollm2.edgellama
    python benchmarks/random_model.py 7b-8layers --to hf -o checkpoint      # float16 safetensors, for other converters

One block of random numbers is repeated all over, so that a file is written about as fast as the disk takes it.
Activations stay finite; the words mean nothing, and there is no tokenizer. The `.edgellama` file needs edgellama; the
checkpoint needs NumPy only, so that other engines' environments can import this module, too.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
COLUMNS += ["max_position_embeddings", "rope_theta", "tie_word_embeddings"]
SHAPES: dict[str, tuple[Any, ...]] = {
    "7b": (32000, 4096, 11008, 32, 32, 32, 4096, 1e4, False),
    "7b-8layers": (32000, 4096, 11008, 8, 32, 32, 4096, 1e4, False),
    "13b": (32000, 5120, 13824, 40, 40, 40, 4096, 1e4, False),
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 8192, 1e5, True),
    "tinyllama-1.1b": (32000, 2048, 5632, 22, 32, 4, 2048, 1e4, False),
    "llama3-8b": (128256, 4096, 14336, 32, 32, 8, 8192, 5e5, False),
}
STD = 0.02
"""Of all weights: what such models are initialized with."""
BLOCK_ROWS = 256
"""Rows of the repeated block; a multiple of the file's row block."""
BLOCK_COLUMNS = 14336
"""As many as the widest matrix has."""


def config(shape: str) -> dict[str, Any]:
    """The config.json of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **dict(zip(COLUMNS, SHAPES[shape], strict=True)),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }


def tensors(shape: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a checkpoint's tensors."""
    c = config(shape)
    hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], (c["vocab_size"], c["hidden_size"])
    kv = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocab}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        result[f"{layer}.input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            result[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
        result[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        result[f"{layer}.mlp.gate_proj.weight"] = result[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        result[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
    result["model.norm.weight"] = (hidden,)
    return result if c["tie_word_embeddings"] else {**result, "lm_head.weight": vocab}


@cache
def _bytes() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (BLOCK_ROWS, BLOCK_COLUMNS), np.uint8)


@cache
def _normal() -> np.ndarray:
    values = np.random.default_rng(1).standard_normal((BLOCK_ROWS, BLOCK_COLUMNS), np.float32)
    return (values * STD).astype("<f2")


@cache
def _stored(layout: str, bits: int, rows: int, columns: int) -> np.ndarray:
    """`rows` of a matrix with `columns` inputs as a layout of the `.edgellama` format stores them."""
    from edgellama import quant

    if layout == "f16":
        return np.ascontiguousarray(_normal()[:rows, :columns])
    if layout == "f16.r16":
        return quant.pack_f16(_normal()[:rows, :columns])
    if layout == "int4.g128":
        return quant.pack_int4(_bytes()[:rows, :columns] % 15 + 1)
    if layout == "int8.g128":
        return quant.pack_int8(_bytes()[:rows, :columns])
    largest = 2 ** (bits - 1) - 1  # codes are uniform in -largest..largest: their deviation is largest / sqrt(3)
    groups = -(-columns // quant.GROUP_SIZE)
    spread = 0.75 + _bytes()[:rows, :groups] / 512  # scales differ, as real ones do
    return quant.pack_scales((spread * STD * 3**0.5 / largest).astype(np.float16))


def write_edgellama(shape: str, path: Path, lm_head_bits: int = 8, int8_units: Sequence[str] = ()) -> Path:
    """Write an `.edgellama` file; replaces another one. `int8_units`: see `edgellama.format.unit_names`."""
    from edgellama.format import ModelWriter

    options: dict[str, Any] = {"lm_head_bits": lm_head_bits, "int8_units": int8_units, "method": "random"}
    with ModelWriter(path, config(shape), **options) as writer:
        stored_bits = {
            spec.name.removesuffix(".qweight"): 8 if spec.layout == "int8.g128" else 4 for spec in writer.specs
        }
        for spec in writer.specs:
            if spec.layout == "f32":
                writer.write(spec.name, np.ones(spec.shape, "<f4"))
                continue
            rows, columns = spec.shape
            bits = stored_bits.get(spec.name.removesuffix(".scales"), 4)
            blocks = (min(BLOCK_ROWS, rows - start) for start in range(0, rows, BLOCK_ROWS))
            writer.write(spec.name, (_stored(spec.layout, bits, n, columns) for n in blocks))
        return writer.finish(files={}, provenance={"source": f"random weights of the shape {shape}"})


def write_checkpoint(shape: str, folder: Path) -> Path:
    """Write config.json and one safetensors file of float16 into an existing folder."""
    header: dict[str, Any] = {}
    end = 0
    for name, size in tensors(shape).items():
        begin, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "F16", "shape": size, "data_offsets": [begin, end]}
    header["__metadata__"] = {"format": "pt"}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in _float16(tensors(shape).values()):
            file.write(piece.data)
    (folder / "config.json").write_text(json.dumps(config(shape)))
    return folder


def _float16(sizes: Iterable[tuple[int, ...]]) -> Iterator[np.ndarray]:
    """The tensors in pieces. No two matrices are equal: an engine might store them once."""
    twice = np.concatenate([_normal().ravel()] * 2)
    place = 0
    for size in sizes:
        left = math.prod(size)
        if len(size) == 1:
            yield np.ones(left, "<f2")
            continue
        while left:
            n = min(left, twice.size // 2)
            yield twice[place : place + n]
            place = (place + 1_234_567) % (twice.size // 2)
            left -= n


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a model of a real one's shapes with random weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the file, or the checkpoint's folder")
    parser.add_argument("--to", choices=("edgellama", "hf"), default="edgellama")
    parser.add_argument("--lm-head-bits", type=int, choices=(4, 8, 16), default=8)
    args = parser.parse_args()
    if args.to == "hf":
        args.out.mkdir(parents=True, exist_ok=True)
        write_checkpoint(args.shape, args.out)
    else:
        write_edgellama(args.shape, args.out, args.lm_head_bits)


if __name__ == "__main__":
    main()
