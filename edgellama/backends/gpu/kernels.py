"""Triton kernels of a decode step's matrices, over the file's own bytes; what comes between is fused into them.

A matrix of 4 bits is read as int32 words [row block][line][16 rows], 8 inputs each (FORMAT.md, section 4): a tile
[lines, rows] is one stretch of memory, and nothing is ever summed across rows. Activations are float32 and lie
transposed, input k at [k % 8][k / 8], so that the j-th inputs of neighbouring lines are neighbours. RMSNorm needs no
pass of its own: whoever writes the residual stream also writes it times the next norm's weight, and the sum of squares
of its rows; who multiplies scales the result.

One token: each kernel multiplies by itself (`SPLITS` 0). Several: `gemm` has multiplied on the tensor cores and left
`SPLITS` partial sums for each output; the same kernels add them up. Program (block, token) computes 16 rows of it.

Knows addresses and sizes; what calls what in which order is `decode.py`'s. Only long-standing parts of Triton are used.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def double(x):
    """Twice x [16]: what tells whether Triton works here."""
    i = tl.arange(0, 16)
    tl.store(x + i, tl.load(x + i) * 2)


@triton.jit
def place(k, n_lines):
    """Where input k lies in a transposed activation."""
    return (k % 8) * n_lines + k // 8


@triton.jit
def exponent(n_groups):
    """The bits of 2^23 as a float, for `code4` and `code8`; a number the compiler does not know to be one.

    An instruction takes one constant only. Of two it loads one anew for each weight; a variable stays in a register.
    """
    return (150 << 23) + tl.minimum(n_groups, 0)


@triton.jit
def code4(words, magic, J: tl.constexpr):
    """Input J of each word as float32, its zero point taken off: exact, and without an int-to-float conversion.

    A field at bit P of a float's mantissa whose exponent is 2^(23-P) reads as 2^(23-P) + code.
    """
    SHIFT: tl.constexpr = 8 * (J % 4) + 4 * (J // 4)
    DOWN: tl.constexpr = 12 * (SHIFT // 17)  # a field must end below bit 23
    P: tl.constexpr = SHIFT - DOWN
    bits = ((words >> DOWN) & (15 << P)) | (magic - (P << 23))
    return bits.to(tl.float32, bitcast=True) - ((1 << (23 - P)) + 8)


@triton.jit
def code8(words, magic, J: tl.constexpr):
    """The same for byte J of each word."""
    DOWN: tl.constexpr = 16 * (J // 2)
    P: tl.constexpr = 8 * (J % 2)
    bits = ((words >> DOWN) & (255 << P)) | (magic - (P << 23))
    return bits.to(tl.float32, bitcast=True) - ((1 << (23 - P)) + 128)


@triton.jit
def fetch(pointers, mask, EVEN: tl.constexpr):
    """What lies there; 0 where the mask does not reach, which EVEN says is nowhere."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=mask, other=0)


