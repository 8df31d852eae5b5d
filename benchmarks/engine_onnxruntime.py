"""ONNX Runtime GenAI: int4, symmetric, groups of 128 (of 64 where 128 does not divide), made by its model builder.

Needs onnxruntime-genai; to make the model also onnx, onnx-ir, torch and transformers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import engine
import numpy as np
import random_model


def write_tokenizer(shape: str, folder: Path) -> None:
    """A tokenizer of made-up words, because the builder insists on one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(random_model.config(shape)["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2").save_pretrained(folder)


def make(shape: str, folder: Path) -> None:
    group_size = 128 if random_model.config(shape)["hidden_size"] % 128 == 0 else 64
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        checkpoint = Path(temporary, "checkpoint")
        checkpoint.mkdir()
        random_model.write_checkpoint(shape, checkpoint)
        write_tokenizer(shape, checkpoint)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(folder)]
        command += ["-c", f"{temporary}/cache", "-p", "int4", "-e", "cpu", "--extra_options"]
        command += [f"block_size={group_size}", "is_symmetric=true", "accuracy_level=4"]
        subprocess.run(command, check=True)


class OnnxRuntime:
    def __init__(self, shape: str, folder: Path, n_threads: int, n_ctx: int):
        import onnxruntime_genai

        path = folder / "genai_config.json"
        settings = json.loads(path.read_text())
        settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = n_threads
        path.write_text(json.dumps(settings))
        self._genai, self._model, self._n_ctx = onnxruntime_genai, onnxruntime_genai.Model(str(folder)), n_ctx
        self._vocab_size = random_model.config(shape)["vocab_size"]
        self._rng = np.random.default_rng(0)
        self.version = f"onnxruntime-genai {version('onnxruntime-genai')}"

    def _times(self, n_prompt: int, n_new: int) -> list[float]:
        """Seconds from the prompt to each of `n_new` tokens."""
        settings = self._genai.GeneratorParams(self._model)
        settings.set_search_options(max_length=self._n_ctx, min_length=self._n_ctx, do_sample=False)  # no early end
        generator = self._genai.Generator(self._model, settings)
        prompt = self._rng.integers(3, self._vocab_size, n_prompt).astype(np.int32)
        times = []
        started = time.perf_counter()
        generator.append_tokens(prompt)
        for _ in range(n_new):
            generator.generate_next_token()
            times.append(time.perf_counter() - started)
        return times

    def prefill(self, n: int, depth: int) -> float:
        if depth:
            raise NotImplementedError("prefill after a depth")
        return self._times(n, 1)[0]

    def decode(self, n: int, depth: int) -> float:
        times = self._times(max(depth, 1), n + 1)
        return times[-1] - times[0]


if __name__ == "__main__":
    engine.main(make, OnnxRuntime)
