"""int4 and int8 arithmetic in plain NumPy: quantize, pack into the file's block layout, unpack, dequantize.

This is the oracle for every faster version and the only place that spells the layout out in Python. It
knows nothing of files, models or threads. Byte-exact rules: `edgellama/format/FORMAT.md`.

A weight is `w = (u - zero) * s`: a code `u` (0..15 with zero 8, or 0..255 with zero 128) and one float16
scale `s` for each output row and 128 inputs; `s` may be negative. A matrix is `[out_features,
in_features]`, padded to `[N, K]` with multiples of 16 and 128 by weights that are exactly zero.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

GROUP_SIZE = 128
ROW_BLOCK = 16
ZERO_POINT = {4: 8, 8: 128}
"""The code that stands for a weight of zero, by bits."""


class MatrixFile(Protocol):
    """What `load_matrix` needs of an open model file."""

    @property
    def tensors(self): ...

    def array(self, name: str) -> np.ndarray: ...


def round_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `n`.

    >>> round_up(576, 128)
    640
    """
    return -(-n // multiple) * multiple


def padded_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """(N, K): the shape as stored, in whole row blocks and groups."""
    return round_up(out_features, ROW_BLOCK), round_up(in_features, GROUP_SIZE)


def _pad(a: np.ndarray, shape: tuple[int, int], value) -> np.ndarray:
    pad = [(0, want - have) for have, want in zip(a.shape, shape, strict=True)]
    return np.pad(a, pad, constant_values=value)


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """uint8 [out, in] of codes 0..15 -> uint8 [N/16, K/128, 1024].

    Line `i` (64 bytes) of a group holds inputs 8i..8i+7: byte `4r + j` has row r's input 8i+j in its low
    nibble and input 8i+4+j in its high nibble.
    """
    n, k = padded_shape(*codes.shape)
    u = _pad(codes, (n, k), ZERO_POINT[4]).reshape(n // 16, 16, k // 128, 16, 2, 4)
    u = u.transpose(0, 2, 3, 1, 5, 4)  # block, group, line, row, j, half
    return (u[..., 0] | (u[..., 1] << 4)).astype(np.uint8).reshape(n // 16, k // 128, 1024)


def unpack_int4(packed: np.ndarray, out_features: int, in_features: int) -> np.ndarray:
    """The inverse of `pack_int4`: uint8 [out, in] of codes 0..15."""
    blocks, groups = packed.shape[:2]
    lines = packed.reshape(blocks, groups, 16, 16, 4)  # block, group, line, row, j
    u = np.stack([lines & 15, lines >> 4], axis=4)  # ..., row, half, j
    return u.transpose(0, 3, 1, 2, 4, 5).reshape(blocks * 16, groups * 128)[:out_features, :in_features]


def pack_int8(codes: np.ndarray) -> np.ndarray:
    """uint8 [out, in] of codes 0..255 -> uint8 [N/16, K/128, 2048]; line i, byte 4r+j: row r's input 4i+j."""
    n, k = padded_shape(*codes.shape)
    u = _pad(codes, (n, k), ZERO_POINT[8]).reshape(n // 16, 16, k // 128, 32, 4)
    return np.ascontiguousarray(u.transpose(0, 2, 3, 1, 4), np.uint8).reshape(n // 16, k // 128, 2048)


def unpack_int8(packed: np.ndarray, out_features: int, in_features: int) -> np.ndarray:
    """The inverse of `pack_int8`: uint8 [out, in]."""
    blocks, groups = packed.shape[:2]
    u = packed.reshape(blocks, groups, 32, 16, 4).transpose(0, 3, 1, 2, 4)
    return u.reshape(blocks * 16, groups * 128)[:out_features, :in_features]


def pack_scales(scales: np.ndarray) -> np.ndarray:
    """float16 [out, groups] -> float16 [N/16, groups, 16]; rows that pad have scale 0."""
    n, groups = round_up(scales.shape[0], ROW_BLOCK), scales.shape[1]
    s = _pad(scales, (n, groups), 0).reshape(n // 16, 16, groups)
    return np.ascontiguousarray(s.transpose(0, 2, 1), np.float16)


def unpack_scales(packed: np.ndarray, out_features: int) -> np.ndarray:
    """The inverse of `pack_scales`: float16 [out, groups]."""
    blocks, groups, _ = packed.shape
    return packed.transpose(0, 2, 1).reshape(blocks * 16, groups)[:out_features]


def pack_f16(weights: np.ndarray) -> np.ndarray:
    """float16 [out, in] -> float16 [N/16, K, 16] (row innermost), zero padded: the `f16.r16` layout."""
    n, k = padded_shape(*weights.shape)
    w = _pad(weights, (n, k), 0).reshape(n // 16, 16, k)
    return np.ascontiguousarray(w.transpose(0, 2, 1), np.float16)


def unpack_f16(packed: np.ndarray, out_features: int, in_features: int) -> np.ndarray:
    """The inverse of `pack_f16`: float16 [out, in]."""
    blocks, k, _ = packed.shape
    return packed.transpose(0, 2, 1).reshape(blocks * 16, k)[:out_features, :in_features]


def quantize_rtn(weights: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Round to nearest, symmetric: float32 [out, in] -> codes uint8 [out, in], scales float16 [out, groups].

    The scale is absmax / 7 (or / 127), rounded to float16 before the codes are chosen, so that the codes
    are right for the scale that is stored. Only elementwise IEEE arithmetic: the same bits everywhere.
    """
    out_features, in_features = weights.shape
    groups = -(-in_features // GROUP_SIZE)
    zero = ZERO_POINT[bits]
    w = _pad(weights.astype(np.float32), (out_features, groups * GROUP_SIZE), 0).reshape(out_features, groups, -1)
    scales = (np.abs(w).max(axis=2) / np.float32(zero - 1)).astype(np.float16)
    s = scales.astype(np.float32)[:, :, None]
    q = np.rint(np.divide(w, s, out=np.zeros_like(w), where=s != 0))
    codes = (np.clip(q, -zero, zero - 1) + zero).astype(np.uint8)
    return codes.reshape(out_features, -1)[:, :in_features], scales


def dequantize(codes: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """codes uint8 [out, in], scales float16 [out, groups] -> float32 [out, in]."""
    q = codes.astype(np.float32) - np.float32(ZERO_POINT[bits])
    q *= np.repeat(scales.astype(np.float32), GROUP_SIZE, axis=1)[:, : codes.shape[1]]
    return q


def load_matrix(model_file: MatrixFile, name: str) -> np.ndarray:
    """A matrix of an open file as float32 [out_features, in_features], whatever its layout.

    `name` is without the suffix: `"model.layers.0.self_attn.q_proj"`, `"model.embed_tokens"`, `"lm_head"`.
    """
    if f"{name}.qweight" not in model_file.tensors:
        entry = model_file.tensors[f"{name}.weight"]
        stored = model_file.array(f"{name}.weight")
        if entry.layout == "f16.r16":
            stored = unpack_f16(stored, *entry.shape)
        return stored.astype(np.float32)
    entry = model_file.tensors[f"{name}.qweight"]
    out_features, in_features = entry.shape
    packed = model_file.array(f"{name}.qweight")
    scales = unpack_scales(model_file.array(f"{name}.scales"), out_features)
    if entry.layout == "int4.g128":
        return dequantize(unpack_int4(packed, out_features, in_features), scales, 4)
    return dequantize(unpack_int8(packed, out_features, in_features), scales, 8)
