"""The preallocated key and value cache of the CPU runtime: slots laid out for streaming.

    keys    [layer][slot][kv_head][n_ctx/16][head_dim][16]     lane = position
    values  [layer][slot][kv_head][n_ctx][value_stride]       value_stride: head_dim, rounded up to 16
    scales  float32 [keys, values][layer][slot][kv_head][n_ctx]   of an int8 cache

Elements are float16, or int8 with a scale for each head and position. `n_ctx` is rounded up to whole attention
blocks. Memory is reserved at once and becomes resident as it is written. This module knows shapes and addresses,
not attention.

A slot's contents can be taken out and put back, into a cache of another length too (`slot_arrays`): plain arrays with
one row for each position, whatever the layout above.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from .config import LlamaConfig
from .quant import round_up

BLOCK = 64
"""Positions in a block of attention; every head's cache holds whole ones."""
ELEMENT_BYTES = {"float16": 2, "int8": 1}
"""Bytes of a number in the cache, by the cache's kind."""
SCALE_BYTES = {"float16": 0, "int8": 4}
"""Bytes of the scale of one head's key (or value) at one position."""
LANES = 16
"""Neighbouring positions of keys, which lie together."""
SLOT_DTYPES = {"float16": np.float16, "int8": np.int8, "float32": np.float32, "bfloat16": np.uint16}
"""What a cache's numbers are taken out as, by the cache's kind; NumPy has no bfloat16, so its bits."""
SCALE_NAMES = ("key_scales", "value_scales")
"""Names of an int8 cache's scales where a slot is taken out; see `slot_arrays`."""


def aligned_zeros(nbytes: int, alignment: int = 64) -> np.ndarray:
    """uint8 [nbytes], zero, at an aligned address; not resident until touched."""
    raw = np.zeros(nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes]


def bytes_per_position(config: LlamaConfig, kind: str = "float16") -> int:
    """Bytes that one position of one slot takes in all layers."""
    per_head = (config.head_dim + round_up(config.head_dim, 16)) * ELEMENT_BYTES[kind] + 2 * SCALE_BYTES[kind]
    return config.num_hidden_layers * config.num_key_value_heads * per_head