@triton.jit
def multiply(codes, scales, x, rows, n_groups, BITS: tl.constexpr, LINES: tl.constexpr, EVEN: tl.constexpr):
    """Rows `rows` [R] of a matrix times one transposed x -> float32 [R]. codes: int32 words, or float16 for 16 bits.

    EVEN: LINES divides the matrix's lines.
    """
    magic = exponent(n_groups)
    n_lines = n_groups * 16
    lanes = (rows % 16)[None, :]
    block = (rows // 16).to(tl.int64)[None, :] * n_groups
    total = tl.zeros((LINES, rows.shape[0]), tl.float32)
    if BITS == 4:
        line = tl.arange(0, LINES)
        ahead = fetch(codes + block * 256 + line[:, None] * 16 + lanes, (line < n_lines)[:, None], EVEN)
    for start in range(0, n_lines, LINES):
        lines = start + tl.arange(0, LINES)
        inside = lines < n_lines
        mask = inside[:, None]
        at = lines[:, None] * 16 + lanes
        part = tl.zeros((LINES, rows.shape[0]), tl.float32)
        if BITS == 4:  # the next tile is on its way while this one is multiplied
            words = ahead
            ahead = tl.load(codes + block * 256 + at + LINES * 16, mask=(lines + LINES < n_lines)[:, None], other=0)
        if BITS == 8:
            words = fetch(codes + block * 512 + at + lines[:, None] * 16, mask, EVEN)
            odd = fetch(codes + block * 512 + at + lines[:, None] * 16 + 16, mask, EVEN)
        for j in tl.static_range(8):
            xj = fetch(x + j * n_lines + lines, inside, EVEN)[:, None]
            if BITS == 4:
                part += code4(words, magic, j) * xj
            if BITS == 8:
                if j < 4:
                    part += code8(words, magic, j) * xj
                else:
                    part += code8(odd, magic, j - 4) * xj
            if BITS == 16:
                row = lines[:, None] * 8 + j
                part += fetch(codes + (block * 128 + row) * 16 + lanes, mask, EVEN).to(tl.float32) * xj
        if BITS == 16:
            total += part
        else:
            scale = fetch(scales + (block + lines[:, None] // 16) * 16 + lanes, mask, EVEN)
            total += part * scale.to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def multiply_two(
    codes, scales, x, rows, other, gap, n_groups, BITS: tl.constexpr, LINES: tl.constexpr, EVEN: tl.constexpr
):
    """`multiply` for 4 or 8 bits and two sets of rows, `rows` and `other`, that share the loads of x.

    The scales of `other` lie `gap` elements behind where their rows alone would put them.
    """
    magic = exponent(n_groups)
    n_lines = n_groups * 16
    lanes, lanes2 = (rows % 16)[None, :], (other % 16)[None, :]
    block = (rows // 16).to(tl.int64)[None, :] * n_groups
    block2 = (other // 16).to(tl.int64)[None, :] * n_groups
    total = tl.zeros((LINES, rows.shape[0]), tl.float32)
    total2 = tl.zeros((LINES, rows.shape[0]), tl.float32)
    for start in range(0, n_lines, LINES):
        lines = start + tl.arange(0, LINES)
        inside = lines < n_lines
        mask = inside[:, None]
        if BITS == 4:
            words = fetch(codes + block * 256 + lines[:, None] * 16 + lanes, mask, EVEN)
            words2 = fetch(codes + block2 * 256 + lines[:, None] * 16 + lanes2, mask, EVEN)
        else:
            words = fetch(codes + block * 512 + lines[:, None] * 32 + lanes, mask, EVEN)
            words2 = fetch(codes + block2 * 512 + lines[:, None] * 32 + lanes2, mask, EVEN)
            odd = fetch(codes + block * 512 + lines[:, None] * 32 + 16 + lanes, mask, EVEN)
            odd2 = fetch(codes + block2 * 512 + lines[:, None] * 32 + 16 + lanes2, mask, EVEN)
        scale = fetch(scales + (block + lines[:, None] // 16) * 16 + lanes, mask, EVEN)
        scale2 = fetch(scales + gap + (block2 + lines[:, None] // 16) * 16 + lanes2, mask, EVEN)
        part = tl.zeros((LINES, rows.shape[0]), tl.float32)
        part2 = tl.zeros((LINES, rows.shape[0]), tl.float32)
        for j in tl.static_range(8):
            xj = fetch(x + j * n_lines + lines, inside, EVEN)[:, None]
            if BITS == 4:
                part += code4(words, magic, j) * xj
                part2 += code4(words2, magic, j) * xj
            elif j < 4:
                part += code8(words, magic, j) * xj
                part2 += code8(words2, magic, j) * xj
            else:
                part += code8(odd, magic, j - 4) * xj
                part2 += code8(odd2, magic, j - 4) * xj
        total += part * scale.to(tl.float32)
        total2 += part2 * scale2.to(tl.float32)
    return tl.sum(total, 0), tl.sum(total2, 0)


@triton.jit
def add_splits(partials, m, rows, n_rows, n_tokens, SPLITS: tl.constexpr):
    """What `gemm` left for rows of token m, summed: float32 [R]."""
    total = tl.zeros((rows.shape[0],), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partials + (split * n_tokens + m).to(tl.int64) * n_rows + rows)
    return total


@triton.jit
def inverse_rms(squares, m, n_blocks, hidden_size, eps, BLOCKS: tl.constexpr):
    """1 / sqrt(mean x^2 + eps) of token m's residual stream, from its blocks' sums of squares [M, n_blocks]."""
    b = tl.arange(0, BLOCKS)
    total = tl.sum(tl.load(squares + m * n_blocks + b, mask=b < n_blocks, other=0.0), 0)
    return 1.0 / tl.sqrt(total / hidden_size + eps)


@triton.jit
def hand_on(values, rows, inside, m, residual, next_norm, normed, squares, block, n_blocks, hidden_size, n_lines):
    """Write rows of the residual stream, times the next norm's weight too, and their sum of squares."""
    values = tl.where(inside, values, 0.0)
    tl.store(residual + m * hidden_size + rows, values, mask=inside)
    weight = tl.load(next_norm + rows, mask=inside, other=0.0)
    tl.store(normed + m * n_lines * 8 + place(rows, n_lines), values * weight, mask=inside)
    tl.store(squares + m * n_blocks + block, tl.sum(values * values, 0))


@triton.jit
def embed(
    tokens, table, scales, next_norm, residual, normed, squares,
    hidden_size, n_groups, n_blocks, BITS: tl.constexpr,
):  # fmt: skip
    """The token's row of the embedding: untied [V][hidden] float16 (BITS 0), or of the tied head's matrix."""
    block, m = tl.program_id(0), tl.program_id(1)
    k = block * 16 + tl.arange(0, 16)
    inside = k < hidden_size
    token = tl.load(tokens + m).to(tl.int64)
    first, lane = token // 16 * n_groups, token % 16
    if BITS == 0:
        values = tl.load(table + token * hidden_size + k, mask=inside, other=0.0).to(tl.float32)
    elif BITS == 16:
        values = tl.load(table + (first * 128 + k) * 16 + lane, mask=inside, other=0.0).to(tl.float32)
    else:
        if BITS == 4:
            words = tl.load(table + first * 256 + (k // 8) * 16 + lane, mask=inside, other=0)
            code = (words >> (8 * (k % 4) + 4 * (k % 8 // 4))) & 15
            code -= 8
        else:
            words = tl.load(table + first * 512 + (k // 4) * 16 + lane, mask=inside, other=0)
            code = (words >> (8 * (k % 4))) & 255
            code -= 128
        scale = tl.load(scales + (first + k // 128) * 16 + lane, mask=inside, other=0.0).to(tl.float32)
        values = code.to(tl.float32) * scale
    hand_on(values, k, inside, m, residual, next_norm, normed, squares, block, n_blocks, hidden_size,
            n_groups * 16)  # fmt: skip


@triton.jit
def qkv(
    codes, scales, bias, x, partials, squares, positions, slots, cos, sin,
    q_out, keys, values, key_scales, value_scales,
    n_groups, n_rows, n_tokens, k_row, v_row, k_gap, v_gap, k_bias, v_bias, n_blocks, hidden_size, n_ctx, query_scale,
    eps, BITS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr,
    LINES: tl.constexpr, EVEN: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BY_POSITION: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Norm, q_proj, k_proj and v_proj, RoPE, and keys and values into the cache: PAIRS dimensions and their partners.

    The three matrices are one: k's rows start at `k_row`, v's at `v_row`; their scales lie `k_gap` and `v_gap` elements
    further than that, their biases at `k_bias` and `v_bias`. cos, sin: [n_ctx or M][head_dim / 2], by the token's
    position or number. An int8 cache needs a whole head in one program: PAIRS covers it then.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    TILES: tl.constexpr = (HALF + PAIRS - 1) // PAIRS
    m = tl.program_id(1)
    head, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i = tile * PAIRS + tl.arange(0, PAIRS)
    inside = i < HALF
    is_q, is_v = head < HEADS, head >= HEADS + KV_HEADS
    kv_head = tl.where(is_v, head - HEADS - KV_HEADS, head - HEADS)
    own = tl.where(is_q, head, kv_head) * HEAD_DIM
    first_row = tl.where(is_q, 0, tl.where(is_v, v_row, k_row))
    gap = tl.where(is_q, 0, tl.where(is_v, v_gap, k_gap))
    rows = first_row + own + i
    if HALF % PAIRS != 0:
        rows = tl.where(inside, rows, 0)  # never where it is not needed: the compiler sees neighbours in i, not in this
    if SPLITS == 0:
        a, b = multiply_two(
            codes, scales + gap, x + m * n_groups * 128, rows, rows + HALF, 0, n_groups, BITS, LINES, EVEN
        )
        norm = inverse_rms(squares, m, n_blocks, hidden_size, eps, BLOCKS)
        a, b = a * norm, b * norm
    else:
        a = add_splits(partials, m, rows, n_rows, n_tokens, SPLITS)
        b = add_splits(partials, m, rows + HALF, n_rows, n_tokens, SPLITS)
    if HAS_BIAS:
        start = own + tl.where(is_q, 0, tl.where(is_v, v_bias, k_bias))
        a += tl.load(bias + start + i, mask=inside, other=0.0)
        b += tl.load(bias + start + HALF + i, mask=inside, other=0.0)

    position = tl.load(positions + m)
    angle = m
    if BY_POSITION:
        angle = position
    c = tl.load(cos + angle.to(tl.int64) * HALF + i, mask=inside, other=0.0)
    s = tl.load(sin + angle.to(tl.int64) * HALF + i, mask=inside, other=0.0)
    low = tl.where(is_v, a, a * c - b * s)
    high = tl.where(is_v, b, b * c + a * s)
    if is_q:
        to = q_out + (m * HEADS + head) * HEAD_DIM + i
        tl.store(to, low * query_scale, mask=inside)
        tl.store(to + HALF, high * query_scale, mask=inside)
    else:
        slot = tl.load(slots + m).to(tl.int64)
        place_of = (slot * KV_HEADS + kv_head) * n_ctx + position
        factor = 1.0
        if INT8:
            size = tl.maximum(tl.abs(low), tl.abs(high))
            top = tl.max(tl.where(inside, size, 0.0), 0)
            factor = tl.where(top > 1e-30, 127.0 / tl.maximum(top, 1e-30), 0.0)
            if is_v:
                tl.store(value_scales + place_of, top / 127.0)
            else:
                tl.store(key_scales + place_of, top / 127.0)
        at = place_of * HEAD_DIM + i
        if is_v:
            keep(values + at, low, inside, factor, INT8)
            keep(values + at + HALF, high, inside, factor, INT8)
        else:
            keep(keys + at, low, inside, factor, INT8)
            keep(keys + at + HALF, high, inside, factor, INT8)


@triton.jit
def keep(to, x, inside, factor, INT8: tl.constexpr):
    """Store x as the cache's elements; codes of an int8 cache round halves up, as `cache.quantize` does."""
    if INT8:
        x = tl.floor(x * factor + 0.5)
    tl.store(to, x.to(to.dtype.element_ty), mask=inside)


@triton.jit
def project(
    codes, scales, bias, x, partials, next_norm, residual, normed, squares,
    n_groups, n_rows, n_tokens, n_blocks, hidden_size, out_lines,
    BITS: tl.constexpr, LINES: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """o_proj or down_proj, added to the residual stream."""
    block, m = tl.program_id(0), tl.program_id(1)
    rows = block * 16 + tl.arange(0, 16)
    inside = rows < hidden_size
    if SPLITS == 0:
        y = multiply(codes, scales, x + m * n_groups * 128, rows, n_groups, BITS, LINES, EVEN)
    else:
        y = add_splits(partials, m, rows, n_rows, n_tokens, SPLITS)
    if HAS_BIAS:
        y += tl.load(bias + rows, mask=inside, other=0.0)
    y += tl.load(residual + m * hidden_size + rows, mask=inside, other=0.0)
    hand_on(y, rows, inside, m, residual, next_norm, normed, squares, block, n_blocks, hidden_size,
            out_lines)  # fmt: skip


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """silu, gelu, gelu_pytorch_tanh or relu."""
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp2(-1.4426950408889634 * x))
    elif ACTIVATION == "gelu":
        y = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x * (1.0 - 1.0 / (1.0 + tl.exp2(2.0 * 1.4426950408889634 * inner)))  # (1 + tanh) / 2
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def gate_up(
    codes, scales, bias, x, partials, squares, out,
    n_groups, n_rows, n_tokens, up_row, up_gap, up_bias, n_blocks, hidden_size, width, out_lines, eps,
    BITS: tl.constexpr, LINES: tl.constexpr, EVEN: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Norm, gate_proj and up_proj, the activation and the product. `up`'s rows start at `up_row` of the one matrix."""
    block, m = tl.program_id(0), tl.program_id(1)
    rows = block * 16 + tl.arange(0, 16)
    inside = rows < width
    if SPLITS == 0:
        gate, up = multiply_two(
            codes, scales, x + m * n_groups * 128, rows, rows + up_row, up_gap, n_groups, BITS, LINES, EVEN
        )
        norm = inverse_rms(squares, m, n_blocks, hidden_size, eps, BLOCKS)
        gate, up = gate * norm, up * norm
    else:
        gate = add_splits(partials, m, rows, n_rows, n_tokens, SPLITS)
        up = add_splits(partials, m, rows + up_row, n_rows, n_tokens, SPLITS)
    if HAS_BIAS:
        gate += tl.load(bias + rows, mask=inside, other=0.0)
        up += tl.load(bias + up_bias + rows, mask=inside, other=0.0)
    tl.store(out + m * out_lines * 8 + place(rows, out_lines), activate(gate, ACTIVATION) * up, mask=inside)


@triton.jit
def head_logits(
    codes, scales, x, partials, squares, logits,
    n_groups, n_rows, n_tokens, n_blocks, hidden_size, vocab_size, eps,
    BITS: tl.constexpr, LINES: tl.constexpr, EVEN: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The final norm and the output matrix of any layout: float32 [M][vocab_size]."""
    block, m = tl.program_id(0), tl.program_id(1)
    rows = block * 16 + tl.arange(0, 16)
    if SPLITS == 0:
        y = multiply(codes, scales, x + m * n_groups * 128, rows, n_groups, BITS, LINES, EVEN)
        y *= inverse_rms(squares, m, n_blocks, hidden_size, eps, BLOCKS)
    else:
        y = add_splits(partials, m, rows, n_rows, n_tokens, SPLITS)
    tl.store(logits + m.to(tl.int64) * vocab_size + rows, y, mask=rows < vocab_size)


@triton.jit
def gemm(
    codes, scales, x, squares, partials,
    n_groups, groups_a_split, n_rows, n_tokens, row2, row3, gap2, gap3, n_blocks, hidden_size, eps,
    BITS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, NORM: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """A piece of K of a matrix times M transposed activations on the tensor cores: partials [split][M][n_rows].

    Codes are exact in DOT (float16 or bfloat16), activations are rounded to it; a group's scale multiplies its sum in
    float32. Scales of rows from `row2` (`row3`) on lie `gap2` (`gap3`) elements further than the rows say.
    """
    split = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = rows < n_rows
    mask = known[None, :]
    lanes = (rows % 16)[None, :]
    block = (rows // 16).to(tl.int64) * n_groups
    gap = tl.where(rows < row2, 0, tl.where(rows < row3, gap2, gap3))
    ms = tl.arange(0, TOKENS)
    real = ms < n_tokens
    line = tl.arange(0, 16)
    n_lines = n_groups * 16
    magic = exponent(n_groups)
    norm = tl.zeros((TOKENS,), tl.float32) + 1.0
    if NORM:
        b = tl.arange(0, BLOCKS)
        at = ms[:, None] * n_blocks + b[None, :]
        total = tl.sum(tl.load(squares + at, mask=real[:, None] & (b < n_blocks)[None, :], other=0.0), 1)
        norm = 1.0 / tl.sqrt(total / hidden_size + eps)
    result = tl.zeros((TOKENS, ROWS), tl.float32)
    for group in range(split * groups_a_split, tl.minimum((split + 1) * groups_a_split, n_groups)):
        first = (block + group)[None, :]
        part = tl.zeros((TOKENS, ROWS), tl.float32)
        if BITS == 4:
            words = tl.load(codes + first * 256 + line[:, None] * 16 + lanes, mask=mask, other=0)
        if BITS == 8:
            words = tl.load(codes + first * 512 + line[:, None] * 32 + lanes, mask=mask, other=0)
            odd = tl.load(codes + first * 512 + line[:, None] * 32 + 16 + lanes, mask=mask, other=0)
        for j in tl.static_range(8):
            xj = tl.load(
                x + ms[:, None] * n_lines * 8 + j * n_lines + group * 16 + line[None, :], mask=real[:, None], other=0.0
            )
            xj = (xj * norm[:, None]).to(DOT)
            if BITS == 4:
                w = code4(words, magic, j).to(DOT)
            if BITS == 8:
                w = code8(words, magic, j).to(DOT) if j < 4 else code8(odd, magic, j - 4).to(DOT)
            if BITS == 16:
                w = tl.load(codes + (first * 128 + line[:, None] * 8 + j) * 16 + lanes, mask=mask, other=0.0).to(DOT)
            part += tl.dot(xj, w)
        if BITS == 16:
            result += part
        else:
            scale = tl.load(scales + gap + (block + group) * 16 + rows % 16, mask=known, other=0.0).to(tl.float32)
            result += part * scale[None, :]
    to = partials + (split * n_tokens + ms).to(tl.int64)[:, None] * n_rows + rows[None, :]
    tl.store(to, result, mask=real[:, None] & known[None, :])


@triton.jit
def dequantize(codes, scales, out, n_groups, n_rows, BITS: tl.constexpr, ROWS: tl.constexpr):
    """One group of ROWS rows as plain numbers: out [K][n_rows], inputs first. 4 or 8 bits."""
    group = tl.program_id(1)
    magic = exponent(n_groups)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = (rows < n_rows)[None, :]
    line = tl.arange(0, 16)
    lanes = (rows % 16)[None, :]
    first = ((rows // 16).to(tl.int64) * n_groups + group)[None, :]
    scale = tl.load(scales + first * 16 + lanes, mask=known, other=0.0).to(tl.float32)
    if BITS == 4:
        words = tl.load(codes + first * 256 + line[:, None] * 16 + lanes, mask=known, other=0)
    else:
        words = tl.load(codes + first * 512 + line[:, None] * 32 + lanes, mask=known, other=0)
        odd = tl.load(codes + first * 512 + line[:, None] * 32 + 16 + lanes, mask=known, other=0)
    for j in tl.static_range(8):
        if BITS == 4:
            w = code4(words, magic, j)
        elif j < 4:
            w = code8(words, magic, j)
        else:
            w = code8(odd, magic, j - 4)
        k = group * 128 + line[:, None] * 8 + j
        tl.store(out + k.to(tl.int64) * n_rows + rows[None, :], (w * scale).to(out.dtype.element_ty), mask=known)
