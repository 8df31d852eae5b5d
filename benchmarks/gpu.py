"""Everything that a GPU has to show, in one go: the CUDA tests, then one table of every shape's speed and memory.

    python benchmarks/gpu.py                                       # tests, 7B, 13B and 8B shapes
    python benchmarks/gpu.py --device torch-cpu --shapes tiny      # the script itself, without a GPU
    python benchmarks/gpu.py --no-tests --shapes 7b --tune         # other tile sizes of the kernels, too

Writes random-weight files of the shapes (`random_model.py`; 3.7, 7.2 and 4.9 GB) into --folder and leaves them there.
Rates are medians of -r samples. `of matmul`: the layers' multiplications a second over those of a large bfloat16
matmul of torch, measured around them. `of memory`: bytes that a step reads over a copy's bandwidth, measured in turn.
`beyond`: memory of the GPU in use beyond file and cache, CUDA's own context included. Exit code 1 if a test fails.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import random_model
import torch

import edgellama
from edgellama import bench, devices
from edgellama.backends.gpu import availability, decode
from edgellama.backends.gpu.backend import TorchBackend
from edgellama.format import ModelFile, open_model

REPOSITORY = Path(__file__).parent.parent
random_model.SHAPES["tiny"] = (320, 256, 512, 2, 4, 2, 512, 1e4, False)
HEADS = (
    "shape", "cache", "load", "beyond", "test", "tokens/s", "of matmul", "of memory", "first token",
)  # fmt: skip
TUNINGS = {"small tiles": (32, 64), "as they are": None, "large tiles": (128, 256)}
"""Lines of a program of the multiplying kernels where there are many programs, and where there are few."""


@dataclass(frozen=True)
class Plan:
    prompts: list[int]
    gens: list[int]
    depths: list[int]
    batches: list[int]
    caches: list[str]


FULL = Plan([512, 2048], [128], [0, 1900], [1, 8, 32], ["float16", "int8"])
SMOKE = Plan([16], [4], [0, 20], [1, 2], ["float16", "int8"])


def main() -> None:
    parser = argparse.ArgumentParser(description="The CUDA tests and the benchmark of the torch backend.")
    parser.add_argument("--device", choices=devices.TORCH_DEVICES, default="cuda")
    parser.add_argument("--shapes", default="7b,13b,llama3-8b", help="names of random_model.py, or tiny")
    parser.add_argument("--folder", type=Path, help="where the models are (default: a temporary folder)")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--tune", action="store_true", help="measure decode with other tile sizes, too")
    args = parser.parse_args()
    problem = availability.device_problem(args.device)
    if problem:
        sys.exit(problem)
    failed = False if args.no_tests else run_tests()
    print(f"\n{describe(args.device)}\n")
    line(HEADS)
    line(["---"] * len(HEADS))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for shape in args.shapes.split(","):
            path = folder / f"{shape}.edgellama"
            if not path.exists():
                random_model.write_edgellama(shape, path)
            with open_model(path) as file:
                plan = SMOKE if shape == "tiny" else FULL
                for cache in plan.caches:
                    measure(file, shape, args.device, plan, cache, args.repetitions)
                if args.tune:
                    tune(file, shape, args.device, plan, args.repetitions)
    sys.exit(1 if failed else 0)


def run_tests() -> bool:
    """The tests marked `cuda`; True if one fails. Without a GPU they all skip."""
    files = "tests/test_gpu_cuda.py", "tests/test_gptq_torch.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", *files]
    return subprocess.run(command, cwd=REPOSITORY, check=False).returncode != 0


def describe(device: str) -> str:
    """What was measured, in one line."""
    where, kernels = platform.processor() or platform.machine(), "no kernels"
    if device == "cuda":
        where = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        kernels = availability.triton_problem() or "Triton works"
    return (
        f"edgellama {edgellama.__version__}, torch {torch.__version__}, {kernels}; {where}; {time.strftime('%Y-%m-%d')}"
    )


def measure(file: ModelFile, shape: str, device: str, plan: Plan, cache: str, repetitions: int) -> None:
    """A line for each test of a shape and kind of cache."""
    load_s, beyond = load_and_memory(file, device, plan, cache)
    matmul = [matmul_rate(device)]
    for batch in plan.batches:
        tests = bench.plan(plan.prompts if batch == 1 else [], plan.gens, plan.depths, [batch])
        for test, row in zip(tests, bench.run(file, tests, repetitions, kv_cache=cache, device=device), strict=True):
            matmul.append(matmul_rate(device))
            rate, share = statistics.median(row.samples_ts), ""
            if test.n_prompt:
                share = f"{rate * operations(file, test) / test.n_prompt / statistics.median(matmul[-2:]):.0%}"
            memory = (
                "" if row.bandwidth_share is None else f"{row.bandwidth_share:.0%} of {row.bandwidth / 1e9:.0f} GB/s"
            )
            first = "" if row.ttft_s is None else f"{1000 * row.ttft_s:.0f} ms"
            line([shape, cache, f"{load_s:.2f} s", beyond, test.name, f"{rate:.1f}", share, memory, first])


def tune(file: ModelFile, shape: str, device: str, plan: Plan, repetitions: int) -> None:
    """Decode of one sequence with other tile sizes of the multiplying kernels."""
    before = decode.MANY_LINES, decode.FEW_LINES
    for name, lines in TUNINGS.items():
        decode.MANY_LINES, decode.FEW_LINES = lines or before
        test = bench.Test(0, plan.gens[0], 0, 1)
        row = next(bench.run(file, [test], repetitions, device=device))
        rate, share = statistics.median(row.samples_ts), f"{row.bandwidth_share:.0%}"
        line([shape, "float16", "", "", f"{test.name}, {name}", f"{rate:.1f}", "", share, ""])
    decode.MANY_LINES, decode.FEW_LINES = before


def load_and_memory(file: ModelFile, device: str, plan: Plan, cache: str) -> tuple[float, str]:
    """Seconds of the second load in a row (the file is in the page cache, the kernels in Triton's), and `beyond`
    after a prefill and a few steps, before anything else of this process is on the GPU."""
    n = max(plan.prompts)
    n_ctx = n + 8
    for _ in range(2):
        if device == "cuda":
            torch.cuda.empty_cache()
        begun = time.perf_counter()
        backend = devices.make_backend(device, file, n_ctx, kv_cache=cache)
        load_s = time.perf_counter() - begun
        assert isinstance(backend, TorchBackend)
        zeros = np.zeros(n, np.int32)
        backend.forward(zeros, np.arange(n), zeros, np.array([n - 1]))
        backend.decode(zeros[:1], np.array([n]), zeros[:1], 8)
        cached = backend.cache_bytes
        used = used_bytes() if device == "cuda" else 0
        backend.close()
    return load_s, f"{(used - file.size - cached) / 1e6:.0f} MB" if used else ""


def matmul_rate(device: str) -> float:
    """Operations a second of one large matmul, bfloat16 on a GPU (float32 elsewhere); the best of a few."""
    on_gpu = device == "cuda"
    n, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    a, b = (torch.randn(n, n, dtype=dtype, device="cuda" if on_gpu else "cpu") for _ in range(2))
    times = []
    for _ in range(6):
        if on_gpu:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        a @ b
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return 2 * n**3 / min(times)


def operations(file: ModelFile, test: bench.Test) -> float:
    """Of a prefill: the layers' weights times two for each token, the head for one, and attention to what is before."""
    config = file.config
    layers = sum(
        2 * entry.shape[0] * entry.shape[1]
        for name, entry in file.tensors.items()
        if name.startswith("model.layers.") and name.endswith(".qweight")
    )
    keys = test.n_prompt * test.n_depth + test.n_prompt**2 / 2
    attention = 4 * keys * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return layers * test.n_prompt + 2 * config.vocab_size * config.hidden_size + attention


def used_bytes() -> int:
    """Of the GPU's memory, by whomever: run this alone."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def line(cells) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
