"""The preallocated key and value cache of the CPU runtime: slots of float16, laid out for streaming.

    keys    float16 [layer][slot][kv_head][n_ctx/16][head_dim][16]     lane = position
    values  float16 [layer][slot][kv_head][n_ctx][value_stride]       value_stride: head_dim, rounded up to 16

`n_ctx` is rounded up to whole attention blocks. Memory is reserved at once and becomes resident as it is
written. This module knows shapes and addresses, not attention.
"""

from __future__ import annotations

import numpy as np

from .config import LlamaConfig
from .quant import round_up

BLOCK = 64
"""Positions in a block of attention; every head's cache holds whole ones."""


def aligned_zeros(nbytes: int, alignment: int = 64) -> np.ndarray:
    """uint8 [nbytes], zero, at an aligned address; not resident until touched."""
    raw = np.zeros(nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes]


def bytes_per_position(config: LlamaConfig) -> int:
    """Bytes that one position of one slot takes in all layers."""
    per_head = config.head_dim + round_up(config.head_dim, 16)
    return config.num_hidden_layers * config.num_key_value_heads * per_head * 2


class KVCache:
    """Keys and values of `n_slots` sequences of up to `n_ctx` positions."""

    def __init__(self, config: LlamaConfig, n_ctx: int, n_slots: int = 1):
        self.n_ctx, self.n_slots = n_ctx, n_slots
        self.value_stride = round_up(config.head_dim, 16)
        positions = round_up(n_ctx, BLOCK)
        self.key_head_bytes = positions * config.head_dim * 2
        self.value_head_bytes = positions * self.value_stride * 2
        self.key_slot_bytes = self.key_head_bytes * config.num_key_value_heads
        self.value_slot_bytes = self.value_head_bytes * config.num_key_value_heads
        self._keys = aligned_zeros(config.num_hidden_layers * n_slots * self.key_slot_bytes)
        self._values = aligned_zeros(config.num_hidden_layers * n_slots * self.value_slot_bytes)

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def key_address(self, layer: int) -> int:
        """Where the keys of a layer's slot 0 begin."""
        return self._keys.ctypes.data + layer * self.n_slots * self.key_slot_bytes

    def value_address(self, layer: int) -> int:
        return self._values.ctypes.data + layer * self.n_slots * self.value_slot_bytes
