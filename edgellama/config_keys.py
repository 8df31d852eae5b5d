"""What is known of the keys in a Llama `config.json` that do not shape the forward pass.

Every key is honoured (`config.py` reads it), listed here with the reason why it changes nothing, or refused by name: a
key nobody has thought about could change every logit.
"""

from __future__ import annotations

from typing import Any

_STORAGE = "each tensor states its own dtype"
_TRAINING = "matters in training only"
_OUTPUTS = "selects what transformers returns, not what it computes"
_GENERATION = "a generation default; those are read from generation_config.json"
_ATTENTION = "chooses among implementations of the same attention"
_PROVENANCE = "tells where the checkpoint comes from"
_CLASSIFIER = "is for classification heads"
_TOKENIZER = "the tokenizer's own files say this"
_LENGTH = "transformers reads max_position_embeddings instead"
_CUSTOM_CODE = "code from a checkpoint is never run; transformers' own Llama is meant"

_GENERATION_KEYS = [
    *["max_length", "max_new_tokens", "min_length", "early_stopping", "num_beams", "num_beam_groups", "do_sample"],
    *["temperature", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "num_return_sequences"],
    *["repetition_penalty", "encoder_repetition_penalty", "length_penalty", "diversity_penalty"],
    *["no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"],
    *["begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"],
    *["exponential_decay_length_penalty", "output_scores", "return_dict_in_generate", "task_specific_params"],
    *["num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"],
    *["assistant_lookbehind", "target_lookbehind"],
]

HARMLESS: dict[str, str] = {
    "dtype": _STORAGE,
    "torch_dtype": _STORAGE,
    "use_bfloat16": _STORAGE,
    "attention_dropout": _TRAINING,
    "hidden_dropout": _TRAINING,
    "hidden_dropout_prob": _TRAINING,
    "resid_pdrop": _TRAINING,
    "embd_pdrop": _TRAINING,
    "attn_pdrop": _TRAINING,
    "initializer_range": _TRAINING,
    "initializer_factor": _TRAINING,
    "gradient_checkpointing": _TRAINING,
    "neftune_noise_alpha": _TRAINING,
    "output_attentions": _OUTPUTS,
    "output_hidden_states": _OUTPUTS,
    "tie_last_hidden_states": _OUTPUTS,
    "return_dict": _OUTPUTS,
    "use_return_dict": _OUTPUTS,
    "torchscript": _OUTPUTS,
    "use_cache": "the KV cache changes speed, not results",
    "chunk_size_feed_forward": "the same result in smaller steps",
    "pretraining_tp": "splits the same matrix products over devices",
    "is_decoder": "a LlamaForCausalLM is a decoder whatever it says",
    "is_llama_config": "a mark of the tool that trained the model",
    "max_window_layers": "only counts layers with a sliding window, which is refused",
    "_attn_implementation": _ATTENTION,
    "_attn_implementation_autoset": _ATTENTION,
    "_attn_implementation_internal": _ATTENTION,
    "_experts_implementation": _ATTENTION,
    "_experts_implementation_internal": _ATTENTION,
    "_flash_attn_2_enabled": _ATTENTION,
    "attn_implementation": _ATTENTION,
    "use_flash_attention": _ATTENTION,
    "use_flash_attn": _ATTENTION,
    "_name_or_path": _PROVENANCE,
    "name_or_path": _PROVENANCE,
    "_commit_hash": _PROVENANCE,
    "transformers_version": _PROVENANCE,
    "transformers.js_config": _PROVENANCE,
    "unsloth_fixed": _PROVENANCE,
    "unsloth_version": _PROVENANCE,
    "auto_map": _CUSTOM_CODE,
    "custom_pipelines": _CUSTOM_CODE,
    "finetuning_task": _CLASSIFIER,
    "id2label": _CLASSIFIER,
    "label2id": _CLASSIFIER,
    "num_labels": _CLASSIFIER,
    "problem_type": _CLASSIFIER,
    "prefix": _TOKENIZER,
    "tokenizer_class": _TOKENIZER,
    "sep_token_id": _TOKENIZER,
    "unk_token_id": _TOKENIZER,
    "decoder_start_token_id": _TOKENIZER,
    "max_sequence_length": _LENGTH,
    "max_seq_len": _LENGTH,
    "model_max_length": _LENGTH,
    "seq_length": _LENGTH,
    **dict.fromkeys(_GENERATION_KEYS, _GENERATION),
}
"""Key -> why it has no effect on logits, whatever its value."""

NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantization_config": (({},), "the checkpoint is already quantized; convert the original one"),
    "compression_config": (({},), "the checkpoint is already compressed; convert the original one"),
    "quantization": (({},), "the checkpoint is already quantized; convert the original one"),
    "is_encoder_decoder": ((False,), "encoder-decoder models are not supported"),
    "add_cross_attention": ((False,), "cross attention is not supported"),
    "cross_attention_hidden_size": ((), "cross attention is not supported"),
    "tie_encoder_decoder": ((False,), "encoder-decoder models are not supported"),
    "tf_legacy_loss": ((False,), "is not supported"),
    "pruned_heads": (({}, []), "pruned heads are not supported"),
    "partial_rotary_factor": ((1.0,), "rotating a part of each head is not supported"),
    "rope_interleaved": ((False,), "interleaved rotary embedding is not supported"),
    "use_sliding_window": ((False,), "sliding window attention is not supported"),
    "attention_chunk_size": ((), "chunked attention is not supported"),
    "per_layer_config": (({},), "layers that differ are not supported"),
    "qkv_bias": ((False,), "is not a Llama key; attention_bias is"),
    "bias": ((False,), "is not a Llama key; attention_bias and mlp_bias are"),
    "use_qk_norm": ((False,), "normalized queries and keys are not supported"),
    "qk_norm": ((False,), "normalized queries and keys are not supported"),
    "is_causal": ((True,), "bidirectional attention is not supported"),
}
"""Key -> (values that change nothing besides null, what to say about any other)."""

_YARN_KEYS = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
_FACTOR = {"factor"}
_ORIGINAL = {"factor", "original_max_position_embeddings"}

ROPE_TYPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": _FACTOR,
    "dynamic": _FACTOR,
    "yarn": _ORIGINAL | _YARN_KEYS,
    "longrope": _ORIGINAL | {"attention_factor", "short_factor", "long_factor"},
    "llama3": _ORIGINAL | {"low_freq_factor", "high_freq_factor"},
}
"""The parameters each RoPE type has, besides its type and rope_theta."""

ROPE_KEYS = set[str]().union(*ROPE_TYPE_KEYS.values())

ROPE_HARMLESS: dict[str, str] = {
    "finetuned": "a mark of early YaRN code; transformers does not read it",
}

ROPE_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "partial_rotary_factor": NEUTRAL["partial_rotary_factor"],
    "attn_factor": ((1.0,), "is a key of early YaRN code; attention_factor is transformers' name"),
    "extrapolation_factor": ((1.0,), "is a key of early YaRN code that transformers does not have"),
}
