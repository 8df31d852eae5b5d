"""Causal attention over the KV cache, for one KV head and up to four queries that share it.

The cache of one head: keys [positions/16][head_dim][16] (lane = position: nothing is summed across lanes),
values [positions][value_stride]; float16, or int8 with a float32 scale for each position. Softmax runs online
over blocks of 64 positions at fixed places, whose results are gathered in splits of 1024 positions and merged in
order. So a query's bits do not depend on which queries share its pass, on chunks, or on which thread did it.
(Online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867; splits: Flash-Decoding, Dao et al. 2023.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import float32, int64, types
from numba.core import cgutils

from ...kv_cache import BLOCK
from .jit import Native, kernel
from .simd import (
    ADDRESS,
    I64,
    V_F32,
    emit_broadcast_f32,
    emit_fma,
    emit_load,
    emit_load_f16,
    emit_load_i8,
    emit_native_call,
    emit_offset,
    emit_splat,
    emit_store,
    hmax,
    hsum,
    ir,
    keep_below,
    load_f32,
    load_i64,
    splat,
    store_f32,
    vadd,
    vector_intrinsic,
    vexp,
    vfma,
    vload,
    vmax,
    vmul,
    vstore,
    vsub,
)

SPLIT = 1024
"""Positions whose blocks share one state; a multiple of BLOCK."""
QUERIES = 4
"""How many queries share one pass over the cache."""


_STATE_HEAD = 128
"""Bytes of a state before its output: the sums (16 floats), the maximum, and room to align."""


def scratch_bytes(value_stride: int) -> int:
    """What `attend` needs for itself: scores, and two states (sums, maximum, output) for each query."""
    return QUERIES * (BLOCK * 4 + 2 * (_STATE_HEAD + 4 * value_stride))


class Element(NamedTuple):
    """How the cache holds a number, and what loads 16 of them as float32."""

    nbytes: int
    emit_load: Callable


ELEMENTS = {"float16": Element(2, emit_load_f16), "int8": Element(1, emit_load_i8)}


def _scores(element: Element, queries: int, parts: int):
    """scores[query][16 * part + lane] = q . k for `parts` neighbouring key blocks of 16 positions."""
    line = 16 * element.nbytes

    def scores(b, q, q_stride, keys, head_dim, out):
        """Query i at q + i * q_stride (bytes); results BLOCK floats apart."""
        acc = [[cgutils.alloca_once(b, V_F32) for _ in range(parts)] for _ in range(queries)]
        for row in acc:
            for cell in row:
                b.store(ir.Constant(V_F32, [0.0] * 16), cell)
        with cgutils.for_range(b, head_dim) as loop:
            d = loop.index
            lines = [
                element.emit_load(b, emit_offset(b, keys, (b.mul(head_dim, I64(p)), line), (d, line)))
                for p in range(parts)
            ]
            for i in range(queries):
                x = emit_broadcast_f32(b, emit_offset(b, q, (q_stride, i), (d, 4)))
                for p in range(parts):
                    b.store(emit_fma(b, lines[p], x, b.load(acc[i][p])), acc[i][p])
        for i in range(queries):
            for p in range(parts):
                emit_store(b, b.load(acc[i][p]), emit_offset(b, out, 4 * BLOCK * i + 64 * p), 4)

    return vector_intrinsic(types.void, *[ADDRESS] * SCORES_ARGUMENTS)(scores)


def _mix(element: Element, queries: int, chunks: int):
    """out[query][dim] += sum over positions of weight * value, for `chunks` * 16 neighbouring dims."""

    def mix(b, weights, values, value_stride, positions, out, out_stride):
        """Weights of a query BLOCK floats apart; value_stride in elements; out_stride in bytes."""
        acc = [[cgutils.alloca_once(b, V_F32) for _ in range(chunks)] for _ in range(queries)]
        for i in range(queries):
            for c in range(chunks):
                b.store(emit_load(b, emit_offset(b, out, (out_stride, i), 64 * c), V_F32, 4), acc[i][c])
        with cgutils.for_range(b, positions) as loop:
            p = loop.index
            row = emit_offset(b, values, (b.mul(p, value_stride), element.nbytes))
            lines = [element.emit_load(b, emit_offset(b, row, 16 * element.nbytes * c)) for c in range(chunks)]
            for i in range(queries):
                w = emit_splat(b, emit_load(b, emit_offset(b, weights, 4 * BLOCK * i, (p, 4)), ir.FloatType(), 4))
                for c in range(chunks):
                    b.store(emit_fma(b, lines[c], w, b.load(acc[i][c])), acc[i][c])
        for i in range(queries):
            for c in range(chunks):
                emit_store(b, b.load(acc[i][c]), emit_offset(b, out, (out_stride, i), 64 * c), 4)

    return vector_intrinsic(types.void, *[ADDRESS] * MIX_ARGUMENTS)(mix)


SCORES_ARGUMENTS, MIX_ARGUMENTS = 5, 6
_f16, _i8 = ELEMENTS["float16"], ELEMENTS["int8"]
_scores_one_f16, _scores_four_f16 = _scores(_f16, 1, 4), _scores(_f16, QUERIES, 2)
_scores_one_i8, _scores_four_i8 = _scores(_i8, 1, 4), _scores(_i8, QUERIES, 2)
_mix_one_f16, _mix_one_narrow_f16 = _mix(_f16, 1, 4), _mix(_f16, 1, 1)
_mix_one_i8, _mix_one_narrow_i8 = _mix(_i8, 1, 4), _mix(_i8, 1, 1)
_mix_four_f16, _mix_four_narrow_f16 = _mix(_f16, QUERIES, 2), _mix(_f16, QUERIES, 1)
_mix_four_i8, _mix_four_narrow_i8 = _mix(_i8, QUERIES, 2), _mix(_i8, QUERIES, 1)


@Native
def scores_one_f16(q, q_stride, keys, head_dim, out):
    _scores_one_f16(q, q_stride, keys, head_dim, out)


@Native
def scores_four_f16(q, q_stride, keys, head_dim, out):
    _scores_four_f16(q, q_stride, keys, head_dim, out)


@Native
def mix_one_f16(weights, values, value_stride, positions, out, out_stride):
    _mix_one_f16(weights, values, value_stride, positions, out, out_stride)


@Native
def mix_one_narrow_f16(weights, values, value_stride, positions, out, out_stride):
    _mix_one_narrow_f16(weights, values, value_stride, positions, out, out_stride)


@Native
def mix_four_f16(weights, values, value_stride, positions, out, out_stride):
    _mix_four_f16(weights, values, value_stride, positions, out, out_stride)


@Native
def mix_four_narrow_f16(weights, values, value_stride, positions, out, out_stride):
    _mix_four_narrow_f16(weights, values, value_stride, positions, out, out_stride)


@Native
def scores_one_i8(q, q_stride, keys, head_dim, out):
    _scores_one_i8(q, q_stride, keys, head_dim, out)


@Native
def scores_four_i8(q, q_stride, keys, head_dim, out):
    _scores_four_i8(q, q_stride, keys, head_dim, out)


@Native
def mix_one_i8(weights, values, value_stride, positions, out, out_stride):
    _mix_one_i8(weights, values, value_stride, positions, out, out_stride)


@Native
def mix_one_narrow_i8(weights, values, value_stride, positions, out, out_stride):
    _mix_one_narrow_i8(weights, values, value_stride, positions, out, out_stride)


@Native
def mix_four_i8(weights, values, value_stride, positions, out, out_stride):
    _mix_four_i8(weights, values, value_stride, positions, out, out_stride)


@Native
def mix_four_narrow_i8(weights, values, value_stride, positions, out, out_stride):
    _mix_four_narrow_i8(weights, values, value_stride, positions, out, out_stride)


KERNEL_FIELDS = ("scores_one", "scores_four", "mix_one", "mix_one_narrow", "mix_four", "mix_four_narrow")
KERNELS = {
    "float16": (scores_one_f16, scores_four_f16, mix_one_f16, mix_one_narrow_f16, mix_four_f16, mix_four_narrow_f16),
    "int8": (scores_one_i8, scores_four_i8, mix_one_i8, mix_one_narrow_i8, mix_four_i8, mix_four_narrow_i8),
}
"""The kernels that `attend` calls by address, by the cache's kind; their fields in the plan have these names."""


