"""Matrix times activations, shared out among the team; the arithmetic itself is in `tiles`.

A *pack* is what a matrix is multiplied with: tokens in tiles of `tile` tokens, quantized for each token and
group of 128 inputs, laid out so that every broadcast of a tile kernel is a constant offset from one pointer.
A code has one part (int8) or two (15 bits, high and low; see `tiles`):

    codes   int8     [tiles][groups][32][parts][tile][4]   4 neighbouring inputs of one token together
    scales  float32  [tiles][groups][tile]
    sums    int32    [tiles][groups][parts][tile]          the sum of the codes, for the weights' zero point
    values  float32  [tiles][K][tile]                      instead of the three above, for 16-bit weights
"""

from __future__ import annotations

from numba import types

from .jit import kernel
from .simd import ADDRESS, emit_native_call, vector_intrinsic
from .sync import fetch_add
from .tiles import ARGUMENTS

L2_CHUNK = 256 * 1024
"""Bytes of weights that stay in the second-level cache while the token tiles stream over them."""


@vector_intrinsic(types.void, *[ADDRESS] * (ARGUMENTS + 1))
def call_tile(b, address, weights, scales, bias, codes, x_scales, x_sums, groups, out, out_stride, add, blocks):
    """Call a kernel of `tiles` by its address."""
    emit_native_call(b, address, weights, scales, bias, codes, x_scales, x_sums, groups, out, out_stride, add, blocks)


@kernel
def multiply_tile(matrix, first, blocks, pack, index, out, out_stride, add):
    """Row blocks first..first+blocks of `matrix` times token tile `index` of `pack`.

    `out` is the address of row 0 of the tile's first token; whole blocks and whole tiles are stored.
    """
    groups = matrix.groups
    bias = matrix.bias + first * 64 if matrix.bias != 0 else 0
    weights = matrix.weights + first * groups * 256 * matrix.bits
    scales = matrix.scales + first * groups * 32
    at = index * groups * pack.tile
    codes = pack.values + at * 512 if matrix.bits == 16 else pack.codes + at * 128 * pack.parts
    x_scales, x_sums = pack.scales + at * 4, pack.sums + at * 4 * pack.parts
    function = matrix.kernel_one if pack.tile == 1 else matrix.kernel_tile
    call_tile(
        function, weights, scales, bias, codes, x_scales, x_sums, groups, out + first * 64, out_stride, add, blocks
    )


@kernel
def chunk_blocks(matrix, total_blocks, n_threads):
    """Row blocks that a thread takes at a time: even, small enough to share out and to stay in L2."""
    block_bytes = matrix.groups * 256 * matrix.bits
    chunk = min(total_blocks // (8 * n_threads), max(1, L2_CHUNK // block_bytes))
    return max(2, chunk // 2 * 2)


@kernel
def multiply(counter, n_threads, matrix, pack, tiles, out, out_stride, add):
    """out[token][row] (+)= matrix times pack, shared out among the team by `counter` (address, zeroed)."""
    chunk = chunk_blocks(matrix, matrix.blocks, n_threads)
    while True:
        first = fetch_add(counter, chunk)
        if first >= matrix.blocks:
            return
        blocks = min(chunk, matrix.blocks - first)
        for index in range(tiles):
            multiply_tile(matrix, first, blocks, pack, index, out + index * pack.tile * out_stride, out_stride, add)


@kernel
def multiply_three(counter, n_threads, q, k, v, pack, tiles, q_out, k_out, v_out, out_stride):
    """`multiply` for q, k and v as one piece of work: their rows share the activations."""
    total = q.blocks + k.blocks + v.blocks
    chunk = chunk_blocks(q, total, n_threads)
    while True:
        start = fetch_add(counter, chunk)
        if start >= total:
            return
        end = min(start + chunk, total)
        while start < end:
            # The part of the chunk that lies in one matrix.
            if start < q.blocks:
                matrix, first, out, stop = q, start, q_out, q.blocks
            elif start < q.blocks + k.blocks:
                matrix, first, out, stop = k, start - q.blocks, k_out, q.blocks + k.blocks
            else:
                matrix, first, out, stop = v, start - q.blocks - k.blocks, v_out, total
            blocks = min(end, stop) - start
            for index in range(tiles):
                to = out + index * pack.tile * out_stride
                multiply_tile(matrix, first, blocks, pack, index, to, out_stride, 0)
            start += blocks
