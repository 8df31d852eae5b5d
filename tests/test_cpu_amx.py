"""The AMX kernels on any machine: the tile unit's five instructions written out as loops, the same bits asked for.

It says nothing of the real unit's instructions, only that they are given the right addresses in the right order.
"""

import numpy as np
import pytest

pytest.importorskip("numba")
from llvmlite import ir
from numba import types
from numba.core import cgutils

from edgellama.backends.cpu import amx
from edgellama.backends.cpu.jit import compiled
from edgellama.backends.cpu.shapes import AMX_TOKENS, STEP
from edgellama.backends.cpu.simd import ADDRESS, I8, I32, I64, vector_intrinsic
from edgellama.backends.cpu.tiles import ARGUMENTS
from test_cpu_matmul import ALL, NONE, SOME, Product

LINES, LINE = 16, 64


def emulate(b, name: str, *args) -> None:
    """What `amx._emit_amx` emits, on eight buffers of 1 KB in place of the registers."""
    registers = b.module.globals.get("registers")
    if registers is None:
        registers = ir.GlobalVariable(b.module, ir.ArrayType(I8, 8 * LINES * LINE), "registers")
        registers.linkage, registers.initializer = "internal", ir.Constant(registers.value_type, None)

    def cell(register: int, offset):
        """The address of a byte of a register; `offset`: int64."""
        return b.gep(registers, [I64(0), b.add(offset, I64(register * LINES * LINE))])

    def copy(register: int, memory, stride, load: bool) -> None:
        with cgutils.for_range(b, I64(LINES)) as line, cgutils.for_range(b, I64(LINE)) as byte:
            inside = cell(register, b.add(b.mul(line.index, I64(LINE)), byte.index))
            outside = b.gep(memory, [b.add(b.mul(line.index, stride), byte.index)])
            b.store(b.load(outside if load else inside), inside if load else outside)

    if name == "tilezero":
        with cgutils.for_range(b, I64(LINES * LINE)) as byte:
            b.store(I8(0), cell(args[0], byte.index))
    elif name in ("tileloadd64", "tilestored64"):
        copy(*args, load=name == "tileloadd64")
    elif name == "tdpbssd":
        to, left, right = args
        with cgutils.for_range(b, I64(LINES)) as m, cgutils.for_range(b, I64(LINES)) as n:
            at = b.add(b.mul(m.index, I64(LINE)), b.mul(n.index, I64(4)))
            total = b.bitcast(cell(to, at), I32.as_pointer())
            with cgutils.for_range(b, I64(LINES)) as word:
                for j in range(4):
                    x = cell(left, b.add(b.mul(m.index, I64(LINE)), b.add(b.mul(word.index, I64(4)), I64(j))))
                    w = cell(right, b.add(b.mul(word.index, I64(LINE)), b.add(b.mul(n.index, I64(4)), I64(j))))
                    product = b.mul(b.sext(b.load(x), I32), b.sext(b.load(w), I32))
                    b.store(b.add(b.load(total), product), total)
    else:
        assert name in ("ldtilecfg", "tilerelease")


@pytest.fixture(scope="module", params=[4, 8])
def bits_and_kernel(request):
    """Bits of the weights, and the AMX kernel for them, compiled with `emulate`."""
    bits = request.param

    def emit_amx_tile(b, weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks,
                      tiles):  # fmt: skip
        amx.integers(bits)(b, weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride, add,
                           blocks, tiles)  # fmt: skip

    tile = vector_intrinsic(types.void, *[ADDRESS] * ARGUMENTS)(emit_amx_tile)

    @compiled
    def run(a):
        tile(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amx, "_emit_amx", emulate)
        patch.setattr(amx, "GROUPS", 2)  # so that three groups are more than go at a time
        run.compile((types.int64[::1],))
    return bits, run


@pytest.mark.parametrize("ceiling", [ALL, SOME, NONE], ids=["all", "some", "none"])
@pytest.mark.parametrize("shape", [(40, 300), (16, 576)])
def test_the_same_bits_as_one_token_at_a_time(bits_and_kernel, shape, ceiling):
    bits, run = bits_and_kernel
    product = Product(bits, shape, 19, ceiling)
    arrays = product.pack(AMX_TOKENS, by_token=True)
    out = np.zeros((2 * AMX_TOKENS, product.n), np.float32)
    add = np.random.default_rng(1).standard_normal((19, shape[0])).astype(np.float32)
    out[:19, : shape[0]] = add
    pack = [arrays[name].ctypes.data for name in ("codes", "highs", "masks", "scales", "sums")]
    weights = [a.ctypes.data for a in (product.weights, product.packed_scales, product.bias)]
    inputs = -(-shape[1] // STEP) * STEP
    arguments = [*weights, *pack, inputs, out.ctypes.data, out.strides[0], 1, product.n // 16, 2]
    run(np.array(arguments, np.int64))
    assert (out[:19, : shape[0]] == product.run(0, bias=True, add=add)).all()
