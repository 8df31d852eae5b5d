"""OpenVINO GenAI: int4, symmetric, groups of 128 (of 64 where 128 does not divide), exported by optimum-intel.

Needs openvino-genai; to make the model also optimum-intel, nncf and torch.
"""

from __future__ import annotations

import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import engine
import numpy as np
import random_model


def make(shape: str, folder: Path) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    group_size = 128 if random_model.config(shape)["hidden_size"] % 128 == 0 else 64
    quantization = OVWeightQuantizationConfig(bits=4, sym=True, group_size=group_size, ratio=1.0)
    with tempfile.TemporaryDirectory(dir=folder.parent) as checkpoint:
        random_model.write_checkpoint(shape, Path(checkpoint))
        model = OVModelForCausalLM.from_pretrained(
            checkpoint, export=True, compile=False, quantization_config=quantization
        )
        model.save_pretrained(folder)


class OpenVINO:
    def __init__(self, shape: str, folder: Path, n_threads: int, n_ctx: int):
        import openvino
        import openvino_genai

        self._genai, self._tensor = openvino_genai, openvino.Tensor
        self._pipe = openvino_genai.LLMPipeline(str(folder), "CPU", INFERENCE_NUM_THREADS=n_threads)
        self._vocab_size = random_model.config(shape)["vocab_size"]
        self._rng = np.random.default_rng(0)
        self.version = f"openvino-genai {version('openvino-genai')}"

    def _times(self, n_prompt: int, n_new: int) -> list[float]:
        """Seconds from the call to each of `n_new` tokens. Prompts differ, so that no cached prefix helps."""
        genai, times = self._genai, []

        class Clock(genai.StreamerBase):
            def write(self, tokens):
                times.extend([time.perf_counter()] * (1 if isinstance(tokens, int) else len(tokens)))
                return genai.StreamingStatus.RUNNING

            def end(self):
                pass

        settings = genai.GenerationConfig(max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False, ignore_eos=True)
        prompt = self._tensor(self._rng.integers(3, self._vocab_size, (1, n_prompt)))
        started = time.perf_counter()
        self._pipe.generate(prompt, settings, Clock())
        assert len(times) == n_new, f"{n_new} tokens wanted, {len(times)} came"
        return [t - started for t in times]

    def prefill(self, n: int, depth: int) -> float:
        if depth:
            raise NotImplementedError("prefill after a depth")
        return self._times(n, 1)[0]

    def decode(self, n: int, depth: int) -> float:
        times = self._times(max(depth, 1), n + 1)
        return times[-1] - times[0]


if __name__ == "__main__":
    engine.main(make, OpenVINO)
