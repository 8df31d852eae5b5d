"""edgellama and other engines on one shape in the same minutes: tokens a second, and the ratios.

    python benchmarks/side_by_side.py smollm2-135m --llama-cpp ~/llama/bin/python --openvino ~/openvino/bin/python

Each engine runs in a process and an environment of its own, given by its Python (engine_*.py say what it must have);
one that is missing is left out with the reason. All weights are random, of one shape. The rounds alternate (A B C,
A B C), and an engine is stopped while another one runs. The memory's bandwidth is measured before and after each
sample, because shared machines change speed from minute to minute: compare ratios, not figures of different runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_model import SHAPES

from edgellama import bench
from edgellama.backends.cpu.bandwidth import Bandwidth
from edgellama.format import open_model

HERE = Path(__file__).resolve().parent
ENGINES = ("edgellama", "llama_cpp", "openvino", "onnxruntime")


class Worker:
    """One engine's process, stopped unless it is asked something. RuntimeError, one line, if it does not work."""

    def __init__(self, name: str, python: str, shape: str, folder: Path, n_threads: int, n_ctx: int):
        self.name = name
        script = str(HERE / f"engine_{name}.py")
        self._log = folder / f"{name}.log"
        model = folder / f"{shape}.{name}"
        self._process: subprocess.Popen | None = None
        environment = {**os.environ, "OMP_NUM_THREADS": str(n_threads), "PYTHONPATH": _path(python)}
        with open(self._log, "w") as log:
            try:
                if not model.exists():
                    partial = folder / f"{shape}.{name}.partial"
                    shutil.rmtree(partial, ignore_errors=True)  # of an earlier failure
                    partial.mkdir()
                    command = [python, script, "make", shape, str(partial)]
                    subprocess.run(command, stdout=log, stderr=log, env=environment, check=True)
                    partial.rename(model)
                self._process = subprocess.Popen(
                    [python, script, "serve", shape, str(model), str(n_threads), str(n_ctx)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                )
            except (OSError, subprocess.CalledProcessError) as error:
                raise RuntimeError(self._reason() or str(error)) from None
        ready = self._read()
        self.version, self.model_bytes = ready["version"], ready["bytes"]
        self._process.send_signal(signal.SIGSTOP)

    def seconds(self, test: bench.Test) -> float:
        """One sample of a test."""
        kind, n = ("pp", test.n_prompt) if test.n_prompt else ("tg", test.n_gen)
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"test": kind, "n": n, "depth": test.n_depth}) + "\n")
        self._process.stdin.flush()
        seconds = self._read()["seconds"]
        self._process.send_signal(signal.SIGSTOP)
        return seconds

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._reason())
        return json.loads(line)

    def _reason(self) -> str:
        """The last line that the process wrote to its log."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


def _path(python: str) -> str:
    """Our own Python finds edgellama as this process does; other environments see nothing of ours."""
    return os.pathsep.join(sys.path[1:]) if python == sys.executable else ""


def start(args: argparse.Namespace, folder: Path) -> list[Worker]:
    """The engines that work; says why another one does not."""
    n_ctx = 64 + max(args.depth + args.n_gen, args.n_prompt)
    workers = []
    for name in ENGINES:
        python = getattr(args, name)
        if python is None:
            print(f"{name}: left out, no --{name.replace('_', '-')} PYTHON")
            continue
        try:
            workers.append(Worker(name, python, args.shape, folder, args.threads, n_ctx))
        except RuntimeError as error:
            print(f"{name}: left out: {error}")
    return workers


def measure(workers: list[Worker], tests: list[bench.Test], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each test and engine, with all samples."""
    bandwidth = Bandwidth(args.threads)
    rows = []
    for test in tests:
        for worker in workers:
            worker.seconds(test)  # to warm up
        rates: dict[str, list[float]] = {worker.name: [] for worker in workers}
        bandwidth.samples.clear()
        for _ in range(args.rounds):
            for worker in workers:
                bandwidth.measure()
                rates[worker.name].append((test.n_prompt or test.n_gen) / worker.seconds(test))
                bandwidth.measure()
        memory = statistics.median(bandwidth.samples)
        ours = rates.get("edgellama")
        for worker in workers:
            median = statistics.median(rates[worker.name])
            row = {"test": test.name, "engine": worker.name, "version": worker.version}
            row |= {"model_bytes": worker.model_bytes, "bandwidth": memory}
            row |= {"median_ts": median, "samples_ts": rates[worker.name]}
            # Round by round: what slowed a round slowed both.
            ratios = [mine / theirs for mine, theirs in zip(ours, rates[worker.name], strict=True)] if ours else [0]
            rows.append({**row, "ratio": statistics.median(ratios) or None})
    bandwidth.close()
    return rows


def show(rows: list[dict[str, Any]], shares: dict[str, float]) -> None:
    print("| test | engine | tok/s, median (all samples) | edgellama, median of the rounds |")
    print("|---|---|---|---|")
    for row in rows:
        samples = ", ".join(f"{sample:.1f}" for sample in row["samples_ts"])
        ratio = f"{row['ratio']:.2f} x" if row["ratio"] and row["engine"] != "edgellama" else ""
        print(f"| {row['test']} | {row['version']} | {row['median_ts']:.1f} ({samples}) | {ratio} |")
    for test in dict.fromkeys(row["test"] for row in rows):
        memory = next(row["bandwidth"] for row in rows if row["test"] == test)
        share = f"; edgellama's share of it: {shares[test]:.0%}" if test in shares else ""
        print(f"{test}: memory bandwidth {memory / 1e9:.1f} GB/s{share}")


def bandwidth_shares(rows: list[dict[str, Any]], tests: list[bench.Test], path: Path) -> dict[str, float]:
    """Test -> edgellama's bytes a second over the memory's, where it decodes."""
    shares = {}
    with open_model(path) as file:
        for test in tests:
            for row in rows:
                if row["engine"] == "edgellama" and row["test"] == test.name and test.n_gen:
                    shares[test.name] = bench.bytes_per_step(file, test) * row["median_ts"] / row["bandwidth"]
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare edgellama with other engines on random weights of one shape.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--edgellama", metavar="PYTHON", default=sys.executable, help="default: this one")
    for name in ENGINES[1:]:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="PYTHON", help="of its own environment")
    parser.add_argument("-p", "--n-prompt", type=int, default=512, metavar="N", help="tokens of prefill; 0: none")
    parser.add_argument("-n", "--n-gen", type=int, default=64, metavar="N", help="tokens to generate; 0: none")
    parser.add_argument("-d", "--depth", type=int, default=0, metavar="N", help="tokens in the cache before decode")
    parser.add_argument("-t", "--threads", type=int, default=2, metavar="T")
    parser.add_argument("-r", "--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--folder", type=Path, help="keep the models here for the next time (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="edgellama-bench-") as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tests = [bench.Test(args.n_prompt, 0, 0, 1)] if args.n_prompt else []
        tests += [bench.Test(0, args.n_gen, args.depth, 1)] if args.n_gen else []
        workers = start(args, folder)
        if not workers:
            sys.exit("no engine works")
        try:
            rows = measure(workers, tests, args)
        finally:
            for worker in workers:
                worker.close()
        ours = folder / f"{args.shape}.edgellama" / "model.edgellama"
        shares = bandwidth_shares(rows, tests, ours) if ours.exists() else {}
    print(f"{args.shape}, {args.threads} threads, {time.strftime('%Y-%m-%d %H:%M')}, {platform.platform()}")
    show(rows, shares)
    if args.json:
        args.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
