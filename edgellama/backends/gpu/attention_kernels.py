"""Triton kernels of a decode step's attention: each token against its slot's cache, in splits that are merged.

A program takes one head of keys with all query heads that share it, so every key is read once, and one split of the
positions. The number of splits is fixed, since a CUDA graph's grid is; their length follows the token's position.
Softmax is kept in base 2 (log2 e is in the queries' scale). Knows nothing of layers or tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import place


@triton.jit
def attend(
    q, keys, values, key_scales, value_scales, positions, slots, out, states, n_ctx, out_lines,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, INT8: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """q: float32 [M][heads][head_dim], scaled. One split: `out`, transposed. Several: `states` [M][heads][SPLITS][.].

    A state is the largest score, the sum of weights and the unnormalized output. QUERIES and WIDTH are GROUP and
    HEAD_DIM rounded up to what `tl.dot` takes.
    """
    kv_head, m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + m) + 1
    slot = tl.load(slots + m).to(tl.int64)
    share = (length + SPLITS - 1) // SPLITS
    share = (share + BLOCK - 1) // BLOCK * BLOCK
    start = split * share
    end = tl.minimum(start + share, length)

    g, d = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    heads = (m * KV_HEADS + kv_head) * GROUP + g
    at = heads[:, None] * HEAD_DIM + d[None, :]
    mine = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    queries = tl.load(q + at, mask=mine, other=0.0).to(DOT)
    base = (slot * KV_HEADS + kv_head) * n_ctx

    best = tl.zeros((QUERIES,), tl.float32) - float("inf")
    weight = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, WIDTH), tl.float32)
    for first in range(start, end, BLOCK):
        p = first + tl.arange(0, BLOCK)
        seen = p < end
        where = (base + p) * HEAD_DIM
        k = tl.load(keys + where[None, :] + d[:, None], mask=seen[None, :] & (d < HEAD_DIM)[:, None], other=0.0).to(DOT)
        scores = tl.dot(queries, k)
        if INT8:
            scores *= tl.load(key_scales + base + p, mask=seen, other=0.0)[None, :]
        scores = tl.where(seen[None, :], scores, -float("inf"))
        top = tl.maximum(best, tl.max(scores, 1))
        fade = tl.exp2(best - top)
        w = tl.exp2(scores - top[:, None])
        weight = weight * fade + tl.sum(w, 1)
        if INT8:
            w *= tl.load(value_scales + base + p, mask=seen, other=0.0)[None, :]
        v = tl.load(values + where[:, None] + d[None, :], mask=seen[:, None] & (d < HEAD_DIM)[None, :], other=0.0).to(
            DOT
        )
        result = result * fade[:, None] + tl.dot(w.to(DOT), v)
        best = top

    if SPLITS == 1:
        k = (kv_head * GROUP + g)[:, None] * HEAD_DIM + d[None, :]
        tl.store(out + m * out_lines * 8 + place(k, out_lines), result / weight[:, None], mask=mine)
    else:
        state = states + (heads * SPLITS + split).to(tl.int64) * (HEAD_DIM + 2)
        tl.store(state, best, mask=g < GROUP)
        tl.store(state + 1, weight, mask=g < GROUP)
        tl.store(state[:, None] + 2 + d[None, :], result, mask=mine)


@triton.jit
def merge(
    states, out, out_lines, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    SPLITS_UP: tl.constexpr,
):  # fmt: skip
    """The splits of one head of one token into its part of `out`; a split without positions weighs nothing."""
    head, m = tl.program_id(0), tl.program_id(1)
    s, d = tl.arange(0, SPLITS_UP), tl.arange(0, WIDTH)
    real = s < SPLITS
    state = states + ((m * HEADS + head) * SPLITS + s).to(tl.int64) * (HEAD_DIM + 2)
    best = tl.load(state, mask=real, other=-float("inf"))
    fade = tl.exp2(best - tl.max(best, 0))
    weight = tl.sum(tl.load(state + 1, mask=real, other=0.0) * fade, 0)
    mine = real[:, None] & (d < HEAD_DIM)[None, :]
    result = tl.sum(tl.load(state[:, None] + 2 + d[None, :], mask=mine, other=0.0) * fade[:, None], 0)
    k = head * HEAD_DIM + d
    tl.store(out + m * out_lines * 8 + place(k, out_lines), result / weight, mask=d < HEAD_DIM)
