"""What every engine's process shares: its command line and its talk with `side_by_side.py`.

    python engine_X.py make  SHAPE FOLDER                  # write the engine's model into the folder
    python engine_X.py serve SHAPE FOLDER THREADS N_CTX    # load it, then answer each line of stdin with one of stdout

A request is {"test": "pp" or "tg", "n": tokens, "depth": tokens before them}, an answer {"seconds": s}; the first
answer, {"version": text, "bytes": size of the model}, says that the model is loaded. Needs the standard library only;
each engine's script runs in an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    version: str

    def prefill(self, n: int, depth: int) -> float:
        """Seconds to process `n` tokens in one go after `depth` others, to the last one's logits."""

    def decode(self, n: int, depth: int) -> float:
        """Seconds of `n` steps of one token each after `depth` tokens."""


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(make: Callable[[str, Path], None], load: Callable[[str, Path, int, int], Engine]) -> None:
    """Run an engine's script: `make(shape, folder)`, `load(shape, folder, n_threads, n_ctx)`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not get between the answers
    verb, shape, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if verb == "make":
        make(shape, folder)
        return

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    engine = load(shape, folder, int(sys.argv[4]), int(sys.argv[5]))
    answer({"version": engine.version, "bytes": folder_bytes(folder)})
    for line in sys.stdin:
        request = json.loads(line)
        engine.decode(2, 0)  # a process that was stopped may have lost pages or its place on a core
        run = engine.prefill if request["test"] == "pp" else engine.decode
        answer({"seconds": run(request["n"], request["depth"])})
