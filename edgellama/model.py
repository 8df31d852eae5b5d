"""A loaded model: ids in, logits or replies out.

Knows: the file, one backend, who may use it now, and where in the cache the last call ended. Does not know: how a
forward pass is computed (`backends`), what a file looks like (`format`), how replies come about (`generate`).
"""

import contextlib
import gc
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast, overload

import numpy as np

from edgellama import chat, devices, openai_shapes
from edgellama.errors import ConfigError, ContextError, EdgellamaError, TokenizerError
from edgellama.format import has_tokenizer
from edgellama.generate import CancelToken, GenerateOptions, Generation, Stream
from edgellama.generate.config import new_tokens, translate
from edgellama.generate.engine import Batch, Engine
from edgellama.generate.exiting import computing
from edgellama.generate.prompts import Ids, Prompts, check_ids, read_prompts
from edgellama.generate.replies import make_replies
from edgellama.generate.request import Request, id_set, integer
from edgellama.generate.slots import Slot
from edgellama.generate.stream import Call, Stepper
from edgellama.memory import available_bytes
from edgellama.paths import find_model
from edgellama.sampling import SamplingParams
from edgellama.sizing import choose_n_ctx, choose_n_slots, kv_bytes_per_token

if TYPE_CHECKING:
    from edgellama.backends import Backend
    from edgellama.config import LlamaConfig
    from edgellama.format import ModelFile
    from edgellama.forward import Hooks
    from edgellama.generate.async_stream import AsyncStream
    from edgellama.outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast
    from edgellama.past import SequenceCache
    from edgellama.scoring import Score
    from edgellama.tokenizer import Tokenizer

DEFAULT_MAX_NEW_TOKENS = 256
_POLL_S = 0.05  # how soon a call that waits for its turn sees that it was cancelled

_log = logging.getLogger("edgellama")


def load(
    path: str | os.PathLike[str],
    device: str = "cpu",
    n_ctx: int | None = None,
    n_threads: int | None = None,
    kv_cache: str = "float16",
    *,
    n_slots: int | None = None,
    prefix_reuse: bool | None = None,
    cancel: CancelToken | None = None,
    progress: Callable[[float], None] | None = None,
) -> "Llama":
    """Open an `.edgellama` file for inference.

    `device`: "cpu" (Numba), "cuda" (torch and Triton on an NVIDIA GPU), "auto" (cuda where there is one, else cpu),
    "reference" (float32 NumPy, slow: to check the others against), "torch-cpu" (plain torch, for tests). `n_ctx`:
    positions in the KV cache; None takes the model's `max_position_embeddings`, cut to what memory allows
    (`Llama.notes` says so). `n_threads` is the CPU's: None takes the cores this process may use. `kv_cache`: "float16",
    "int8" (half the memory), or on torch's devices "bfloat16" (the reference keeps float32). `n_slots`: sequences that
    are computed together, each with `n_ctx` positions of its own, which take memory only once they are used (a GPU's is
    taken at once); None: 8, or as many as fit. `prefix_reuse`: whether a call may start from what earlier ones left in
    the cache; None: where that changes no bits, which the CPU promises and the other devices do not.

    Opening takes milliseconds, the first pass then reads the weights from the disk. With `progress(fraction)` they are
    read here instead, for a bar that tells the truth. `cancel` ends it within a few milliseconds.

    Raises EdgellamaError (missing file), FormatError (damaged file), DeviceError, ContextError, CancelledError.
    """
    begun = time.perf_counter()
    asked, device = device, devices.resolve(device, kv_cache)
    n_ctx = None if n_ctx is None else integer("n_ctx", n_ctx, 1)
    n_threads = None if n_threads is None else integer("n_threads", n_threads, 1)
    n_slots = None if n_slots is None else integer("n_slots", n_slots, 1)
    cancel = cancel or CancelToken()
    cancel.raise_if_cancelled()
    path = find_model(path)
    from edgellama.format import open_model

    file = open_model(path)
    try:
        if progress is not None:
            _read_ahead(file, available_bytes(), cancel, progress)
        cancel.raise_if_cancelled()
        free = devices.free_bytes(device)
        too_small = asked == "auto" and device == "cuda" and file.size > (free or 0)
        if too_small:
            device = devices.resolve("cpu", kv_cache)
            free = devices.free_bytes(device)
        kind = "float32" if device == "reference" else kv_cache
        n_ctx, notes = choose_n_ctx(file.config, n_ctx, file.size, free, kind, n_slots or 1)
        if n_slots is None:
            n_slots = choose_n_slots(file.config, n_ctx, file.size, free, kind)
        if too_small:
            notes.append("the model does not fit into the GPU's free memory: running on the CPU")
        if device == "cpu" and not _kernels_are_compiled():
            notes.append("first run on this machine: the kernels are compiled, once")
        with computing(cancel):
            backend = devices.make_backend(device, file, n_ctx, n_slots, n_threads, kv_cache)
        notes += getattr(backend, "notes", [])
        try:
            cancel.raise_if_cancelled()
        except BaseException:
            backend.close()
            raise
    except BaseException:
        file.close()
        raise
    if progress is not None:
        progress(1.0)
    load_s = time.perf_counter() - begun
    return Llama(file, backend, notes=notes, load_s=load_s, prefix_reuse=prefix_reuse)


