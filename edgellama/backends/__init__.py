"""What a device must be able to do to run a model, and the check of its input that all of them share.

A backend owns the weights as its device needs them and a KV cache of `n_slots` sequences, each of `n_ctx` positions. It
knows tokens, positions and slots as numbers; it does not know text, sampling or who owns a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from edgellama.errors import ContextError


class Backend(Protocol):
    """One loaded model on one device. Calls must not overlap; the caller serializes them.

    Some can be driven layer by layer as well: see `layerwise.Layered`.

    Prefill of three tokens for the last one's logits, then one token each of two sequences (lists stand for arrays):

    >>> backend.forward(tokens=[1, 15043, 445], positions=[0, 1, 2], slots=[0, 0, 0], rows=[2])
    >>> backend.forward(tokens=[338, 1], positions=[3, 0], slots=[0, 1], rows=[0, 1])
    """

    @property
    def n_ctx(self) -> int:
        """Positions in each slot's cache."""

    @property
    def n_slots(self) -> int:
        """Sequences the cache holds."""

    @property
    def batch_invariant(self) -> bool:
        """Whether the bits of a token's keys, values and logits depend on the tokens before it only: not on what else
        is in the call, nor on how a sequence was cut into calls. Then a cache may be reused without anyone noticing."""

    @property
    def kv_cache(self) -> str:
        """What the cache holds: "float16", "bfloat16", "int8" or "float32"."""

    @property
    def pass_tokens(self) -> int:
        """Tokens of prompts that one call should have: more gain nothing, and wait longer for `cancel`."""

    def forward(self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Run a flat batch of tokens; return float32 [R, vocab_size], the logits after the tokens numbered in `rows`
        (a classifier has a row of them for its labels: [R, config.n_outputs]).

        Token t is `tokens[t]` at `positions[t]` of the sequence in `slots[t]` (all int32 [T]); its keys and values are
        written there, over whatever was there. It attends to every position of its slot up to its own, those written by
        this call included: the caller sees to it that all of them have been written, and that every index is in range
        (`check_batch` proves it). `rows` (int32 [R]) ascends. Where RoPE depends on the sequence's length, that is 1 +
        the slot's highest position in this call. CancelledError if another thread called `cancel`.
        """

    def hidden(self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """`forward`, but for what the head would have been multiplied with: float32 [R, hidden_size], normalized by
        the model's last norm."""

    def copy_slot(self, source: int, target: int, n: int, start: int = 0) -> None:
        """Give slot `target` the positions [start, n) of slot `source`, bit by bit; its others stay as they are."""

    def read_slot(self, slot: int, n: int) -> dict[str, np.ndarray]:
        """Copies of the first `n` positions of a slot, as `kv_cache.slot_arrays` lays them out, whatever the device."""

    def write_slot(self, slot: int, data: Mapping[str, np.ndarray]) -> None:
        """Put what `read_slot` took out into a slot, of another backend of the same model and `kv_cache` too.

        ValueError where the arrays are not those, or are longer than `n_ctx`.
        """

    def cancel(self) -> None:
        """From another thread: make the `forward` or `hidden` that runs, or else the next one, raise CancelledError.

        Within one layer of one chunk of the prompt (a GPU works off what it was given before: up to a chunk). The
        backend can be used afterwards; positions that the call was to write are undefined.
        """

    def close(self) -> None:
        """Give back what the backend holds; it cannot be used afterwards. Closing twice is fine."""


def check_batch(
    tokens: ArrayLike, positions: ArrayLike, slots: ArrayLike, rows: ArrayLike, *, vocab_size: int, backend: Backend
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The four arrays of a `forward` call as contiguous int32, every index proven to be in range.

    Kernels check nothing: this is what stands between a wrong number and memory that is not ours. A position beyond the
    cache is a ContextError; the rest can only be a caller's mistake and is a ValueError.
    """
    n_tokens = np.size(tokens)
    if n_tokens == 0:
        raise ValueError("tokens must not be empty")
    checked_tokens = _checked("tokens", tokens, vocab_size, n_tokens)
    checked_positions = _checked("positions", positions, backend.n_ctx, n_tokens)
    checked_slots = _checked("slots", slots, backend.n_slots, n_tokens)
    checked_rows = _checked("rows", rows, n_tokens, None)
    if n_tokens > 1:
        places = checked_slots.astype(np.int64) * backend.n_ctx + checked_positions
        if np.unique(places).size != n_tokens:
            raise ValueError("two tokens have the same slot and position")
    return checked_tokens, checked_positions, checked_slots, checked_rows


def check_slots(backend: Backend, slots: tuple[int, ...], n: int, start: int = 0) -> None:
    """ValueError unless all `slots` are there and have positions [start, n)."""
    for slot in slots:
        if not 0 <= slot < backend.n_slots:
            raise ValueError(f"slot must be from 0 to {backend.n_slots - 1}, got {slot}")
    if not 0 <= start <= n <= backend.n_ctx:
        raise ValueError(f"positions must be from 0 to {backend.n_ctx}, got {start} to {n}")


def _checked(name: str, value: ArrayLike, limit: int, size: int | None) -> np.ndarray:
    """One array of `check_batch`: int32, whole numbers below `limit`, `size` of them."""
    array = np.atleast_1d(np.asarray(value))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):  # an empty list has no kind
        raise ValueError(f"{name} must be a list of whole numbers, got {array.dtype} {array.shape}")
    if size is not None and array.size != size:
        raise ValueError(f"{name} has {array.size} entries for {size} tokens")
    if array.size:
        lowest, highest = (array[0], array[0]) if array.size == 1 else (array.min(), array.max())
        if lowest < 0:
            raise ValueError(f"{name} must not be negative, got {lowest}")
        if highest >= limit:
            if name == "positions":
                raise ContextError(f"{highest + 1} tokens do not fit into a context of {limit} (n_ctx)")
            raise ValueError(f"{name} must be below {limit}, got {highest}")
    return np.ascontiguousarray(array, np.int32)
