"""The tiles of `tiles` for many tokens on Intel's AMX: 16 tokens x 16 output rows x 64 inputs in one instruction.

The file's layout is what the instruction wants as its second operand: four neighbouring inputs of 16 rows in a line,
once nibbles are bytes. So weights are unpacked into a buffer that stays in the first-level cache, a few groups at a
time, and all tokens stream past them. Sums of a group are exact integers; they are scaled and added group by group as
in `tiles`, and every bit is the same. A pack's codes lie token by token, [tiles][groups][16 tokens][128], and so do
high parts, which are multiplied as a whole in each group that has outliers.
(Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 1, chapter 18.)
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir
from numba.core import cgutils

from .shapes import AMX_TOKENS
from .simd import (
    I8,
    I64,
    LOW_BITS,
    V_F32,
    V_I8,
    V_I32,
    emit_broadcast_f32,
    emit_call,
    emit_fma,
    emit_load,
    emit_load_f16,
    emit_nibbles,
    emit_offset,
    emit_store,
)

GROUPS = 6
"""Groups of 128 inputs that are unpacked at a time, at most."""
BLOCKS = 2
"""Row blocks that are unpacked at a time: 24 KB with GROUPS groups."""
BUNCH = 16
"""Token tiles whose totals are kept while the groups go by: 32 KB."""
_TILE_BYTES = 1024
_SLOTS = 4  # buffers for the sums of a group, used in turn
_GROUP_BYTES = 2 * _TILE_BYTES  # 128 inputs x 16 rows (or tokens), a byte each


class _Pair(NamedTuple):
    """Addresses of what belongs to one row block and one token tile, from the first of some groups on."""

    weights: ir.Value  # unpacked: bytes [GROUPS][128 / 4][16 rows][4]
    scales: ir.Value
    codes: ir.Value
    highs: ir.Value
    masks: ir.Value
    x_scales: ir.Value
    totals: ir.Value  # float32 [16 tokens][16 rows], of the groups before
    bias: ir.Value
    out: ir.Value


def integers(bits: int):
    """What emits the kernel for weights of `bits` bits and AMX_TOKENS tokens; the arguments are those of `tiles`."""
    group_bytes = 256 * bits

    def tile(b, weights, scales, bias, codes, highs, masks, x_scales, _x_sums, inputs, out, out_stride, add, blocks,
             tiles):  # fmt: skip
        groups = b.udiv(b.add(inputs, I64(127)), I64(128))
        chunks = b.udiv(b.add(groups, I64(GROUPS - 1)), I64(GROUPS))
        chunk = b.udiv(b.add(groups, b.sub(chunks, I64(1))), chunks)
        _emit_configure(b)
        unpacked = _buffer(b, BLOCKS * GROUPS * _GROUP_BYTES)
        totals = _buffer(b, BUNCH * BLOCKS * _TILE_BYTES)
        sums = _buffer(b, _SLOTS * 2 * _TILE_BYTES)

        def some_groups(first, n_blocks, first_tile, n_tiles, g):
            """Groups g .. g+chunk-1 of `n_blocks` row blocks times `n_tiles` token tiles."""
            n_groups = _least(b, b.sub(groups, g), chunk)
            with cgutils.for_range(b, n_blocks) as row:
                at = b.add(b.mul(b.add(first, row.index), groups), g)
                to = emit_offset(b, unpacked, (row.index, GROUPS * _GROUP_BYTES))
                lines = b.mul(n_groups, I64(group_bytes // 64))
                _emit_unpack(b, bits, emit_offset(b, weights, (at, group_bytes)), lines, to)
            with cgutils.for_range(b, n_tiles) as column, cgutils.for_range(b, n_blocks) as row:
                block, token_tile = b.add(first, row.index), b.add(first_tile, column.index)
                w_at, x_at = b.add(b.mul(block, groups), g), b.add(b.mul(token_tile, groups), g)
                pair = _Pair(
                    weights=emit_offset(b, unpacked, (row.index, GROUPS * _GROUP_BYTES)),
                    scales=emit_offset(b, scales, (w_at, 32)),
                    codes=emit_offset(b, codes, (x_at, _GROUP_BYTES)),
                    highs=emit_offset(b, highs, (x_at, _GROUP_BYTES)),
                    masks=emit_offset(b, masks, (x_at, 8)),
                    x_scales=emit_offset(b, x_scales, (x_at, 4 * AMX_TOKENS)),
                    totals=emit_offset(b, totals, (column.index, BLOCKS * _TILE_BYTES), (row.index, _TILE_BYTES)),
                    bias=b.select(b.icmp_signed("!=", bias, I64(0)), emit_offset(b, bias, (block, 64)), I64(0)),
                    out=emit_offset(b, out, b.mul(b.mul(token_tile, I64(AMX_TOKENS)), out_stride), (block, 64)),
                )
                cells = [cgutils.alloca_once(b, V_F32) for _ in range(AMX_TOKENS)]
                _emit_begin(b, pair, cells, b.icmp_signed("==", g, I64(0)))
                left = b.sub(inputs, b.mul(g, I64(128)))
                # The unit hands its sums over in memory, which takes a while: they are added one group later.
                for group in range(GROUPS + 1):
                    if group < GROUPS:
                        with b.if_then(b.icmp_signed("<", I64(group), n_groups), likely=True):
                            _emit_sums(b, pair, sums, group, left)
                    if group > 0:
                        with b.if_then(b.icmp_signed("<=", I64(group), n_groups), likely=True):
                            _emit_add(b, pair, sums, group - 1, cells)
                is_last = b.icmp_signed("==", b.add(g, n_groups), groups)
                _emit_end(b, pair, cells, is_last, out_stride, add)

        with cgutils.for_range_slice(b, I64(0), tiles, I64(BUNCH), inc=True) as (first_tile, _):
            n_tiles = _least(b, b.sub(tiles, first_tile), I64(BUNCH))
            with cgutils.for_range_slice(b, I64(0), blocks, I64(BLOCKS), inc=True) as (first, _):
                n_blocks = _least(b, b.sub(blocks, first), I64(BLOCKS))
                with cgutils.for_range_slice(b, I64(0), groups, chunk, inc=True) as (g, _):
                    some_groups(first, n_blocks, first_tile, n_tiles, g)
        _emit_amx(b, "tilerelease")

    return tile


def _emit_amx(b, name: str, *args) -> None:
    """Call an intrinsic of AMX; a plain int is the number of a tile register, an IR value an address or a stride."""
    values = [I8(a) if isinstance(a, int) else a for a in args]
    emit_call(b, f"llvm.x86.{name}", ir.VoidType(), values)


def _emit_configure(b) -> None:
    """All eight registers: 16 lines of 64 bytes."""
    config = _buffer(b, 64)
    palette, line_bytes, lines = [1] + [0] * 15, [64, 0] * 8, [16] * 8
    emit_store(b, ir.Constant(V_I8, palette + line_bytes + [0] * 16 + lines + [0] * 8), config, 64)
    _emit_amx(b, "ldtilecfg", _pointer(b, config))


def _buffer(b, nbytes: int):
    """The address of `nbytes` on the stack, aligned to lines."""
    with b.goto_entry_block():  # numba's own alloca would clear it, byte by byte
        buffer = b.alloca(ir.ArrayType(I8, nbytes))
    buffer.align = 64
    return b.ptrtoint(buffer, I64)


def _pointer(b, address):
    return b.inttoptr(address, I8.as_pointer())


def _least(b, value, limit):
    return b.select(b.icmp_signed("<", value, limit), value, limit)


def _emit_unpack(b, bits: int, source, lines, to) -> None:
    """`lines` lines of codes to signed bytes, less the zero point."""
    with cgutils.for_range(b, lines) as loop:
        line = emit_load(b, emit_offset(b, source, (loop.index, 64)), V_I8, 64)
        codes, zero = ([line], -128) if bits == 8 else (emit_nibbles(b, line), 8)
        for i, code in enumerate(codes):
            value = b.sub(code, ir.Constant(V_I8, [zero] * 64))
            emit_store(b, value, emit_offset(b, to, (loop.index, 64 * len(codes)), 64 * i), 64)


def _has_outliers(b, pair: _Pair, g: int):
    return b.icmp_signed("!=", emit_load(b, emit_offset(b, pair.masks, 8 * g), I64, 8), I64(0))


def _emit_sums(b, pair: _Pair, sums, g: int, left) -> None:
    """sums[g % _SLOTS][0, 1][token][row] = the exact sums of group `g` over low parts, and over high ones if there are
    any; `left` inputs are left from group 0 on."""
    weights = emit_offset(b, pair.weights, g * _GROUP_BYTES)
    more = b.icmp_signed(">", left, I64(128 * g + 64))

    def product(codes, register: int, to) -> None:
        def half(step: int):
            """64 of the group's inputs."""
            _emit_amx(b, "tileloadd64", 4 + step, _pointer(b, emit_offset(b, weights, step * _TILE_BYTES)), I64(64))
            _emit_amx(b, "tileloadd64", 6 + step, _pointer(b, emit_offset(b, codes, 64 * step)), I64(128))
            _emit_amx(b, "tdpbssd", register, 6 + step, 4 + step)

        _emit_amx(b, "tilezero", register)
        half(0)
        with b.if_then(more, likely=True):
            half(1)
        _emit_amx(b, "tilestored64", register, _pointer(b, to), I64(64))

    to = emit_offset(b, sums, g % _SLOTS * 2 * _TILE_BYTES)
    product(emit_offset(b, pair.codes, g * _GROUP_BYTES), 2 * g % 4, to)
    with b.if_then(_has_outliers(b, pair, g), likely=False):
        product(emit_offset(b, pair.highs, g * _GROUP_BYTES), (2 * g + 1) % 4, emit_offset(b, to, _TILE_BYTES))


