"""transformers' `GenerationConfig`, and the keywords of its `generate` that have other names here. Knows names only.

A key that this package computes is translated, one that changes no token is passed over, and any other that is set to
something is refused by name: a reply that silently ignores a constraint is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgellama.errors import ConfigError
from edgellama.generate.request import integer
from edgellama.sampling import SamplingParams

_SAMPLING = ["do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"]
_SAMPLING += ["repetition_penalty", "no_repeat_ngram_size", "sequence_bias", "bad_words_ids", "min_new_tokens"]
_SAME = ["num_return_sequences", "num_beams", "length_penalty", "early_stopping", "max_time", "eos_token_id"]
_SAME += ["prompt_lookup_num_tokens"]
_OTHER_NAMES = ("max_new_tokens", "max_length", "min_length", "stop_strings", "suppress_tokens")
KEYWORDS = ["generation_config", "do_sample", "max_length", "min_length", "stop_strings", "suppress_tokens"]
KEYWORDS += ["cache_implementation", "use_cache"]
"""Keywords of `generate` that are read here."""
# The cache is always allocated at once, so each of these is what it does already.
_CACHES = ("static", "dynamic", "dynamic_full", "hybrid", "offloaded", "offloaded_static", "sliding_window")
_HARMLESS = {"use_cache", "cache_implementation", "cache_config", "bos_token_id", "pad_token_id", "output_attentions"}
_HARMLESS |= {"output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "compile_config"}
_HARMLESS |= {
    "disable_compile",
    "transformers_version",
    "_from_model_config",
    "_commit_hash",
    "max_matching_ngram_size",
}
_HARMLESS |= {"is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"}
_HARMLESS |= {"assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "prefill_chunk_size"}
_HARMLESS |= {"decoder_start_token_id", "low_memory", "remove_invalid_values", "continuous_batching_config"}
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1.0,),
    "renormalize_logits": (False,),
    "token_healing": (False,),
}


def read_generation_config(value: object) -> dict[str, Any]:
    """The keys of a dict, or of an object with `to_dict()` or attributes, that are set; ValueError for one unknown."""
    if isinstance(value, Mapping):
        given: Mapping[str, Any] = value
    elif callable(getattr(value, "to_dict", None)):
        given = value.to_dict()  # type: ignore[attr-defined]
    else:
        given = getattr(value, "__dict__", {}) or {}
        if not given:
            raise TypeError(f"generation_config must be a dict or a GenerationConfig, got {type(value).__name__}")
    keys: dict[str, Any] = {}
    for name, setting in given.items():
        if setting is None or name in _HARMLESS:
            continue
        if name in _SAMPLING or name in _SAME or name in _OTHER_NAMES:
            keys[name] = setting
        elif setting not in _NEUTRAL.get(name, ((), {}, [])):
            raise ValueError(f"generation_config: {name} is not supported (it is {setting!r:.60})")
    return keys


def translate(
    options: Mapping[str, Any], model: Mapping[str, Any], own: SamplingParams
) -> tuple[dict[str, Any], SamplingParams, dict[str, Any]]:
    """`generate`'s keywords -> (those of ours, the sampling defaults, max_new_tokens, max_length and min_length).

    `model`: its generation_config.json; `own`: the defaults that follow from it. A `generation_config` is laid over the
    model's, keywords over both; as in transformers, one that does not say `do_sample` is greedy.
    """
    ours = {name: value for name, value in options.items() if name not in KEYWORDS}
    given = {name: options[name] for name in KEYWORDS if options.get(name) is not None}
    if not given:
        return ours, own, {}
    cache = given.get("cache_implementation")
    if cache is not None and cache not in _CACHES:
        raise ValueError(f"cache_implementation {cache!r} is unknown: it is one of {', '.join(_CACHES)}")
    config = given.pop("generation_config", None)
    keys = {} if config is None else read_generation_config(config)
    keys |= read_generation_config(given)

    sampling = {name: keys[name] for name in _SAMPLING if name in keys}
    if sampling or config is not None:
        base = {**model, **sampling}
        if config is not None and base.get("do_sample") is None:
            base["do_sample"] = False
        try:
            own = SamplingParams.from_generation_config(base)
        except ConfigError as error:
            raise ValueError(str(error).replace("generation_config.json", "generation_config")) from None
        if base.get("do_sample") is False:
            ours["temperature"] = 0.0
    renamed = {name: keys[name] for name in _SAME if name in keys}
    if "stop_strings" in keys:
        renamed["stop"] = keys["stop_strings"]
    if suppressed := {int(token): -math.inf for token in keys.get("suppress_tokens") or ()}:
        renamed["logit_bias"] = {**suppressed, **(ours.get("logit_bias") or {})}
    for name, value in renamed.items():
        if ours.get(name) is None or name == "logit_bias":
            ours[name] = value
    return ours, own, {name: keys[name] for name in ("max_new_tokens", "max_length", "min_length") if name in keys}


def new_tokens(lengths: Mapping[str, Any], longest_prompt: int) -> dict[str, int]:
    """`max_new_tokens` and `min_new_tokens` from lengths that count the prompt: the longest of a batch."""
    found: dict[str, int] = {}
    if "max_new_tokens" in lengths:
        found["max_new_tokens"] = lengths["max_new_tokens"]
    elif "max_length" in lengths:
        found["max_new_tokens"] = integer("max_length", lengths["max_length"], 1) - longest_prompt
        if found["max_new_tokens"] < 1:
            raise ValueError(
                f"max_length {lengths['max_length']} leaves nothing to a prompt of {longest_prompt} tokens; "
                "max_new_tokens does not count the prompt"
            )
    if "min_length" in lengths:
        found["min_new_tokens"] = max(0, integer("min_length", lengths["min_length"], 0) - longest_prompt)
    return found
