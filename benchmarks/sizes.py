"""The table of sizes in docs/transformers.md: what the family's models take as a file and in memory, from their shapes.

    python benchmarks/sizes.py                  # int8 output layer, as convert does by default
    python benchmarks/sizes.py --lm-head-bits 4 --ctx 8192

No model is needed: a file's size and its cache follow from the config. The tokenizer (0.5 to 9 MB) comes on top.
"""

from __future__ import annotations

import argparse
import math

from edgellama.config import LlamaConfig
from edgellama.format import model_tensors
from edgellama.sizing import kv_bytes_per_token, memory_bytes, weight_bytes

KEYS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    max_position_embeddings""".split()
_LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA_3 |= {"original_max_position_embeddings": 8192}
_LLAMA_31 = {"rope_theta": 500000.0, "rope_scaling": {**_LLAMA_3, "factor": 8.0}}
_LLAMA_32 = {"rope_theta": 500000.0, "rope_scaling": {**_LLAMA_3, "factor": 32.0}, "tie_word_embeddings": True}
_CODE = {"rope_theta": 1e6}

FAMILY: dict[str, tuple[tuple[int, ...], dict]] = {
    "Llama 2 7B": ((32000, 4096, 11008, 32, 32, 32, 4096), {}),
    "Llama 2 13B": ((32000, 5120, 13824, 40, 40, 40, 4096), {}),
    "Llama 2 70B": ((32000, 8192, 28672, 80, 64, 8, 4096), {}),
    "Code Llama 7B": ((32016, 4096, 11008, 32, 32, 32, 16384), _CODE),
    "Code Llama 34B": ((32000, 8192, 22016, 48, 64, 8, 16384), _CODE),
    "Llama 3.1 8B": ((128256, 4096, 14336, 32, 32, 8, 131072), _LLAMA_31),
    "Llama 3.1 70B": ((128256, 8192, 28672, 80, 64, 8, 131072), _LLAMA_31),
    "Llama 3.2 1B": ((128256, 2048, 8192, 16, 32, 8, 131072), _LLAMA_32),
    "Llama 3.2 3B": ((128256, 3072, 8192, 28, 24, 8, 131072), _LLAMA_32),
    "TinyLlama 1.1B": ((32000, 2048, 5632, 22, 32, 4, 2048), {}),
    "SmolLM2 135M": ((49152, 576, 1536, 30, 9, 3, 8192), {"rope_theta": 1e5, "tie_word_embeddings": True}),
    "SmolLM2 1.7B": ((49152, 2048, 8192, 24, 32, 32, 8192), {"rope_theta": 1.3e5, "tie_word_embeddings": True}),
    "Mistral 7B v0.3": ((32768, 4096, 14336, 32, 32, 8, 32768), {"rope_theta": 1e6}),
    "Yi 34B": ((64000, 7168, 20480, 60, 56, 8, 4096), {"rope_theta": 5e6}),
}
"""Name -> (the values of `KEYS`, further config keys)."""


def config_of(name: str) -> LlamaConfig:
    sizes, further = FAMILY[name]
    return LlamaConfig.from_dict({"model_type": "llama", **dict(zip(KEYS, sizes, strict=True)), **further})


def parameters(config: LlamaConfig) -> int:
    """Weights of the source, tied ones once."""
    specs = model_tensors(config, 16)
    return sum(math.prod(spec.shape) for spec in specs if not spec.name.endswith(".scales"))


def table(lm_head_bits: int = 8, n_ctx: int = 4096) -> str:
    """The table as Markdown; sizes in GB of 10^9 bytes."""
    rows = [
        f"| model | parameters | 16 bits | file | KV cache of {n_ctx} tokens, float16 / int8 | memory to run it |",
        "|---|---|---|---|---|---|",
    ]
    for name in FAMILY:
        config = config_of(name)
        count = parameters(config)
        context = min(n_ctx, config.max_position_embeddings)
        caches = [f"{kv_bytes_per_token(config, kind) * context / 1e9:.2f}" for kind in ("float16", "int8")]
        note = f" ({context})" if context < n_ctx else ""
        file, memory = weight_bytes(config, lm_head_bits), memory_bytes(config, context, lm_head_bits)
        rows.append(
            f"| {name} | {count / 1e9:.2f} B | {2 * count / 1e9:.2f} GB | {file / 1e9:.2f} GB "
            f"| {' / '.join(caches)} GB{note} | {memory / 1e9:.1f} GB |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-head-bits", type=int, default=8, choices=(4, 8, 16))
    parser.add_argument("--ctx", type=int, default=4096)
    args = parser.parse_args()
    print(table(args.lm_head_bits, args.ctx))
