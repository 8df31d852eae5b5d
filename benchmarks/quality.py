"""How far each way to 4 bits is from its source: edgellama's methods, and llama.cpp's own quantizations of it.

    python benchmarks/quality.py SOURCE TEXT... [--methods rtn,search,gptq] [--bpw 4.5,5.4] [--folder DIR] \
        [--llama-cpp llama/bin/python --types Q4_0,Q4_K_M]

SOURCE is a checkpoint folder, TEXT a file not used for calibration; what counts is the mean over the texts. All
are computed in float32 from the weights as stored (`edgellama compare`'s arithmetic): activations and kernels play no
part. With `--bpw` each method is measured under these budgets, too. llama.cpp quantizes a GGUF of the same float32
weights, and the gguf package reads its file's weights back.
`--llama-cpp` is the Python of an environment with llama-cpp-python and gguf. Converted files stay in DIR for next time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

Row = tuple[str, float, float, list[Any], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--methods", default="rtn,search,gptq")
    parser.add_argument("--bpw", default="", metavar="BITS", help="budgets that each method is tried under as well")
    parser.add_argument("--types", default="Q4_0,Q4_K_M")
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--chunks", type=int, default=12, help="windows of each text (default 12)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        folder.mkdir(exist_ok=True)
        rows = []
        budgets = [None, *(float(bits) for bits in args.bpw.split(",") if bits)]
        for method in args.methods.split(","):
            rows += [show(ours(args, method, bpw, folder)) for bpw in budgets]
        for kind in args.types.split(",") if args.llama_cpp else []:
            rows.append(show(theirs(args, kind, Path(name))))
    means = [float(np.mean([result.kl_mean for result in row[3]])) for row in rows]
    for row, mean in zip(rows, means, strict=True):
        print(f"{row[0]:12} KL {mean:.4f}, {mean / means[0]:.3f} of {rows[0][0]}'s")


def show(row: Row) -> Row:
    name, linear_bits, bits, results, seconds = row
    texts = "   ".join(f"KL {c.kl_mean:.4f} top-1 {c.top1:.1%} ppl {c.perplexity:.2f}" for c in results)
    print(f"{name:12} {linear_bits:.3f} bits in the layers, {bits:.3f} in all; {seconds:.0f} s   {texts}", flush=True)
    return row


def ours(args: argparse.Namespace, method: str, bpw: float | None, folder: Path) -> Row:
    from edgellama_convert import convert
    from edgellama_convert.comparison import compare

    name = method if bpw is None else f"{method} {bpw:g}"
    out, report = folder / f"{name}.edgellama", folder / f"{name}.json"
    if not report.exists():
        done = convert(args.source, out, method=method, bpw=bpw, receipt=False)
        report.write_text(json.dumps([done.linear_bits_per_weight, done.bits_per_weight, done.seconds]))
    linear_bits, bits, seconds = json.loads(report.read_text())
    results = [compare(out, args.source, text.read_text(), max_windows=args.chunks) for text in args.text]
    return name, linear_bits, bits, results, seconds


def theirs(args: argparse.Namespace, kind: str, folder: Path) -> Row:
    from edgellama.tokenizer import load_tokenizer
    from edgellama_convert.checkpoint import Checkpoint
    from edgellama_convert.comparison import measure, windows_of
    from edgellama_convert.files import read_config, read_files
    from edgellama_convert.weights import CheckpointWeights

    _, config = read_config(args.source)
    source = folder / "f32"
    if not source.exists():
        write_float32(args.source, source)
        more = {"head_dim": config.head_dim, "rope_theta": config.rope.rope_theta}
        (folder / "more.json").write_text(json.dumps(more))
    started = time.perf_counter()
    command = [args.llama_cpp, __file__, "--worker", str(folder), kind]
    linear_bits, bits = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    seconds = time.perf_counter() - started
    tokenizer = load_tokenizer(read_files(args.source), config)
    assert tokenizer is not None
    results = []
    with Checkpoint(args.source) as a, Checkpoint(folder / kind) as b:
        for text in args.text:
            windows = windows_of(tokenizer, text.read_text(), config.vocab_size, 512)[: args.chunks]
            results.append(measure(CheckpointWeights(config, a), CheckpointWeights(config, b), windows, 2)[0])
    return kind, linear_bits, bits, results, seconds


def write_float32(source: Path, out: Path) -> None:
    """The checkpoint as one file of float32."""
    from safetensors.numpy import save_file

    from edgellama_convert.checkpoint import Checkpoint

    out.mkdir()
    with Checkpoint(source) as checkpoint:
        tensors = {name: checkpoint.read(tensor) for name, tensor in checkpoint.tensors.items()}
    if json.loads((source / "config.json").read_text()).get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_bytes((source / "config.json").read_bytes())


# -- in llama.cpp's environment --------------------------------------------------------------------------------------


def worker(folder: Path, kind: str) -> None:
    """Quantize folder/f32, write what it says as folder/KIND; prints [bits in the layers' matrices, in all]."""
    import gguf
    import llama_cpp
    from engine_llama_cpp import gguf_name
    from perplexity_llama_cpp import read_header, write_gguf

    more = json.loads((folder / "more.json").read_text())
    if not (folder / "f32.gguf").exists():
        write_gguf(folder / "f32", folder / "f32.gguf", more)
    llama_cpp.llama_backend_init()
    log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(log, None)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = 2
    out = folder / f"{kind}.gguf"
    if llama_cpp.llama_model_quantize(str(folder / "f32.gguf").encode(), str(out).encode(), params):
        raise RuntimeError("llama_model_quantize failed")
    config = json.loads((folder / "f32" / "config.json").read_text())
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    source = folder / "f32" / "model.safetensors"
    header, data = read_header(source)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads")}
    heads["k_proj"] = heads["k_proj"] or heads["q_proj"]
    (folder / kind).mkdir()
    (folder / kind / "config.json").write_text(json.dumps(config))
    nbytes = {"layers": [0, 0], "all": [0, 0]}
    with open(folder / kind / "model.safetensors", "wb") as file:
        file.write(source.read_bytes()[:data])
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            tensor = stored[gguf_name(name)]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(entry["shape"])
            for part, n in heads.items():
                if f".{part}." in name:  # llama.cpp turns neighbours, Hugging Face halves
                    values = values.reshape(n, more["head_dim"] // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
            assert file.tell() == data + entry["data_offsets"][0] and entry["dtype"] == "F32"
            file.write(np.ascontiguousarray(values, "<f4").tobytes())
            for where in ["all"] + ["layers"] * (".layers." in name and values.ndim == 2):
                nbytes[where][0] += int(tensor.n_bytes)
                nbytes[where][1] += values.size
    print(json.dumps([8 * size / weights for size, weights in nbytes.values()]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
