"""The Triton kernels without a GPU: under Triton's interpreter against NumPy, and compiled for one not there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed (there is none for this platform)"
    ),
]
HERE = Path(__file__).parent


def run_script(name: str, folder: Path, *arguments: str, **environment: str) -> dict:
    """What a script of this folder prints as JSON, in a process of its own: TRITON_INTERPRET is read at import."""
    paths = [HERE, HERE.parent, HERE.parent / "convert", os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    run = subprocess.run(
        [sys.executable, HERE / name, folder, *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


CHECKS = "multiply multiply_two every_code_is_exact gemm dequantize attention_mha attention_gqa attention_int8".split()
MODELS = "gqa mqa_int8_cache mha_biases gelu_tied gelu_pytorch_tanh_tied_4 relu_tied_16 dynamic_rope wide".split()
MODELS += ["mixed_qkv_down", "mixed_o_gate_up"]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return run_script("kernel_checks.py", tmp_path_factory.mktemp("kernels"), TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", [*CHECKS, *MODELS])
def test_interpreted(interpreted, name):
    """`kernel_checks.check_NAME`, or a whole step of the model of that name in `kernel_checks.MODELS`."""
    assert interpreted[name] is None, interpreted[name]


def test_every_check_is_told_here(interpreted):
    assert set(interpreted) == {*CHECKS, *MODELS}


def test_compiled_for_compute_capability_90(tmp_path):
    """No spills, and every kernel that streams the weights of one token's step loads 16 bytes at a time."""
    outcome = run_script("kernel_compile.py", tmp_path, "90")["90"]
    assert {name: spilled for name, (spilled, _) in outcome.items() if spilled} == {}
    streams = ["qkv, 1", "project, 1", "gate_up, 1", "head_logits, 1", "attend, 1", "gemm, 5", "dequantize, all"]
    streams += ["qkv, 1, 8 bits", "project, 1, 8 bits", "gate_up, 1, 8 bits", "gemm, 5, 8 bits"]
    assert {name: outcome[name][1] for name in streams} == dict.fromkeys(streams, 128)