def _emit_add(b, pair: _Pair, sums, g: int, cells) -> None:
    """cells[token] += the scaled sums of group `g`."""
    sums = emit_offset(b, sums, g % _SLOTS * 2 * _TILE_BYTES)
    scale = emit_load_f16(b, emit_offset(b, pair.scales, 32 * g))

    def add(with_high: bool) -> None:
        for t, cell in enumerate(cells):
            exact = emit_load(b, emit_offset(b, sums, 64 * t), V_I32, 64)
            if with_high:
                high = emit_load(b, emit_offset(b, sums, _TILE_BYTES + 64 * t), V_I32, 64)
                exact = b.add(b.shl(high, ir.Constant(V_I32, [LOW_BITS] * 16)), exact)
            x_scale = emit_broadcast_f32(b, emit_offset(b, pair.x_scales, 4 * AMX_TOKENS * g + 4 * t))
            b.store(emit_fma(b, b.sitofp(exact, V_F32), b.fmul(scale, x_scale), b.load(cell)), cell)

    with b.if_else(_has_outliers(b, pair, g), likely=False) as (outliers, none):
        with outliers:
            add(True)
        with none:
            add(False)


def _emit_begin(b, pair: _Pair, cells, is_first) -> None:
    """cells[token] = the totals of the groups before; zero if there are none."""
    with b.if_else(is_first) as (then, otherwise):
        with then:
            for cell in cells:
                b.store(ir.Constant(V_F32, [0.0] * 16), cell)
        with otherwise:
            for t, cell in enumerate(cells):
                b.store(emit_load(b, emit_offset(b, pair.totals, 64 * t), V_F32, 64), cell)


def _emit_end(b, pair: _Pair, cells, is_last, out_stride, add) -> None:
    """Keep the totals; or, if no groups are left, out[token] = totals + bias, or += where `add` is not 0."""
    with b.if_else(is_last) as (then, otherwise):
        with otherwise:
            for t, cell in enumerate(cells):
                emit_store(b, b.load(cell), emit_offset(b, pair.totals, 64 * t), 64)
        with then:
            with b.if_then(b.icmp_signed("!=", pair.bias, I64(0))):
                extra = emit_load(b, pair.bias, V_F32, 4)
                for cell in cells:
                    b.store(b.fadd(b.load(cell), extra), cell)
            lines = [emit_offset(b, pair.out, (out_stride, t)) for t in range(AMX_TOKENS)]
            with b.if_then(b.icmp_signed("!=", add, I64(0))):
                for cell, line in zip(cells, lines, strict=True):
                    b.store(b.fadd(b.load(cell), emit_load(b, line, V_F32, 4)), cell)
            for cell, line in zip(cells, lines, strict=True):
                emit_store(b, b.load(cell), line, 4)


__all__ = ["AMX_TOKENS", "integers"]
