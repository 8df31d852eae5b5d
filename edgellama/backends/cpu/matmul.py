"""Matrix times activations, straight from the file's block layout.

A *pack* is what a matrix is multiplied with: tokens in tiles of `tile` tokens, quantized to int8 for each
token and group of 128 inputs, laid out so that every broadcast of the tile kernel is a constant offset
from one pointer:

    codes   int8     [tiles][groups][32][tile][4]    4 neighbouring inputs of one token together
    scales  float32  [tiles][groups][tile]
    sums    int32    [tiles][groups][tile]           the sum of the codes, for the weights' zero point
    values  float32  [tiles][K][tile]                instead of the three above, for 16-bit weights

Lane = output row, so nothing is summed across lanes. Every output element is computed in one order
whatever the tile: the integer sum of a group (exact), one conversion, one fma for each group in turn.
That is why any number of threads, tokens or chunks gives the same bits.
"""

from __future__ import annotations

from numba import types
from numba.core import cgutils

from .jit import kernel
from .simd import (
    ADDRESS,
    I64,
    INT8_ZERO_IN_DOT,
    V_F32,
    V_I8,
    V_I32,
    emit_broadcast_f32,
    emit_broadcast_i32,
    emit_dot4,
    emit_dot4_int8,
    emit_fma,
    emit_load,
    emit_load_f16,
    emit_nibbles,
    emit_offset,
    emit_splat,
    emit_store,
    ir,
    vector_intrinsic,
)
from .sync import fetch_add
from .target import TARGET

TILE_TOKENS = TARGET.tile_tokens
TILE_BLOCKS = TARGET.tile_blocks
L2_CHUNK = 256 * 1024
"""Bytes of weights that stay in the second-level cache while the token tiles stream over them."""


def _int_group(bits: int, tokens: int):
    """IR for one (row block, group): (builder, weights, codes, accumulators) -> accumulators."""
    lines, bytes_per_line = (16, 8) if bits == 4 else (32, 4)

    def emit_line(b, weights, codes, acc):
        """One 64-byte line of each row block against every token of the tile."""
        for r, address in enumerate(weights):
            line = emit_load(b, address, V_I8, 64)
            parts = emit_nibbles(b, line) if bits == 4 else (line,)
            dot = emit_dot4 if bits == 4 else emit_dot4_int8
            for half, part in enumerate(parts):
                for t in range(tokens):
                    x = emit_broadcast_i32(b, emit_offset(b, codes, 4 * tokens * half + 4 * t))
                    b.store(dot(b, b.load(acc[r][t]), part, b.bitcast(x, V_I8)), acc[r][t])

    return lines, bytes_per_line * tokens, emit_line


def make_int_tile(bits: int, tokens: int, blocks: int):
    """A tile kernel for int4 or int8 weights: `blocks` x 16 rows times `tokens` tokens into `out`.

    (weights, scales, bias or 0, codes, x_scales, x_sums: addresses, groups, out: address, out_stride: bytes,
    add: 1 to add to what is in `out`). Row blocks lie `groups` groups apart, in weights and scales.
    """
    zero = -8 if bits == 4 else INT8_ZERO_IN_DOT
    lines, code_stride, emit_line = _int_group(bits, tokens)
    group_bytes = 64 * lines

    def tile(b, weights, scales, bias, codes, x_scales, x_sums, groups, out, out_stride, add):
        def grid(kind):
            return [[cgutils.alloca_once(b, kind) for _ in range(tokens)] for _ in range(blocks)]

        float_acc, int_acc = grid(V_F32), grid(V_I32)
        for row in float_acc:
            for cell in row:
                b.store(ir.Constant(V_F32, [0.0] * 16), cell)
        block_weights = [emit_offset(b, weights, (groups, group_bytes * r)) for r in range(blocks)]
        block_scales = [emit_offset(b, scales, (groups, 32 * r)) for r in range(blocks)]
        with cgutils.for_range(b, groups) as group_loop:
            g = group_loop.index
            group_sums, group_x_scales = (emit_offset(b, a, (g, 4 * tokens)) for a in (x_sums, x_scales))
            for t in range(tokens):
                start = b.mul(emit_load(b, emit_offset(b, group_sums, 4 * t), ir.IntType(32), 4), ir.IntType(32)(zero))
                for r in range(blocks):
                    b.store(emit_splat(b, start), int_acc[r][t])
            group_weights = [emit_offset(b, w, (g, group_bytes)) for w in block_weights]
            group_codes = emit_offset(b, codes, (g, 128 * tokens))
            with cgutils.for_range(b, I64(lines)) as line_loop:
                i = line_loop.index
                line_weights = [emit_offset(b, w, (i, 64)) for w in group_weights]
                emit_line(b, line_weights, emit_offset(b, group_codes, (i, code_stride)), int_acc)
            for r in range(blocks):
                scale = emit_load_f16(b, emit_offset(b, block_scales[r], (g, 32)))
                for t in range(tokens):
                    both = b.fmul(scale, emit_broadcast_f32(b, emit_offset(b, group_x_scales, 4 * t)))
                    total = b.sitofp(b.load(int_acc[r][t]), V_F32)
                    b.store(emit_fma(b, total, both, b.load(float_acc[r][t])), float_acc[r][t])
        _emit_epilogue(b, float_acc, bias, out, out_stride, add)

    tile.__name__ = f"int{bits}_tile_{blocks}x{tokens}"
    return vector_intrinsic(types.void, *[ADDRESS] * 10)(tile)


