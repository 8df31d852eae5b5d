"""What happens to one token's vector between the matrices: embed, normalize, pack, activate.

Rows are float32 at integer addresses; a row of `n` values lies in a buffer that is zero up to the next
multiple of 128, and stays so. Each row is computed by one thread in one fixed order. Knows nothing of
layers or threads.
"""

from __future__ import annotations

import math

from numba import float32, int32

from .jit import kernel
from .shapes import GELU, GELU_TANH, ROW_MAJOR_F16, SILU
from .simd import (
    LOW_BITS,
    hmax,
    hsum,
    hsum_i32,
    interleave_few,
    interleave_many,
    load_f16,
    load_f32,
    load_i64,
    load_u8,
    round_i32,
    splat,
    store_f32,
    store_i32,
    store_i64,
    vabs,
    vadd,
    vadd_i32,
    vdiv,
    vexp,
    vfma,
    vhigh_part,
    vload,
    vlow_part,
    vmax,
    vmul,
    vstore,
    vstore_i8,
    vsub,
    words_of_i8,
    zero_i32,
)
from .target import TARGET


@kernel
def embed(table, token, n, x):
    """Row `token` of an embedding, in any layout that a file may hold it in, to float32 [n] at `x`."""
    block, row = token // 16, token % 16
    if table.bits == ROW_MAJOR_F16:
        for i in range(n):
            store_f32(x + 4 * i, load_f16(table.weights + (token * n + i) * 2))
        return
    if table.bits == 16:
        start = table.weights + (block * table.groups * 128 * 16 + row) * 2
        for i in range(n):
            store_f32(x + 4 * i, load_f16(start + i * 32))
        return
    scales = table.scales + (block * table.groups * 16 + row) * 2
    for i in range(n):
        group = i // 128
        scale = load_f16(scales + group * 32)
        if table.bits == 4:
            line = table.weights + (block * table.groups + group) * 1024 + i % 128 // 8 * 64
            code = int32(load_u8(line + 4 * row + i % 4))
            code = (code >> 4 if i % 8 >= 4 else code & 15) - 8
        else:
            line = table.weights + (block * table.groups + group) * 2048 + i % 128 // 4 * 64
            code = int32(load_u8(line + 4 * row + i % 4)) - 128
        store_f32(x + 4 * i, float32(code) * scale)


@kernel
def rms_norm(x, weight, n, padded, eps, out):
    """out = weight * x / sqrt(mean(x**2) + eps); `weight` is zero beyond n, so `out` is too."""
    # Four sums, added in a fixed order, hide the latency of fma; `padded` is a multiple of 128.
    a, b, c, d = splat(float32(0.0)), splat(float32(0.0)), splat(float32(0.0)), splat(float32(0.0))
    for i in range(x, x + 4 * padded, 256):
        a, b = vfma(vload(i), vload(i), a), vfma(vload(i + 64), vload(i + 64), b)
        c, d = vfma(vload(i + 128), vload(i + 128), c), vfma(vload(i + 192), vload(i + 192), d)
    squares = hsum(vadd(vadd(a, b), vadd(c, d)))
    factor = splat(float32(1.0) / math.sqrt(squares / float32(n) + float32(eps)))
    for i in range(0, padded, 16):
        vstore(out + 4 * i, vmul(vload(weight + 4 * i), vmul(vload(x + 4 * i), factor)))


@kernel
def mean_size(x, n):
    """The mean absolute value of float32 [n], n a multiple of 128."""
    # Four sums, added in a fixed order, hide the latency of the addition.
    a, b, c, d = splat(float32(0.0)), splat(float32(0.0)), splat(float32(0.0)), splat(float32(0.0))
    for i in range(x, x + 4 * n, 256):
        a, b = vadd(vabs(vload(i)), a), vadd(vabs(vload(i + 64)), b)
        c, d = vadd(vabs(vload(i + 128)), c), vadd(vabs(vload(i + 192)), d)
    return hsum(vadd(vadd(a, b), vadd(c, d))) / float32(n)


