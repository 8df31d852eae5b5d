"""llama.cpp through llama-cpp-python (built on this machine, for its processor), as llama-bench would run it.

Its model is Q4_0, which llama.cpp repacks for the processor when it loads; the output matrix is what llama.cpp's own
quantizer makes of it: Q6_K, or Q8_0 where rows are no multiple of 256. Needs llama-cpp-python, gguf, NumPy.
"""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from pathlib import Path

import engine
import numpy as np
import random_model

MATRICES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{MATRICES[part]}.weight"


def random_blocks(kind: str, size: tuple[int, ...]) -> np.ndarray:
    """uint8 [rows, bytes]: blocks of a ggml type with random quants; scales such that weights deviate as ours."""
    rows, columns = size
    rng = np.random.default_rng(0)
    weights, d_at, nbytes, deviation = {
        "Q4_0": (32, 0, 18, 4.6),  # d, 32 nibbles
        "Q8_0": (32, 0, 34, 74.0),  # d, 32 int8
        "Q6_K": (256, 208, 210, 18.5 * 16),  # 128 + 64 bytes of quants, 16 int8 scales, d
    }[kind]
    blocks = rng.integers(1, 256, (4096, nbytes), np.uint8)
    if kind == "Q6_K":
        blocks[:, 192:208] = 16
    blocks[:, d_at : d_at + 2] = np.frombuffer(np.float16(random_model.STD / deviation).tobytes(), np.uint8)
    return np.resize(blocks, rows * columns // weights * nbytes).reshape(rows, -1)


def add_config(writer, config: dict, head_dim: int, rope_theta: float) -> None:
    """A Llama's config.json as a GGUF's metadata; no vocabulary goes with it."""
    heads = config["num_attention_heads"]
    writer.add_context_length(config.get("max_position_embeddings", 2048))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope_theta)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def finish(writer) -> None:
    """Write the GGUF."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(shape: str, folder: Path) -> None:
    import gguf

    config = random_model.config(shape)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    add_config(writer, config, config["hidden_size"] // config["num_attention_heads"], config["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    output = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    made: dict[tuple, np.ndarray] = {}
    for name, size in random_model.tensors(shape).items():
        if len(size) == 1:
            writer.add_tensor(gguf_name(name), np.ones(size, np.float32))
            continue
        kind = "Q4_0" if name != output else "Q6_K" if size[1] % 256 == 0 else "Q8_0"
        if (kind, size) not in made:
            made[kind, size] = random_blocks(kind, size)
        writer.add_tensor(gguf_name(name), made[kind, size], raw_dtype=gguf.GGMLQuantizationType[kind])
    finish(writer)


class LlamaCpp:
    def __init__(self, shape: str, folder: Path, n_threads: int, n_ctx: int):
        import llama_cpp

        self._lib = llama_cpp
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(folder / "model.gguf").encode(), params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, max(512, n_ctx), 512
        params.n_threads = params.n_threads_batch = n_threads
        flash = os.environ.get("LLAMA_FLASH_ATTN", "1")  # 0: off; which is faster depends on the processor
        params.flash_attn_type = int(flash)
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocab_size = random_model.config(shape)["vocab_size"]
        self._rng = np.random.default_rng(0)
        features = llama_cpp.llama_print_system_info().decode()
        simd = "AVX512_VNNI" if "AVX512_VNNI = 1" in features else "no AVX512_VNNI"
        self.version = f"llama-cpp-python {version('llama-cpp-python')} ({simd}, flash attention {flash})"

    def _decode(self, n: int) -> None:
        import ctypes

        tokens = (self._lib.llama_token * n)(*self._rng.integers(3, self._vocab_size, n).tolist())
        batch = self._lib.llama_batch_get_one(ctypes.cast(tokens, ctypes.POINTER(self._lib.llama_token)), n)
        if self._lib.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        self._lib.llama_synchronize(self._context)

    def _clear(self, depth: int) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        if depth:
            self._decode(depth)

    def prefill(self, n: int, depth: int) -> float:
        self._clear(depth)
        started = time.perf_counter()
        self._decode(n)
        return time.perf_counter() - started

    def decode(self, n: int, depth: int) -> float:
        self._clear(depth)
        started = time.perf_counter()
        for _ in range(n):
            self._decode(1)
        return time.perf_counter() - started


if __name__ == "__main__":
    engine.main(make, LlamaCpp)
