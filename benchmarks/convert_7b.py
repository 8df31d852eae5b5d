"""Converts a checkpoint of Llama-2-7B's shapes (random weights, 13.5 GB) and measures memory, speed and opening time.

    python benchmarks/convert_7b.py                    # needs 18 GB of free disk in --folder, and some minutes
    python benchmarks/convert_7b.py --layers 2 --json  # the same matrices, fewer layers: 1.3 GB

The conversion and the opening run in processes of their own. Memory is read from outside, from Linux's
/proc/<pid>/status every 20 ms: RssAnon and RssShmem are what the process itself holds; RssFile (mapped libraries, and a
mapped source if there were one) is told apart. Everything written is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}
SHARD_BYTES = 5 << 30
BLOCK_WEIGHTS = 8 << 20

CONVERT = """
import json, sys, time
from edgellama_convert import convert
source, out, method, threads, max_ram = sys.argv[1:]
report = convert(source, out, method=method, n_threads=int(threads) or None, max_ram=int(max_ram) or None)
print(json.dumps({**report.to_dict(), "cpu_seconds": time.process_time()}))
"""
OPEN = """
import sys, time
from edgellama.format import open_model
started = time.perf_counter()
model = open_model(sys.argv[1])
print(time.perf_counter() - started)
"""


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape, in file order."""
    hidden, inner, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def write_checkpoint(folder: Path, layers: int) -> int:
    """Shards of normal float16 weights, one random block over and over at changing places; the number of weights."""
    block = (np.random.default_rng(0).standard_normal(BLOCK_WEIGHTS, np.float32) * 0.02).astype("<f2")
    twice = np.concatenate([block, block]).view(np.uint8).data
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for name, shape in tensors(layers).items():
        nbytes = 2 * int(np.prod(shape))
        if nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shape
        room -= nbytes
    weight_map = {}
    total, place = 0, 0
    for i, shard in enumerate(shards):
        file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        header, end = {}, 0
        for name, shape in shard.items():
            begin, end = end, end + 2 * int(np.prod(shape))
            header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
            weight_map[name] = file_name
        text = json.dumps(header).encode()
        with open(folder / file_name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            left = end
            while left:
                n = min(left, 2 * BLOCK_WEIGHTS)
                file.write(twice[place : place + n])
                place = (place + 2 * 1_234_567) % (2 * BLOCK_WEIGHTS)
                left -= n
        total += end
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total // 2


def status_kib(pid: int) -> dict[str, int]:
    """The memory lines of /proc/<pid>/status, in KiB; {} once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("Rss", "VmHWM"))}


def run_convert(folder: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The report of a conversion in its own process, with the memory that was seen from outside."""
    command = [sys.executable, "-c", CONVERT, str(folder), str(out)]
    command += [args.method, str(args.threads), str(args.max_ram)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    anonymous, files, peak = 0, 0, 0
    while process.poll() is None:
        seen = status_kib(process.pid)
        anonymous = max(anonymous, seen.get("RssAnon", 0) + seen.get("RssShmem", 0))
        files = max(files, seen.get("RssFile", 0))
        peak = max(peak, seen.get("VmHWM", 0))
        time.sleep(0.02)
    assert process.stdout is not None
    if process.returncode:
        sys.exit("the conversion failed")
    report = json.loads(process.stdout.read())
    return {**report, "peak_anonymous": anonymous << 10, "peak_file": files << 10, "peak_all": peak << 10}


def open_times(path: Path, times: int = 7) -> list[float]:
    """Seconds of open_model, each in a fresh process, sorted."""
    command = [sys.executable, "-c", OPEN, str(path)]
    return sorted(float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(times))


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a checkpoint of Llama-2-7B's shapes; memory, speed, opening.")
    parser.add_argument("--folder", type=Path, help="where to put 18 GB (default: the system's temporary folder)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--method", default="search", choices=("search", "rtn"))
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are processors")
    parser.add_argument("--max-ram", type=int, default=0, metavar="BYTES", help="0: no limit")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="edgellama-7b-", dir=args.folder))
    try:
        needed = 2 * sum(int(np.prod(shape)) for shape in tensors(args.layers).values()) * 4 // 3
        if shutil.disk_usage(folder).free < needed:
            sys.exit(f"{folder}: {needed / 1e9:.1f} GB of free disk are needed")
        started = time.perf_counter()
        weights = write_checkpoint(folder, args.layers)
        written = time.perf_counter() - started
        report = run_convert(folder, folder / "out.edgellama", args)
        opened = open_times(folder / "out.edgellama")
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    per_core = report["weights_per_second"] / report["n_threads"]
    per_cpu_second = weights / report["cpu_seconds"]  # free of what other processes took
    result = {
        "weights": weights,
        "method": args.method,
        "n_threads": report["n_threads"],
        "source_bytes": report["source_bytes"],
        "file_bytes": report["file_bytes"],
        "bits_per_weight": report["bits_per_weight"],
        "seconds": report["seconds"],
        "weights_per_second_per_core": per_core,
        "weights_per_cpu_second": per_cpu_second,
        "peak_anonymous": report["peak_anonymous"],
        "peak_file": report["peak_file"],
        "peak_all": report["peak_all"],
        "open_seconds_median": opened[len(opened) // 2],
        "open_seconds_worst": opened[-1],
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"{weights / 1e9:.2f} G weights, source {report['source_bytes'] / 1e9:.2f} GB (written in {written:.0f} s)")
    threads = report["n_threads"]
    print(f"{args.method}: {report['seconds']:.1f} s with {threads} threads, {per_core / 1e6:.1f} M weights/s/core")
    print(f"{report['cpu_seconds']:.1f} s of CPU time: {per_cpu_second / 1e6:.1f} M weights/s, start-up included")
    print(f"file {report['file_bytes'] / 1e9:.2f} GB, {report['bits_per_weight']:.3f} bits per weight")
    print(
        f"peak RSS {report['peak_anonymous'] / 1e6:.0f} MB without mapped files "
        f"({report['peak_all'] / 1e6:.0f} MB with them)"
    )
    print(f"open {1e3 * opened[len(opened) // 2]:.2f} ms median, {1e3 * opened[-1]:.2f} ms worst of {len(opened)}")


if __name__ == "__main__":
    main()
