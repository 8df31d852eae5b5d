"""RoPE, and keys and values on their way into the cache (its layout: see `kv_cache`).

A key's dimensions lie 16 positions apart, so 16 keys are transposed together where 16 neighbouring positions come at
once, and one is scattered. Both ways every number is computed alike. Knows nothing of layers, slots or attention.
"""

from __future__ import annotations

from numba import float32, int64

from .jit import Native, kernel
from .shapes import LINE_POSITIONS
from .simd import (
    hmax,
    load_f32,
    round_i32,
    splat,
    store_f16,
    store_f32,
    store_i8,
    transpose,
    vabs,
    vadd,
    vload,
    vmax,
    vmul,
    vscatter_f16,
    vscatter_i8,
    vstore,
    vstore_f16,
    vstore_i8,
    vsub,
)


@kernel
def rotate(x, cos, sin, head_dim, factor, out):
    """out = RoPE(x) * factor, half-split as in Hugging Face's Llama (no interleaving); `out` lies apart from `x`.

    x, out: float32 [head_dim]; cos, sin: float32 [head_dim / 2]; addresses.
    """
    half = head_dim // 2
    scale = splat(factor)
    i = int64(0)
    while i < half and half >= 16:
        # The last vector ends with the half: what it shares with the one before is computed twice.
        at = 4 * min(i, half - 16)
        c, s = vload(cos + at), vload(sin + at)
        low, high = vload(x + at), vload(x + 4 * half + at)
        vstore(out + at, vmul(vsub(vmul(low, c), vmul(high, s)), scale))
        vstore(out + 4 * half + at, vmul(vadd(vmul(high, c), vmul(low, s)), scale))
        i += 16
    while i < half:
        c, s = load_f32(cos + 4 * i), load_f32(sin + 4 * i)
        low, high = load_f32(x + 4 * i), load_f32(x + 4 * (half + i))
        store_f32(out + 4 * i, (low * c - high * s) * factor)
        store_f32(out + 4 * (half + i), (high * c + low * s) * factor)
        i += 1


@kernel
def _copy(x, n, out):
    """float32 [n]; `out` is not written beyond."""
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        vstore(out + 4 * i, vload(x + 4 * i))
    for i in range(whole, n):
        store_f32(out + 4 * i, load_f32(x + 4 * i))


@kernel
def _int8_factor(x, n, scale):
    """Store absmax / 127 at `scale`; the factor that makes codes of x, float32 [n], n a multiple of 16."""
    largest = splat(float32(0.0))
    for i in range(0, n, 16):
        largest = vmax(vabs(vload(x + 4 * i)), largest)
    top = hmax(largest)
    store_f32(scale, top / float32(127.0))
    return float32(127.0) / top if top > float32(1e-30) else float32(0.0)


@kernel
def _scatter_key(k, head_dim, kv_bytes, factor, to):
    """One key to its place in a line of 16 positions."""
    whole = head_dim // 16 * 16
    line = 16 * kv_bytes
    if kv_bytes == 1:
        for i in range(0, whole, 16):
            vscatter_i8(to + i * line, line, round_i32(vmul(vload(k + 4 * i), splat(factor))))
        for i in range(whole, head_dim):
            store_i8(to + i * line, load_f32(k + 4 * i) * factor)
    else:
        for i in range(0, whole, 16):
            vscatter_f16(to + i * line, line, vload(k + 4 * i))
        for i in range(whole, head_dim):
            store_f16(to + i * line, load_f32(k + 4 * i))


@kernel
def _transpose_keys(rows, stride, head_dim, kv_bytes, factors, square, to):
    """16 keys, `stride` bytes apart, to a whole line of positions. `factors`: address of float32 [16]."""
    for first in range(0, head_dim, 16):
        transpose(rows + 4 * first, stride, square)
        for i in range(min(16, head_dim - first)):
            dimension = vload(square + 64 * i)
            at = to + (first + i) * 16 * kv_bytes
            if kv_bytes == 1:
                vstore_i8(at, round_i32(vmul(dimension, vload(factors))))
            else:
                vstore_f16(at, dimension)


@kernel
def _store_value(v, stride, kv_bytes, factor, to):
    """One row of values, with what pads it."""
    for i in range(0, stride, 16):
        if kv_bytes == 1:
            vstore_i8(to + i, round_i32(vmul(vload(v + 4 * i), splat(factor))))
        else:
            vstore_f16(to + 2 * i, vload(v + 4 * i))


@Native
def store(k, v, apart, cos, sin, tokens, position, keys, values, key_scales, value_scales, kv_bytes, head_dim,
          value_stride, scratch):  # fmt: skip
    """Rotated keys, and values, of 1 to 16 tokens at positions `position`.. of one head, into its cache.

    k, v: float32 [head_dim], those of the next token `apart` bytes further; cos, sin: float32 [tokens][head_dim / 2].
    An int8 cache (`kv_bytes` 1) gets its scales, float32, too. `scratch`: see `store_scratch_bytes`.
    """
    row_bytes = 4 * value_stride
    square = scratch + LINE_POSITIONS * row_bytes
    factors = square + 1024
    padding = row_bytes - 64
    zero, factor = splat(float32(0.0)), float32(1.0)
    line = keys + position // 16 * 16 * head_dim * kv_bytes
    together = tokens == LINE_POSITIONS and position % 16 == 0
    for t in range(tokens):
        row, at = scratch + t * row_bytes, position + t
        vstore(row + padding, zero)
        _copy(v + t * apart, head_dim, row)
        if kv_bytes == 1:
            factor = _int8_factor(row, value_stride, value_scales + 4 * at)
        _store_value(row, value_stride, kv_bytes, factor, values + at * value_stride * kv_bytes)
        vstore(row + padding, zero)
        angle = t * (head_dim // 2) * 4
        rotate(k + t * apart, cos + angle, sin + angle, head_dim, float32(1.0), row)
        if kv_bytes == 1:
            factor = _int8_factor(row, value_stride, key_scales + 4 * at)
            store_f32(factors + 4 * t, factor)
        if not together:
            to = keys + at // 16 * 16 * head_dim * kv_bytes + at % 16 * kv_bytes
            _scatter_key(row, head_dim, kv_bytes, factor, to)
    if together:
        _transpose_keys(scratch, row_bytes, head_dim, kv_bytes, factors, square, line)
