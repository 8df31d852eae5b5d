"""Causal attention over the KV cache: which queries attend to which positions, and which thread does it.

All queries of a few neighbouring tokens that share a KV head go through the cache together, in splits of SPLIT
positions at fixed places; the states of the splits are merged in order (see `softmax`). A query's bits do not depend
on the queries beside it, nor on who computes a split: several threads may share the splits of one head, and the one
that ends last merges them. How a split is computed: `attention_loops`.
"""

from __future__ import annotations

from numba import int64, types

from ...kv_cache import BLOCK
from .attention_loops import (
    mix_few_f16,
    mix_few_i8,
    mix_many,
    mix_one_f16,
    mix_one_i8,
    scores_few_f16,
    scores_few_i8,
    scores_many,
    scores_one_f16,
    scores_one_i8,
    widen_f16,
    widen_i8,
)
from .cache_store import rotate
from .jit import Native, kernel
from .shapes import FEW_TOKENS, LINE_POSITIONS, OUTPUT, QUERIES, SPLIT
from .simd import ADDRESS, emit_native_call, load_i64, store_i64, vector_intrinsic
from .softmax import finish, merge, state_bytes_of, weigh
from .sync import atomic_store, fetch_add


@kernel
def _end_of(lengths, n, start):
    """Positions of the split at `start` that the longest of `n` queries sees."""
    end = int64(0)
    for i in range(n):
        end = max(end, load_i64(lengths + 8 * i) - start)
    return min(end, SPLIT)


@Native
def pass_one(q, n, lengths, start, keys, values, key_scales, value_scales, kv_bytes, head_dim, value_stride, states,
             scratch):  # fmt: skip
    """The state of one query after the split whose positions begin with `start`; arguments: see `pass_many`."""
    end = _end_of(lengths, 1, start)
    lines = (end + 15) // 16
    output = states + OUTPUT
    if kv_bytes == 1:
        scores_one_i8(q, keys, head_dim, lines, scratch)
    else:
        scores_one_f16(q, keys, head_dim, lines, scratch)
    weigh(1, scratch, lengths, start, lines, key_scales if kv_bytes == 1 else 0, value_scales, states, value_stride)
    if kv_bytes == 1:
        mix_one_i8(scratch, values, value_stride, end, output, 0)
    else:
        mix_one_f16(scratch, values, value_stride, end, output, 0)


@Native
def pass_few(q, n, lengths, start, keys, values, key_scales, value_scales, kv_bytes, head_dim, value_stride, states,
             scratch):  # fmt: skip
    """`pass_many` for up to QUERIES queries, which takes the cache as it streams from memory."""
    end = _end_of(lengths, n, start)
    lines = (end + 15) // 16
    stride = state_bytes_of(value_stride)
    if kv_bytes == 1:
        scores_few_i8(q, keys, head_dim, lines, scratch)
    else:
        scores_few_f16(q, keys, head_dim, lines, scratch)
    scales = key_scales if kv_bytes == 1 else 0
    weigh(QUERIES, scratch, lengths, start, lines, scales, value_scales, states, value_stride)
    if kv_bytes == 1:
        mix_few_i8(scratch, values, value_stride, end, states + OUTPUT, stride)
    else:
        mix_few_f16(scratch, values, value_stride, end, states + OUTPUT, stride)


