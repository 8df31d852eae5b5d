"""The forward pass of a Llama model as one program, run by every thread of a team at once.

Each thread calls `forward` with its rank. Shared work is handed out in chunks by atomic counters, and a
barrier separates what depends on each other's results. One token is packed by each thread for itself,
which is cheaper than waiting; several are shared out. Nothing here knows how a matrix is multiplied
(`matmul`), how attention goes through the cache (`attention`), or what the tables are made from (`plan`).
"""

from __future__ import annotations

import functools

from numba import int64, types

from .attention import attend_all, bring_their_own, store_all
from .jit import Native, kernel
from .matmul import claim, multiply, multiply_blocks, multiply_three
from .plan import (
    BARRIER,
    CANCEL,
    COUNTERS,
    DECISION,
    LAYER,
    PACK,
    PLAN,
    UP_BLOCKS,
    UP_CELLS,
    WORK_PER_CALL,
    WORK_PER_LAYER,
)
from .shapes import LINE
from .simd import load_i32, record_at
from .sync import atomic_load, atomic_store, barrier, fetch_add
from .vector_ops import embed, finish_tile, gate, pack_row, pack_row_f32, rms_norm

_plan_at, _layer_at, _pack_at = record_at(PLAN), record_at(LAYER), record_at(PACK)
_LAYER_BYTES, _PACK_BYTES = LAYER.itemsize, PACK.itemsize


@functools.partial(Native, result=types.int64, steps=16)
def forward(plan, layers, packs, rank):
    """Tokens in, logits (or hidden states) of the wanted rows out; 0 if cancelled, or else 1.

    Addresses of PLAN, LAYER[n_layers], PACK[n_threads + 2]; see `plan`. Rank 0 is back when nobody reads the tables
    any more, but for DECISION where the result is 0.
    """
    p = _plan_at(plan)
    bring = bring_their_own(p)
    scratch = p.scratch + rank * p.scratch_stride
    words = p.control + BARRIER * LINE
    # Once rank 0 is back the next call's tables are filled in, and others may still be on the way.
    n_rows, n_layers = p.n_rows, p.n_layers
    # Two sets of counters in turn: one is cleared while the other is in use.
    for_call, work = p.control + COUNTERS * LINE, p.n_threads * LINE
    counter, other = for_call + WORK_PER_CALL * work, for_call + (WORK_PER_CALL + WORK_PER_LAYER) * work
    clear(for_call + work, WORK_PER_CALL - 1 + 2 * WORK_PER_LAYER, p.n_threads, rank)

    embed_tokens(p, for_call)
    barrier(words, p.n_threads)
    for i in range(n_layers):
        layer = _layer_at(layers + i * _LAYER_BYTES)

        # Attention: x += o_proj(attention(rope(q), rope(k), v)) with q, k, v from the normalized x.
        pack = pack_for(p, packs, p.n_tokens, rank)
        pack_tokens(p, counter, pack, p.x, p.x_stride, layer.input_norm, layer.q, scratch)
        multiply_three(counter + work, p.n_threads, rank, layer.q, layer.k, layer.v, pack, p.n_tokens,
                       p.qkv, p.qkv + p.k_column, p.qkv + p.v_column, p.qkv_stride)  # fmt: skip
        barrier(words, p.n_threads)
        clear(other, WORK_PER_LAYER, p.n_threads, rank)
        if not bring:
            store_all(p, counter + 2 * work, layer, scratch)
            barrier(words, p.n_threads)
        attend_all(p, counter + 3 * work, layer, bring, scratch)
        barrier(words, p.n_threads)
        pack = pack_for(p, packs, p.n_tokens, rank)
        pack_tokens(p, counter + 4 * work, pack, p.attention, p.attention_stride, 0, layer.o, scratch)
        multiply(counter + 5 * work, p.n_threads, rank, layer.o, pack, p.n_tokens, p.x, p.x_stride, 1)
        barrier(words, p.n_threads)

        # MLP: x += down_proj(act(gate_proj(x)) * up_proj(x)) with the normalized x.
        pack = pack_for(p, packs, p.n_tokens, rank)
        pack_tokens(p, counter + 6 * work, pack, p.x, p.x_stride, layer.post_norm, layer.gate, scratch)
        gate_and_up(p, counter + 7 * work, rank, layer, pack, scratch)
        if rank == 0:
            atomic_store(p.control + DECISION * LINE, atomic_load(p.control + CANCEL * LINE))
        barrier(words, p.n_threads)
        if atomic_load(p.control + DECISION * LINE) != 0:
            if rank == 0:
                atomic_store(for_call, 0)
            return 0
        pack = pack_for(p, packs, p.n_tokens, rank)
        pack_tokens(p, counter + 8 * work, pack, p.mlp, p.mlp_stride, 0, layer.down, scratch)
        multiply(counter + 9 * work, p.n_threads, rank, layer.down, pack, p.n_tokens, p.x, p.x_stride, 1)
        barrier(words, p.n_threads)
        counter, other = other, counter

    if rank == 0:
        atomic_store(for_call, 0)
    if n_rows > 0:
        if p.hidden_out != 0:
            hidden_of_rows(p, for_call + work)
        else:
            logits_of_rows(p, for_call + work, packs, rank, scratch)
    return 1


