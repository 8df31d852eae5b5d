"""Causal attention over the KV cache, for one KV head and up to four queries that share it.

The cache of one head: keys float16 [positions/16][head_dim][16] (lane = position: nothing is summed across
lanes), values float16 [positions][value_stride]. Softmax runs online over blocks of 64 positions at fixed
places, whose results are gathered in splits of 1024 positions and merged in order. So a query's bits do
not depend on which queries share its pass, on chunks, or on which thread did it. (Online softmax: Milakov
and Gimelshein 2018, arXiv:1805.02867; splits: Flash-Decoding, Dao et al. 2023.)
"""

from __future__ import annotations

import numpy as np
from numba import float32, int64, types
from numba.core import cgutils

from .jit import kernel
from .simd import (
    ADDRESS,
    I64,
    V_F32,
    emit_broadcast_f32,
    emit_fma,
    emit_load,
    emit_load_f16,
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

BLOCK = 64
SPLIT = 1024
QUERIES = 4
"""How many queries share one pass over the cache."""


_STATE_HEAD = 128
"""Bytes of a state before its output: the sums (16 floats), the maximum, and room to align."""


def scratch_bytes(value_stride: int) -> int:
    """What `attend` needs for itself: scores, and two states (sums, maximum, output) for each query."""
    return QUERIES * (BLOCK * 4 + 2 * (_STATE_HEAD + 4 * value_stride))


def _make_scores(queries: int, parts: int):
    """scores[query][16 * part + lane] = q . k for `parts` neighbouring key blocks of 16 positions."""

    def scores(b, q, q_stride, keys, head_dim, out):
        """Query i at q + i * q_stride (bytes); results BLOCK floats apart."""
        acc = [[cgutils.alloca_once(b, V_F32) for _ in range(parts)] for _ in range(queries)]
        for row in acc:
            for cell in row:
                b.store(ir.Constant(V_F32, [0.0] * 16), cell)
        with cgutils.for_range(b, head_dim) as loop:
            d = loop.index
            lines = [
                emit_load_f16(b, emit_offset(b, keys, (b.mul(head_dim, I64(p)), 32), (d, 32))) for p in range(parts)
            ]
            for i in range(queries):
                x = emit_broadcast_f32(b, emit_offset(b, q, (q_stride, i), (d, 4)))
                for p in range(parts):
                    b.store(emit_fma(b, lines[p], x, b.load(acc[i][p])), acc[i][p])
        for i in range(queries):
            for p in range(parts):
                emit_store(b, b.load(acc[i][p]), emit_offset(b, out, 4 * BLOCK * i + 64 * p), 4)

    scores.__name__ = f"scores_{queries}x{parts}"
    return vector_intrinsic(types.void, *[ADDRESS] * 5)(scores)


def _make_mix(queries: int, chunks: int):
    """out[query][dim] += sum over positions of weight * value, for `chunks` * 16 neighbouring dims."""

    def mix(b, weights, values, value_stride, positions, out, out_stride):
        """Weights of a query BLOCK floats apart; value_stride in float16s; out_stride in bytes."""
        acc = [[cgutils.alloca_once(b, V_F32) for _ in range(chunks)] for _ in range(queries)]
        for i in range(queries):
            for c in range(chunks):
                b.store(emit_load(b, emit_offset(b, out, (out_stride, i), 64 * c), V_F32, 4), acc[i][c])
        with cgutils.for_range(b, positions) as loop:
            p = loop.index
            row = emit_offset(b, values, (b.mul(p, value_stride), 2))
            lines = [emit_load_f16(b, emit_offset(b, row, 32 * c)) for c in range(chunks)]
            for i in range(queries):
                w = emit_splat(b, emit_load(b, emit_offset(b, weights, 4 * BLOCK * i, (p, 4)), ir.FloatType(), 4))
                for c in range(chunks):
                    b.store(emit_fma(b, lines[c], w, b.load(acc[i][c])), acc[i][c])
        for i in range(queries):
            for c in range(chunks):
                emit_store(b, b.load(acc[i][c]), emit_offset(b, out, (out_stride, i), 64 * c), 4)

    mix.__name__ = f"mix_{queries}x{chunks}"
    return vector_intrinsic(types.void, *[ADDRESS] * 6)(mix)


_scores_one, _scores_four = _make_scores(1, 4), _make_scores(QUERIES, 2)
_mix_one, _mix_one_narrow = _make_mix(1, 4), _make_mix(1, 1)
_mix_four, _mix_four_narrow = _make_mix(QUERIES, 2), _make_mix(QUERIES, 1)


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
def _mix(queries, weights, values, value_stride, positions, out, out_stride):
    """All dims of the output, widest kernel first."""
    i = int64(0)
    while i < value_stride:
        to, at = out + 4 * i, values + 2 * i
        if queries == 1:
            if value_stride - i >= 64:
                _mix_one(weights, at, value_stride, positions, to, out_stride)
                i += 64
            else:
                _mix_one_narrow(weights, at, value_stride, positions, to, out_stride)
                i += 16
        elif value_stride - i >= 32:
            _mix_four(weights, at, value_stride, positions, to, out_stride)
            i += 32
        else:
            _mix_four_narrow(weights, at, value_stride, positions, to, out_stride)
            i += 16


@kernel
def attend(queries, q, q_stride, lengths, keys, values, head_dim, value_stride, out, scratch):
    """Attention of `queries` (1 or QUERIES) queries of one KV head.

    q, keys, values, scratch: addresses; query i is q + i * q_stride (bytes; already rotated and scaled) and
    sees positions 0 .. lengths[i] - 1; a query whose length is 0 is left out. `lengths` and `out` are int64
    [QUERIES]; out[i] is the address of a float32 [head_dim].
    """
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
            at = keys + block * head_dim * 2
            if queries == 1:
                _scores_one(q, q_stride, at, head_dim, scores)
            else:
                _scores_four(q, q_stride, at, head_dim, scores)
                _scores_four(q, q_stride, at + 32 * head_dim * 2, head_dim, scores + 128)
            for i in range(queries):
                valid = load_i64(lengths + 8 * i) - block
                if valid > 0:
                    _softmax_block(scores + i * BLOCK * 4, valid, running + i * state_bytes, value_stride)
                else:
                    for j in range(0, BLOCK, 16):
                        vstore(scores + (i * BLOCK + j) * 4, splat(float32(0.0)))
            positions = min(longest - block, BLOCK)
            _mix(queries, scores, values + block * value_stride * 2, value_stride, positions,
                 running + _STATE_HEAD, state_bytes)  # fmt: skip
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
