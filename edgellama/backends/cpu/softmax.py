"""Softmax over the positions of one split, and the merging of splits, in base 2.

A *state* is what attention knows of one query after some positions, all relative to the largest score m:

    sums     float32 [16]             sum of 2**(score - m), lane = position % 16
    largest  float32                  m, in all of 16 lanes
    output   float32 [value_stride]   sum of 2**(score - m) * value

In a cache of int8 the output has the values' scales in its weights, the sums have not.
(Online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867; splits: Flash-Decoding, Dao et al. 2023.) Scores come
times log2(e). Knows nothing of keys, of values or of who attends to what.
"""

from __future__ import annotations

import math

import numpy as np
from numba import float32, types
from numba.core import cgutils

from .jit import kernel
from .shapes import LARGEST, OUTPUT, QUERIES, SPLIT, state_bytes
from .simd import (
    ADDRESS,
    V_F32,
    emit_exp2,
    emit_load,
    emit_max,
    emit_offset,
    emit_store,
    hmax,
    hsum,
    ir,
    keep_below,
    load_f32,
    load_i64,
    splat,
    store_f32,
    vector_intrinsic,
    vexp2,
    vfma,
    vload,
    vmax,
    vmul,
    vstore,
    vsub,
)

LOWEST = float(np.finfo(np.float32).min)

state_bytes_of = kernel(state_bytes)
"""`state_bytes` for jitted code."""


def _tops(queries: int):
    """largest[i] = the largest in each lane of `lines` vectors of scores; scores SPLIT floats apart, states `stride`
    bytes."""

    def tops(b, scores, lines, states, stride):
        cells = [cgutils.alloca_once(b, V_F32) for _ in range(queries)]
        for cell in cells:
            b.store(ir.Constant(V_F32, [-math.inf] * 16), cell)
        with cgutils.for_range(b, lines) as loop:
            for i, cell in enumerate(cells):
                score = emit_load(b, emit_offset(b, scores, (loop.index, 64), 4 * SPLIT * i), V_F32, 4)
                b.store(emit_max(b, score, b.load(cell)), cell)
        for i, cell in enumerate(cells):
            emit_store(b, b.load(cell), emit_offset(b, states, (stride, i), LARGEST), 4)

    return vector_intrinsic(types.void, *[ADDRESS] * 4)(tops)


def _weights(queries: int):
    """scores = 2**(score - m) and sums[i] = their sum in each lane; m from the states. Otherwise as `_tops`."""

    def weights(b, scores, lines, states, stride):
        zero, lowest = (ir.Constant(V_F32, [value] * 16) for value in (0.0, LOWEST))
        cells, shifts = [cgutils.alloca_once(b, V_F32) for _ in range(queries)], []
        for i, cell in enumerate(cells):
            b.store(zero, cell)
            largest = emit_load(b, emit_offset(b, states, (stride, i), LARGEST), V_F32, 4)
            shifts.append(emit_max(b, largest, lowest))  # finite even if no score counts: each weight is 0 then
        with cgutils.for_range(b, lines) as loop:
            for i, cell in enumerate(cells):
                at = emit_offset(b, scores, (loop.index, 64), 4 * SPLIT * i)
                weight = emit_exp2(b, b.fsub(emit_load(b, at, V_F32, 4), shifts[i]))
                emit_store(b, weight, at, 4)
                b.store(b.fadd(b.load(cell), weight), cell)
        for i, cell in enumerate(cells):
            emit_store(b, b.load(cell), emit_offset(b, states, (stride, i)), 4)

    return vector_intrinsic(types.void, *[ADDRESS] * 4)(weights)


tops_one, tops_some = _tops(1), _tops(QUERIES)
weights_one, weights_some = _weights(1), _weights(QUERIES)


@kernel
def weigh(queries, scores, lengths, start, lines, key_scales, value_scales, states, value_stride):
    """Scores of a split's first positions -> weights, and states with output 0, for 1 or QUERIES queries.

    `lines`: how many vectors of 16 scores each query has, SPLIT floats apart; the split begins at position `start`, and
    query i sees lengths[i] (int64) positions in all, so perhaps none here: the weights of the others are zero. Unless
    `key_scales` is 0, scores and weights are multiplied by the scales of their positions (float32 [SPLIT]).
    """
    stride = state_bytes_of(value_stride)
    for i in range(queries):
        _hide(scores + 4 * i * SPLIT, load_i64(lengths + 8 * i) - start, lines, key_scales)
    if queries == 1:
        tops_one(scores, lines, states, stride)
    else:
        tops_some(scores, lines, states, stride)
    for i in range(queries):
        largest = states + i * stride + LARGEST
        vstore(largest, splat(hmax(vload(largest))))
    if queries == 1:
        weights_one(scores, lines, states, stride)
    else:
        weights_some(scores, lines, states, stride)
    for i in range(queries):
        if key_scales != 0:
            _scale(scores + 4 * i * SPLIT, load_i64(lengths + 8 * i) - start, lines, value_scales)
        for j in range(OUTPUT, stride, 64):
            vstore(states + i * stride + j, splat(float32(0.0)))


@kernel
def _hide(scores, valid, lines, scales):
    """Scores times scales; -inf from `valid` on, where scales may be anything."""
    if scales != 0:
        for i in range(0, 16 * lines, 16):
            vstore(scores + 4 * i, vmul(vload(scores + 4 * i), vload(scales + 4 * i)))
    for i in range(max(valid, 0) // 16 * 16, 16 * lines, 16):
        vstore(scores + 4 * i, keep_below(vload(scores + 4 * i), valid - i))


@kernel
def _scale(weights, valid, lines, scales):
    """Weights times scales, as far as these are written."""
    for i in range(0, 16 * lines, 16):
        scale = vmax(keep_below(vload(scales + 4 * i), valid - i), splat(float32(0.0)))
        vstore(weights + 4 * i, vmul(vload(weights + 4 * i), scale))


@kernel
def merge(into, state, value_stride):
    """Add the state of later positions, which may be none, to one that has some."""
    a, b = vload(into + LARGEST), vload(state + LARGEST)
    top = vmax(a, b)
    fa, fb = vexp2(vsub(a, top)), vexp2(vsub(b, top))
    vstore(into + LARGEST, top)
    vstore(into, vfma(vload(into), fa, vmul(vload(state), fb)))
    for i in range(OUTPUT, OUTPUT + 4 * value_stride, 64):
        vstore(into + i, vfma(vload(into + i), fa, vmul(vload(state + i), fb)))


@kernel
def finish(state, head_dim, out):
    """out float32 [head_dim] = output / sum of the weights."""
    inverse = float32(1.0) / hsum(vload(state))
    whole = head_dim // 16 * 16
    for i in range(0, whole, 16):
        vstore(out + 4 * i, vmul(vload(state + OUTPUT + 4 * i), splat(inverse)))
    for i in range(whole, head_dim):
        store_f32(out + 4 * i, load_f32(state + OUTPUT + 4 * i) * inverse)
