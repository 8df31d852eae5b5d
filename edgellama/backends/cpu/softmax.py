"""Softmax over the positions of one split, and the merging of splits, in base 2.

A *state* is what attention knows of one query after some positions, all relative to the largest score m:

    sums     float32 [16]             sum of 2**(score - m), lane = position % 16
    largest  float32                  m, in all of 16 lanes
    output   float32 [value_stride]   sum of 2**(score - m) * value

(Online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867; splits: Flash-Decoding, Dao et al. 2023.) Scores come
times log2(e). Knows nothing of keys, of values or of who attends to what.
"""

from __future__ import annotations

import numpy as np
from numba import float32

from .jit import kernel
from .simd import (
    hmax,
    hsum,
    keep_below,
    load_f32,
    splat,
    store_f32,
    vadd,
    vexp2,
    vfma,
    vload,
    vmax,
    vmul,
    vstore,
    vsub,
)

LARGEST, OUTPUT = 64, 128
"""Bytes before these parts of a state."""
LOWEST = float(np.finfo(np.float32).min)


def state_bytes(value_stride: int) -> int:
    """Of one state."""
    return OUTPUT + 4 * value_stride


state_bytes_of = kernel(state_bytes)


@kernel
def weigh(scores, valid, end, key_scales, value_scales, state, value_stride):
    """Scores of a split's first positions -> weights; starts the state with output 0.

    The first `valid` of `end` (a multiple of 16) scores count, which may be none; the weights of the others are zero.
    Unless `key_scales` is 0, scores and weights are multiplied by the scales of their positions (float32).
    """
    whole = max(valid, 0) // 16 * 16
    top = splat(float32(-np.inf))
    if key_scales != 0:
        for i in range(0, whole, 16):
            vstore(scores + 4 * i, vmul(vload(scores + 4 * i), vload(key_scales + 4 * i)))
    for i in range(0, whole, 16):
        top = vmax(vload(scores + 4 * i), top)
    for i in range(whole, end, 16):
        # What lies beyond is unwritten, with any scale: the mask comes last.
        score = vload(scores + 4 * i)
        if key_scales != 0:
            score = vmul(score, vload(key_scales + 4 * i))
        score = keep_below(score, valid - i)
        vstore(scores + 4 * i, score)
        top = vmax(score, top)
    largest = splat(hmax(top))
    vstore(state + LARGEST, largest)
    shift = vmax(largest, splat(float32(LOWEST)))  # finite even where nothing counts: every weight is 0 then
    sums = splat(float32(0.0))
    for i in range(0, end, 16):
        weights = vexp2(vsub(vload(scores + 4 * i), shift))
        sums = vadd(sums, weights)
        vstore(scores + 4 * i, weights)
    vstore(state, sums)
    if key_scales != 0:
        for i in range(0, end, 16):
            scale = vmax(keep_below(vload(value_scales + 4 * i), valid - i), splat(float32(0.0)))
            vstore(scores + 4 * i, vmul(vload(scores + 4 * i), scale))
    for i in range(0, value_stride, 16):
        vstore(state + OUTPUT + 4 * i, splat(float32(0.0)))


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
