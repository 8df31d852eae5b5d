"""`edgellama.pipeline`: transformers' pipelines over one of our files, with their calls and results.

Knows what a caller gives and what is to come back. How texts are continued, chats rendered and labels scored is
`Llama`'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgellama import chat
from edgellama.errors import ContextError
from edgellama.generate.config import read_generation_config
from edgellama.model import Llama, load

TASKS = ("text-generation", "text-classification", "sentiment-analysis")
_GENERATION = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}
"""Where neither the model nor the caller says anything; transformers' own."""
_FUNCTIONS = ("default", "sigmoid", "softmax", "none")
_MISSING = object()


def pipeline(
    task: str | None = None, model: str | os.PathLike[str] | Llama | None = None, **options: Any
) -> TextGenerationPipeline | TextClassificationPipeline:
    """A function of texts: `edgellama.pipeline("text-generation", "llama.edgellama")("Once upon a time")`.

    `task`: "text-generation", "text-classification" (or "sentiment-analysis"); None: what the model is made for.
    `model`: a path, or a model that is open already. `device`, `n_ctx`, `n_threads`, `n_slots`, `kv_cache` go to
    `edgellama.load`; everything else is a default of the calls.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"unknown task {task!r}: it is one of {', '.join(TASKS)}")
    if model is None:
        raise ValueError("give model=, the path of an .edgellama file or a model from edgellama.load")
    names = ("device", "n_ctx", "n_threads", "n_slots", "kv_cache")
    for_load = {name: options.pop(name) for name in names if name in options}
    owned = not isinstance(model, Llama)
    llm = model if isinstance(model, Llama) else load(model, **for_load)
    if not owned and for_load:
        raise ValueError(f"{', '.join(for_load)} cannot be changed: the model is open already")
    kind = TextClassificationPipeline if llm.config.is_classifier else TextGenerationPipeline
    if task is not None and (task == "text-generation") == llm.config.is_classifier:
        if owned:
            llm.close()
        raise ValueError(f"{task} is not for a {llm.config.architecture}")
    return kind(llm, owned, **options)


class _Pipeline:
    """What both have: the model, which is closed with the pipeline if the pipeline opened it, and the defaults."""

    def __init__(self, model: Llama, owned: bool = False, **defaults: Any):
        self.model, self._owned, self._defaults = model, owned, defaults

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    def close(self) -> None:
        if self._owned:
            self.model.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class TextGenerationPipeline(_Pipeline):
    """Texts or chats to what comes after them."""

    task = "text-generation"

    def __call__(self, text_inputs: Any, **options: Any) -> list[Any]:
        """A text gives a list of `{"generated_text": ...}`, `num_return_sequences` of them; texts give a list of such.

        A chat (a list of messages) gives the chat with the model's message behind it; several chats a list of such.
        `return_full_text=False`: only what is new. `return_tensors=True`: `{"generated_token_ids": ...}` instead.
        `continue_final_message`: go on with a chat's last message; the default where it is the assistant's. `prefix`:
        in front of each text. `stop_sequence`: a string or several that end the text, and stay in it.
        `handle_long_generation="hole"`: cut what does not fit off the beginning. `tools`, `documents`: for the chat
        template. The rest is `Llama.generate`'s, `generation_config` and `do_sample` included; without anything else
        256 tokens are sampled at a temperature of 0.7, as in transformers.
        """
        given = {**self._defaults, **options}
        given |= given.pop("generate_kwargs", None) or {}
        for ignored in ("batch_size", "num_workers", "clean_up_tokenization_spaces"):
            given.pop(ignored, None)
        as_ids = bool(given.pop("return_tensors", False))
        full, text = given.pop("return_full_text", None), given.pop("return_text", None)
        if full is not None and (text is not None or as_ids):
            raise ValueError("return_full_text excludes return_text and return_tensors")
        if text is not None and as_ids:
            raise ValueError("return_text excludes return_tensors")
        skip = given.pop("skip_special_tokens", None)
        several = _is_several(text_inputs)
        inputs = list(text_inputs) if several else [text_inputs]
        prompts = self._prompts(inputs, given)
        replies = self._generate([ids for ids, _ in prompts], given)
        n = len(replies) // max(len(inputs), 1)
        results = []
        for i, (each, (ids, goes_on)) in enumerate(zip(inputs, prompts, strict=True)):
            records: list[dict[str, Any]] = []
            for new in replies[i * n : (i + 1) * n]:
                if as_ids:
                    records.append({"generated_token_ids": [*ids, *new]})
                    continue
                said = self._decode(ids, new, True if skip is None else bool(skip))
                records.append({"generated_text": said if full is False else _behind(each, said, goes_on)})
            results.append(records)
        return results if several else results[0]

    def _prompts(self, inputs: Sequence[Any], given: dict[str, Any]) -> list[tuple[list[int], bool]]:
        """(ids, whether the last message of a chat goes on) of each input; takes its options out of `given`."""
        goes_on, prefix = given.pop("continue_final_message", None), given.pop("prefix", None) or ""
        special, stops = given.pop("add_special_tokens", None), given.pop("stop_sequence", None)
        for_chat = {name: given.pop(name) for name in ("tools", "documents") if name in given}
        if stops is not None:
            given["stop"] = stops
        prompts = []
        stop: list[str] = []
        eos: set[int] = set()
        for each in inputs:
            if isinstance(each, str):
                ids = self.tokenizer.encode(prefix + each, add_special_tokens=special is not False)
                prompts.append((ids, False))
                continue
            last = each[-1].get("role") if each and isinstance(each[-1], Mapping) else None
            mine = last == "assistant" if goes_on is None else bool(goes_on)
            ready = chat.prepare(
                self.model, each, add_generation_prompt=not mine, continue_final_message=mine, **for_chat
            )
            prompts.append((ready.ids, mine))
            stop += ready.stop
            eos |= ready.eos_ids
        if stop and "stop" not in given:
            given["stop"] = list(dict.fromkeys(stop))
        if eos and given.get("eos_token_id") is None:
            given["eos_token_id"] = sorted(eos)
        return prompts

    def _generate(self, prompts: list[list[int]], given: dict[str, Any]) -> list[list[int]]:
        """The new ids of each reply, the replies to one prompt one after the other."""
        own = given.pop("generation_config", None)
        model = {key: value for key, value in self.model.generation_config.items() if value is not None}
        known = {name: model[name] for name in (*_GENERATION, "max_length") if name in model}
        config = {**_GENERATION, **known, **({} if own is None else read_generation_config(own))}
        if "max_length" in given and "max_new_tokens" not in given:
            del config["max_new_tokens"]
        long = given.pop("handle_long_generation", None)
        if long not in (None, "hole"):
            raise ValueError(f'handle_long_generation must be None or "hole", got {long!r}')
        if long == "hole":
            room = self.model.n_ctx - int(given.get("max_new_tokens") or config.get("max_new_tokens", 1))
            if room < 1:
                raise ContextError(f"a context of {self.model.n_ctx} leaves no room for a prompt: ask for fewer tokens")
            prompts = [ids[-room:] for ids in prompts]
        if not prompts:
            return []
        replies = self.model.generate(prompts, generation_config=config, **given)
        return [reply.token_ids for reply in replies]

    def _decode(self, ids: list[int], new: list[int], skip_special_tokens: bool) -> str:
        stream = self.tokenizer.stream(skip_special_tokens=skip_special_tokens, after=ids)
        return "".join([stream.push(token) for token in new]) + stream.flush()


class TextClassificationPipeline(_Pipeline):
    """Texts to labels and their scores."""

    task = "text-classification"

    def __call__(
        self,
        inputs: Any,
        *,
        top_k: Any = _MISSING,
        function_to_apply: str | None = None,
        **options: Any,
    ) -> list[Any]:
        """`[{"label": ..., "score": ...}]`: of each text the best label; with `top_k`, a list of the best (None: all).

        `inputs`: a text, `{"text": ..., "text_pair": ...}`, or a list of them. `function_to_apply`: "sigmoid",
        "softmax" or "none"; by default none for a regression, sigmoid for one label or several that hold at once,
        softmax otherwise. `truncation=True` with `max_length` cuts each text's ids.
        """
        given = {**self._defaults, **options}
        is_legacy = top_k is _MISSING
        top_k = given.pop("top_k", _MISSING) if is_legacy else top_k
        apply = function_to_apply or given.pop("function_to_apply", None) or "default"
        truncation, limit = given.pop("truncation", None), given.pop("max_length", None)
        for ignored in ("batch_size", "num_workers", "padding"):
            given.pop(ignored, None)
        if given:
            raise TypeError(f"unknown options: {', '.join(given)}")
        if top_k is not _MISSING and top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int)):
            raise TypeError(f"top_k must be a number of labels, or None for all, got {top_k!r}")
        if not isinstance(apply, str) or apply.lower() not in _FUNCTIONS:
            raise ValueError(f"function_to_apply must be one of {', '.join(_FUNCTIONS)}, got {apply!r}")
        several = isinstance(inputs, list | tuple)
        texts = [self._encode(each) for each in (inputs if several else [inputs])]
        if truncation:
            texts = [ids[: limit or self.model.n_ctx] for ids in texts]
        if not texts:
            return []
        scores = self._apply(apply.lower(), self.model.classify(texts).logits)
        results = [self._labelled(row, top_k) for row in scores]
        if several:
            return results
        # As transformers: one text gives a list even of a single label.
        return results if is_legacy else results[0]

    def _encode(self, text: Any) -> list[int]:
        pair = None
        if isinstance(text, Mapping):
            unknown = set(text) - {"text", "text_pair"}
            if unknown or "text" not in text:
                raise ValueError(f'a pair is {{"text": ..., "text_pair": ...}}, got the keys {sorted(text)}')
            text, pair = text["text"], text.get("text_pair")
        if not isinstance(text, str):
            raise TypeError(f'give a text or {{"text": ..., "text_pair": ...}}, got {type(text).__name__}')
        tokenizer = self.model.tokenizer
        return tokenizer.encode(text) if pair is None else tokenizer.encode_pair(text, pair)

    def _apply(self, function: str, logits: np.ndarray) -> np.ndarray:
        config = self.model.config
        if function == "default":
            function = "softmax"
            if config.problem_type == "regression":
                function = "none"
            elif config.problem_type == "multi_label_classification" or config.n_outputs == 1:
                function = "sigmoid"
        if function == "sigmoid":
            return 1 / (1 + np.exp(-logits))
        if function == "softmax":
            powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
            return powers / powers.sum(axis=-1, keepdims=True)
        return logits

    def _labelled(self, scores: np.ndarray, top_k: Any) -> Any:
        names = self.model.config.id2label
        order = np.argsort(-scores, kind="stable")
        found = [{"label": names[i], "score": float(scores[i])} for i in order]
        return found[0] if top_k is _MISSING else found[:top_k]


def _is_several(inputs: Any) -> bool:
    """Whether this is a list of texts or of chats, not one of either."""
    if isinstance(inputs, str):
        return False
    if not isinstance(inputs, list | tuple):
        raise TypeError(f"give a text, a chat, or a list of either, got {type(inputs).__name__}")
    return not (inputs and isinstance(inputs[0], Mapping))


def _behind(given: Any, said: str, goes_on: bool) -> Any:
    """The text with what was said behind it, or the chat."""
    if isinstance(given, str):
        return given + said
    if goes_on:
        return [*given[:-1], {**given[-1], "content": given[-1]["content"] + said}]
    return [*given, {"role": "assistant", "content": said}]