def _read_ahead(file: "ModelFile", free: int | None, cancel: CancelToken, progress: Callable[[float], None]) -> None:
    """Have the system read the file into memory, where it fits."""
    progress(0.0)
    if free is not None and file.size > free:
        return  # the beginning would be thrown out again for the end

    def tell(done: int, total: int) -> None:
        cancel.raise_if_cancelled()
        if done < total:
            progress(done / total)

    file.read_ahead(tell)


def _kernels_are_compiled() -> bool:
    from edgellama.backends.cpu.code_cache import cache_folder

    return (cache_folder() / "program.forward.o").exists()


class Llama:
    """A model ready to run; made by `load`. Calls from several threads wait for each other.

    `config`, `tokenizer`, `n_ctx`, `n_slots`, `n_past` (positions filled), `eos_ids`, `defaults` (sampling), `notes`
    (what the user should know), `load_s`. Use as a context manager, or call `close()`.
    """

    def __init__(
        self,
        file: "ModelFile",
        backend: "Backend",
        *,
        notes: Sequence[str] = (),
        load_s: float = 0.0,
        prefix_reuse: bool | None = None,
    ):
        self.file = file
        self.config: LlamaConfig = file.config
        self.n_ctx, self.n_slots = backend.n_ctx, backend.n_slots
        self.notes = tuple(notes)
        self.load_s = load_s
        for note in self.notes:
            _log.info(note)
        self._backend = backend
        self._engine = Engine(backend, file.config, prefix_reuse)
        self._cursor: Slot | None = None  # where `forward` goes on
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
        try:
            return id_set("eos_token_id", value)
        except TypeError as error:
            raise ConfigError(f"generation_config.json: {error}") from None

    @property
    def defaults(self) -> SamplingParams:
        """How this model samples when nothing else is asked."""
        return SamplingParams.from_generation_config(self.generation_config)

    # -- running -------------------------------------------------------------------------------------------------

    def prepare(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Get ready now, not in the first call: on a machine's first run the CPU's kernels are compiled, some 15 s.

        `progress(done, total)`, in functions, while they are. On other devices, and on every other run, there is
        nothing to wait for. Raises EdgellamaError.
        """
        self._acquire()
        try:
            prepare = getattr(self._backend, "prepare", None)
            if prepare is not None:
                with computing(None):
                    prepare(progress)
        finally:
            self._release()

    @property
    def n_past(self) -> int:
        """Positions filled: where the next `forward` starts. After a `generate` of several replies that is 0."""
        return 0 if self._cursor is None else self._cursor.n

    @overload
    def forward(
        self, input_ids: Sequence[int], logits_to_keep: int = 0, *, cancel: CancelToken | None = None
    ) -> np.ndarray: ...

    @overload
    def forward(
        self,
        input_ids: Any = None,
        logits_to_keep: Any = 0,
        *,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: "SequenceCache | None" = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        cache_position: Any = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        hooks: "Hooks | None" = None,
        cancel: CancelToken | None = None,
    ) -> Any: ...

    def forward(
        self,
        input_ids: Any = None,
        logits_to_keep: Any = 0,
        *,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: "SequenceCache | None" = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        cache_position: Any = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        hooks: "Hooks | None" = None,
        cancel: CancelToken | None = None,
    ) -> "np.ndarray | CausalLMOutputWithPast | SequenceClassifierOutputWithPast":
        """One forward pass, in one of two forms.

        **A list of ids** alone (ints [T]) runs after what is in the model's own cache and stays there (`n_past`,
        `reset`). Returns logits, float32 [T, vocab_size]; of the last `logits_to_keep` positions only, where that is
        not 0. After an error the cache is as it was.

        **A batch** (ints [B, T], or a list of ids with any keyword but `cancel`) is what transformers' LlamaForCausalLM
        takes; returns its CausalLMOutputWithPast in NumPy arrays (`edgellama.outputs`). `n_past` is 0 afterwards.
        `attention_mask` [B, past + T] of 0 and 1, padding left or right; padding is not computed, its rows are 0.
        `position_ids` [B, T]: for RoPE; by default the columns, padding included. `inputs_embeds` float32 [B, T,
        hidden_size] in place of ids. `past_key_values`: what an earlier call returned; it is extended in place
        (`edgellama.past`: crop, copy, fork, select). `use_cache`: whether to return one; by default where there are no
        `labels`. A batch needs a slot for each sequence (`load(n_slots=...)`). `logits_to_keep`: the last so many
        columns, or a list of columns. `labels` int [B, T]: the loss of the next tokens, -100 does not count.
        `output_hidden_states`, `output_attentions`: on the devices cpu and reference, as are inputs_embeds and
        `hooks`: a function (layer, states float32 [B, T, hidden_size]), or a dict layer -> function (states), that sees
        the residual stream after a layer and may change it in place or return another.

        A LlamaForSequenceClassification returns its SequenceClassifierOutputWithPast: logits [B, num_labels] at each
        sequence's last id that is not `pad_token_id`, and the loss of `labels` after the config's `problem_type`.

        Raises ContextError where it does not fit, ValueError or TypeError for arguments that are wrong, DeviceError for
        what the device cannot give, CancelledError.
        """
        given = (attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache, cache_position, hooks)
        plain = not (output_hidden_states or output_attentions) and all(each is None for each in given)
        if plain and not _is_batch(input_ids) and not self.config.is_classifier:
            return self._forward_next(input_ids, logits_to_keep, cancel)
        from edgellama.batch_call import BatchCall
        from edgellama.forward import read_columns, read_hooks, read_inputs

        self._check_open()
        inputs = read_inputs(
            self.config,
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            cache_position,
            None if past_key_values is None else past_key_values.mask,
        )
        if past_key_values is not None and past_key_values.engine is not self._engine:
            raise ValueError("past_key_values is another model's")
        call = BatchCall(
            self.config,
            inputs,
            past_key_values,
            labels,
            use_cache,
            output_hidden_states,
            output_attentions,
            read_hooks(hooks, self.config.num_hidden_layers),
            lend=lambda: self.lent(cancel),
            exclusive=self._exclusively,
            cancel=cancel,
        )
        if self.config.is_classifier:
            return call.classifier()
        return call.causal_lm(read_columns(logits_to_keep, inputs.kept.shape[1]))

    def _forward_next(self, input_ids: Ids, logits_to_keep: int, cancel: CancelToken | None) -> np.ndarray:
        ids = self._check_ids(input_ids)
        if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int | np.integer) or logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be an integer of at least 0, got {logits_to_keep!r}")
        keep = min(int(logits_to_keep) or ids.size, ids.size)
        self._acquire(cancel)
        try:
            if self.n_past + ids.size > self.n_ctx:
                raise ContextError(
                    f"{self.n_past} tokens in the cache and {ids.size} new ones are more than the context of "
                    f"{self.n_ctx}; reset() empties the cache, n_ctx makes it larger"
                )
            slots = self._engine.slots
            slot = self._cursor
            if slot is None:
                slots.begin()
                slot = slots.take(ids, reuse=False)
            assert slot is not None
            with computing(cancel):
                logits = self._engine.extend(slot, ids, keep, cancel)
            slots.release(slot)
            self._cursor = slot
            return logits
        finally:
            self._release()

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """The model to oneself, its cache left as it is."""
        self._acquire()
        try:
            yield
        finally:
            self._release()

    def reset(self) -> None:
        """Empty the cache: the next `forward` starts at position 0, and nothing is left to be reused."""
        self._acquire()
        self._cursor = None
        self._engine.slots.forget()
        self._release()

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str, but comes first
        self,
        prompt: str | Ids,
        max_new_tokens: int | None = None,
        *,
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Prompts,
        max_new_tokens: int | None = None,
        *,
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]: ...

    @overload
    def generate(
        self,
        prompt: str | Ids,
        max_new_tokens: int | None = None,
        *,
        stream: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> Stream: ...

    def generate(
        self,
        prompt: str | Ids | Prompts,
        max_new_tokens: int | None = None,
        *,
        stream: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Generation | list[Generation] | Stream:
        """Continue `prompt`: a text, encoded with the model's special tokens, or ids as they are.

        A list of texts (or of lists of ids) is computed together, `n_slots` at a time; returns a list of Generations
        in the same order, each bit for bit what it would be alone. With `stream=True` (one prompt) returns a `Stream`
        of pieces of text, whose `.result` is the Generation. A model without a tokenizer takes ids only, and its
        replies have no text. Raises ContextError when a prompt leaves no room for a token.

        `max_new_tokens`: None is the model's generation_config.json, else 256. A full context ends the reply, too,
        unless `on_full="slide"`: then the first 4 positions and the later half of the rest are kept and computed
        again, which costs as much as a prompt of that length, each time that the context is full.

        `stop`: a string or several; the text ends before the first of them. `eos_token_id`: an id or several in place
        of the model's own. `max_time`: seconds from the first pass on, looked at between passes. `cancel`: a
        CancelToken. `progress(done, total)`: after every pass over the prompts (on the CPU 256 tokens at most).
        `logprobs`, `top_logprobs`: of each new token, and the likeliest so many in its place; with `echo` (the text
        begins with the prompt) of the prompt's tokens, too. `num_return_sequences`: so many replies to each prompt,
        which is computed once; returns a list. Reply number i of the call has the seed `seed + i`.
        `logits_processor`: functions (ids, logits) -> logits. One of `json_schema`, `regex`, `choice`, `grammar`
        holds the text to a form. `num_beams`, `length_penalty`, `early_stopping`: beam search, which cannot stream.
        `prompt_lookup_num_tokens` or `draft_model`: speculative decoding.

        `generation_config`: a dict or a GenerationConfig of transformers, laid over the model's own; `do_sample`,
        `max_length`, `stop_strings` and other names of transformers' mean what they do there (`generate.config`).

        Everything else is a sampling option (`SamplingParams`): temperature (0 is greedy), top_k, top_p, min_p, seed
        and so on. What is left out or None is the model's own (`defaults`).
        """
        started = time.perf_counter()
        self._check_writes()
        ours, defaults, lengths = translate(options, self.generation_config, self.defaults)
        prompts, several = read_prompts(prompt, self._encode, self._check_ids, self.n_ctx)
        if lengths:
            found = new_tokens(lengths, max((each.ids.size for each in prompts), default=0))
            from_config = found.pop("max_new_tokens", None)
            max_new_tokens = from_config if max_new_tokens is None else max_new_tokens
            ours = {**found, **ours}
        request = Request.of(ours)
        params = defaults.override(**cast(Any, request.sampling))
        if max_new_tokens is None:
            max_new_tokens = self._default_max_new_tokens()
        if request.draft_model is self or not isinstance(request.draft_model, Llama | None):
            raise ValueError("draft_model must be another model, opened with edgellama.load")
        several = several or request.num_return_sequences > 1
        if stream and (several or request.num_beams > 1):
            raise ValueError("stream=True takes one prompt, one reply to it, and no beams")
        is_about_text = bool(request.stop or request.constraint or request.echo)
        replies = make_replies(
            prompts,
            request,
            params,
            max_new_tokens=integer("max_new_tokens", max_new_tokens, 1),
            eos_ids=self.eos_ids if request.eos_token_id is None else request.eos_token_id,
            tokenizer=self.tokenizer if self._has_tokenizer() or is_about_text else None,
            n_ctx=self.n_ctx,
            vocab_size=self.config.vocab_size,
            load_s=self.load_s,
            started=started,
        )
        call = Call(
            replies,
            lambda call: self._start(call, request),
            acquire=lambda call: self._begin(call, request.draft_model),
            release=lambda call: self._end(call, request.draft_model),
            outer=request.cancel,
        )
        if stream:
            return Stream(call)
        results = call.run()
        return results if several else results[0]

    def astream(
        self, prompt: str | Ids, max_new_tokens: int | None = None, **options: Unpack[GenerateOptions]
    ) -> "AsyncStream":
        """`generate(stream=True)` for `async for`: the work is done in a thread, the event loop stays free."""
        from edgellama.generate.async_stream import AsyncStream

        return AsyncStream(lambda: self.generate(prompt, max_new_tokens, stream=True, **options))

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

    # -- a call's way through ------------------------------------------------------------------------------------

    def _start(self, call: Call, request: Request) -> Stepper:
        """With the model acquired: what runs the call's replies. The one place where other ways of decoding plug in."""
        deadline = None if request.max_time is None else time.perf_counter() + request.max_time
        if request.num_beams > 1:
            from edgellama.generate.beams import beam_batch

            return beam_batch(
                self._engine, call.replies, request, self._tokenizer, cancel=call.cancel, deadline=deadline
            )
        if request.prompt_lookup_num_tokens or request.draft_model is not None:
            from edgellama.generate.speculate import speculative_batch

            draft = None if request.draft_model is None else request.draft_model._engine
            return speculative_batch(self._engine, call.replies, request, draft, cancel=call.cancel, deadline=deadline)
        return Batch(
            self._engine,
            call.replies,
            cancel=call.cancel,
            deadline=deadline,
            slide=request.on_full == "slide",
            progress=request.progress,
        )

    def _begin(self, call: Call, draft: "Llama | None") -> None:
        # All calls take two models in the same order, so that two of them never wait for each other.
        first, second = (self, draft) if draft is None or id(self) < id(draft) else (draft, self)
        first._acquire(call.cancel)
        if second is not None:
            try:
                second._acquire(call.cancel)
            except BaseException:
                first._release()
                raise
        for model in (self,) if draft is None else (self, draft):
            model._stream, model._cursor = call.stream, None

    def _end(self, call: Call, draft: "Llama | None") -> None:
        if len(call.replies) == 1:
            self._cursor = call.replies[0].slot
        self._release()
        if draft is not None:
            draft._release()

    def _acquire(self, cancel: CancelToken | None = None) -> None:
        """Wait for the calls of other threads; a stream left open in this one would wait for ever, so say it."""
        me = threading.get_ident()
        if self._owner == me:
            gc.collect()  # a stream that a `break` left behind may sit in a cycle, with a traceback
        if self._owner == me:
            raise EdgellamaError("a stream of this model is still open: exhaust it or close() it before the next call")
        while not self._lock.acquire(timeout=-1 if cancel is None else _POLL_S):
            if cancel is not None:
                cancel.raise_if_cancelled()
        self._owner = me
        if self._closed:
            self._release()
            self._check_open()

    def _release(self) -> None:
        self._owner = self._stream = None
        self._lock.release()

    def _check_writes(self) -> None:
        if self.config.is_classifier:
            raise EdgellamaError(
                f"this model is a {self.config.architecture}: it labels texts (llm.classify) and cannot write any"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise EdgellamaError("this model is closed; load() it again")

    # -- what callers give ---------------------------------------------------------------------------------------

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

    def _has_tokenizer(self) -> bool:
        return self._tokenizer is not None or has_tokenizer(self.file.files)

    def _check_ids(self, ids: object) -> np.ndarray:
        """`ids` as int32 [T], every one in the vocabulary."""
        self._check_open()
        return check_ids(ids, self.config.vocab_size)

    # -- beyond generate -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lent(self, cancel: CancelToken | None = None) -> Iterator[Engine]:
        """The engine, for what is no call of `generate`: calls of others wait, and its slots are all free."""
        self._acquire(cancel)
        self._cursor = None
        self._engine.slots.begin()
        try:
            with computing(cancel):
                yield self._engine
        finally:
            self._release()

    def score(
        self, prompt: str | Ids, choices: Sequence[str] | Sequence[Ids], *, cancel: CancelToken | None = None
    ) -> "list[Score]":
        """How probable each of `choices` is after `prompt`; see `edgellama.scoring`, which says where a choice begins.

        What they share is computed once, as many choices at a time as the cache has slots. Ids in place of texts go
        as they are. Raises ValueError or TypeError for a choice that is none, ContextError for one that does not fit.
        """
        from edgellama.scoring import read_choices, score_choices

        self._check_writes()
        read = read_choices(prompt, choices, self._encode, self._check_ids)
        with self.lent(cancel) as engine:
            return score_choices(engine, read, cancel)

    def embed(
        self,
        texts: str | Ids | Prompts,
        pooling: Literal["mean", "last"] = "mean",
        normalize: bool = True,
        *,
        cancel: CancelToken | None = None,
    ) -> np.ndarray:
        """float32 [N, hidden_size]: a vector for each text (or list of ids), one row for a single one.

        `pooling`: the mean over all tokens' last hidden states, or the last token's. `normalize`: to length 1.
        """
        from edgellama.scoring import embed_texts

        prompts, _ = read_prompts(texts, self._encode, self._check_ids, sys.maxsize)
        with self.lent(cancel) as engine:
            return embed_texts(engine, [each.ids for each in prompts], pooling, normalize, cancel)

    def classify(
        self,
        texts: str | Ids | Prompts,
        labels: Any = None,
        *,
        cancel: CancelToken | None = None,
    ) -> "SequenceClassifierOutputWithPast":
        """The scores of a LlamaForSequenceClassification: `.logits` float32 [N, num_labels], and `.loss` of `labels`.

        `texts`: a text or several (or ids), of any lengths, each as if it were alone in the batch. `config.id2label`
        names the scores; `edgellama.pipeline("text-classification", llm)` makes probabilities of them. `labels`: one
        for each text, after the config's `problem_type` (`edgellama.losses`). For masks and caches see `forward`.
        """
        from edgellama.classification import classify
        from edgellama.losses import classification_loss
        from edgellama.outputs import SequenceClassifierOutputWithPast

        if not self.config.is_classifier:
            raise EdgellamaError(f"this model is a {self.config.architecture}: it has no labels to classify with")
        prompts, _ = read_prompts(texts, self._encode, self._check_ids, sys.maxsize)
        with self.lent(cancel) as engine:
            logits = classify(engine, [each.ids for each in prompts], cancel)
        loss = None if labels is None else classification_loss(logits, np.asarray(labels), self.config.problem_type)
        return SequenceClassifierOutputWithPast(loss, logits)

    def save_session(self, path: str | os.PathLike[str]) -> None:
        """Write the `n_past` tokens that the last call left in the cache, with their keys and values, to a file.

        Raises EdgellamaError where there is nothing to save, or `path` cannot be written; see `edgellama.session`.
        """
        from edgellama.session import Session, write_session

        self._acquire()
        try:
            slot = self._cursor
            if slot is None or slot.n == 0:
                raise EdgellamaError("there is no session to save: the last call left no single sequence in the cache")
            data = self._backend.read_slot(slot.index, slot.n)
            session = Session(slot.tokens.copy(), slot.classes.copy(), data)
        finally:
            self._release()
        write_session(path, session, self.file.header_hash)

    def load_session(self, path: str | os.PathLike[str]) -> list[int]:
        """Put a saved session into the cache, as if it had just been computed; returns its ids, `n_past` of them.

        `forward` goes on behind them, and a `generate` whose prompt begins with them does not compute them again: the
        same bits as if they had never been saved. Raises FormatError (damaged), EdgellamaError (of another model or
        kind of cache) or ContextError; then nothing has changed.
        """
        from edgellama.session import read_session

        self._check_open()
        session = read_session(path, self.config, self.file.header_hash, self._backend.kv_cache, self.n_ctx)
        with self.lent() as engine:
            slot = engine.slots.take(session.tokens, reuse=False)
            assert slot is not None
            engine.backend.write_slot(slot.index, session.data)
            slot.record(session.tokens, session.classes)
            engine.slots.release(slot)
            self._cursor = slot
        return session.tokens.tolist()

    # -- conversations, and OpenAI's shapes: these functions are methods -----------------------------------------

    chat = chat.chat
    create_completion = __call__ = openai_shapes.create_completion
    create_chat_completion = openai_shapes.create_chat_completion
    create_embedding = openai_shapes.create_embedding


def _is_batch(input_ids: object) -> bool:
    """Whether these are rows of ids, were they of different lengths."""
    if isinstance(input_ids, list | tuple):
        return bool(input_ids) and isinstance(input_ids[0], Sequence | np.ndarray) and np.ndim(input_ids[0]) == 1
    return getattr(input_ids, "ndim", 0) == 2


__all__ = ["Llama", "choose_n_ctx", "kv_bytes_per_token", "load"]