@Native
def pass_many(q, n, lengths, start, keys, values, key_scales, value_scales, kv_bytes, head_dim, value_stride, states,
              scratch):  # fmt: skip
    """The states of `n` queries after the split whose positions begin with `start`.

    q: float32 [n][head_dim]; query i sees lengths[i] positions of the sequence (int64). keys .. value_scales: addresses
    of the split in one head's cache. q, lengths and states have room for whole groups of QUERIES; lengths there are 0.
    A block of the cache is widened to float32 for all queries at once.
    """
    stride = state_bytes_of(value_stride)
    groups = (n + QUERIES - 1) // QUERIES
    block = scratch + 4 * groups * QUERIES * SPLIT
    longest = _end_of(lengths, n, start)
    for first in range(0, longest, BLOCK):
        numbers = (min(longest - first, BLOCK) + 15) // 16 * 16 * head_dim
        at = keys + first * head_dim * kv_bytes
        if kv_bytes == 1:
            widen_i8(at, numbers, block)
        else:
            widen_f16(at, numbers, block)
        for i in range(0, n, QUERIES):
            end = min(_end_of(lengths + 8 * i, QUERIES, start) - first, BLOCK)
            if end > 0:
                scores_many(q + 4 * i * head_dim, block, head_dim, (end + 15) // 16, scratch + 4 * (i * SPLIT + first))
    scales = key_scales if kv_bytes == 1 else 0
    for i in range(0, n, QUERIES):
        lines = (_end_of(lengths + 8 * i, QUERIES, start) + 15) // 16
        weigh(QUERIES, scratch + 4 * i * SPLIT, lengths + 8 * i, start, lines, scales, value_scales,
              states + i * stride, value_stride)  # fmt: skip
    for first in range(0, longest, BLOCK):
        numbers = min(longest - first, BLOCK) * value_stride
        at = values + first * value_stride * kv_bytes
        if kv_bytes == 1:
            widen_i8(at, numbers, block)
        else:
            widen_f16(at, numbers, block)
        for i in range(0, n, QUERIES):
            end = min(_end_of(lengths + 8 * i, QUERIES, start) - first, BLOCK)
            if end > 0:
                weights = scratch + 4 * (i * SPLIT + first)
                mix_many(weights, block, value_stride, end, states + i * stride + OUTPUT, stride)


@vector_intrinsic(types.void, *[ADDRESS] * 14)
def call_pass(b, address, q, n, lengths, start, keys, values, key_scales, value_scales, kv_bytes, head_dim,
              value_stride, states, scratch):  # fmt: skip
    """Call `pass_one` or `pass_many` by its address."""
    emit_native_call(b, address, q, n, lengths, start, keys, values, key_scales, value_scales, kv_bytes, head_dim,
                     value_stride, states, scratch)  # fmt: skip


@vector_intrinsic(types.void, *[ADDRESS] * 16)
def call_store(b, address, k, v, apart, cos, sin, tokens, position, keys, values, key_scales, value_scales, kv_bytes,
               head_dim, value_stride, scratch):  # fmt: skip
    """Call `store` by its address."""
    emit_native_call(b, address, k, v, apart, cos, sin, tokens, position, keys, values, key_scales, value_scales,
                     kv_bytes, head_dim, value_stride, scratch)  # fmt: skip


@kernel
def _head_cache(p, layer, slot, head):
    """Addresses of one KV head's keys, values and their scales (which are nowhere if the cache is float16)."""
    scales = slot * p.scale_slot_bytes + head * p.scale_head_bytes
    return (
        layer.keys + slot * p.key_slot_bytes + head * p.key_head_bytes,
        layer.values + slot * p.value_slot_bytes + head * p.value_head_bytes,
        layer.key_scales + scales,
        layer.value_scales + scales,
    )


@kernel
def _run(p, first, end):
    """How many tokens from `first` on, before `end`, are of one slot."""
    slot = load_i64(p.slots + 8 * first)
    n = int64(1)
    while first + n < end and load_i64(p.slots + 8 * (first + n)) == slot:
        n += 1
    return n


@kernel
def _splits_of(p, t):
    """How many splits token `t` sees."""
    return load_i64(p.positions + 8 * t) // SPLIT + 1


@kernel
def _store_tokens(p, layer, head, first, tokens, scratch):
    """Keys and values of one head of tokens at neighbouring positions of one slot."""
    keys, values, key_scales, value_scales = _head_cache(p, layer, load_i64(p.slots + 8 * first), head)
    row = p.qkv + first * p.qkv_stride + 4 * head * p.head_dim
    angle = first * (p.head_dim // 2) * 4
    call_store(p.store, row + p.k_column, row + p.v_column, p.qkv_stride, p.cos + angle, p.sin + angle, tokens,
               load_i64(p.positions + 8 * first), keys, values, key_scales, value_scales, p.kv_bytes, p.head_dim,
               p.value_stride, scratch + p.pass_scratch)  # fmt: skip


@kernel
def bring_their_own(p):
    """Whether there are a few tokens, each of a sequence of its own: none sees another's key, nobody has to wait."""
    if p.n_tokens > FEW_TOKENS:
        return False
    for t in range(1, p.n_tokens):
        for other in range(t):
            if load_i64(p.slots + 8 * t) == load_i64(p.slots + 8 * other):
                return False
    return True


@kernel
def store_all(p, counter, layer, scratch):
    """Keys and values of all tokens into the cache; a piece of work is one KV head and a line of positions."""
    before = load_i64(p.positions) % LINE_POSITIONS
    pieces = (before + p.n_tokens + LINE_POSITIONS - 1) // LINE_POSITIONS
    while True:
        work = fetch_add(counter, 1)
        if work >= pieces * p.n_kv_heads:
            return
        piece, head = work // p.n_kv_heads, work % p.n_kv_heads
        t = max(piece * LINE_POSITIONS - before, 0)
        end = min((piece + 1) * LINE_POSITIONS - before, p.n_tokens)
        while t < end:
            of_slot, position = _run(p, t, end), load_i64(p.positions + 8 * t)
            n = int64(1)
            while n < of_slot and load_i64(p.positions + 8 * (t + n)) == position + n:
                n += 1
            _store_tokens(p, layer, head, t, n, scratch)
            t += n


@kernel
def _prepare_queries(p, head, first, tokens, scratch):
    """Rotate and scale the queries of a run of tokens that share a KV head; their number, and the longest length."""
    shared, half = p.n_heads // p.n_kv_heads, p.head_dim // 2
    n, longest = int64(0), int64(0)
    for t in range(first, first + tokens):
        length = load_i64(p.positions + 8 * t) + 1
        longest = max(longest, length)
        row = p.qkv + t * p.qkv_stride + 4 * head * shared * p.head_dim
        angle = 4 * t * half
        for i in range(shared):
            out = scratch + p.queries + 4 * n * p.head_dim
            rotate(row + 4 * i * p.head_dim, p.cos + angle, p.sin + angle, p.head_dim, p.query_scale, out)
            store_i64(scratch + p.lengths + 8 * n, length)
            n += 1
    for i in range(n, (n + QUERIES - 1) // QUERIES * QUERIES):
        store_i64(scratch + p.lengths + 8 * i, 0)
    return n, longest


@kernel
def _attend_split(p, layer, slot, head, start, n, states, scratch):
    """The states of the `n` queries in scratch after the split that begins at position `start`."""
    keys, values, key_scales, value_scales = _head_cache(p, layer, slot, head)
    native = p.pass_one if n == 1 else p.pass_few if n <= QUERIES else p.pass_many
    call_pass(native, scratch + p.queries, n, scratch + p.lengths, start, keys + start * p.head_dim * p.kv_bytes,
              values + start * p.value_stride * p.kv_bytes, key_scales + 4 * start, value_scales + 4 * start,
              p.kv_bytes, p.head_dim, p.value_stride, states, scratch + p.pass_scratch)  # fmt: skip


@kernel
def _finish_token(p, head, t, states):
    """The outputs of the queries of token `t` that share a KV head."""
    shared = p.n_heads // p.n_kv_heads
    out = p.attention + t * p.attention_stride + 4 * head * shared * p.head_dim
    for i in range(shared):
        finish(states + i * state_bytes_of(p.value_stride), p.head_dim, out + 4 * i * p.head_dim)


@kernel
def _attend_run(p, layer, head, first, tokens, scratch):
    """Attention of a run of tokens of one slot with one KV head: one split after the other."""
    slot = load_i64(p.slots + 8 * first)
    stride = state_bytes_of(p.value_stride)
    states, split_states = scratch + p.states, scratch + p.split_states
    n, longest = _prepare_queries(p, head, first, tokens, scratch)
    _attend_split(p, layer, slot, head, 0, n, states, scratch)
    for start in range(SPLIT, longest, SPLIT):
        _attend_split(p, layer, slot, head, start, n, split_states, scratch)
        for i in range(n):
            merge(states + i * stride, split_states + i * stride, p.value_stride)
    shared = n // tokens
    for t in range(tokens):
        _finish_token(p, head, first + t, states + t * shared * stride)


@kernel
def _attend_many(p, counter, layer, scratch):
    """Attention of many tokens: a piece of work is one KV head and a few neighbouring tokens."""
    pieces = (p.n_tokens + p.piece_tokens - 1) // p.piece_tokens
    while True:
        work = fetch_add(counter, 1)
        if work >= pieces * p.n_kv_heads:
            return
        # The last tokens see the most positions: they come first, so that no thread ends alone with them.
        head, piece = work // pieces, pieces - 1 - work % pieces
        t = piece * p.piece_tokens
        end = min(t + p.piece_tokens, p.n_tokens)
        while t < end:
            tokens = _run(p, t, end)
            _attend_run(p, layer, head, t, tokens, scratch)
            t += tokens


@kernel
def _few_states(p, head, split, first):
    """Where the states of a split are kept for a run of tokens from `first` on: whole groups of QUERIES have room."""
    room = (p.n_heads // p.n_kv_heads + QUERIES - 1) // QUERIES * QUERIES
    return p.few_states + ((split * p.n_kv_heads + head) * FEW_TOKENS + first) * room * state_bytes_of(p.value_stride)


@kernel
def _attend_few(p, counter, layer, bring, scratch):
    """Attention of a few tokens: a piece of work is one KV head and one split, of one sequence or of one token.

    Whoever does the last piece of a head merges its splits and resets their count.
    """
    shared, stride = p.n_heads // p.n_kv_heads, state_bytes_of(p.value_stride)
    splits = int64(0)
    for t in range(p.n_tokens):
        splits = max(splits, _splits_of(p, t))
    # Tokens of several sequences have nothing to share.
    size = min(p.piece_tokens, p.n_tokens) if _run(p, 0, p.n_tokens) == p.n_tokens else int64(1)
    pieces = (p.n_tokens + size - 1) // size
    while True:
        work = fetch_add(counter, 1)
        if work >= pieces * p.n_kv_heads * splits:
            return
        unit, split = work // splits, work % splits
        piece, head = unit // p.n_kv_heads, unit % p.n_kv_heads
        first, start = piece * size, split * SPLIT
        tokens = min(size, p.n_tokens - first)
        n, longest = _prepare_queries(p, head, first, tokens, scratch)
        if bring and split == _splits_of(p, first) - 1:
            _store_tokens(p, layer, head, first, int64(1), scratch)
        if start < longest:
            slot = load_i64(p.slots + 8 * first)
            _attend_split(p, layer, slot, head, start, n, _few_states(p, head, split, first), scratch)
        if fetch_add(p.splits_done + 8 * unit, 1) < splits - 1:
            continue
        atomic_store(p.splits_done + 8 * unit, 0)
        for t in range(first, first + tokens):
            own = (t - first) * shared * stride
            states = _few_states(p, head, 0, first) + own
            for later in range(1, _splits_of(p, t)):
                later_states = _few_states(p, head, later, first) + own
                for i in range(0, shared * stride, stride):
                    merge(states + i, later_states + i, p.value_stride)
            _finish_token(p, head, t, states)


@kernel
def attend_all(p, counter, layer, bring, scratch):
    """Attention of all tokens, whose keys and values are in the cache, unless they bring their own there.

    `bring`: whether they do (`bring_their_own`). `p` and `layer` are records of the plan, `counter` (zeroed) and
    `scratch` addresses.
    """
    if p.n_tokens <= FEW_TOKENS:
        _attend_few(p, counter, layer, bring, scratch)
    else:
        _attend_many(p, counter, layer, scratch)
