"""The tile kernels for other CPUs: the instructions LLVM chooses, and on aarch64 the same bits, under emulation."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")
import llvmlite.binding as llvm

from edgellama.backends.cpu.tiles import EMITTERS
from test_cpu_matmul import Product

HERE = Path(__file__).parent
NAMES = list(EMITTERS)
TARGETS = {
    "aarch64 dotprod": ("aarch64", "+neon,+dotprod"),
    "aarch64": ("aarch64", "+neon"),
    "avxvnni": ("x86_64", "+avx2,+fma,+f16c,+avxvnni"),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """kind -> (folder with tiles.o and tiles.s, a Target as words), compiled once."""
    llvm.initialize_all_targets()
    done = {}

    def get(kind: str):
        arch, features = TARGETS[kind]
        try:
            llvm.Target.from_triple(f"{arch}-unknown-linux-gnu")
        except RuntimeError:
            pytest.skip(f"this llvmlite cannot compile for {arch}")
        if kind not in done:
            folder = tmp_path_factory.mktemp("tiles")
            command = [sys.executable, HERE / "cross_tiles.py", folder, arch, features]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            assert ran.returncode == 0, ran.stderr[-2000:]
            done[kind] = folder, ran.stdout.split()
        return done[kind]

    return get


@pytest.mark.parametrize(
    ("kind", "dot4", "dots", "no_dots", "others"),
    [
        ("aarch64 dotprod", "neon", "sdot", "usdot", ("fmla", "fcvtl")),
        ("aarch64", "plain", "mla", "sdot", ("fmla", "fcvtl")),
        ("avxvnni", "avxvnni", "vpdpbusd", "zmm", ("vfmadd", "vcvtph2ps")),
    ],
)
def test_instructions(compiled, kind, dot4, dots, no_dots, others):
    folder, target = compiled(kind)
    assert target[0] == dot4
    assembly = (folder / "tiles.s").read_text()
    for name in NAMES:
        body = assembly.split(f"\n{name}:")[1].split(".size")[0]
        wanted = others if name.startswith("f16") else (dots, *others)
        assert all(word in body for word in wanted), name
        assert no_dots not in body, name
        assert "\tbl\t" not in body and "\tcall" not in body, f"{name} calls a function"


@pytest.fixture(scope="module")
def emulated(compiled):
    """kind -> an aarch64 program that runs one kernel, and the columns of its tiles."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu, qemu-user)")

    def get(kind: str):
        folder, target = compiled(kind)
        (folder / "kernels.h").write_text("".join(f"KERNEL({name})\n" for name in NAMES))
        program = folder / "driver"
        sources = [HERE / "cross_driver.c", folder / "tiles.o"]
        subprocess.run([compiler, "-static", "-I", folder, *sources, "-o", program, "-lm"], check=True)
        return [emulator, "-cpu", "max", program], [int(columns) for columns in target[2:4]]

    return get


@pytest.mark.parametrize("kind", ["aarch64 dotprod", "aarch64"])
def test_the_same_bits_under_emulation(emulated, kind):
    command, (few, many) = emulated(kind)
    for index, name in enumerate(NAMES):
        weights, size = name.split("_")
        bits, tile = int(weights.lstrip("intf")), {"one": 1, "few": few, "many": many}[size]
        product = Product(bits, (40, 300), tile)
        add = np.random.default_rng(1).standard_normal((tile, product.n)).astype(np.float32)
        add[:, 40:] = 0
        pack = product.pack(tile)
        x = pack["values"] if bits == 16 else pack["codes"]
        quantized = [pack[name] for name in ("highs", "masks", "scales", "sums")]
        arrays = [product.weights, product.packed_scales, product.bias, x, *quantized, add]
        head = [index, 320, add.strides[0], 1, product.n // 16, *(a.nbytes for a in arrays)]
        data = np.array(head, np.int64).tobytes() + b"".join(a.tobytes() for a in arrays)
        ran = subprocess.run(command, input=data, capture_output=True, check=True)
        got = np.frombuffer(ran.stdout, np.float32).reshape(tile, product.n)[:, :40]
        assert (got == product.run(0, bias=True, add=add[:, :40])).all(), name
