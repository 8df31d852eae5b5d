"""A loaded model: ids in, logits or a reply out.

Knows: the file, one backend with its KV cache (one sequence), and where in it we are. Does not know: how a forward
pass is computed (`backends`), what a file looks like (`format`), how a token is chosen (`sampling`).
"""

import gc
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np

from edgellama import devices
from edgellama.errors import CancelledError, ConfigError, ContextError, EdgellamaError, TokenizerError
from edgellama.generate import Generation, NoText, Stream, TextDecoder
from edgellama.paths import find_model
from edgellama.sampling import Sampler, SamplingOptions, SamplingParams

if TYPE_CHECKING:
    from edgellama.backends import Backend
    from edgellama.config import LlamaConfig
    from edgellama.format import ModelFile
    from edgellama.tokenizer import Tokenizer

DEFAULT_MAX_NEW_TOKENS = 256
_MIN_CTX = 512  # a context worth having: not cut below it however little memory there seems to be
_SLACK_BYTES = 256 << 20  # left for Python, NumPy and activations

# The tail of the prompt that the text decoder sees: enough that the reply's first word keeps its leading space.
_PRIME_TOKENS = 16

_log = logging.getLogger("edgellama")

Ids = Sequence[int] | np.ndarray


def load(
    path: str | os.PathLike[str],
    device: str = "cpu",
    n_ctx: int | None = None,
    n_threads: int | None = None,
    kv_cache: str = "float16",
) -> "Llama":
    """Open an `.edgellama` file for inference.

    `device`: "cpu" (Numba), "cuda" (torch and Triton on an NVIDIA GPU), "auto" (cuda where there is one, else cpu),
    "reference" (float32 NumPy, slow: to check the others against), "torch-cpu" (plain torch, for tests). `n_ctx`:
    positions in the KV cache; None takes the model's `max_position_embeddings`, cut to what memory allows
    (`Llama.notes` says so). `n_threads` is the CPU's: None takes the cores this process may use. `kv_cache`: "float16",
    "int8" (half the memory), or on torch's devices "bfloat16" (the reference keeps float32).

    Raises EdgellamaError (missing file), FormatError (damaged file), DeviceError, ContextError.
    """
    begun = time.perf_counter()
    asked, device = device, devices.resolve(device, kv_cache)
    n_ctx = None if n_ctx is None else _positive("n_ctx", n_ctx)
    n_threads = None if n_threads is None else _positive("n_threads", n_threads)
    path = find_model(path)
    from edgellama.format import open_model

    file = open_model(path)
    try:
        too_small = asked == "auto" and device == "cuda" and file.size > (devices.free_bytes(device) or 0)
        if too_small:
            device = devices.resolve("cpu", kv_cache)
        kind = "float32" if device == "reference" else kv_cache
        n_ctx, notes = choose_n_ctx(file.config, n_ctx, file.size, devices.free_bytes(device), kind)
        if too_small:
            notes.append("the model does not fit into the GPU's free memory: running on the CPU")
        if device == "cpu" and not _kernels_are_compiled():
            notes.append("first run on this machine: compiling kernels, up to half a minute, once")
        backend = devices.make_backend(device, file, n_ctx, 1, n_threads, kv_cache)
        notes += getattr(backend, "notes", [])
    except BaseException:
        file.close()
        raise
    return Llama(file, backend, notes=notes, load_s=time.perf_counter() - begun)


def kv_bytes_per_token(config: "LlamaConfig", kv_cache: str = "float16") -> int:
    """Bytes of KV cache that one position takes; "float32" is the reference's."""
    from edgellama.kv_cache import bytes_per_position

    if kv_cache == "float32":
        return bytes_per_position(config) * 2
    return bytes_per_position(config, "int8" if kv_cache == "int8" else "float16")


