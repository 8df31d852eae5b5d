"""How each layout stores a tensor: bytes, padding, and the shape of the NumPy view.

Knows the sizes only; the meaning of the bytes is in FORMAT.md section 4, and `edgellama.quant` packs and unpacks them.

>>> LAYOUTS["int4.g128"].nbytes((576, 576))   # padded to 576 x 640, half a byte each
184320
>>> LAYOUTS["int4.g128"].stored_shape((576, 576))
(36, 5, 1024)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .container import align

GROUP_SIZE = 128
"""Inputs that share one scale."""
ROW_BLOCK = 16
"""Output rows stored together."""


@dataclass(frozen=True)
class Layout:
    """One way to store a tensor of logical shape [out_features, in_features] (or [n]: `rank` 1)."""

    name: str
    dtype: np.dtype
    rank: int
    stored_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    """Logical shape -> shape of the stored array of `dtype`, padding included."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this logical shape, padding included; exact for any size."""
        return math.prod(self.stored_shape(shape)) * self.dtype.itemsize


def _blocks(shape: tuple[int, ...]) -> tuple[int, int]:
    """Row blocks and groups of a logical [out_features, in_features]."""
    return align(shape[0], ROW_BLOCK) // ROW_BLOCK, align(shape[1], GROUP_SIZE) // GROUP_SIZE


_U8, _F16, _F32 = np.dtype("u1"), np.dtype("<f2"), np.dtype("<f4")

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("int4.g128", _U8, 2, lambda shape: (*_blocks(shape), GROUP_SIZE * ROW_BLOCK // 2)),
        Layout("int8.g128", _U8, 2, lambda shape: (*_blocks(shape), GROUP_SIZE * ROW_BLOCK)),
        Layout("scales.g128", _F16, 2, lambda shape: (*_blocks(shape), ROW_BLOCK)),
        Layout("f16.r16", _F16, 2, lambda shape: (_blocks(shape)[0], _blocks(shape)[1] * GROUP_SIZE, ROW_BLOCK)),
        Layout("f16", _F16, 2, lambda shape: shape),
        Layout("f32", _F32, 1, lambda shape: shape),
    )
}
"""Every layout of format version 1, by name."""
