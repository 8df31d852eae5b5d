"""Matrix times activations, shared out among the team; the arithmetic itself is in `tiles`.

A *pack* is what a matrix is multiplied with: tokens in tiles of `tile` tokens, quantized for each token and
group of 128 inputs, laid out so that every broadcast of a tile kernel is a constant offset from one pointer.
A code is q = 128 * high + low, two int8; high is 0 but for outliers (see `vector_ops.pack_row`):

    codes   int8     [tiles][groups][32][tile][4]   low parts; 4 neighbouring inputs of one token together: a word
    masks   int64    [tiles][groups]                bit i: word i of the group has outliers in some token
    highs   int8     [tiles][groups][32][tile][4]   high parts, of the words that `masks` names; the rest is undefined
    scales  float32  [tiles][groups][tile]
    sums    int32    [tiles][groups][tile]          the sum of the codes, for the weights' zero point
    values  float32  [tiles][K][tile]               instead of all these, for 16-bit weights
"""

from __future__ import annotations

from numba import types

from .jit import kernel
from .shapes import FEW, LINE, ONE
from .simd import ADDRESS, emit_native_call, vector_intrinsic
from .sync import atomic_load, fetch_add
from .tiles import ARGUMENTS

L2_CHUNK = 256 * 1024
"""Bytes of weights that stay in the second-level cache while the token tiles stream over them."""


PIECES = 8
"""Pieces of a thread's share of a matrix: what may be left to do when a thread has ended and another has not."""


@vector_intrinsic(types.void, *[ADDRESS] * (ARGUMENTS + 1))
def call_tile(b, address, weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride, add,
              blocks, tiles):  # fmt: skip
    """Call a kernel of `tiles` by its address."""
    emit_native_call(b, address, weights, scales, bias, codes, highs, masks, x_scales, x_sums, inputs, out, stride,
                     add, blocks, tiles)  # fmt: skip


@kernel
def multiply_blocks(matrix, first, blocks, pack, n_tokens, out, out_stride, add):
    """Row blocks first..first+blocks of `matrix` times all tiles of `pack`.

    `out` is the address of row 0 of the first token; whole blocks and whole tiles are stored.
    """
    groups = matrix.groups
    bias = matrix.bias + first * 64 if matrix.bias != 0 else 0
    weights = matrix.weights + first * groups * 256 * matrix.bits
    scales = matrix.scales + first * groups * 32
    x = pack.values if matrix.bits == 16 else pack.codes
    tiles = (n_tokens + pack.tile - 1) // pack.tile
    function = matrix.kernel_one if pack.size == ONE else matrix.kernel_few if pack.size == FEW else matrix.kernel_many
    out += first * 64
    call_tile(function, weights, scales, bias, x, pack.highs, pack.masks, pack.scales, pack.sums, matrix.inputs, out,
              out_stride, add, blocks, tiles)  # fmt: skip


@kernel
def multiply_piece(matrix, first, end, pack, n_tokens, out, out_stride, add):
    """`multiply_blocks` for row blocks first..end-1, by what stays in cache while all tokens stream over it."""
    chunk = end - first
    if pack.size != ONE:
        chunk = max(1, L2_CHUNK // (matrix.groups * 256 * matrix.bits))
    while first < end:
        blocks = min(chunk, end - first)
        multiply_blocks(matrix, first, blocks, pack, n_tokens, out, out_stride, add)
        first += blocks


@kernel
def claim(counter, n_threads, rank, total):
    """The next piece of work, first..end-1 of `total` row blocks; empty when there is none.

    Each thread has a range of its own and goes through it piece by piece, one long stretch of memory; when it has done,
    it helps the others with theirs, so that a slow or interrupted one keeps nobody waiting. `counter`: address of a
    zeroed line for each thread: pieces taken from its range.
    """
    for i in range(n_threads):
        owner = (rank + i) % n_threads
        first, end = total * owner // n_threads, total * (owner + 1) // n_threads
        piece = max(1, (end - first) // PIECES)
        if first + atomic_load(counter + owner * LINE) * piece < end:
            first += fetch_add(counter + owner * LINE, 1) * piece
            if first < end:
                return first, min(first + piece, end)
    return total, total


@kernel
def multiply(counter, n_threads, rank, matrix, pack, n_tokens, out, out_stride, add):
    """out[token][row] (+)= matrix times pack, shared out among the team; `counter`: see `claim`."""
    while True:
        first, end = claim(counter, n_threads, rank, matrix.blocks)
        if first >= end:
            return
        multiply_piece(matrix, first, end, pack, n_tokens, out, out_stride, add)


@kernel
def multiply_three(counter, n_threads, rank, q, k, v, pack, n_tokens, q_out, k_out, v_out, out_stride):
    """`multiply` for q, k and v as one piece of work: their rows share the activations."""
    total = q.blocks + k.blocks + v.blocks
    while True:
        first, end = claim(counter, n_threads, rank, total)
        if first >= end:
            return
        # The parts of the piece that lie in each matrix.
        before_v = q.blocks + k.blocks
        multiply_piece(q, first, min(end, q.blocks), pack, n_tokens, q_out, out_stride, 0)
        multiply_piece(k, max(first - q.blocks, 0), min(end - q.blocks, k.blocks), pack, n_tokens, k_out, out_stride, 0)
        multiply_piece(v, max(first - before_v, 0), end - before_v, pack, n_tokens, v_out, out_stride, 0)
