"""A small SIMD vocabulary for Numba: vectors of 16 lanes, in code that is compiled for the user's own CPU.

Vectors are opaque Numba types over LLVM vectors and always 512 bits wide in the IR; LLVM splits them on
narrower machines. Addresses are plain integers. Only the sum of four neighbouring int8 products has a
lowering per instruction set; everything else is portable IR. Each arithmetic step is written out (`fma`
is one rounding, `mul` then `add` two), so results have the same bits on every machine.

Functions in lower case are usable in jitted code; those that start with `emit_` build IR for the tile
kernels in `matmul` and `attention`. The module knows nothing of quantization or models.
"""

from __future__ import annotations

import inspect
import math

import numpy as np
from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model
from numba.np import numpy_support

from .target import TARGET

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
V_I8 = ir.VectorType(I8, 64)
V_I32 = ir.VectorType(I32, 16)
V_F32 = ir.VectorType(F32, 16)
V_F16 = ir.VectorType(F16, 16)
_LLVM = {"i8x64": V_I8, "i32x16": V_I32, "f32x16": V_F32}


class Vector(types.Type):
    """A Numba type for one LLVM vector register (or several)."""

    def __init__(self, name: str):
        self.llvm = _LLVM[name]
        super().__init__(name=f"simd.{name}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, data_model_manager, fe_type):
        super().__init__(data_model_manager, fe_type, fe_type.llvm)


i32x16 = Vector("i32x16")
f32x16 = Vector("f32x16")
ADDRESS = types.intp

# ---- IR building blocks ------------------------------------------------------------------------------


def emit_splat(builder, value, lanes: int = 16):
    """A vector with `value` in every lane."""
    vector = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(
        one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    )


def emit_load(builder, address, llvm_type, align: int):
    """Load `llvm_type` from an integer address."""
    value = builder.load(builder.inttoptr(address, llvm_type.as_pointer()))
    value.align = align
    return value


def emit_store(builder, value, address, align: int) -> None:
    """Store to an integer address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def emit_prefetch(builder, address, keep: int = 3) -> None:
    """Ask for the cache line at an address, which may be no memory at all; nothing waits.

    keep: 3 for the first-level cache, 2 for the second.
    """
    read, keep, data = I32(0), I32(keep), I32(1)
    pointer = builder.inttoptr(address, I8.as_pointer())
    emit_call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, read, keep, data])


def emit_offset(builder, address, *terms):
    """address + the sum of terms, each an int, an IR value, or a (value, int) product."""
    for term in terms:
        if isinstance(term, tuple):
            term = builder.mul(term[0], I64(term[1]))
        address = builder.add(address, I64(term) if isinstance(term, int) else term)
    return address


def emit_call(builder, name: str, result, args):
    """Call an LLVM intrinsic (or a C function) by name."""
    function_type = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def emit_fma(builder, a, b, c):
    """a * b + c with one rounding."""
    return emit_call(builder, "llvm.fma.v16f32", V_F32, [a, b, c])


def _shaped(kind, like):
    """A scalar type, or a vector of it with as many lanes as the type `like`."""
    return ir.VectorType(kind, like.count) if isinstance(like, ir.VectorType) else kind


def _constant(kind, like, value):
    shaped = _shaped(kind, like)
    return ir.Constant(shaped, [value] * like.count if shaped is not kind else value)


def emit_from_f16(builder, half):
    """float16 (one or a vector) -> float32; exact."""
    wide, bits = _shaped(F32, half.type), _shaped(I32, half.type)
    if TARGET.float16:
        return builder.fpext(half, wide)
    # Move exponent and fraction into place and correct the exponent's bias by a multiplication, which is
    # exact for subnormals too. An infinity becomes 65536: no file and no cache of ours holds one.
    h = builder.zext(builder.bitcast(half, _shaped(I16, half.type)), bits)
    magnitude = builder.shl(builder.and_(h, _constant(I32, bits, 0x7FFF)), _constant(I32, bits, 13))
    value = builder.fmul(builder.bitcast(magnitude, wide), _constant(F32, bits, 2.0**112))
    sign = builder.shl(builder.and_(h, _constant(I32, bits, 0x8000)), _constant(I32, bits, 16))
    return builder.bitcast(builder.or_(builder.bitcast(value, bits), sign), wide)


def emit_to_f16(builder, value):
    """float32 (one or a vector) -> float16, to nearest even; beyond its range, its largest."""
    wide, bits, half = value.type, _shaped(I32, value.type), _shaped(F16, value.type)
    top = _constant(F32, bits, 65504.0)
    bottom = _constant(F32, bits, -65504.0)
    value = emit_min(builder, emit_max(builder, value, bottom), top)
    if TARGET.float16:
        return builder.fptrunc(value, half)
    # F. Giesen's float_to_half_fast3_rtne: an integer addition rounds normal numbers, adding 0.5 subnormal ones.
    raw = builder.bitcast(value, bits)
    sign = builder.and_(raw, _constant(I32, bits, -0x80000000))
    magnitude = builder.xor(raw, sign)
    odd = builder.and_(builder.lshr(magnitude, _constant(I32, bits, 13)), _constant(I32, bits, 1))
    rebias = _constant(I32, bits, 0xFFF - 0x38000000)
    normal = builder.lshr(builder.add(builder.add(magnitude, rebias), odd), _constant(I32, bits, 13))
    shifted = builder.fadd(builder.bitcast(magnitude, wide), _constant(F32, bits, 0.5))
    subnormal = builder.sub(builder.bitcast(shifted, bits), _constant(I32, bits, 0x3F000000))
    is_small = builder.icmp_signed("<", magnitude, _constant(I32, bits, 0x38800000))
    h = builder.or_(builder.select(is_small, subnormal, normal), builder.lshr(sign, _constant(I32, bits, 16)))
    return builder.bitcast(builder.trunc(h, _shaped(I16, half)), half)


def emit_load_f16(builder, address):
    """16 float16 -> f32x16; exact."""
    return emit_from_f16(builder, emit_load(builder, address, V_F16, 2))


def emit_load_i8(builder, address):
    """16 int8 -> f32x16; exact."""
    return builder.sitofp(emit_load(builder, address, ir.VectorType(I8, 16), 1), V_F32)


def emit_native_call(builder, address, *args) -> None:
    """Call a `Native` kernel (int64 arguments, no result) by its address: Numba's calling convention, see `native`."""
    unused = cgutils.alloca_once(builder, I64)
    place = builder.ptrtoint(unused, I64)
    function = ir.FunctionType(I32, [I64] * (2 + len(args)))
    builder.call(builder.inttoptr(address, function.as_pointer()), [place, place, *args])


def emit_max(builder, x, y):
    """The larger in every lane; y where x is no number."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def emit_min(builder, x, y):
    return builder.select(builder.fcmp_ordered("<", x, y), x, y)


def emit_broadcast_f32(builder, address):
    return emit_splat(builder, emit_load(builder, address, F32, 4))


def emit_broadcast_i32(builder, address):
    return emit_splat(builder, emit_load(builder, address, I32, 4))


def emit_nibble(builder, packed, odd):
    """i8x64 of packed nibbles -> the high ones if `odd` (int64) is 1, the low ones if it is 0."""
    wide = ir.VectorType(I16, 32)
    by = emit_splat(builder, builder.trunc(builder.shl(odd, I64(2)), I16), 32)
    nibble = builder.bitcast(builder.lshr(builder.bitcast(packed, wide), by), V_I8)
    return builder.and_(nibble, ir.Constant(V_I8, [15] * 64))


def emit_nibbles(builder, packed):
    """i8x64 of packed nibbles -> (low, high) as i8x64 of values 0..15."""
    mask = ir.Constant(V_I8, [15] * 64)
    # A shift of bytes does not exist in x86; a shift of 16-bit lanes and the same mask does the same.
    wide = ir.VectorType(I16, 32)
    high = builder.bitcast(builder.lshr(builder.bitcast(packed, wide), ir.Constant(wide, [4] * 32)), V_I8)
    return builder.and_(packed, mask), builder.and_(high, mask)


def _emit_parts(builder, vector, parts: int):
    """Split a vector into `parts` equal vectors, low lanes first."""
    width = vector.type.count // parts
    undefined = ir.Constant(vector.type, ir.Undefined)
    index = ir.VectorType(I32, width)
    return [
        builder.shuffle_vector(vector, undefined, ir.Constant(index, list(range(p * width, (p + 1) * width))))
        for p in range(parts)
    ]


def _emit_join(builder, parts):
    """The inverse of `_emit_parts`."""
    while len(parts) > 1:
        lanes = 2 * parts[0].type.count
        index = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        parts = [builder.shuffle_vector(a, b, index) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _emit_vpdpbusd(builder, bits: int, acc, u, x):
    if llvm_version_info < (22,):  # which wants bytes as bytes
        u, x = builder.bitcast(u, acc.type), builder.bitcast(x, acc.type)
    return emit_call(builder, f"llvm.x86.avx512.vpdpbusd.{bits}", acc.type, [acc, u, x])


def _dot4_vnni512(builder, acc, u, x):
    return _emit_vpdpbusd(builder, 512, acc, u, x)


def _dot4_in_parts(parts: int, one_part):
    def dot4(builder, acc, u, x):
        pieces = zip(*(_emit_parts(builder, v, parts) for v in (acc, u, x)), strict=True)
        return _emit_join(builder, [one_part(builder, *piece) for piece in pieces])

    return dot4


def _dot4_avxvnni(builder, acc, u, x):
    return _emit_vpdpbusd(builder, 256, acc, u, x)


def _dot4_avx2(builder, acc, u, x):
    """u8 x s8 in pairs to saturated int16, then pairs to int32; |u * x| must stay below 2**14."""
    i16x16 = ir.VectorType(I16, 16)
    pairs = emit_call(builder, "llvm.x86.avx2.pmadd.ub.sw", i16x16, [u, x])
    fours = emit_call(builder, "llvm.x86.avx2.pmadd.wd", acc.type, [pairs, ir.Constant(i16x16, [1] * 16)])
    return builder.add(acc, fours)


def _dot4_neon(builder, acc, u, x):
    """Signed x signed: codes up to 127 are the same in both readings."""
    return emit_call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, [acc, u, x])


def _dot4_plain(builder, acc, u, x):
    wide = ir.VectorType(I32, 64)
    products = builder.mul(builder.zext(u, wide), builder.sext(x, wide))
    undefined = ir.Constant(wide, ir.Undefined)
    for j in range(4):
        index = ir.Constant(V_I32, list(range(j, 64, 4)))
        acc = builder.add(acc, builder.shuffle_vector(products, undefined, index))
    return acc


emit_dot4 = {
    "avx512vnni": _dot4_vnni512,
    "avxvnni": _dot4_in_parts(2, _dot4_avxvnni),
    "avx2": _dot4_in_parts(2, _dot4_avx2),
    "neon": _dot4_in_parts(4, _dot4_neon),
    "plain": _dot4_plain,
}[TARGET.dot4]
"""acc + sums of four neighbouring u[0..15] * x[-127..127]: (builder, i32x16, i8x64, i8x64) -> i32x16."""

INT8_ZERO_IN_DOT = {"avx512vnni": -128, "avxvnni": -128, "avx2": 0, "neon": 0, "plain": -128}[TARGET.dot4]
"""What an int8 accumulator must start from, times the sum of the activations (see `emit_dot4_int8`)."""


def emit_dot4_int8(builder, acc, u, x):
    """acc + sums of four neighbouring (u - 128) * x, less what INT8_ZERO_IN_DOT put into acc at the start.

    Unsigned x signed instructions take the codes as they are and leave the zero point to the start value.
    AVX2's would saturate at 255 * 127 * 2, so it multiplies |w| by x with w's sign: at most 128 * 127 * 2.
    """
    if INT8_ZERO_IN_DOT:
        return emit_dot4(builder, acc, u, x)
    w = builder.xor(u, ir.Constant(V_I8, [-128] * 64))
    if TARGET.dot4 == "neon":
        return emit_dot4(builder, acc, w, x)
    halves = zip(*(_emit_parts(builder, v, 2) for v in (acc, w, x)), strict=True)
    return _emit_join(builder, [_dot4_avx2_signed(builder, *half) for half in halves])


def _dot4_avx2_signed(builder, acc, w, x):
    signed_x = emit_call(builder, "llvm.x86.avx2.psign.b", x.type, [x, w])
    negative = builder.icmp_signed("<", w, ir.Constant(w.type, [0] * 32))
    magnitude = builder.select(negative, builder.sub(ir.Constant(w.type, [0] * 32), w), w)
    return _dot4_avx2(builder, acc, magnitude, signed_x)


# ---- the vocabulary for jitted code -------------------------------------------------------------------


def vector_intrinsic(result, *arg_types):
    """Make `emit(builder, *args) -> value` callable from jitted code with a fixed signature."""

    def wrap(emit):
        def codegen(context, builder, sig, args):
            value = emit(builder, *args)
            return context.get_dummy_value() if result is types.void else value

        def typing(typing_context, *args):
            return result(*arg_types), codegen

        # Numba asks for the parameter list, to fold keyword arguments into it.
        names = list(inspect.signature(emit).parameters)[1:]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        vars(typing)["__signature__"] = inspect.Signature(
            [inspect.Parameter(n, kind) for n in ["typing_context", *names]]
        )
        typing.__name__ = typing.__qualname__ = emit.__name__
        typing.__module__, typing.__doc__ = emit.__module__, emit.__doc__
        return intrinsic(typing)

    return wrap


def record_at(dtype: np.dtype):
    """What makes a record of `dtype` of an address, for jitted code: a view."""
    kind = numpy_support.from_dtype(dtype)

    @vector_intrinsic(kind, ADDRESS)
    def view(b, address):
        return b.inttoptr(address, ir.ArrayType(I8, dtype.itemsize).as_pointer())

    return view


@vector_intrinsic(types.float32, ADDRESS)
def load_f32(b, a):
    return emit_load(b, a, F32, 4)


@vector_intrinsic(types.int32, ADDRESS)
def load_i32(b, a):
    return emit_load(b, a, I32, 4)


@vector_intrinsic(types.int64, ADDRESS)
def load_i64(b, a):
    return emit_load(b, a, I64, 8)


@vector_intrinsic(types.uint8, ADDRESS)
def load_u8(b, a):
    return emit_load(b, a, I8, 1)


@vector_intrinsic(types.float32, ADDRESS)
def load_f16(b, a):
    return emit_from_f16(b, emit_load(b, a, F16, 2))


@vector_intrinsic(types.void, ADDRESS, types.float32)
def store_f32(b, a, value):
    emit_store(b, value, a, 4)


@vector_intrinsic(types.void, ADDRESS, types.int32)
def store_i32(b, a, value):
    emit_store(b, value, a, 4)


@vector_intrinsic(types.void, ADDRESS, types.int64)
def store_i64(b, a, value):
    emit_store(b, value, a, 8)


@vector_intrinsic(types.void, ADDRESS, types.float32)
def store_i8(b, a, value):
    """Round to nearest even; the value must be within -127..127."""
    emit_store(b, b.fptosi(emit_call(b, "llvm.rint.f32", F32, [value]), I8), a, 1)


@vector_intrinsic(types.void, ADDRESS, types.float32)
def store_f16(b, a, value):
    """Round to nearest even; values beyond float16's range become its largest."""
    emit_store(b, emit_to_f16(b, value), a, 2)


@vector_intrinsic(f32x16, ADDRESS)
def vload(b, a):
    return emit_load(b, a, V_F32, 4)


@vector_intrinsic(f32x16, ADDRESS)
def vload_f16(b, a):
    return emit_load_f16(b, a)


@vector_intrinsic(types.void, ADDRESS, f32x16)
def vstore(b, a, v):
    emit_store(b, v, a, 4)


@vector_intrinsic(types.void, ADDRESS, f32x16)
def vstore_f16(b, a, v):
    """Round to nearest even; values beyond float16's range become its largest."""
    emit_store(b, emit_to_f16(b, v), a, 2)


@vector_intrinsic(f32x16, types.float32)
def splat(b, x):
    return emit_splat(b, x)


@vector_intrinsic(types.void, ADDRESS, ADDRESS, f32x16)
def vscatter_f16(b, a, stride, v):
    """Lane i as float16 to a + i * stride (bytes); rounded as by `vstore_f16`."""
    half = emit_to_f16(b, v)
    for i in range(16):
        emit_store(b, b.extract_element(half, I32(i)), emit_offset(b, a, (stride, i)), 2)


@vector_intrinsic(types.void, ADDRESS, ADDRESS, i32x16)
def vscatter_i8(b, a, stride, v):
    """The low byte of lane i to a + i * stride (bytes)."""
    low = b.trunc(v, ir.VectorType(I8, 16))
    for i in range(16):
        emit_store(b, b.extract_element(low, I32(i)), emit_offset(b, a, (stride, i)), 1)


@vector_intrinsic(types.void, ADDRESS, ADDRESS, ADDRESS)
def transpose(b, a, stride, to):
    """float32 [16][16]: row i at a + i * stride (bytes) becomes column i of the matrix at `to`."""
    rows = [emit_load(b, emit_offset(b, a, (stride, i)), V_F32, 4) for i in range(16)]
    # Four rounds, each of which exchanges blocks of half the size across the diagonal.
    for size in (8, 4, 2, 1):
        index = range(16)
        upper = [i if i & size == 0 else 16 + i - size for i in index]
        lower = [i + size if i & size == 0 else 16 + i for i in index]
        kind = ir.VectorType(I32, 16)
        upper, lower = ir.Constant(kind, upper), ir.Constant(kind, lower)
        for i in (i for i in index if i & size == 0):
            x, y = rows[i], rows[i + size]
            rows[i], rows[i + size] = b.shuffle_vector(x, y, upper), b.shuffle_vector(x, y, lower)
    for i, row in enumerate(rows):
        emit_store(b, row, emit_offset(b, to, 64 * i), 4)


@vector_intrinsic(f32x16, f32x16, f32x16)
def vadd(b, x, y):
    return b.fadd(x, y)


@vector_intrinsic(f32x16, f32x16, f32x16)
def vsub(b, x, y):
    return b.fsub(x, y)


@vector_intrinsic(f32x16, f32x16, f32x16)
def vmul(b, x, y):
    return b.fmul(x, y)


@vector_intrinsic(f32x16, f32x16, f32x16)
def vdiv(b, x, y):
    return b.fdiv(x, y)


@vector_intrinsic(f32x16, f32x16, f32x16, f32x16)
def vfma(b, x, y, z):
    return emit_fma(b, x, y, z)


@vector_intrinsic(f32x16, f32x16, f32x16)
def vmax(b, x, y):
    return emit_max(b, x, y)


@vector_intrinsic(f32x16, f32x16)
def vabs(b, x):
    return emit_call(b, "llvm.fabs.v16f32", V_F32, [x])


def _emit_fold(b, v, combine):
    """Combine 16 lanes in one fixed order: halves onto each other, 8, 4, 2, 1."""
    for half in (8, 4, 2, 1):
        low, high = _emit_parts(b, v, 2) if half > 1 else (b.extract_element(v, I32(0)), b.extract_element(v, I32(1)))
        v = combine(low, high)
    return v


@vector_intrinsic(types.float32, f32x16)
def hsum(b, v):
    """The sum of all lanes, in a fixed order."""
    return _emit_fold(b, v, b.fadd)


@vector_intrinsic(types.float32, f32x16)
def hmax(b, v):
    return _emit_fold(b, v, lambda x, y: emit_max(b, x, y))


@vector_intrinsic(i32x16, f32x16)
def round_i32(b, v):
    """Round to nearest even, to int32."""
    return b.fptosi(emit_call(b, "llvm.rint.v16f32", V_F32, [v]), V_I32)


@vector_intrinsic(types.int32, i32x16)
def hsum_i32(b, v):
    return _emit_fold(b, v, b.add)


@vector_intrinsic(i32x16, i32x16, i32x16)
def vadd_i32(b, x, y):
    return b.add(x, y)


@vector_intrinsic(i32x16)
def zero_i32(b):
    return ir.Constant(V_I32, [0] * 16)


LOW_BITS = 7
"""Bits of the low part of a code that does not fit into 8 bits."""


@vector_intrinsic(i32x16, i32x16)
def vhigh_part(b, q):
    """q / 128 towards zero: the high part of a code, 0 where it fits into 8 bits."""
    below = b.and_(b.ashr(q, ir.Constant(V_I32, [31] * 16)), ir.Constant(V_I32, [(1 << LOW_BITS) - 1] * 16))
    return b.ashr(b.add(q, below), ir.Constant(V_I32, [LOW_BITS] * 16))


@vector_intrinsic(i32x16, i32x16, i32x16)
def vlow_part(b, q, high):
    """q - 128 * high: -127..127."""
    return b.sub(q, b.shl(high, ir.Constant(V_I32, [LOW_BITS] * 16)))


@vector_intrinsic(types.void, ADDRESS, i32x16)
def vstore_i8(b, a, v):
    """The low bytes of 16 lanes, to 16 bytes."""
    emit_store(b, b.trunc(v, ir.VectorType(I8, 16)), a, 1)


@vector_intrinsic(types.int64, i32x16)
def words_of_i8(b, v):
    """Bit i of four: whether any of lanes 4i to 4i + 3 is not 0 in its low byte."""
    words = b.bitcast(b.trunc(v, ir.VectorType(I8, 16)), ir.VectorType(I32, 4))
    some = b.icmp_signed("!=", words, ir.Constant(words.type, [0] * 4))
    return b.zext(b.bitcast(some, ir.IntType(4)), I64)


def _interleave(rows: int):
    """[rows][32] of 32 bits at `a` becomes [32][rows] there; rows is a power of two, up to 16."""

    def interleave(b, a):
        low, high = ([i // 2 + half + 16 * (i % 2) for i in range(16)] for half in (0, 8))
        low, high = ir.Constant(V_I32, low), ir.Constant(V_I32, high)
        halves = [[emit_load(b, emit_offset(b, a, 128 * i + half), V_I32, 4) for i in range(rows)] for half in (0, 64)]
        for n, lines in enumerate(halves):
            step = rows
            while step > 1:
                pairs = zip(lines[: rows // 2], lines[rows // 2 :], strict=True)
                lines = [b.shuffle_vector(x, y, part) for x, y in pairs for part in (low, high)]
                step //= 2
            for i, line in enumerate(lines):
                emit_store(b, line, emit_offset(b, a, 64 * (rows * n + i)), 4)

    return vector_intrinsic(types.void, ADDRESS)(interleave)


interleave_few, interleave_many = _interleave(TARGET.few_columns), _interleave(TARGET.many_columns)


@vector_intrinsic(f32x16, f32x16, types.int64)
def keep_below(b, v, n):
    """Lanes below n as they are, the others -inf (n may be negative or above 16)."""
    lanes = ir.Constant(ir.VectorType(I64, 16), list(range(16)))
    kept = b.icmp_signed("<", lanes, emit_splat(b, n))
    return b.select(kept, v, ir.Constant(V_F32, [-math.inf] * 16))


def _splat_f32(value: float):
    return ir.Constant(V_F32, [value] * 16)


_TO_WHOLE = 12582912.0
"""1.5 * 2**23: added to a small float32 it rounds it to a whole number, which it leaves in the low bits."""


def _emit_power(b, shifted, r):
    """2**(n + r) with |r| <= 1/2, by a minimax polynomial of degree 5; `shifted`: n + _TO_WHOLE, -126 <= n <= 127.

    A shift takes the whole number n into the exponent.
    """
    p = _splat_f32(1.3269406045e-3)
    for c in (9.6712941304e-3, 5.5507112294e-2, 2.4022246897e-1, 6.9314700365e-1, 1.0):
        p = emit_fma(b, p, r, _splat_f32(c))
    exponent = b.shl(b.bitcast(shifted, V_I32), ir.Constant(V_I32, [23] * 16))
    return b.bitcast(b.add(b.bitcast(p, V_I32), exponent), V_F32)


def emit_exp(b, x):
    """e**x in every lane, within 3 ulp; exactly 1 at 0, exactly 0 below -87.3 (and at -inf), no more than e**88."""
    too_small = b.fcmp_ordered("<", x, _splat_f32(-87.3))
    x = emit_min(b, emit_max(b, x, _splat_f32(-87.3)), _splat_f32(88.0))
    # x / ln 2 = n + r, with log2(e) as the sum of two numbers.
    shifted = emit_fma(b, x, _splat_f32(1.44269502162933349609375), _splat_f32(_TO_WHOLE))
    minus_n = b.fsub(_splat_f32(_TO_WHOLE), shifted)
    r = emit_fma(b, x, _splat_f32(1.44269502162933349609375), minus_n)
    r = emit_fma(b, x, _splat_f32(1.92596299e-8), r)
    return b.select(too_small, _splat_f32(0.0), _emit_power(b, shifted, r))


@vector_intrinsic(f32x16, f32x16)
def vexp(b, x):
    return emit_exp(b, x)


def emit_exp2(b, x):
    """2**x for x <= 0, within 3 ulp; exactly 1 at 0, exactly 0 below -126 (and at -inf)."""
    shifted = b.fadd(x, _splat_f32(_TO_WHOLE))
    r = b.fsub(x, b.fsub(shifted, _splat_f32(_TO_WHOLE)))
    return b.select(b.fcmp_ordered(">=", x, _splat_f32(-126.0)), _emit_power(b, shifted, r), _splat_f32(0.0))


@vector_intrinsic(f32x16, f32x16)
def vexp2(b, x):
    return emit_exp2(b, x)
