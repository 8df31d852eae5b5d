"""The numbers that kernels and the tables they read (`plan`) agree on: tiles, splits, scratch, names.

Knows nothing of Numba: a process that finds its kernels compiled does not import it.
"""

from __future__ import annotations

from ...kv_cache import BLOCK
from ...quant import round_up
from .target import TARGET

LINE = 64
"""Bytes of a line of the processor's cache; a word that threads share has one to itself."""

# -- matrices ----------------------------------------------------------------------------------------------------

ONE, FEW, MANY = 0, 1, 2
"""The sizes of a pack's tiles: one token, a few (decode of several sequences), many."""
AMX_TOKENS = 16
"""The rows of a tile register of AMX."""
SIZES = (1, TARGET.few_columns, AMX_TOKENS if TARGET.amx else TARGET.many_columns)
"""Tokens of a tile, by size."""
BY_TOKEN = (False, False, TARGET.amx)
"""For each size: whether codes lie token by token (see `amx`), instead of word by word."""
STEP = 32
"""Inputs that an inner loop takes at a time."""
TILE_KERNELS = {
    bits: tuple(f"tiles.{kind}_{size}" for size in ("one", "few", "many"))
    for bits, kind in ((4, "int4"), (8, "int8"), (16, "f16"))
}
"""Bits of the weights -> kernels for tiles of SIZES tokens."""
ROW_MAJOR_F16 = 0
"""`bits` of an untied embedding: plain rows of float16, not the block layout of a matrix."""

SILU, GELU, GELU_TANH, RELU = 0, 1, 2, 3

# -- attention ---------------------------------------------------------------------------------------------------

SPLIT = 256
"""Positions whose scores lie side by side, and whose softmax is one; whole blocks."""
QUERIES = 4
"""How many queries share one loop over widened keys and values."""
LINE_POSITIONS = 16
"""Neighbouring positions of keys that lie together."""
MOST_QUERIES = 64
"""Queries that go through the cache together: the more, the less often it is widened; their scores stay in cache."""
FEW_TOKENS = 8
"""Up to so many tokens, each split of each head is a piece of work of its own."""
LARGEST, OUTPUT = 64, 128
"""Bytes before these parts of a state (see `softmax`)."""
ATTENTION_KERNELS = {
    "pass_one": "attention.pass_one",
    "pass_few": "attention.pass_few",
    "pass_many": "attention.pass_many",
    "store": "cache_store.store",
}
"""What is called by address, by field of the plan."""


def state_bytes(value_stride: int) -> int:
    """Of one state."""
    return OUTPUT + 4 * value_stride


def store_scratch_bytes(value_stride: int) -> int:
    """What `cache_store.store` needs for itself: 16 rows, a transposed square, 16 factors."""
    return LINE_POSITIONS * 4 * value_stride + 1024 + 64


def piece_tokens(shared: int) -> int:
    """Tokens of a piece of attention's work, if `shared` queries of a token share a KV head."""
    return max(1, MOST_QUERIES // shared)


def scratch_parts(shared: int, head_dim: int, value_stride: int) -> dict[str, int]:
    """Bytes that a thread needs for attention, by plan field; they lie in this order."""
    room = round_up(piece_tokens(shared) * shared, QUERIES)
    states = room * state_bytes(value_stride)
    block = max(4 * BLOCK * value_stride, store_scratch_bytes(value_stride))
    return {
        "lengths": 8 * room,
        "queries": round_up(4 * room * head_dim, 64),
        "states": states,
        "split_states": states,
        "pass_scratch": 4 * room * SPLIT + block,
    }


def few_states_bytes(n_kv_heads: int, shared: int, n_ctx: int, value_stride: int) -> int:
    """Bytes of the states of all splits of FEW_TOKENS tokens: see `attention._few_states`."""
    splits = -(-n_ctx // SPLIT)
    return splits * n_kv_heads * FEW_TOKENS * round_up(shared, QUERIES) * state_bytes(value_stride)