@kernel
def pack_row(x, groups, ceiling, pack, index, t):
    """Quantize a row into token `t` of tile `index`, whose tokens come in order and are then `finish_tile`d.

    A group's codes are q = rint(x / scale). Its largest value gets 127, unless that is an outlier, over `ceiling` times
    the mean size of the whole row: then that limit gets 127 (or what is 128 times smaller than the outlier, if that is
    more), the others are as fine as without it, and its own code has up to 15 bits. The layout: see `matmul`.
    """
    tile = pack.tile
    limit = ceiling * mean_size(x, groups * 128)
    for g in range(groups):
        group = index * groups + g
        at = group * tile + t
        values = x + 512 * g
        largest = splat(float32(0.0))
        for i in range(0, 128, 16):
            largest = vmax(vabs(vload(values + 4 * i)), largest)
        absmax = hmax(largest)
        top = max(min(absmax, limit), absmax / float32(1 << LOW_BITS))
        inverse = splat(float32(127.0) / top if top > float32(1e-30) else float32(0.0))
        store_f32(pack.scales + 4 * at, top / float32(127.0))
        total = zero_i32()
        if t == 0:
            store_i64(pack.masks + 8 * group, 0)
        if absmax > top:
            words = load_i64(pack.masks + 8 * group)
            if words == 0:
                clear(pack.highs + 128 * group * tile, 128 * tile)
            for i in range(0, 128, 16):
                q = round_i32(vmul(vload(values + 4 * i), inverse))
                total = vadd_i32(total, q)
                high = vhigh_part(q)
                vstore_i8(pack.codes + 128 * at + i, vlow_part(q, high))
                vstore_i8(pack.highs + 128 * at + i, high)
                words |= words_of_i8(high) << (i // 4)
            store_i64(pack.masks + 8 * group, words)
        else:
            for i in range(0, 128, 16):
                q = round_i32(vmul(vload(values + 4 * i), inverse))
                total = vadd_i32(total, q)
                vstore_i8(pack.codes + 128 * at + i, q)
        store_i32(pack.sums + 4 * at, hsum_i32(total))


@kernel
def finish_tile(groups, pack, index):
    """Codes and high parts of tile `index` from token by token to word by word, unless its kernel wants them so."""
    if pack.tile == 1 or pack.by_token != 0:
        return
    for group in range(index * groups, (index + 1) * groups):
        interleave(pack.codes + 128 * group * pack.tile, pack.tile)
        if load_i64(pack.masks + 8 * group) != 0:
            interleave(pack.highs + 128 * group * pack.tile, pack.tile)


@kernel
def interleave(a, tile):
    """int8 [tile][32][4] at `a` becomes [32][tile][4]; `tile` is this target's for a few tokens or for many."""
    if tile == TARGET.few_columns:
        interleave_few(a)
    else:
        interleave_many(a)


@kernel
def clear(a, nbytes):
    """Zero a multiple of 64 bytes."""
    for i in range(a, a + nbytes, 64):
        vstore(i, splat(float32(0.0)))


@kernel
def pack_row_f32(x, groups, pack, index, t):
    """`pack_row` for a 16-bit matrix: the values as they are."""
    tile = pack.tile
    values = pack.values + 4 * (index * groups * 128 * tile + t)
    for i in range(groups * 128):
        store_f32(values + 4 * i * tile, load_f32(x + 4 * i))


@kernel
def sigmoid(v):
    """1 / (1 + e**-v) of a vector; its limits at both ends."""
    one = splat(float32(1.0))
    return vdiv(one, vadd(one, vexp(vsub(splat(float32(0.0)), v))))


@kernel
def gate(h, up, n, activation):
    """h = act(h) * up, n values (a multiple of 16)."""
    if activation == SILU:
        for i in range(0, n, 16):
            v = vload(h + 4 * i)
            vstore(h + 4 * i, vmul(vmul(v, sigmoid(v)), vload(up + 4 * i)))
    elif activation == GELU_TANH:
        # 0.5 * (1 + tanh(y)) is sigmoid(2y).
        a, b = splat(float32(2.0 * math.sqrt(2.0 / math.pi))), splat(float32(0.044715))
        for i in range(0, n, 16):
            v = vload(h + 4 * i)
            y = vmul(a, vfma(vmul(b, v), vmul(v, v), v))
            vstore(h + 4 * i, vmul(vmul(v, sigmoid(y)), vload(up + 4 * i)))
    elif activation == GELU:
        for i in range(n):
            v = load_f32(h + 4 * i)
            g = float32(0.5 * v * (1.0 + math.erf(v * math.sqrt(0.5))))
            store_f32(h + 4 * i, g * load_f32(up + 4 * i))
    else:
        zero = splat(float32(0.0))
        for i in range(0, n, 16):
            vstore(h + 4 * i, vmul(vmax(vload(h + 4 * i), zero), vload(up + 4 * i)))
