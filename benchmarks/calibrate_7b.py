"""Times `gptq` on layers of Llama-2-7B's shapes (random weights), and watches its memory.

    python benchmarks/calibrate_7b.py                  # one layer, 16,384 tokens: minutes, 5 GB of disk in --folder
    python benchmarks/calibrate_7b.py --tokens 4096    # a quarter of the text
    python benchmarks/calibrate_7b.py --device cuda    # on the GPU, whose memory is told, too

Prints the seconds after which each matrix was done. What matters is the shape: random weights take as long as others.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import convert_7b
import numpy as np

from edgellama import devices
from edgellama.backends.cpu.threads import default_threads
from edgellama.config import LlamaConfig
from edgellama.devices import TORCH_DEVICES
from edgellama.errors import DeviceError
from edgellama_convert.checkpoint import Checkpoint
from edgellama_convert.gptq import CalibratedLayers, WorkFolder, memory_needed
from edgellama_convert.resources import private_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--device", choices=("cpu", *TORCH_DEVICES), default="cpu")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    args = parser.parse_args()
    try:
        devices.resolve(args.device)
    except DeviceError as error:
        parser.error(str(error))
    peak = 0

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, private_bytes() or 0)
            time.sleep(0.02)

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        convert_7b.write_checkpoint(folder, args.layers)
        config = LlamaConfig.from_dict({**convert_7b.CONFIG, "num_hidden_layers": args.layers})
        ids = np.random.default_rng(0).integers(
            config.vocab_size, size=(max(1, args.tokens // 512), 512), dtype=np.int32
        )
        threading.Thread(target=watch, daemon=True).start()
        before = private_bytes() or 0
        started, cpu = time.perf_counter(), os.times()

        def on_weights(n: int) -> None:
            print(f"{time.perf_counter() - started:6.1f} s  {n / 1e6:.1f} M weights done", flush=True)

        with Checkpoint(folder) as checkpoint, WorkFolder(folder / "out", {}) as work:
            layers = CalibratedLayers(
                checkpoint, config, ids, work, embedding_bits=16, n_threads=args.threads, on_weights=on_weights,
                device=args.device,
            )  # fmt: skip
            layers.run()
        seconds, used = time.perf_counter() - started, os.times()
    print(
        f"{args.layers} layer(s), {ids.size} tokens, {args.device}, {args.threads} threads: {seconds:.0f} s "
        f"({used.user - cpu.user + used.system - cpu.system:.0f} s of CPU time), "
        f"peak memory {peak / 1e9:.2f} GB (planned {(before + memory_needed(config, 512)) / 1e9:.2f} GB)"
    )
    if args.device == "cuda":
        import torch

        print(f"peak memory on the GPU {torch.cuda.max_memory_reserved() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
