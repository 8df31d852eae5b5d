"""The inner loops: a block of 16 output rows times a tile of tokens, from the file's layout, in SIMD.

Lane = output row, so nothing is summed across lanes. Every output element is computed in one order
whatever the tile: the integer sum of a group (exact), one conversion, one fma for each group in turn.
That is why any number of threads, tokens or chunks gives the same bits.

Activations come as codes q = 128 * high + low of two int8 parts. The high part is 0 but for outliers: a mask says for
each group which words (4 neighbouring inputs) have any, in any token of the tile, and only these are multiplied.
`matmul` says how a pack is laid out; this module does not know where packs and matrices come from.
"""

from __future__ import annotations

from numba import types
from numba.core import cgutils

from . import amx
from .jit import Native
from .shapes import SIZES, STEP
from .simd import (
    ADDRESS,
    I32,
    I64,
    INT8_ZERO_IN_DOT,
    LOW_BITS,
    V_F32,
    V_I8,
    V_I32,
    emit_broadcast_f32,
    emit_broadcast_i32,
    emit_call,
    emit_dot4,
    emit_dot4_int8,
    emit_fma,
    emit_load,
    emit_load_f16,
    emit_nibble,
    emit_nibbles,
    emit_offset,
    emit_prefetch,
    emit_splat,
    emit_store,
    ir,
    vector_intrinsic,
)
from .target import TARGET

ARGUMENTS = 14
"""All: (weights, scales, bias or 0, codes or values, highs, masks, x_scales, x_sums, inputs, out, stride, add,
blocks, tiles).

Addresses, but for inputs (in_features up to a multiple of STEP), stride (bytes between tokens in `out`), add (1: add
to what is in `out`), blocks (row blocks), tiles (of tokens). What pads the last group of 128 inputs is zero. Many
tokens are multiplied up to `inputs` only; one or a few with the padding, too, for a stream from memory with gaps is no
stream to the processor's prefetcher (576 inputs: 12 GB/s a core with gaps, 30 without)."""
AHEAD = 4096
"""Bytes of weights that are asked for ahead where a few tokens share them: so slow a stream does not wake the
prefetcher, and waiting and multiplying would add up (4096 inputs, 8 tokens: 9.5 GB/s a core without, 12.9 with)."""
CHAINS = 4
"""Sums that grow side by side, at least: each waits for its own last product."""


def _cells(b, kind, n: int):
    """`n` accumulators, zeroed; LLVM keeps them in registers."""
    cells = [cgutils.alloca_once(b, kind) for _ in range(n)]
    zero = ir.Constant(kind, [0] * 16 if kind is V_I32 else [0.0] * 16)
    for cell in cells:
        b.store(zero, cell)
    return cells


def _emit_total(b, cells):
    """The sum of integer accumulators."""
    total = b.load(cells[0])
    for cell in cells[1:]:
        total = b.add(total, b.load(cell))
    return total


def _emit_over(b, tiles, blocks, emit_one):
    """emit_one(token tile, row block) for all."""
    with cgutils.for_range(b, tiles) as tile, cgutils.for_range(b, blocks) as block:
        emit_one(tile.index, block.index)


def _emit_epilogue(b, acc, bias, out, stride, add, block) -> None:
    """out[token][row] = acc[token] + bias, or += where `add` is not 0; the rows of `block`."""
    adds, biased = (b.icmp_signed("!=", flag, I64(0)) for flag in (add, bias))
    with b.if_then(biased):
        extra = emit_load(b, emit_offset(b, bias, (block, 64)), V_F32, 4)
        for cell in acc:
            b.store(b.fadd(b.load(cell), extra), cell)
    for t, cell in enumerate(acc):
        address = emit_offset(b, out, (stride, t), (block, 64))
        with b.if_then(adds):
            b.store(b.fadd(b.load(cell), emit_load(b, address, V_F32, 4)), cell)
        emit_store(b, b.load(cell), address, 4)


def _emit_bits_of(b, mask, emit_one) -> None:
    """emit_one(i) for every bit i (int64) that is set in `mask` (int64), which is not 0."""
    rest = cgutils.alloca_once_value(b, mask)
    body, after = b.append_basic_block("bit"), b.append_basic_block("bits.end")
    b.branch(body)
    b.position_at_end(body)
    bits = b.load(rest)
    emit_one(emit_call(b, "llvm.cttz.i64", I64, [bits, ir.Constant(ir.IntType(1), 1)]))
    b.store(b.and_(bits, b.sub(bits, I64(1))), rest)
    b.cbranch(b.icmp_signed("!=", b.load(rest), I64(0)), body, after)
    b.position_at_end(after)


def _int4(tokens: int):
    return _integers(4, tokens)


def _int8(tokens: int):
    return _integers(8, tokens)


