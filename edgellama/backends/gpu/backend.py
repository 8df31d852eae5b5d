"""The torch backend: one loaded model on a CUDA GPU, or on the CPU as torch sees it.

A batch of up to 64 tokens goes through the fused kernels where there are any (`decode.py`), a longer one in chunks
through torch operations (`plain.py`); both write the same cache. Beyond `Backend` it chooses tokens on the device.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch

from ...errors import CancelledError, ContextError, DeviceError, EdgellamaError
from ...format import ModelFile
from ...rope import DEPEND_ON_LENGTH, cos_sin
from .. import check_batch, check_slots
from .availability import triton_problem
from .cache import DTYPES, Cache
from .plain import Program
from .selection import Choice, as_rows, choose
from .weights import Weights

if TYPE_CHECKING:
    from .decode import Decoder
    from .graph import Steps

P = ParamSpec("P")
R = TypeVar("R")
CHUNK = {"cuda": 2048, "cpu": 512}
"""Tokens that go through the layers together in prefill; bounds the work buffers."""
MAX_KERNEL_HEAD_DIM = 256
"""Of the attention kernel: a wider head's tile does not fit into registers."""
COMPUTE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def make_backend(device: str, file: ModelFile, n_ctx: int, n_slots: int = 1, **options: Any) -> TorchBackend:
    """A backend on "cuda" or "torch-cpu", which `device_problem` has found nothing against; for `options` see there."""
    try:
        return TorchBackend(file, n_ctx, n_slots, device="cuda" if device == "cuda" else "cpu", **options)
    except torch.OutOfMemoryError:
        raise ContextError(
            f"not enough memory on the GPU for this model and {n_slots} sequences of {n_ctx} tokens; "
            "ask for less with n_ctx (-c) and n_slots, or for kv_cache int8"
        ) from None


