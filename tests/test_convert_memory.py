"""Memory of real conversions, seen from outside: matrices of Llama-2-7B's shapes, fewer layers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "convert_7b.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def measured(tmp_path, layers, *options):
    command = [sys.executable, str(SCRIPT), "--layers", str(layers), "--folder", str(tmp_path), "--json", *options]
    result = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=600).stdout)
    assert list(tmp_path.iterdir()) == []
    return result


def test_memory_is_a_bounded_working_set_whatever_the_depth(tmp_path):
    one, three = measured(tmp_path, 1, "--method", "rtn"), measured(tmp_path, 3, "--method", "rtn")
    assert three["weights"] > 1.5 * one["weights"]
    assert three["peak_anonymous"] < min(1.5e9, one["peak_anonymous"] + 50e6)


def test_max_ram_holds_as_measured_from_outside(tmp_path):
    limit = 150_000_000
    result = measured(tmp_path, 1, "--max-ram", str(limit), "--threads", "2")
    assert result["peak_anonymous"] <= limit
    assert result["peak_anonymous"] < measured(tmp_path, 1, "--threads", "8")["peak_anonymous"]
