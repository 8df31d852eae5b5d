"""The preallocated key and value cache of the CPU runtime: slots laid out for streaming.

    keys    [layer][slot][kv_head][n_ctx/16][head_dim][16]     lane = position
    values  [layer][slot][kv_head][n_ctx][value_stride]       value_stride: head_dim, rounded up to 16
    scales  float32 [keys, values][layer][slot][kv_head][n_ctx]   of an int8 cache

Elements are float16, or int8 with a scale for each head and position. `n_ctx` is rounded up to whole attention
blocks. Memory is reserved at once and becomes resident as it is written. This module knows shapes and addresses,
not attention.
"""

from __future__ import annotations

import numpy as np

from .config import LlamaConfig
from .quant import round_up

BLOCK = 64
"""Positions in a block of attention; every head's cache holds whole ones."""
ELEMENT_BYTES = {"float16": 2, "int8": 1}
"""Bytes of a number in the cache, by the cache's kind."""
SCALE_BYTES = {"float16": 0, "int8": 4}
"""Bytes of the scale of one head's key (or value) at one position."""


def aligned_zeros(nbytes: int, alignment: int = 64) -> np.ndarray:
    """uint8 [nbytes], zero, at an aligned address; not resident until touched."""
    raw = np.zeros(nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes]


def bytes_per_position(config: LlamaConfig, kind: str = "float16") -> int:
    """Bytes that one position of one slot takes in all layers."""
    per_head = (config.head_dim + round_up(config.head_dim, 16)) * ELEMENT_BYTES[kind] + 2 * SCALE_BYTES[kind]
    return config.num_hidden_layers * config.num_key_value_heads * per_head


class KVCache:
    """Keys and values of `n_slots` sequences of up to `n_ctx` positions; `kind` is "float16" or "int8"."""

    def __init__(self, config: LlamaConfig, n_ctx: int, n_slots: int = 1, kind: str = "float16"):
        self.n_ctx, self.n_slots, self.kind = n_ctx, n_slots, kind
        self.element_bytes = ELEMENT_BYTES[kind]
        self.value_stride = round_up(config.head_dim, 16)
        positions = round_up(n_ctx, BLOCK)
        self.key_head_bytes = positions * config.head_dim * self.element_bytes
        self.value_head_bytes = positions * self.value_stride * self.element_bytes
        self.scale_head_bytes = positions * SCALE_BYTES[kind]
        heads = config.num_key_value_heads
        self.key_slot_bytes, self.value_slot_bytes = heads * self.key_head_bytes, heads * self.value_head_bytes
        self.scale_slot_bytes = heads * self.scale_head_bytes
        slots = config.num_hidden_layers * n_slots
        self._keys = aligned_zeros(slots * self.key_slot_bytes)
        self._values = aligned_zeros(slots * self.value_slot_bytes)
        self._key_scales = aligned_zeros(slots * self.scale_slot_bytes)
        self._value_scales = aligned_zeros(slots * self.scale_slot_bytes)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self._keys, self._values, self._key_scales, self._value_scales))

    def addresses(self, layer: int) -> tuple[int, int, int, int]:
        """Where keys, values, key scales and value scales of a layer's slot 0 begin."""
        parts = [
            (self._keys, self.key_slot_bytes),
            (self._values, self.value_slot_bytes),
            (self._key_scales, self.scale_slot_bytes),
            (self._value_scales, self.scale_slot_bytes),
        ]
        keys, values, key_scales, value_scales = (
            array.ctypes.data + layer * self.n_slots * slot_bytes for array, slot_bytes in parts
        )
        return keys, values, key_scales, value_scales