def slot_arrays(config: LlamaConfig, kind: str, n: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """name -> (dtype, shape) of what the first `n` positions of a slot are taken out as.

    Keys and values [layers, kv_heads, n, head_dim] of the cache's kind ("float16", "int8", "float32", or "bfloat16" as
    the uint16 of its bits); an int8 cache's scales besides, float32 [layers, kv_heads, n].
    """
    front = (config.num_hidden_layers, config.num_key_value_heads, n)
    arrays: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for name in ("keys", "values"):
        arrays[name] = np.dtype(SLOT_DTYPES[kind]), (*front, config.head_dim)
    for name in SCALE_NAMES if kind == "int8" else ():
        arrays[name] = np.dtype(np.float32), front
    return arrays


def check_slot_arrays(config: LlamaConfig, kind: str, n_ctx: int, data: Mapping[str, np.ndarray]) -> int:
    """The positions that `data` holds; ValueError unless it is what `slot_arrays` says and fits."""
    keys = data.get("keys")
    n = keys.shape[2] if keys is not None and keys.ndim == 4 else 0
    expected = slot_arrays(config, kind, n)
    found = {name: (array.dtype, array.shape) for name, array in data.items()}
    if found != expected:
        raise ValueError(f"these are not the contents of a slot: expected {expected}, got {found}")
    if n > n_ctx:
        raise ValueError(f"{n} positions do not fit into a slot of {n_ctx}")
    return n


class KVCache:
    """Keys and values of `n_slots` sequences of up to `n_ctx` positions; `kind` is "float16" or "int8"."""

    def __init__(self, config: LlamaConfig, n_ctx: int, n_slots: int = 1, kind: str = "float16"):
        self.config, self.n_ctx, self.n_slots, self.kind = config, n_ctx, n_slots, kind
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

    def copy(self, source: int, target: int, n: int, start: int = 0) -> None:
        """Positions [start, n) of slot `source` to slot `target`, bit by bit; the target's others stay."""
        if source == target:
            return
        keys, *rows = self._views()
        for blocks, lanes in _lines(start, n):
            keys[:, target, :, blocks, :, lanes] = keys[:, source, :, blocks, :, lanes]
        for array in rows:
            array[:, target, :, start:n] = array[:, source, :, start:n]

    def read(self, slot: int, n: int) -> dict[str, np.ndarray]:
        """The first `n` positions of a slot as new arrays; see `slot_arrays`."""
        keys, values, *scales = self._views()
        blocks = keys[:, slot, :, : -(-n // LANES)].swapaxes(-1, -2)  # [layer, head, block, lane, dimension]
        head_dim = self.config.head_dim
        data = {
            "keys": blocks.reshape(*blocks.shape[:2], -1, head_dim)[:, :, :n],
            "values": values[:, slot, :, :n, :head_dim],
        }
        data |= {name: array[:, slot, :, :n] for name, array in zip(SCALE_NAMES, scales, strict=False)}
        return {name: array.copy() for name, array in data.items()}

    def keys(self, layer: int, slot: int, n: int) -> np.ndarray:
        """float32 [kv_heads, n, head_dim]: the keys of a layer at the first `n` positions of a slot."""
        stored, _, *scales = self._views()
        blocks = stored[layer, slot, :, : -(-n // LANES)].swapaxes(-1, -2)  # [head, block, lane, dimension]
        keys = blocks.reshape(len(blocks), -1, self.config.head_dim)[:, :n].astype(np.float32)
        return keys * scales[0][layer, slot, :, :n, None] if scales else keys

    def write(self, slot: int, data: Mapping[str, np.ndarray]) -> None:
        """Put back what `read` of a cache of this kind, of any length, took out. ValueError for anything else."""
        n = check_slot_arrays(self.config, self.kind, self.n_ctx, data)
        keys, values, *scales = self._views()
        for blocks, lanes in _lines(0, n):
            part = data["keys"][:, :, blocks.start * LANES + lanes.start : blocks.stop * LANES - LANES + lanes.stop]
            lines = part.reshape(*part.shape[:2], -1, lanes.stop - lanes.start, self.config.head_dim)
            keys[:, slot, :, blocks, :, lanes] = lines.swapaxes(-1, -2)
        values[:, slot, :, :n, : self.config.head_dim] = data["values"]
        for name, array in zip(SCALE_NAMES, scales, strict=False):
            array[:, slot, :, :n] = data[name]

    def _views(self) -> list[np.ndarray]:
        """Keys, values and, of an int8 cache, the scales of both, in the shapes that the module's header shows."""
        config = self.config
        positions = self.key_head_bytes // (config.head_dim * self.element_bytes)
        front = (config.num_hidden_layers, self.n_slots, config.num_key_value_heads)
        views = [
            self._keys.view(self.kind).reshape(*front, positions // LANES, config.head_dim, LANES),
            self._values.view(self.kind).reshape(*front, positions, self.value_stride),
        ]
        if SCALE_BYTES[self.kind]:
            views += [a.view(np.float32).reshape(*front, positions) for a in (self._key_scales, self._value_scales)]
        return views


def _lines(start: int, end: int) -> Iterator[tuple[slice, slice]]:
    """(blocks, lanes) of the keys at positions [start, end): a part of a block, whole blocks, a part of a block.

    >>> list(_lines(3, 32))
    [(slice(0, 1, None), slice(3, 16, None)), (slice(1, 2, None), slice(0, 16, None))]
    """
    while start < end:
        block, lane = divmod(start, LANES)
        whole = (end - start) // LANES if lane == 0 else 0
        stop = lane + min(LANES - lane, end - start)
        yield slice(block, block + max(whole, 1)), slice(lane, stop)
        start += whole * LANES if whole else stop - lane
