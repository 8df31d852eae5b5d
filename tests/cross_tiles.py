"""Cross-compiles the tile kernels with LLVM: `python cross_tiles.py FOLDER aarch64 +neon,+dotprod`.

Writes FOLDER/tiles.o (C functions named after the kernels) and FOLDER/tiles.s. A process of its own: the
kernels ask which CPU Numba compiles for when they are imported, and here the answer is made up.
"""

import os
import platform
import sys
from pathlib import Path

ARCH, FEATURES = sys.argv[2:4]
os.environ["NUMBA_CPU_NAME"], os.environ["NUMBA_CPU_FEATURES"] = "generic", FEATURES
platform.machine = lambda: ARCH

import llvmlite.binding as llvm  # noqa: E402
from llvmlite import ir  # noqa: E402

from edgellama.backends.cpu.target import TARGET  # noqa: E402
from edgellama.backends.cpu.tiles import ARGUMENTS, EMITTERS  # noqa: E402

TRIPLE = f"{ARCH}-unknown-linux-gnu"


def build() -> ir.Module:
    """One external function for each kernel: void(int64 x ARGUMENTS)."""
    module = ir.Module("tiles")
    module.triple = TRIPLE
    for name, emitter in EMITTERS.items():
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * ARGUMENTS)
        function = ir.Function(module, kind, name)
        builder = ir.IRBuilder(function.append_basic_block())
        emitter(builder, *function.args)
        builder.ret_void()
    return module


def main(folder: Path) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine("", FEATURES, opt=3, reloc="pic")
    module = llvm.parse_assembly(str(build()))
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    (folder / "tiles.o").write_bytes(machine.emit_object(module))
    (folder / "tiles.s").write_text(machine.emit_assembly(module))
    print(*TARGET)


main(Path(sys.argv[1]))
