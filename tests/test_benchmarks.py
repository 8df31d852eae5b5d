"""The random models of benchmarks/: right files, finite activations, and no two equal matrices in a checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgellama.backends.reference import ReferenceBackend
from edgellama.format import open_model
from edgellama_convert import convert

TINY = (300, 72, 200, 2, 4, 2, 64, 1e4)  # nothing is a multiple of a group or of a row block


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def random_model(request, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import random_model

    monkeypatch.setitem(random_model.SHAPES, "tiny", (*TINY, request.param))
    return random_model


def logits(path: Path) -> np.ndarray:
    with open_model(path) as file:
        file.verify()
        return ReferenceBackend(file, 16).forward(np.arange(9), np.arange(9), np.zeros(9, int), np.arange(9))


@pytest.mark.parametrize("lm_head_bits", [4, 8, 16])
def test_random_file_runs(random_model, tmp_path, lm_head_bits):
    result = logits(random_model.write_edgellama("tiny", tmp_path / "tiny.edgellama", lm_head_bits))
    assert np.isfinite(result).all()
    assert 0.05 < result.std() < 0.5  # about STD * sqrt(hidden_size)


def test_random_checkpoint_converts(random_model, tmp_path):
    random_model.write_checkpoint("tiny", tmp_path)
    convert(tmp_path, tmp_path / "tiny.edgellama", method="rtn")
    result = logits(tmp_path / "tiny.edgellama")
    assert np.isfinite(result).all()
    assert 0.05 < result.std() < 0.5


def test_no_two_matrices_are_equal(random_model, tmp_path):
    random_model.write_checkpoint("tiny", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: value.shape for name, value in tensors.items()} == random_model.tensors("tiny")
    matrices = [value.tobytes() for value in tensors.values() if value.ndim == 2]
    assert len(set(matrices)) == len(matrices)


def test_every_shape_has_a_valid_config(random_model):
    from edgellama.config import LlamaConfig

    for shape in random_model.SHAPES:
        assert LlamaConfig.from_dict(random_model.config(shape)).num_hidden_layers == random_model.SHAPES[shape][3]


@pytest.mark.torch
def test_the_gpu_benchmark_runs_without_a_gpu(tmp_path):
    """The script itself, end to end on a tiny shape: one table of whole lines."""
    script = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
    command = [sys.executable, script, "--device", "torch-cpu", "--shapes", "tiny", "-r", "1", "--no-tests", "--tune"]
    run = subprocess.run(
        [*command, "--folder", tmp_path], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    table = [line for line in run.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2 * 6 + 3 and len({line.count("|") for line in table}) == 1
