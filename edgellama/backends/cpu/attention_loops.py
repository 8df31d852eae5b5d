"""The inner loops of attention: scores of queries against keys, and values mixed by weights, in SIMD.

Lane = position in scores, lane = dimension in mixed values: nothing is summed across lanes. A score is one chain of
fma over the dimensions, a mixed value one over the positions, both in order and from zero, so neither depends on how
many queries share a loop nor on whether keys and values were widened first. Knows nothing of softmax or of who
attends to what.
"""

from __future__ import annotations

from collections.abc import Callable

from numba import types
from numba.core import cgutils

from .shapes import QUERIES, SPLIT
from .simd import (
    ADDRESS,
    I64,
    V_F32,
    emit_broadcast_f32,
    emit_fma,
    emit_load,
    emit_load_f16,
    emit_load_i8,
    emit_offset,
    emit_store,
    ir,
    vector_intrinsic,
)
from .target import TARGET

ROWS = 32
"""Rows of values of the cache that all columns go through before the next ones. So memory sees one stream, as it does
with scores of one line at a time, and the processor's own prefetcher does best; asking for lines ahead, or several
lines at a time, takes a third to a half of the speed."""


def _load_f32(b, address):
    return emit_load(b, address, V_F32, 4)


_LOADS: dict[int, Callable] = {1: emit_load_i8, 2: emit_load_f16, 4: _load_f32}
"""Bytes of a number -> what loads 16 of them as float32."""


def _cells(b, rows: int, columns: int):
    """Accumulators [row][column] of 16 floats, zeroed; LLVM keeps them in registers."""
    cells = [[cgutils.alloca_once(b, V_F32) for _ in range(columns)] for _ in range(rows)]
    for row in cells:
        for cell in row:
            b.store(ir.Constant(V_F32, [0.0] * 16), cell)
    return cells


def _in_widths(b, count, widths: tuple[int, ...], emit_one) -> None:
    """emit_one(first, width) for all of 0..count-1, in steps of the widest width that fits; the last width is 1."""
    first = I64(0)
    for width in widths:
        end = b.sub(count, b.urem(b.sub(count, first), I64(width)))
        with cgutils.for_range_slice(b, first, end, I64(width), inc=True) as (index, _):
            emit_one(index, width)
        first = end


def _scores(nbytes: int, queries: int, widths: tuple[int, ...]):
    """scores[query][position] = q . k; q float32 [queries][head_dim], keys as in the cache, scores SPLIT floats apart.

    `lines`: how many vectors of 16 positions.
    """
    load = _LOADS[nbytes]

    def scores(b, q, keys, head_dim, lines, out):
        stride = b.mul(head_dim, I64(4))
        line_bytes = b.mul(head_dim, I64(16 * nbytes))

        def some(first, width: int):
            acc = _cells(b, queries, width)
            starts = [emit_offset(b, keys, b.mul(b.add(first, I64(j)), line_bytes)) for j in range(width)]
            with cgutils.for_range(b, head_dim) as loop:
                loaded = [load(b, emit_offset(b, start, (loop.index, 16 * nbytes))) for start in starts]
                for i in range(queries):
                    x = emit_broadcast_f32(b, emit_offset(b, q, (stride, i), (loop.index, 4)))
                    for line, cell in zip(loaded, acc[i], strict=True):
                        b.store(emit_fma(b, line, x, b.load(cell)), cell)
            for i in range(queries):
                for j, cell in enumerate(acc[i]):
                    emit_store(b, b.load(cell), emit_offset(b, out, (first, 64), 64 * j + 4 * SPLIT * i), 4)

        _in_widths(b, lines, widths, some)

    return vector_intrinsic(types.void, *[ADDRESS] * 5)(scores)


def _mix(nbytes: int, queries: int, widths: tuple[int, ...]):
    """out[query][dim] += sum over positions of weight * value; weights SPLIT floats apart, out out_stride bytes.

    `value_stride`: numbers in a row of values; all of them are mixed.
    """
    load = _LOADS[nbytes]

    def mix(b, weights, values, value_stride, positions, out, out_stride):
        row_bytes = b.mul(value_stride, I64(nbytes))

        def some(first, width: int, start, count):
            acc = _cells(b, queries, width)
            places = [
                [emit_offset(b, out, (out_stride, i), (first, 64), 64 * j) for j in range(width)]
                for i in range(queries)
            ]
            for i in range(queries):
                for j in range(width):
                    b.store(emit_load(b, places[i][j], V_F32, 4), acc[i][j])
            column = emit_offset(b, values, (first, 16 * nbytes))
            with cgutils.for_range(b, count) as loop:
                position = b.add(start, loop.index)
                row = emit_offset(b, column, b.mul(position, row_bytes))
                loaded = [load(b, emit_offset(b, row, 16 * nbytes * j)) for j in range(width)]
                for i in range(queries):
                    w = emit_broadcast_f32(b, emit_offset(b, weights, 4 * SPLIT * i, (position, 4)))
                    for line, cell in zip(loaded, acc[i], strict=True):
                        b.store(emit_fma(b, line, w, b.load(cell)), cell)
            for i in range(queries):
                for j in range(width):
                    emit_store(b, b.load(acc[i][j]), places[i][j], 4)

        def rows(start, count):
            _in_widths(b, b.udiv(value_stride, I64(16)), widths, lambda first, width: some(first, width, start, count))

        if nbytes == 4:
            rows(I64(0), positions)
            return
        with cgutils.for_range_slice(b, I64(0), positions, I64(ROWS), inc=True) as (start, _):
            left = b.sub(positions, start)
            rows(start, b.select(b.icmp_signed("<", left, I64(ROWS)), left, I64(ROWS)))

    return vector_intrinsic(types.void, *[ADDRESS] * 6)(mix)


def _widen(nbytes: int):
    """`count` numbers of the cache (a multiple of 16) as float32."""
    load = _LOADS[nbytes]

    def widen(b, source, count, to):
        with cgutils.for_range(b, b.udiv(count, I64(16))) as loop:
            line = load(b, emit_offset(b, source, (loop.index, 16 * nbytes)))
            emit_store(b, line, emit_offset(b, to, (loop.index, 64)), 4)

    return vector_intrinsic(types.void, *[ADDRESS] * 3)(widen)


_MANY = tuple(width for width in (4, 2, 1) if width <= TARGET.attention_lines)
_ONE = tuple(width for width in (8, 4, 2, 1) if width <= 2 * TARGET.attention_lines)

scores_one_f16, scores_one_i8 = _scores(2, 1, (1,)), _scores(1, 1, (2, 1))
mix_one_f16, mix_one_i8 = (_mix(nbytes, 1, _ONE) for nbytes in (2, 1))
widen_f16, widen_i8 = _widen(2), _widen(1)
scores_few_f16, scores_few_i8 = _scores(2, QUERIES, (1,)), _scores(1, QUERIES, _MANY)
mix_few_f16, mix_few_i8 = (_mix(nbytes, QUERIES, _MANY) for nbytes in (2, 1))
scores_many, mix_many = _scores(4, QUERIES, _MANY), _mix(4, QUERIES, _MANY)