@vector_intrinsic(types.void, *[ADDRESS] * (SCORES_ARGUMENTS + 1))
def call_scores(b, address, q, q_stride, keys, head_dim, out):
    """Call a kernel of scores by its address."""
    emit_native_call(b, address, q, q_stride, keys, head_dim, out)


@vector_intrinsic(types.void, *[ADDRESS] * (MIX_ARGUMENTS + 1))
def call_mix(b, address, weights, values, value_stride, positions, out, out_stride):
    """Call a kernel that mixes values by its address."""
    emit_native_call(b, address, weights, values, value_stride, positions, out, out_stride)


@kernel
def _start(state, value_stride):
    """An empty state: sums 0 (16 lanes), output 0, max -inf."""
    zero = splat(float32(0.0))
    vstore(state, zero)
    store_f32(state + 64, float32(-np.inf))
    for i in range(0, value_stride, 16):
        vstore(state + _STATE_HEAD + 4 * i, zero)


@kernel
def _softmax_block(scores, valid, state, value_stride):
    """Turn 64 scores, the first `valid` of them real, into weights; rescale the state to the new maximum."""
    top = keep_below(vload(scores), valid)
    for i in range(16, BLOCK, 16):
        top = vmax(keep_below(vload(scores + 4 * i), valid - i), top)
    old = load_f32(state + 64)
    new = max(old, hmax(top))
    store_f32(state + 64, new)
    shift = splat(new)
    # On the first block the sums and the output are zero and the factor, e**-inf, is zero too.
    factor = vexp(vsub(splat(old), shift))
    sums = vmul(vload(state), factor)
    for i in range(0, BLOCK, 16):
        weights = vexp(vsub(keep_below(vload(scores + 4 * i), valid - i), shift))
        sums = vadd(sums, weights)
        vstore(scores + 4 * i, weights)
    vstore(state, sums)
    if new != old:
        for i in range(0, value_stride, 16):
            at = state + _STATE_HEAD + 4 * i
            vstore(at, vmul(vload(at), factor))


