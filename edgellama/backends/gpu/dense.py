"""The file's layouts (FORMAT.md, section 4) as torch arithmetic: a matrix, or a few of its rows, as plain numbers.

What `quant.py` is in NumPy; the same values to the last bit in float32. Works on the stored bytes, on any device.
"""

from __future__ import annotations

import torch

ZERO = {4: 8, 8: 128}


def dense(codes: torch.Tensor, scales: torch.Tensor | None, bits: int, out: torch.Tensor) -> torch.Tensor:
    """Fill `out` [K, N] (contiguous, any float dtype) with a matrix's weights, inputs first; return it.

    codes: uint8 [B, G, 1024] (4 bits), uint8 [B, G, 2048] (8), float16 [B, K, 16] (16). scales: float16 [B, G, 16].
    """
    blocks = codes.shape[0]
    if bits == 16:
        out.view(-1, blocks, 16).copy_(codes.permute(1, 0, 2))
        return out
    assert scales is not None
    groups = codes.shape[1]
    factor = scales.permute(1, 0, 2)[:, None].to(torch.float32)  # [G, 1, B, 16]
    if bits == 4:
        lines = codes.view(blocks, groups, 16, 16, 4).permute(1, 2, 4, 0, 3)  # [G, line, byte, B, row]
        halves = out.view(groups, 16, 2, 4, blocks, 16)  # input 8 line + 4 half + byte
        for half, code in enumerate((lines & 15, lines >> 4)):
            halves[:, :, half] = (code.to(torch.float32) - ZERO[4]) * factor[:, None]
    else:
        lines = codes.view(blocks, groups, 32, 16, 4).permute(1, 2, 4, 0, 3)
        out.view(groups, 32, 4, blocks, 16).copy_((lines.to(torch.float32) - ZERO[8]) * factor[:, None])
    return out


def rows(codes: torch.Tensor, scales: torch.Tensor | None, bits: int, indices: torch.Tensor) -> torch.Tensor:
    """float32 [T, K]: the rows numbered in `indices` (int64 [T]) of a matrix stored in blocks."""
    block, lane = indices // 16, indices % 16
    if bits == 16:
        return codes[block, :, lane].to(torch.float32)
    assert scales is not None
    blocks, groups = codes.shape[:2]
    if bits == 4:
        lines = codes.view(blocks, groups, 16, 16, 4)[block, :, :, lane]  # [T, G, line, byte]
        code = torch.stack((lines & 15, lines >> 4), dim=3)
    else:
        code = codes.view(blocks, groups, 32, 16, 4)[block, :, :, lane]
    values = code.reshape(len(indices), groups, 128).to(torch.float32) - ZERO[bits]
    return (values * scales[block, :, lane].to(torch.float32)[:, :, None]).reshape(len(indices), -1)