def make_f16_tile(tokens: int):
    """A tile kernel for 16-bit weights (`f16.r16`): 16 rows times `tokens` tokens of float32 values.

    (weights, bias or 0, values: addresses, K, out: address, out_stride: bytes, add). Four partial sums (K
    is a multiple of 128), added in a fixed order, hide the latency of fma.
    """
    partial = 4

    def tile(b, weights, bias, values, k, out, out_stride, add):
        acc = [[cgutils.alloca_once(b, V_F32) for _ in range(partial)] for _ in range(tokens)]
        for cells in acc:
            for cell in cells:
                b.store(ir.Constant(V_F32, [0.0] * 16), cell)
        with cgutils.for_range(b, b.udiv(k, I64(partial))) as loop:
            for p in range(partial):
                line = emit_load_f16(b, emit_offset(b, weights, (loop.index, 32 * partial), 32 * p))
                x = emit_offset(b, values, (loop.index, 4 * tokens * partial), 4 * tokens * p)
                for t in range(tokens):
                    value = emit_broadcast_f32(b, emit_offset(b, x, 4 * t))
                    b.store(emit_fma(b, line, value, b.load(acc[t][p])), acc[t][p])
        total = []
        for cells in acc:
            s = [b.load(c) for c in cells]
            cell = cgutils.alloca_once(b, V_F32)
            b.store(b.fadd(b.fadd(s[0], s[1]), b.fadd(s[2], s[3])), cell)
            total.append(cell)
        _emit_epilogue(b, [total], bias, out, out_stride, add)

    tile.__name__ = f"f16_tile_{tokens}"
    return vector_intrinsic(types.void, *[ADDRESS] * 7)(tile)


def _emit_epilogue(b, acc, bias, out, out_stride, add) -> None:
    """out[token][row] = acc + bias, or += where `add` is not 0."""
    adds = b.icmp_signed("!=", add, I64(0))
    biased = b.icmp_signed("!=", bias, I64(0))
    for r, row in enumerate(acc):
        with b.if_then(biased):
            extra = emit_load(b, emit_offset(b, bias, 64 * r), V_F32, 4)
            for cell in row:
                b.store(b.fadd(b.load(cell), extra), cell)
        for t, cell in enumerate(row):
            address = emit_offset(b, out, (out_stride, t), 64 * r)
            with b.if_then(adds):
                b.store(b.fadd(b.load(cell), emit_load(b, address, V_F32, 4)), cell)
            emit_store(b, b.load(cell), address, 4)


_int4_one, _int4_few = make_int_tile(4, 1, 1), make_int_tile(4, TILE_TOKENS, 1)
_int8_one, _int8_few = make_int_tile(8, 1, 1), make_int_tile(8, TILE_TOKENS, 1)
_int4_many = make_int_tile(4, TILE_TOKENS, TILE_BLOCKS) if TILE_BLOCKS > 1 else _int4_few
_int8_many = make_int_tile(8, TILE_TOKENS, TILE_BLOCKS) if TILE_BLOCKS > 1 else _int8_few
_f16_one, _f16_few = make_f16_tile(1), make_f16_tile(TILE_TOKENS)


@kernel
def int4_blocks(weights, scales, bias, codes, x_scales, x_sums, groups, out, out_stride, add, tile, blocks):
    """`blocks` row blocks of an int4 matrix times one token tile (`tile` is 1 or TILE_TOKENS)."""
    block = 0
    while block < blocks:
        w, s = weights + block * groups * 1024, scales + block * groups * 32
        c, o = (bias + block * 64 if bias != 0 else 0), out + block * 64
        if tile == 1:
            _int4_one(w, s, c, codes, x_scales, x_sums, groups, o, out_stride, add)
            block += 1
        elif blocks - block >= TILE_BLOCKS:
            _int4_many(w, s, c, codes, x_scales, x_sums, groups, o, out_stride, add)
            block += TILE_BLOCKS
        else:
            _int4_few(w, s, c, codes, x_scales, x_sums, groups, o, out_stride, add)
            block += 1