def _integers(bits: int, tokens: int):
    """What emits a kernel for weights of `bits` bits, one row block at a time.

    One stream of weights: with two row blocks side by side the prefetcher starts anew at the end of each pair (int8,
    576 inputs: 19 GB/s a core with two, 31 with one).
    """
    if TARGET.amx and tokens == SIZES[-1]:
        return amx.integers(bits)
    zero = -8 if bits == 4 else INT8_ZERO_IN_DOT
    lines = STEP * bits // 32  # of 64 bytes, in a step
    group_bytes = 256 * bits
    dot = emit_dot4 if bits == 4 else emit_dot4_int8
    chains = max(1, CHAINS // tokens)

    def high_parts(b, group_weights, group_highs, words, sums):
        """sums[token] += what the high parts of some words of a group give; `words`: a mask."""

        def word(i):
            line = emit_load(b, emit_offset(b, group_weights, (b.lshr(i, I64(1 if bits == 4 else 0)), 64)), V_I8, 64)
            w = emit_nibble(b, line, b.and_(i, I64(1))) if bits == 4 else line
            for t, cell in enumerate(sums):
                x = emit_broadcast_i32(b, emit_offset(b, group_highs, (i, 4 * tokens), 4 * t))
                b.store(dot(b, b.load(cell), w, b.bitcast(x, V_I8)), cell)

        _emit_bits_of(b, words, word)

    def begin(b, group_sums, group_weights, group_highs, mask, sums):
        """sums[token] = what the weights' zero point takes off + 128 * what the high parts of a group give."""

        def start(t: int):
            of_codes = emit_load(b, emit_offset(b, group_sums, 4 * t), I32, 4)
            return emit_splat(b, b.mul(of_codes, I32(zero)))

        if tokens == 1:
            b.store(start(0), sums[0])
            return
        with b.if_else(b.icmp_signed("!=", mask, I64(0)), likely=False) as (outliers, none):
            with outliers:
                for cell in sums:
                    b.store(ir.Constant(V_I32, [0] * 16), cell)
                high_parts(b, group_weights, group_highs, mask, sums)
                # Each way reads its own: LLVM would keep them in the registers that the loop needs.
                for t, cell in enumerate(sums):
                    high = b.shl(b.load(cell), ir.Constant(V_I32, [LOW_BITS] * 16))
                    b.store(b.add(high, start(t)), cell)
            with none:
                for t, cell in enumerate(sums):
                    b.store(start(t), cell)

    def tile(b, weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks,
             tiles):  # fmt: skip
        groups = _groups(b, inputs)

        def one_block(index, block):
            x_group, first_group = b.mul(index, groups), b.mul(block, groups)
            # The last tile asks for the weights that are multiplied next; the others, for what is there already.
            is_last = b.icmp_signed("==", index, b.sub(tiles, I64(1)))
            behind = b.select(is_last, b.mul(b.mul(blocks, groups), I64(group_bytes)), I64(0))
            total = _cells(b, V_F32, tokens)
            sums = [_cells(b, V_I32, chains) for _ in range(tokens)]
            (high_sum,) = _cells(b, V_I32, 1)  # of one token
            with cgutils.for_range(b, groups) as group_loop:
                g = group_loop.index
                x_at, w_at = b.add(x_group, g), b.add(first_group, g)
                group_weights = emit_offset(b, weights, (w_at, group_bytes))
                mask = emit_load(b, emit_offset(b, masks, (x_at, 8)), I64, 8)
                group_highs = emit_offset(b, highs, (x_at, 128 * tokens))
                for cell in [*(cell for chain in sums for cell in chain[1:]), high_sum]:
                    b.store(ir.Constant(V_I32, [0] * 16), cell)
                group_sums = emit_offset(b, x_sums, (x_at, 4 * tokens))
                begin(b, group_sums, group_weights, group_highs, mask, [chain[0] for chain in sums])
                group_codes = emit_offset(b, codes, (x_at, 128 * tokens))
                steps = I64(128 // STEP)
                if tokens == SIZES[-1]:
                    left = b.udiv(b.sub(inputs, b.mul(g, I64(128))), I64(STEP))
                    steps = b.select(b.icmp_signed("<", left, steps), left, steps)
                with cgutils.for_range(b, steps) as loop:
                    step_codes = emit_offset(b, group_codes, (loop.index, STEP * tokens))
                    for n in range(lines):
                        at = emit_offset(b, group_weights, (loop.index, 64 * lines), 64 * n)
                        if tokens == SIZES[1]:
                            emit_prefetch(b, emit_offset(b, at, AHEAD))
                        elif tokens == SIZES[-1]:
                            emit_prefetch(b, emit_offset(b, at, behind), 2)
                        line = emit_load(b, at, V_I8, 64)
                        words = emit_nibbles(b, line) if bits == 4 else (line,)
                        for i, w in enumerate(words, n * len(words)):
                            for t in range(tokens):
                                x = emit_broadcast_i32(b, emit_offset(b, step_codes, 4 * (tokens * i + t)))
                                cell = sums[t][i % chains]
                                b.store(dot(b, b.load(cell), w, b.bitcast(x, V_I8)), cell)
                    if tokens == 1:
                        # Now that the lines are there: a stream from memory must not be read here and there.
                        in_step = b.shl(I64((1 << STEP // 4) - 1), b.mul(loop.index, I64(STEP // 4)))
                        here = b.and_(mask, in_step)
                        with b.if_then(b.icmp_signed("!=", here, I64(0)), likely=False):
                            high_parts(b, group_weights, group_highs, here, [high_sum])
                scale = emit_load_f16(b, emit_offset(b, scales, (w_at, 32)))
                for t in range(tokens):
                    x_scale = emit_broadcast_f32(b, emit_offset(b, x_scales, (x_at, 4 * tokens), 4 * t))
                    exact = _emit_total(b, sums[t])
                    if tokens == 1:
                        high = b.shl(b.load(high_sum), ir.Constant(V_I32, [LOW_BITS] * 16))
                        exact = b.add(exact, high)
                    value = emit_fma(b, b.sitofp(exact, V_F32), b.fmul(scale, x_scale), b.load(total[t]))
                    b.store(value, total[t])
            to = emit_offset(b, out, b.mul(b.mul(index, I64(tokens)), stride))
            _emit_epilogue(b, total, bias, to, stride, add, block)

        _emit_over(b, tiles, blocks, one_block)

    return tile


def _f16(tokens: int):
    """What emits a kernel for 16-bit weights (`f16.r16`) and float32 values.

    Four partial sums (K is a multiple of STEP), added in a fixed order, hide the latency of fma. A few tokens at a
    time: the sums must fit into the registers.
    """
    partial = 4

    def tile(b, weights, scales, bias, values, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks,
             tiles):  # fmt: skip
        groups = _groups(b, inputs)

        def some_tokens(index, block, start: int, count: int):
            acc = [_cells(b, V_F32, partial) for _ in range(count)]
            row_weights = emit_offset(b, weights, (b.mul(block, groups), 128 * 32))
            tile_values = emit_offset(b, values, (b.mul(index, groups), 128 * 4 * tokens))
            with cgutils.for_range(b, b.udiv(inputs, I64(partial))) as loop:
                for p in range(partial):
                    line = emit_load_f16(b, emit_offset(b, row_weights, (loop.index, 32 * partial), 32 * p))
                    x = emit_offset(b, tile_values, (loop.index, 4 * tokens * partial), 4 * (tokens * p + start))
                    for t in range(count):
                        value = emit_broadcast_f32(b, emit_offset(b, x, 4 * t))
                        b.store(emit_fma(b, line, value, b.load(acc[t][p])), acc[t][p])
            for cells in acc:
                s = [b.load(c) for c in cells]
                b.store(b.fadd(b.fadd(s[0], s[1]), b.fadd(s[2], s[3])), cells[0])
            to = emit_offset(b, out, b.mul(b.add(b.mul(index, I64(tokens)), I64(start)), stride))
            _emit_epilogue(b, [cells[0] for cells in acc], bias, to, stride, add, block)

        def one_block(index, block):
            for start in range(0, tokens, 4):
                some_tokens(index, block, start, min(4, tokens - start))

        _emit_over(b, tiles, blocks, one_block)

    return tile


def _groups(b, inputs):
    return b.udiv(b.add(inputs, I64(127)), I64(128))


EMITTERS = {
    f"{weights}_{size}": emitter(tokens)
    for size, tokens in zip(("one", "few", "many"), SIZES, strict=True)
    for weights, emitter in (("int4", _int4), ("int8", _int8), ("f16", _f16))
}
"""What writes each kernel's IR: (builder, the arguments)."""


def _intrinsic(name: str):
    """The body of a kernel for jitted code."""
    emitter = EMITTERS[name]
    emitter.__name__ = f"emit_{name}"
    return vector_intrinsic(types.void, *[ADDRESS] * ARGUMENTS)(emitter)


_int4_one = _intrinsic("int4_one")
_int4_few = _intrinsic("int4_few")
_int4_many = _intrinsic("int4_many")
_int8_one = _intrinsic("int8_one")
_int8_few = _intrinsic("int8_few")
_int8_many = _intrinsic("int8_many")
_f16_one = _intrinsic("f16_one")
_f16_few = _intrinsic("f16_few")
_f16_many = _intrinsic("f16_many")


@Native
def int4_one(weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles):
    _int4_one(weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles)


@Native
def int4_few(weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles):
    _int4_few(weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles)


@Native
def int4_many(weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles):
    _int4_many(weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles)


@Native
def int8_one(weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles):
    _int8_one(weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles)


@Native
def int8_few(weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles):
    _int8_few(weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles)


@Native
def int8_many(weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles):
    _int8_many(weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles)


@Native
def f16_one(weights, scales, bias, values, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles):
    _f16_one(weights, scales, bias, values, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles)


@Native
def f16_few(weights, scales, bias, values, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles):
    _f16_few(weights, scales, bias, values, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles)


@Native
def f16_many(weights, scales, bias, values, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles):
    _f16_many(weights, scales, bias, values, highs, masks, x_scales, x_sums, inputs, out, stride, add, blocks, tiles)
