"""The CPU backend: the compiled forward pass over a memory-mapped file and a preallocated cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ...errors import CancelledError
from ...format import ModelFile
from ...kv_cache import KVCache
from ...quant import round_up
from ...rope import cos_sin
from .. import check_batch, check_slots
from . import native
from .layerwise import CpuLayerPass
from .plan import BARRIER, CANCEL, Plan
from .shapes import LINE
from .team import Team
from .threads import default_threads

PREFILL_CHUNK = 256
"""Tokens that go through the layers together; bounds the work buffers."""
MAX_THREADS = 256
EXACT_BELOW, WIDE_FROM = 576, 1024
"""Widths of models: the narrower one is, the more it feels activations of 8 bits."""
EXACT = {"q": 0.0, "o": 0.0, "gate": 0.0, "down": 0.0, "head": 0.0}
NARROW = {"q": 0.0, "o": 6.0, "gate": 5.0, "down": 8.0, "head": 3.0}
WIDE = {"q": 16.0, "o": 16.0, "gate": 16.0, "down": 32.0, "head": 16.0}
"""From how many times the mean size of a row on a value is an outlier (see `vector_ops.pack_row`): for what goes into q
(k, v), o, gate (up), down and head. The lower, the finer the other values, and the more is multiplied twice."""


def ceilings(hidden_size: int) -> dict[str, float]:
    """Those of a model by its width."""
    return EXACT if hidden_size < EXACT_BELOW else NARROW if hidden_size < WIDE_FROM else WIDE


class CpuBackend:
    """Runs one model; see `edgellama.backends.Backend`. One call at a time.

    The bits of the logits depend on the file, the tokens and the instruction set's arithmetic only: not
    on `n_threads`, not on `prefill_chunk`, not on what shares the batch.
    """

    batch_invariant = True
    pass_tokens = PREFILL_CHUNK

    def __init__(
        self,
        model_file: ModelFile,
        n_ctx: int,
        n_slots: int = 1,
        n_threads: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        ceiling: float | None = None,
        kv_cache: str = "float16",
    ):
        self.config, self.n_ctx, self.n_slots = model_file.config, n_ctx, n_slots
        self.n_threads = min(n_threads or default_threads(), MAX_THREADS)
        self._chunk = min(prefill_chunk, n_ctx * n_slots)
        self._cache = KVCache(self.config, n_ctx, n_slots, kv_cache)
        limits = ceilings(self.config.hidden_size) if ceiling is None else dict.fromkeys(EXACT, ceiling)
        self._plan = Plan(model_file, self._cache, self.n_threads, self._chunk, limits)
        self._layers = self._plan.layers  # those that the program runs
        self._team = Team(self.n_threads)
        self._record = self._plan.record[0]
        self._prepared, self._barriers_before = False, 0
        # Inputs of one chunk, filled in place: the program knows their addresses.
        half = self.config.head_dim // 2
        self._tokens = np.zeros(self._chunk, np.int32)
        self._rows = np.zeros(self._chunk, np.int32)
        self._positions, self._slots = np.zeros(self._chunk, np.int64), np.zeros(self._chunk, np.int64)
        self._cos, self._sin = np.zeros((self._chunk, half), np.float32), np.zeros((self._chunk, half), np.float32)
        for name in ("tokens", "rows", "positions", "slots", "cos", "sin"):
            self._record[name] = getattr(self, f"_{name}").ctypes.data

    @property
    def kv_cache(self) -> str:
        """What the cache holds: "float16" or "int8"."""
        return self._cache.kind

    def forward(self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """See `Backend.forward`."""
        # Whole row blocks are stored, and whole tiles of tokens where there are several: the last ones need room.
        room = self._plan.tile_tokens if np.size(rows) > 1 else 0
        logits = self._forward(tokens, positions, slots, rows, round_up(self.config.n_outputs, 16), room)
        return logits[:, : self.config.n_outputs]

    def hidden(self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """See `Backend.hidden`."""
        self._record["hidden_out"] = 1
        try:
            width = round_up(self.config.hidden_size, 128)
            return self._forward(tokens, positions, slots, rows, width, 0)[:, : self.config.hidden_size]
        finally:
            self._record["hidden_out"] = 0

    def _forward(self, tokens, positions, slots, rows, width: int, room: int) -> np.ndarray:
        """float32 [R, width]: what the program stores for each wanted row; it may write `room` rows beyond."""
        tokens, positions, slots, rows = check_batch(
            tokens, positions, slots, rows, vocab_size=self.config.vocab_size, backend=self
        )
        self.prepare()
        lengths = {slot: int(positions[slots == slot].max()) + 1 for slot in set(slots.tolist())}
        out = np.empty((len(rows) + room, width), np.float32)
        done = 0
        for start in range(0, len(tokens), self._chunk):
            part = slice(start, min(start + self._chunk, len(tokens)))
            upto = int(np.searchsorted(rows, part.stop))
            self._load(tokens[part], positions[part], slots[part], rows[done:upto] - start, lengths)
            self._run(out[done:])
            done = upto
        return out[: len(rows)]

    def copy_slot(self, source: int, target: int, n: int, start: int = 0) -> None:
        """See `Backend.copy_slot`."""
        check_slots(self, (source, target), n, start)
        self._cache.copy(source, target, n, start)

    def read_slot(self, slot: int, n: int) -> dict[str, np.ndarray]:
        """See `Backend.read_slot`."""
        check_slots(self, (slot,), n)
        return self._cache.read(slot, n)

    def write_slot(self, slot: int, data: Mapping[str, np.ndarray]) -> None:
        """See `Backend.write_slot`."""
        check_slots(self, (slot,), 0)
        self._cache.write(slot, data)

    def prepare(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile the kernels, or load them from the cache; the first `forward` does it otherwise.

        Before the team starts, so that Ctrl-C ends it at once. `progress(done, total)` where there is much to do.
        """
        if not self._prepared:
            native.prepare(["program.forward", *self._plan.kernels()], progress)
            self._plan.link()
            self._forward_program = native.function("program.forward", 4)
            self._prepared = True

    def _load(self, tokens, positions, slots, rows, lengths) -> None:
        """Put one chunk's inputs where the program looks for them."""
        n = len(tokens)
        self._tokens[:n], self._positions[:n], self._slots[:n] = tokens, positions, slots
        self._rows[: len(rows)] = rows
        several = set(slots.tolist())
        for slot in several:
            here = np.flatnonzero(slots == slot) if len(several) > 1 else slice(n)
            self._cos[here], self._sin[here] = cos_sin(self.config, positions[here], lengths[slot])
        self._record["n_tokens"] = self._record["n_embedded"] = n
        self._record["n_rows"] = len(rows)

    def layers(self, places: np.ndarray, slots: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> CpuLayerPass:
        """See `edgellama.backends.layerwise.Layered`."""
        tokens = np.zeros(len(places), np.int32)
        _, places, slots, _ = check_batch(tokens, places, slots, [], vocab_size=1, backend=self)
        return CpuLayerPass(self, self._plan, self._cache, self._chunk, (places, slots, cos, sin))

    def run_part(
        self,
        tokens: np.ndarray,
        *,
        embeds: bool = False,
        places: tuple[np.ndarray, ...] | None = None,
        layer: int | None = None,
        rows: np.ndarray | None = None,
        out: np.ndarray | None = None,
        hidden: bool = False,
    ) -> None:
        """One piece of a pass over a chunk whose residual stream lies in the plan's `x`: for `CpuLayerPass`.

        `embeds`: fill it from `tokens`. `layer`: run that one, at `places` (places, slots, cos, sin of each token).
        `rows`: store their logits, or their normed states (`hidden`), in `out`.
        """
        n, record = len(tokens), self._record
        self._tokens[:n] = tokens
        if places is not None:
            self._positions[:n], self._slots[:n], self._cos[:n], self._sin[:n] = places
        n_rows = 0 if rows is None else len(rows)
        self._rows[:n_rows] = rows if rows is not None else ()
        record["n_tokens"], record["n_embedded"], record["n_rows"] = n, n if embeds else 0, n_rows
        record["n_layers"], record["hidden_out"] = 0 if layer is None else 1, int(hidden)
        if layer is not None:
            self._layers = self._plan.layers[layer : layer + 1]
        try:
            self._run(np.empty((1, 16), np.float32) if out is None else out)
        finally:
            record["n_layers"], record["hidden_out"] = self.config.num_hidden_layers, 0
            self._layers = self._plan.layers

    def _run(self, out: np.ndarray) -> None:
        self._record["logits"], self._record["logits_stride"] = out.ctypes.data, out.strides[0]
        tables = self._plan.record.ctypes.data, self._layers.ctypes.data, self._plan.packs.ctypes.data
        self._barriers_before = self._barriers_passed()
        control = self._plan.control
        try:
            whole = self._team.run(lambda rank: self._forward_program(*tables, rank) == 1, self._must_join)
        except BaseException:
            control[CANCEL * LINE // 8] = 0
            raise
        if not whole:
            control[CANCEL * LINE // 8] = 0
            raise CancelledError("the forward pass was cancelled; what was computed before stays in the cache")

    def _must_join(self) -> bool:
        """After an interrupt: True if nobody has passed a barrier, which takes all. The pass is to end soon."""
        self.cancel()
        return self._barriers_passed() == self._barriers_before

    def _barriers_passed(self) -> int:
        return int(self._plan.control[(BARRIER + 1) * LINE // 8])

    def cancel(self) -> None:
        """Make a `forward` that runs in another thread raise CancelledError within one layer of one chunk."""
        self._plan.control[CANCEL * LINE // 8] = 1

    def close(self) -> None:
        """End the threads; the buffers go with the object."""
        self._team.close()


__all__ = ["PREFILL_CHUNK", "CpuBackend"]