@kernel
def int8_blocks(weights, scales, bias, codes, x_scales, x_sums, groups, out, out_stride, add, tile, blocks):
    """`int4_blocks` for an int8 matrix."""
    block = 0
    while block < blocks:
        w, s = weights + block * groups * 2048, scales + block * groups * 32
        c, o = (bias + block * 64 if bias != 0 else 0), out + block * 64
        if tile == 1:
            _int8_one(w, s, c, codes, x_scales, x_sums, groups, o, out_stride, add)
            block += 1
        elif blocks - block >= TILE_BLOCKS:
            _int8_many(w, s, c, codes, x_scales, x_sums, groups, o, out_stride, add)
            block += TILE_BLOCKS
        else:
            _int8_few(w, s, c, codes, x_scales, x_sums, groups, o, out_stride, add)
            block += 1


@kernel
def f16_blocks(weights, bias, values, k, out, out_stride, add, tile, blocks):
    """`int4_blocks` for a 16-bit matrix."""
    for block in range(blocks):
        w, o = weights + block * k * 32, out + block * 64
        c = bias + block * 64 if bias != 0 else 0
        if tile == 1:
            _f16_one(w, c, values, k, o, out_stride, add)
        else:
            _f16_few(w, c, values, k, o, out_stride, add)


@kernel
def multiply_tile(matrix, first, blocks, pack, index, out, out_stride, add):
    """Row blocks first..first+blocks of `matrix` times token tile `index` of `pack`.

    `out` is the address of row 0 of the tile's first token; whole blocks and whole tiles are stored.
    """
    groups, tile = matrix.groups, pack.tile
    bias = matrix.bias + first * 64 if matrix.bias != 0 else 0
    to = out + first * 64
    per_tile = index * groups * tile
    if matrix.bits == 16:
        k = groups * 128
        weights = matrix.weights + first * k * 32
        f16_blocks(weights, bias, pack.values + per_tile * 512, k, to, out_stride, add, tile, blocks)
        return
    scales = matrix.scales + first * groups * 32
    codes, x_scales, x_sums = pack.codes + per_tile * 128, pack.scales + per_tile * 4, pack.sums + per_tile * 4
    if matrix.bits == 4:
        weights = matrix.weights + first * groups * 1024
        int4_blocks(weights, scales, bias, codes, x_scales, x_sums, groups, to, out_stride, add, tile, blocks)
    else:
        weights = matrix.weights + first * groups * 2048
        int8_blocks(weights, scales, bias, codes, x_scales, x_sums, groups, to, out_stride, add, tile, blocks)


@kernel
def chunk_blocks(matrix, total_blocks, n_threads):
    """Row blocks that a thread takes at a time: even, small enough to share out and to stay in L2."""
    block_bytes = matrix.groups * 256 * matrix.bits
    chunk = min(total_blocks // (8 * n_threads), max(1, L2_CHUNK // block_bytes))
    return max(2, chunk // 2 * 2)


@kernel
def multiply(counter, n_threads, matrix, pack, tiles, out, out_stride, add):
    """out[token][row] (+)= matrix times pack, shared out among the team by `counter` (address, zeroed)."""
    chunk = chunk_blocks(matrix, matrix.blocks, n_threads)
    while True:
        first = fetch_add(counter, chunk)
        if first >= matrix.blocks:
            return
        blocks = min(chunk, matrix.blocks - first)
        for index in range(tiles):
            multiply_tile(matrix, first, blocks, pack, index, out + index * pack.tile * out_stride, out_stride, add)


@kernel
def multiply_three(counter, n_threads, q, k, v, pack, tiles, q_out, k_out, v_out, out_stride):
    """`multiply` for q, k and v as one piece of work: their rows share the activations."""
    total = q.blocks + k.blocks + v.blocks
    chunk = chunk_blocks(q, total, n_threads)
    while True:
        start = fetch_add(counter, chunk)
        if start >= total:
            return
        end = min(start + chunk, total)
        while start < end:
            # The part of the chunk that lies in one matrix.
            if start < q.blocks:
                matrix, first, out, stop = q, start, q_out, q.blocks
            elif start < q.blocks + k.blocks:
                matrix, first, out, stop = k, start - q.blocks, k_out, q.blocks + k.blocks
            else:
                matrix, first, out, stop = v, start - q.blocks - k.blocks, v_out, total
            blocks = min(end, stop) - start
            for index in range(tiles):
                to = out + index * pack.tile * out_stride
                multiply_tile(matrix, first, blocks, pack, index, to, out_stride, 0)
            start += blocks
