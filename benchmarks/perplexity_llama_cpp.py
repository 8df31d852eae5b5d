"""`edgellama perplexity` against llama.cpp: the same weights, the same windows, llama.cpp's logits.

    python benchmarks/perplexity_llama_cpp.py MODEL.edgellama FILE --llama-cpp llama/bin/python [--ctx 512] [--chunks N]

The file's dequantized weights are exported as float32 and written as an F32 GGUF (rows of q and k in llama.cpp's
order), so that what differs is arithmetic alone. `--llama-cpp` is the Python of an environment with llama-cpp-python
and gguf; there this script runs a second time, to write the GGUF and compute the logits. Exit code 1 if they differ
by 1 %.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from engine_llama_cpp import add_config, finish, gguf_name

TOLERANCE = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("file")
    parser.add_argument("--llama-cpp", required=True, metavar="PYTHON")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    from edgellama.model import load
    from edgellama.perplexity import chunks, encode_text, perplexity
    from edgellama_convert import export_hf

    text = Path(args.file).read_text(encoding="utf-8")
    ours = {}
    for device in ("cpu", "reference"):
        with load(args.model, device, args.ctx, args.threads, n_slots=1) as llm:
            if llm.config.rope.rope_type != "default" or llm.config.attention_bias or llm.config.mlp_bias:
                parser.error("only models with plain RoPE and without biases are written as GGUF here")
            ours[device] = perplexity(llm, text, ctx=args.ctx, max_windows=args.chunks).perplexity
            windows = chunks(*encode_text(llm.tokenizer, text, llm.config.vocab_size), args.ctx)[: args.chunks]
            config = {"head_dim": llm.config.head_dim, "rope_theta": llm.config.rope.rope_theta}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_hf(args.model, folder / "hf")
        np.save(folder / "windows.npy", np.stack([window.tokens for window in windows]))
        (folder / "more.json").write_text(json.dumps({**config, "first": windows[0].first, "threads": args.threads}))
        command = [args.llama_cpp, __file__, "--worker", str(folder)]
        theirs = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    for device, value in ours.items():
        print(f"edgellama {device:9} {value:.4f}  ({value / theirs['perplexity'] - 1:+.3%})")
    print(
        f"llama.cpp F32       {theirs['perplexity']:.4f}  ({theirs['version']}, {len(windows)} windows of {args.ctx})"
    )
    return int(any(abs(value / theirs["perplexity"] - 1) > TOLERANCE for value in ours.values()))


# -- in llama.cpp's environment --------------------------------------------------------------------------------------


def worker(folder: Path) -> None:
    from importlib.metadata import version

    more = json.loads((folder / "more.json").read_text())
    write_gguf(folder / "hf", folder / "model.gguf", more)
    nll = losses(folder / "model.gguf", np.load(folder / "windows.npy"), more["first"], more["threads"])
    result = {"perplexity": math.exp(nll.mean()), "version": f"llama-cpp-python {version('llama-cpp-python')}"}
    print(json.dumps(result))


def write_gguf(hf: Path, out: Path, more: dict[str, Any]) -> None:
    """A float32 checkpoint of one file as an F32 GGUF without a vocabulary."""
    import gguf

    config = json.loads((hf / "config.json").read_text())
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    writer = gguf.GGUFWriter(out, "llama")
    add_config(writer, config, more["head_dim"], more["rope_theta"])
    writer.add_key_length(more["head_dim"])
    writer.add_value_length(more["head_dim"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    header, data = read_header(hf / "model.safetensors")
    for name, entry in header.items():
        begin = data + entry["data_offsets"][0]
        values = np.memmap(hf / "model.safetensors", "<f4", "r", begin, tuple(entry["shape"]))
        for part, n in (("q_proj", heads), ("k_proj", kv_heads)):
            if f".{part}." in name:  # llama.cpp turns neighbours, Hugging Face halves
                values = values.reshape(n, 2, more["head_dim"] // 2, -1).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    finish(writer)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(the tensors of a safetensors file, where their data begins)"""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def losses(path: Path, windows: np.ndarray, first: int, n_threads: int) -> np.ndarray:
    """-log p of the tokens from number `first` on of each window, by llama.cpp."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(log, None)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    params = llama_cpp.llama_context_default_params()
    n = windows.shape[1]
    params.n_ctx = params.n_batch = params.n_ubatch = n
    params.n_threads = params.n_threads_batch = n_threads
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(n, 0, 1)
    found = []
    for window in windows:
        batch.n_tokens = n
        for i, token in enumerate(window.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (n, n_vocab))[first - 1 : -1]
        wide = logits.astype(np.float64)
        top = wide.max(axis=1)
        total = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
        found.append(total - wide[np.arange(n - first), window[first:]])
    return np.concatenate(found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]))
    else:
        sys.exit(main())