def choose_n_ctx(
    config: "LlamaConfig", asked: int | None, weight_bytes: int, free_bytes: int | None, kv_cache: str = "float16"
) -> tuple[int, list[str]]:
    """The number of positions to keep, and what the user should know about it.

    `free_bytes` None: unknown, no cut. An explicit `asked` is obeyed, or refused with ContextError where it
    cannot fit at all.
    """
    limit = config.max_position_embeddings
    per_token = kv_bytes_per_token(config, kv_cache)
    fits = None
    if free_bytes is not None:
        # Three quarters of what is left beside the weights: the user's other programs live here too.
        fits = max(_MIN_CTX, (free_bytes - weight_bytes - _SLACK_BYTES) * 3 // 4 // per_token)
    if asked is not None:
        if free_bytes is not None and asked * per_token > free_bytes and asked > _MIN_CTX:
            raise ContextError(
                f"n_ctx {asked} needs {asked * per_token / 1e9:.1f} GB of KV cache, "
                f"{free_bytes / 1e9:.1f} GB of memory are free; about {min(limit, fits or limit)} fit"
            )
        if asked > limit:
            return asked, [f"context {asked} is beyond the model's {limit} positions; the end of it may be poor"]
        return asked, []
    if fits is not None and fits < limit:
        fits = fits // 256 * 256
        return fits, [f"context cut from the model's {limit} to {fits} tokens, which is what memory allows"]
    return limit, []


def _kernels_are_compiled() -> bool:
    from edgellama.backends.cpu.code_cache import cache_folder

    # One folder serves the converter's kernels, too: the forward pass is `program`.
    return next(cache_folder().rglob("program.*.nbi"), None) is not None


class Llama:
    """A model ready to run; made by `load`. One sequence at a time: calls from several threads wait for each other.

    `config`, `tokenizer`, `n_ctx`, `n_past` (positions filled), `eos_ids`, `defaults` (sampling), `notes` (what
    the user should know), `load_s`. Use as a context manager, or call `close()`.
    """

    def __init__(self, file: "ModelFile", backend: "Backend", *, notes: Sequence[str] = (), load_s: float = 0.0):
        self.file = file
        self.config = file.config
        self.n_ctx = backend.n_ctx
        self.n_past = 0
        self.notes = tuple(notes)
        self.load_s = load_s
        for note in self.notes:
            _log.info(note)
        self._backend = backend
        self._tokenizer: Tokenizer | None = None
        self._generation_config: Mapping[str, object] | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread that holds the lock
        self._stream: weakref.ref[Stream] | None = None  # the stream that holds it
        self._tokenizer_lock = threading.Lock()

    # -- what the file says --------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> "Tokenizer":
        """Read from the file at first use: loading weights does not wait for it. Raises TokenizerError."""
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._check_open()
                from edgellama.tokenizer import load_tokenizer

                self._tokenizer = load_tokenizer(self.file.files, self.config)
            return self._tokenizer

    @property
    def generation_config(self) -> Mapping[str, object]:
        """The model's own generation_config.json; empty without one."""
        if self._generation_config is None:
            self._check_open()
            from edgellama.format.strict_json import parse_object

            data = self.file.files.get("generation_config.json")
            self._generation_config = {} if data is None else parse_object(data, "generation_config.json", 0)
        return self._generation_config

    @property
    def eos_ids(self) -> frozenset[int]:
        """The ids that end a text: generation_config.json's `eos_token_id`, else the config's."""
        value = self.generation_config.get("eos_token_id")
        if value is None:
            return frozenset(self.config.eos_token_ids)
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
            raise ConfigError(
                f"generation_config.json: eos_token_id must be an integer or a list of them, got {value!r}"
            )
        return frozenset(ids)

    @property
    def defaults(self) -> SamplingParams:
        """How this model samples when nothing else is asked."""
        return SamplingParams.from_generation_config(self.generation_config)

    # -- running -------------------------------------------------------------------------------------------------

    def forward(self, input_ids: Ids, logits_to_keep: int = 0) -> np.ndarray:
        """Run `input_ids` (ints [T]) after what is in the cache and keep them there.

        Returns logits, float32 [T, vocab_size]; of the last `logits_to_keep` positions only, where that is not 0.
        Raises ContextError when they do not fit, ValueError or TypeError for ids that are none.
        """
        ids = self._check_ids(input_ids)
        if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int | np.integer) or logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be an integer of at least 0, got {logits_to_keep!r}")
        keep = min(int(logits_to_keep) or ids.size, ids.size)
        self._acquire()
        try:
            return self._forward(ids, keep)
        finally:
            self._release()

    def reset(self) -> None:
        """Empty the cache: the next `forward` starts at position 0."""
        self._acquire()
        self.n_past = 0
        self._release()

    @overload
    def generate(
        self,
        prompt: str | Ids,
        max_new_tokens: int | None = None,
        *,
        stream: Literal[False] = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: str | Ids,
        max_new_tokens: int | None = None,
        *,
        stream: Literal[True],
        **sampling: Unpack[SamplingOptions],
    ) -> Stream: ...

    def generate(
        self,
        prompt: str | Ids,
        max_new_tokens: int | None = None,
        *,
        stream: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation | Stream:
        """Continue `prompt` (text, encoded with the model's special tokens, or ids as they are).

        Starts from an empty cache. `max_new_tokens` None: the model's generation_config.json, else 256; a full
        context ends the reply too. `sampling`: temperature (0 is greedy), top_k, top_p, min_p, seed; what is left
        out or None is the model's own (`defaults`). With `stream=True` returns a `Stream` of pieces of text, whose
        `.result` is the Generation. A model without a tokenizer takes ids only, and its replies have no text.
        Raises ContextError when the prompt leaves no room for a token.
        """
        started = time.perf_counter()
        params = self.defaults.override(**sampling)
        if max_new_tokens is None:
            max_new_tokens = self._default_max_new_tokens()
        else:
            max_new_tokens = _positive("max_new_tokens", max_new_tokens)
        ids = self._encode(prompt) if isinstance(prompt, str) else self._check_ids(prompt)
        if ids.size >= self.n_ctx:
            raise ContextError(
                f"the prompt has {ids.size} tokens, the context {self.n_ctx}: nothing would be left for an answer; "
                "shorten the prompt or raise n_ctx (-c)"
            )
        step, sample = self._chooser(params)
        reply = Stream(
            ids.tolist(),
            step,
            sample,
            self._text_decoder(ids),
            max_new_tokens=min(max_new_tokens, self.n_ctx - ids.size),
            eos_ids=self.eos_ids,
            acquire=self._begin_stream,
            release=self._release,
            abort=getattr(self._backend, "cancel", lambda: None),
            load_s=self.load_s,
            started=started,
        )
        if stream:
            return reply
        with reply:  # an interrupt between two tokens must not leave the model busy
            for _ in reply:
                pass
        return reply.result

    def close(self) -> None:
        """Free the cache and release the file's map. May be called twice; waits for a call in another thread."""
        if self._closed:
            return
        stream = self._stream() if self._stream else None
        if stream is not None and self._owner == threading.get_ident():
            stream.close()
        with self._lock:
            if not self._closed:
                self._closed = True
                self._backend.close()
                self.file.close()

    def __enter__(self) -> "Llama":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.n_past}/{self.n_ctx} tokens"
        return f"<Llama {self.file.path} ({state})>"

    # -- inside --------------------------------------------------------------------------------------------------

    def _forward(self, ids: np.ndarray, keep: int, run: Callable[..., np.ndarray] | None = None) -> np.ndarray:
        """With the lock held: run ids int32 [T], return the last `keep` positions' logits (or what `run` gives)."""
        run = run or self._backend.forward
        end = self.n_past + ids.size
        if end > self.n_ctx:
            raise ContextError(
                f"{self.n_past} tokens in the cache and {ids.size} new ones are more than the context of {self.n_ctx}; "
                "reset() empties the cache, n_ctx makes it larger"
            )
        positions = np.arange(self.n_past, end, dtype=np.int32)
        slots = np.zeros(ids.size, np.int32)
        rows = np.arange(ids.size - keep, ids.size, dtype=np.int32)
        try:
            logits = run(ids, positions, slots, rows)
        except CancelledError:
            stream = self._stream() if self._stream else None
            if stream is not None and stream.cancelled:
                raise
            # Meant for an earlier call that had ended just before: it must not hit this one.
            logits = run(ids, positions, slots, rows)
        self.n_past = end
        return logits

    def _step(self, ids: np.ndarray) -> np.ndarray:
        return self._forward(ids, 1)[0]

    def _chooser(self, params: SamplingParams) -> tuple[Callable[[np.ndarray], Any], Callable[[Any], int]]:
        """(step, sample) of a stream. A backend that can choose does it on its device, and only the id comes back.

        The draws are the Sampler's: the same seed gives the same tokens, up to rounding of the logits.
        """
        select = getattr(self._backend, "select", None)
        if select is None:
            return self._step, Sampler(params)
        from edgellama.backends.gpu.selection import Choice

        greedy = params.temperature == 0 or params.top_k == 1
        rng = None if greedy else np.random.Generator(np.random.PCG64(params.seed))

        def step(ids: np.ndarray) -> np.ndarray:
            how = Choice()
            if rng is not None:
                how = Choice(params.temperature, params.top_k, params.top_p, params.min_p, rng.random())
            return self._forward(ids, 1, lambda *batch: select(*batch, [how]))

        return step, lambda chosen: int(chosen[0])

    def _begin_stream(self, stream: Stream) -> None:
        self._acquire()
        self._stream = weakref.ref(stream)
        self.n_past = 0

    def _acquire(self) -> None:
        """Wait for the calls of other threads; a stream left open in this one would wait for ever, so say it."""
        me = threading.get_ident()
        if self._owner == me:
            gc.collect()  # a stream that a `break` left behind holds itself until then
        if self._owner == me:
            raise EdgellamaError("a stream of this model is still open: exhaust it or close() it before the next call")
        self._lock.acquire()
        self._owner = me
        if self._closed:
            self._release()
            self._check_open()

    def _release(self) -> None:
        self._owner = self._stream = None
        self._lock.release()

    def _check_open(self) -> None:
        if self._closed:
            raise EdgellamaError("this model is closed; load() it again")

    def _default_max_new_tokens(self) -> int:
        value = self.generation_config.get("max_new_tokens")
        if value is None:
            return DEFAULT_MAX_NEW_TOKENS
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"generation_config.json: max_new_tokens must be a positive integer, got {value!r}")
        return value

    def _encode(self, text: str) -> np.ndarray:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the prompt is not valid Unicode text: {error.reason} at {error.start}") from None
        ids = self.tokenizer.encode(text, add_special_tokens=True)
        if not ids:
            raise EdgellamaError("the prompt is empty, and this model has no start-of-text token: give it some text")
        try:
            return self._check_ids(ids)
        except ValueError as error:
            raise TokenizerError(f"the tokenizer does not fit the model: {error}") from None

    def _text_decoder(self, prompt_ids: np.ndarray) -> TextDecoder:
        if not {"tokenizer.json", "tokenizer.model"} & set(self.file.files) and self._tokenizer is None:
            return NoText()  # ids in, ids out
        return self.tokenizer.stream(skip_special_tokens=True, after=prompt_ids[-_PRIME_TOKENS:].tolist())

    def _check_ids(self, ids: object) -> np.ndarray:
        """`ids` as int32 [T], every one in the vocabulary."""
        self._check_open()
        if isinstance(ids, str):
            raise TypeError("input_ids must be integers; encode text with llm.tokenizer.encode(text)")
        array = np.asarray(ids)
        if array.size == 0:
            raise ValueError("there are no tokens: the prompt is empty")
        if array.dtype.kind not in "iu":
            raise TypeError(f"input_ids must be integers, got {array.dtype}")
        if array.ndim == 2 and array.shape[0] == 1:  # a batch of one, as transformers' tokenizers return it
            array = array[0]
        if array.ndim != 1:
            raise ValueError(f"input_ids must have one dimension, got shape {array.shape}")
        bad = (array < 0) | (array >= self.config.vocab_size)
        if bad.any():
            where = int(bad.argmax())
            raise ValueError(
                f"input_ids[{where}] is {array[where]}, outside the vocabulary of {self.config.vocab_size} tokens"
            )
        return array.astype(np.int32)


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)