@kernel
def _merge(into, state, value_stride):
    """Add a split's state to the running one; `into` may be empty, `state` may not."""
    a, b = load_f32(into + 64), load_f32(state + 64)
    top = max(a, b)
    fa, fb = vexp(splat(a - top)), vexp(splat(b - top))
    store_f32(into + 64, top)
    vstore(into, vfma(vload(into), fa, vmul(vload(state), fb)))
    for i in range(_STATE_HEAD, _STATE_HEAD + 4 * value_stride, 64):
        vstore(into + i, vfma(vload(into + i), fa, vmul(vload(state + i), fb)))


@kernel
def _scale(values, scales, n):
    """Multiply 64 values by the scales of their positions, of which the first `n` are written."""
    for i in range(0, BLOCK, 16):
        written = keep_below(vload(scales + 4 * i), n - i)
        vstore(values + 4 * i, vmul(vload(values + 4 * i), vmax(written, splat(float32(0.0)))))


@kernel
def _mix_all(p, queries, weights, values, positions, out, out_stride):
    """All dims of the output, widest kernel first."""
    wide, narrow, width = p.mix_one, p.mix_one_narrow, int64(64)
    if queries > 1:
        wide, narrow, width = p.mix_four, p.mix_four_narrow, int64(32)
    i = int64(0)
    while i < p.value_stride:
        step = width if p.value_stride - i >= width else int64(16)
        function = wide if step == width else narrow
        call_mix(function, weights, values + i * p.kv_bytes, p.value_stride, positions, out + 4 * i, out_stride)
        i += step


@kernel
def attend(p, queries, q, q_stride, lengths, keys, values, key_scales, value_scales, out, scratch):
    """Attention of `queries` (1 or QUERIES) queries of one KV head; `p` is the plan (see `plan`).

    q, keys, values, scratch: addresses; query i is q + i * q_stride (bytes; already rotated and scaled) and sees
    positions 0 .. lengths[i] - 1; a query whose length is 0 is left out. `key_scales` and `value_scales`, float32
    [positions], are read if the cache is int8. `lengths` and `out` are int64 [QUERIES]; out[i] is the address of a
    float32 [head_dim].
    """
    head_dim, value_stride = p.head_dim, p.value_stride
    state_bytes = _STATE_HEAD + 4 * value_stride
    scores, running = scratch, scratch + QUERIES * BLOCK * 4
    total = running + QUERIES * state_bytes
    longest = load_i64(lengths)
    for i in range(queries):
        length = load_i64(lengths + 8 * i)
        longest = max(longest, length)
        _start(total + i * state_bytes, value_stride)
    for split in range(0, longest, SPLIT):
        for i in range(queries):
            _start(running + i * state_bytes, value_stride)
        for block in range(split, min(split + SPLIT, longest), BLOCK):
            at = keys + block * head_dim * p.kv_bytes
            if queries == 1:
                call_scores(p.scores_one, q, q_stride, at, head_dim, scores)
            else:
                call_scores(p.scores_four, q, q_stride, at, head_dim, scores)
                call_scores(p.scores_four, q, q_stride, at + 32 * head_dim * p.kv_bytes, head_dim, scores + 128)
            positions = min(longest - block, BLOCK)
            for i in range(queries):
                block_scores = scores + i * BLOCK * 4
                valid = load_i64(lengths + 8 * i) - block
                if valid > 0:
                    if p.kv_bytes == 1:
                        _scale(block_scores, key_scales + 4 * block, positions)
                    _softmax_block(block_scores, valid, running + i * state_bytes, value_stride)
                    if p.kv_bytes == 1:
                        _scale(block_scores, value_scales + 4 * block, positions)
                else:
                    for j in range(0, BLOCK, 16):
                        vstore(block_scores + j * 4, splat(float32(0.0)))
            at = values + block * value_stride * p.kv_bytes
            _mix_all(p, queries, scores, at, positions, running + _STATE_HEAD, state_bytes)
        for i in range(queries):
            if load_i64(lengths + 8 * i) > split:
                _merge(total + i * state_bytes, running + i * state_bytes, value_stride)
    for i in range(queries):
        state = total + i * state_bytes
        if load_i64(lengths + 8 * i) > 0:
            to = load_i64(out + 8 * i)
            inverse = float32(1.0) / hsum(vload(state))
            for d in range(head_dim):
                store_f32(to + 4 * d, load_f32(state + _STATE_HEAD + 4 * d) * inverse)