@kernel
def clear(counter, n, n_threads, rank):
    """Zero a thread's own lines of `n` counters."""
    for i in range(n):
        atomic_store(counter + (i * n_threads + rank) * LINE, 0)


@kernel
def pack_for(p, packs, n, rank):
    """The pack that takes `n` tokens: the thread's own, or everybody's for a few or for many."""
    few = packs + p.n_threads * _PACK_BYTES
    if n == 1:
        return _pack_at(packs + rank * _PACK_BYTES)
    return _pack_at(few if n <= _pack_at(few).tile else few + _PACK_BYTES)


@kernel
def embed_tokens(p, counter):
    """x = the embedding of each token; of none where the caller has filled x (see `layerwise`)."""
    while True:
        t = fetch_add(counter, 1)
        if t >= p.n_embedded:
            return
        embed(p.embed, int64(load_i32(p.tokens + 4 * t)), p.hidden_size, p.x + t * p.x_stride)


@kernel
def pack_tokens(p, counter, pack, rows, stride, norm, matrix, scratch):
    """Normalize (if `norm`, an address, is not 0) and pack all tokens for `matrix`.

    One token: each thread packs its own copy. Several: shared out by tile, and waited for.
    """
    if pack.tile == 1:
        pack_one(p, pack, rows, norm, matrix, 0, 0, scratch)
        return
    while True:
        tile = fetch_add(counter, 1)
        if tile * pack.tile >= p.n_tokens:
            break
        # What an unfilled tile multiplies besides is left over from before, and nobody reads the product.
        for t in range(min(pack.tile, p.n_tokens - tile * pack.tile)):
            pack_one(p, pack, rows + (tile * pack.tile + t) * stride, norm, matrix, tile, t, scratch)
        finish_tile(matrix.groups, pack, tile)
    barrier(p.control + BARRIER * LINE, p.n_threads)


@kernel
def pack_one(p, pack, row, norm, matrix, tile, t, scratch):
    """One row to token `t` of tile `tile`."""
    if norm != 0:
        rms_norm(row, norm, p.hidden_size, matrix.groups * 128, p.eps, scratch + p.normed)
        row = scratch + p.normed
    pack_row(row, matrix.groups, matrix.ceiling, pack, tile, t)


@kernel
def gate_and_up(p, counter, rank, layer, pack, scratch):
    """mlp = act(gate_proj) * up_proj, a few row blocks of both at a time."""
    padded = (p.n_tokens + pack.tile - 1) // pack.tile * pack.tile
    room = max(UP_CELLS // padded, UP_BLOCKS)
    up, up_stride = scratch + p.up, room * 64
    while True:
        first, end = claim(counter, p.n_threads, rank, layer.gate.blocks)
        if first >= end:
            return
        while first < end:
            blocks = min(room, end - first)
            multiply_blocks(layer.gate, first, blocks, pack, p.n_tokens, p.mlp, p.mlp_stride, 0)
            # `up` holds only these row blocks: row 0 of the matrix would lie before it.
            multiply_blocks(layer.up, first, blocks, pack, p.n_tokens, up - first * 64, up_stride, 0)
            for t in range(p.n_tokens):
                gate(p.mlp + t * p.mlp_stride + first * 64, up + t * up_stride, blocks * 16, p.activation)
            first += blocks


@kernel
def logits_of_rows(p, counter, packs, rank, scratch):
    """logits = lm_head(norm(x)) for the wanted rows."""
    one = p.n_rows == 1
    pack = pack_for(p, packs, p.n_rows, rank)
    tile = pack.tile
    groups, is_f16 = p.head.groups, p.head.bits == 16
    tiles = (p.n_rows + tile - 1) // tile
    while True:
        index = int64(0) if one else fetch_add(counter, 1)
        if index >= tiles:
            break
        for t in range(min(tile, p.n_rows - index * tile)):
            x = p.x + int64(load_i32(p.rows + 4 * (index * tile + t))) * p.x_stride
            rms_norm(x, p.final_norm, p.hidden_size, groups * 128, p.eps, scratch + p.normed)
            if is_f16:
                pack_row_f32(scratch + p.normed, groups, pack, index, t)
            else:
                pack_row(scratch + p.normed, groups, p.head.ceiling, pack, index, t)
        if not is_f16:
            finish_tile(groups, pack, index)
        if one:
            break
    barrier(p.control + BARRIER * LINE, p.n_threads)
    multiply(counter + p.n_threads * LINE, p.n_threads, rank, p.head, pack, p.n_rows, p.logits, p.logits_stride, 0)
    barrier(p.control + BARRIER * LINE, p.n_threads)


@kernel
def hidden_of_rows(p, counter):
    """norm(x) of the wanted rows, to where logits go."""
    while True:
        row = fetch_add(counter, 1)
        if row >= p.n_rows:
            break
        x = p.x + int64(load_i32(p.rows + 4 * row)) * p.x_stride
        rms_norm(x, p.final_norm, p.hidden_size, p.x_stride // 4, p.eps, p.logits + row * p.logits_stride)
    barrier(p.control + BARRIER * LINE, p.n_threads)
