"""Every x86 path runs in a process of its own, compiled for another CPU, and must print the same bits."""

import importlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
from edgellama.backends.cpu.target import TARGET, choose

PROGRAMS = ("test_cpu_matmul", "test_cpu_attention")
AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
PLAIN = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}


@pytest.mark.parametrize(
    ("arch", "name", "features", "dot4"),
    [
        ("x86_64", "znver4", "+avx2,+f16c,+avx512f,+avx512bw,+avx512vnni", "avx512vnni"),
        ("x86_64", "znver4", "+avx2,+f16c,-avx512vnni", "avx2"),
        ("x86_64", "icelake-server", "", "avx512vnni"),
        ("AMD64".lower(), "alderlake", "+avx2,+f16c,+avxvnni", "avxvnni"),
        ("x86_64", "haswell", "", "avx2"),
        ("x86_64", "skylake-avx512", "+avx512f,+avx512bw,+avx2,+f16c", "avx2"),
        ("x86_64", "x86-64", "+sse2", "plain"),
        ("aarch64", "neoverse-n1", "+neon,+dotprod", "neon"),
        ("arm64", "apple-m1", "", "neon"),
        ("aarch64", "cortex-a53", "+neon", "plain"),
        ("riscv64", "generic-rv64", "", "plain"),
    ],
)
def test_the_instruction_follows_from_what_numba_compiles_for(arch, name, features, dot4):
    assert choose(arch, name, features).dot4 == dot4


def digest_on(environment: dict[str, str], program: str) -> list[str]:
    """[dot4, hash] as printed by a test program compiled for another CPU."""
    env = {**os.environ, **environment}
    path = Path(__file__).with_name(f"{program}.py")
    done = subprocess.run([sys.executable, path], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="x86 instruction sets")
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("environment", "dot4"), [(AVX2, "avx2"), (PLAIN, "plain")])
def test_every_path_gives_the_same_bits(environment, dot4, program):
    if dot4 == "avx2" and TARGET.dot4 == "plain":
        pytest.skip("this CPU has no AVX2")
    expected = importlib.import_module(program).digest()
    assert digest_on(environment, program) == [dot4, expected]