def on_device(method: Callable[Concatenate[TorchBackend, P], R]) -> Callable[Concatenate[TorchBackend, P], R]:
    """Run a method without gradients, on the backend's own GPU: which one is current is each thread's own affair."""

    @functools.wraps(method)
    def wrapped(self: TorchBackend, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            return method(self, *args, **kwargs)

    return wrapped


class TorchBackend:
    """Runs one model; see `edgellama.backends.Backend`. One call at a time.

    `notes`: what the user should know. On the CPU results do not depend on what shares the batch beyond rounding; on
    neither device are they bit by bit those of the CPU backend.
    """

    batch_invariant = False  # other shapes of a product, other sums

    def __init__(
        self,
        model_file: ModelFile,
        n_ctx: int,
        n_slots: int = 1,
        *,
        device: str = "cuda",
        kv_cache: str = "float16",
        dtype: str | None = None,
        kernels: bool | None = None,
        chunk: int | None = None,
        step_tokens: int | None = None,
    ):
        """`device`: "cuda" or "cpu". `kv_cache`: "float16", "bfloat16" or "int8" ("float32" without kernels).

        `dtype`: what matrices are multiplied in: None is bfloat16 on a GPU that has it (else float16), float32 on the
        CPU. `kernels`: None takes Triton's where they work; False is plain torch; True demands them (on the CPU under
        TRITON_INTERPRET=1). `chunk`: tokens of prefill at once; `step_tokens`: up to this many go through the
        kernels (None: as many as they take).
        """
        self.config, self.n_ctx, self.n_slots = model_file.config, n_ctx, n_slots
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        self.dtype = dtype or _default_dtype(self.device)
        self.notes: list[str] = []
        self._chunk = chunk or CHUNK[self.device.type]
        self._cancel = threading.Event()
        with torch.no_grad():
            self._use_kernels = self._choose_kernels(kernels, kv_cache)
            dequantize = {}
            if self._use_kernels:
                from . import decode

                dequantize = {"dequantize": decode.dequantize}
            self._weights = Weights(model_file, self.device, COMPUTE_DTYPES[self.dtype], **dequantize)
            self._cache = Cache(self.config, n_ctx, n_slots, kv_cache, self.device)
            self._program = Program(self.config, self._weights, self._cache)
            self._decoder: Decoder | None = None
            self._steps: Steps | None = None
            if self._use_kernels:
                self._decoder, self._steps = self._make_decoder(step_tokens)

    def _choose_kernels(self, asked: bool | None, kv_cache: str) -> bool:
        if kv_cache not in DTYPES:
            raise ValueError(f"kv_cache must be one of {', '.join(DTYPES)}, got {kv_cache!r}")
        why = triton_problem() if asked is None and self.device.type == "cuda" else None
        if self.config.head_dim > MAX_KERNEL_HEAD_DIM:
            why = f"a head_dim of {self.config.head_dim} is more than the kernels take ({MAX_KERNEL_HEAD_DIM})"
        if kv_cache == "float32":
            why = "the kernels have no float32 cache"
        if asked and why:
            raise DeviceError(why)
        if asked is None and self.device.type == "cuda" and why:
            self.notes.append(f"{why}: running as plain torch operations, several times slower")
        return asked if asked is not None else self.device.type == "cuda" and why is None

    def _make_decoder(self, step_tokens: int | None) -> tuple[Decoder, Steps]:
        from .decode import MAX_TOKENS, Decoder
        from .graph import Steps

        tokens = min(step_tokens or MAX_TOKENS, MAX_TOKENS, self.n_ctx * self.n_slots)
        by_position = self.config.rope.rope_type not in DEPEND_ON_LENGTH
        positions = np.arange(self.n_ctx if by_position else tokens)
        angles = cos_sin(self.config, positions, int(positions[-1]) + 1)
        cos, sin = (torch.from_numpy(each).to(self.device) for each in angles)
        processors = 16
        if self.device.type == "cuda":
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._host_inputs = torch.zeros(3, tokens, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        self._inputs = self._host_inputs.numpy()
        decoder = Decoder(self.config, self._weights, self._cache, tokens, (cos, sin), by_position, processors)
        return decoder, Steps(decoder, self.device)

    @property
    def kv_cache(self) -> str:
        """What the cache holds: "float16", "bfloat16", "int8" or "float32"."""
        return self._cache.kind

    @property
    def pass_tokens(self) -> int:
        """See `Backend.pass_tokens`."""
        return self._chunk

    @property
    def uses_kernels(self) -> bool:
        """Whether few tokens go through Triton's kernels."""
        return self._use_kernels

    @property
    def cache_bytes(self) -> int:
        """What the KV cache takes."""
        return self._cache.nbytes

    @property
    def device_bytes(self) -> int | None:
        """The most bytes that torch has held on the GPU for this process so far; None on the CPU."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else None

    # -- Backend --------------------------------------------------------------------------------------------------

    @on_device
    def forward(self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """See `Backend.forward`."""
        tokens, positions, slots, rows = self._check(tokens, positions, slots, rows)
        self._checkpoint()
        if self._takes(tokens):
            assert self._decoder is not None
            self._step(tokens, positions, slots, "logits")
            found = self._decoder.logits[: len(tokens)].to("cpu", copy=True).numpy()
            return found if len(rows) == len(tokens) else found[rows]
        logits = np.empty((len(rows), self.config.n_outputs), np.float32)
        done = 0
        for hidden in self._chunks(tokens, positions, slots, rows):
            for part in hidden.split(self._chunk):
                logits[done : done + len(part)] = self._program.logits(part).cpu().numpy()
                done += len(part)
        return logits

    @on_device
    def hidden(self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """See `Backend.hidden`."""
        tokens, positions, slots, rows = self._check(tokens, positions, slots, rows)
        self._checkpoint()
        return np.concatenate([part.cpu().numpy() for part in self._chunks(tokens, positions, slots, rows)])

    @on_device
    def copy_slot(self, source: int, target: int, n: int, start: int = 0) -> None:
        """See `Backend.copy_slot`."""
        check_slots(self, (source, target), n, start)
        self._cache.copy(source, target, n, start)

    @on_device
    def read_slot(self, slot: int, n: int) -> dict[str, np.ndarray]:
        """See `Backend.read_slot`."""
        check_slots(self, (slot,), n)
        return self._cache.read_slot(slot, n)

    @on_device
    def write_slot(self, slot: int, data: Mapping[str, np.ndarray]) -> None:
        """See `Backend.write_slot`."""
        check_slots(self, (slot,), 0)
        self._cache.write_slot(slot, data)

    def cancel(self) -> None:
        """See `Backend.cancel`."""
        self._cancel.set()

    def close(self) -> None:
        """Give the memory back. Closing twice is fine."""
        if self.device.type == "cuda" and hasattr(self, "_weights"):
            torch.cuda.synchronize(self.device)
        for name in ("_steps", "_decoder", "_program", "_cache", "_weights"):
            self.__dict__.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- choosing on the device -----------------------------------------------------------------------------------

    @on_device
    def select(
        self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray, choices: Sequence[Choice]
    ) -> np.ndarray:
        """Like `forward`, but the tokens chosen after each of `rows`: int32 [R], one `Choice` each.

        Only ids leave the device. EdgellamaError where logits are not finite.
        """
        tokens, positions, slots, rows = self._check(tokens, positions, slots, rows)
        if len(choices) != len(rows):
            raise ValueError(f"{len(choices)} choices for {len(rows)} rows")
        self._checkpoint()
        if self._takes(tokens) and len(rows) == len(tokens):
            decoder = self._decoder
            assert decoder is not None
            greedy = all(each.greedy for each in choices)
            if not greedy:
                decoder.choices[: len(rows)].copy_(as_rows(choices))
            self._step(tokens, positions, slots, "greedy" if greedy else "sampled")
            return _finite(decoder.chosen[: len(tokens)].to("cpu", copy=True).numpy())
        chosen, done = [np.zeros(0, np.int32)], 0
        for hidden in self._chunks(tokens, positions, slots, rows):
            if len(hidden):
                part = choices[done : done + len(hidden)]
                table = None if all(each.greedy for each in part) else as_rows(part).to(self.device)
                chosen.append(choose(self._program.logits(hidden), table).cpu().numpy().astype(np.int32))
                done += len(hidden)
        return _finite(np.concatenate(chosen))

    @on_device
    def decode(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        n_steps: int,
        choices: Sequence[Sequence[Choice]] | None = None,
    ) -> np.ndarray:
        """`n_steps` tokens of each sequence, int32 [n_steps, B]: every choice is fed back on the device.

        One token each of B different slots begins. `choices[step][b]`; None is greedy. Where kernels run nothing waits
        for the host between the steps; the ids come at the end.
        """
        rows = np.arange(len(np.atleast_1d(tokens)))
        tokens, positions, slots, rows = self._check(tokens, positions, slots, rows)
        if n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, got {n_steps}")
        last = positions + n_steps - 1
        self._check(tokens, last, slots, rows)  # the end must fit, too
        if len(np.unique(slots)) != len(slots):
            raise ValueError("every token must be of another slot")
        decoder = self._decoder
        if decoder is None or not decoder.by_position or len(tokens) > decoder.max_tokens:
            found = []
            for step in range(n_steps):
                how = [Choice()] * len(tokens) if choices is None else choices[step]
                tokens = self.select(tokens, positions + step, slots, rows, how)
                found.append(tokens)
            return np.stack(found)
        assert self._steps is not None
        table = None
        if choices is not None:
            table = torch.stack([as_rows(each) for each in choices]).to(self.device)
        ids = torch.empty((n_steps, len(tokens)), dtype=torch.int32, device=self.device)
        self._load(tokens, positions, slots)
        for step in range(n_steps):
            self._checkpoint()
            if table is not None:
                decoder.choices[: len(tokens)].copy_(table[step])
            splits = decoder.attention_splits(int(positions.max()) + step + 1)
            self._steps.run((len(tokens), splits, "greedy" if table is None else "sampled"))
            ids[step].copy_(decoder.chosen[: len(tokens)])
        return _finite(ids.cpu().numpy())

    # -- inside ---------------------------------------------------------------------------------------------------

    def _check(self, tokens, positions, slots, rows) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        if not hasattr(self, "_weights"):
            raise EdgellamaError("this backend is closed")
        return check_batch(tokens, positions, slots, rows, vocab_size=self.config.vocab_size, backend=self)

    def _checkpoint(self) -> None:
        if self._cancel.is_set():
            self._cancel.clear()
            raise CancelledError("the forward pass was cancelled; what was computed before stays in the cache")

    def _takes(self, tokens: np.ndarray) -> bool:
        """Whether the kernels run this batch."""
        return self._decoder is not None and len(tokens) <= self._decoder.max_tokens

    def _load(self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray) -> None:
        """Put a batch where the kernels read it."""
        decoder = self._decoder
        assert decoder is not None
        n = len(tokens)
        self._inputs[:, :n] = tokens, positions, slots
        decoder.inputs.copy_(self._host_inputs)  # waits: the buffer is free again on return
        if not decoder.by_position:
            cos, sin = self._angles(positions, slots, _lengths(positions, slots, self.n_slots))
            decoder.cos[:n].copy_(torch.from_numpy(cos))
            decoder.sin[:n].copy_(torch.from_numpy(sin))

    def _step(self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, output: str) -> None:
        assert self._decoder is not None and self._steps is not None
        self._load(tokens, positions, slots)
        splits = self._decoder.attention_splits(int(positions.max()) + 1)
        self._steps.run((len(tokens), splits, output))

    def _chunks(self, tokens, positions, slots, rows) -> Iterator[torch.Tensor]:
        """Run a batch through the layers; yield the normed hidden states of `rows`, chunk by chunk."""
        lengths = _lengths(positions, slots, self.n_slots)
        done = 0
        for start in range(0, len(tokens), self._chunk):
            part = slice(start, min(start + self._chunk, len(tokens)))
            cos, sin = self._angles(positions[part], slots[part], lengths)
            x = self._program.run(tokens[part], positions[part], slots[part], cos, sin, self._checkpoint)
            upto = int(np.searchsorted(rows, part.stop))
            wanted = torch.from_numpy(rows[done:upto].astype(np.int64) - start).to(self.device)
            yield self._program.norm(x[wanted], "model.norm")
            done = upto

    def _angles(self, positions, slots, lengths) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines, float32 [T, head_dim / 2] each; every slot's sequence has a length of its own."""
        cos, sin = np.empty((2, len(positions), self.config.head_dim // 2), np.float32)
        for slot in np.unique(slots):
            mine = slots == slot
            cos[mine], sin[mine] = cos_sin(self.config, positions[mine], int(lengths[slot]))
        return cos, sin


def _default_dtype(device: torch.device) -> str:
    if device.type == "cpu":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"


def _lengths(positions: np.ndarray, slots: np.ndarray, n_slots: int) -> np.ndarray:
    """1 + the highest position of each slot in a call."""
    lengths = np.zeros(n_slots, np.int64)
    np.maximum.at(lengths, slots, positions.astype(np.int64) + 1)
    return lengths


def _finite(ids: np.ndarray) -> np.ndarray:
    if (ids < 0).any():
        raise EdgellamaError(
            "the model's logits are not finite: its weights are damaged or overflow; `edgellama verify` tells which"
        )
    return ids
