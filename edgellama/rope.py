"""Rotary position embedding: the inverse frequencies of all six types, exactly as transformers 5.23 computes them.

Each function names the transformers function it follows, and rounds to float32 wherever that one does: positions are
multiplied by these frequencies, so an error in the last place shows in the logits at position 100,000. Only powers and
cosines go through float64 (rounded to float32 at once), so that they do not depend on a C library's `powf` and `cosf`.
Does not know: queries, keys or caches. Their halves are paired as Hugging Face does: element i with i + head_dim/2.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from edgellama.config import LlamaConfig

F32 = np.float32


def inverse_frequencies(config: LlamaConfig, seq_len: int) -> tuple[np.ndarray, float]:
    """(float32 [head_dim // 2], attention_scaling): angle = position * frequency; cos and sin are scaled.

    Types `dynamic` and `longrope` depend on `seq_len`, the highest position of the call + 1, as in transformers when a
    sequence is computed in one call. (transformers remembers its longest call so far; this function has no memory.)
    """
    return _cached(config, seq_len if depends_on_length(config) else 0)


def depends_on_length(config: LlamaConfig) -> bool:
    """Whether the frequencies follow the length of a call: then it matters how a sequence is cut into calls."""
    return config.rope.rope_type in DEPEND_ON_LENGTH


def length_class(config: LlamaConfig, seq_len: int) -> int:
    """A number that two lengths share if and only if they have the same frequencies; below 2**31 for such lengths.

    Keys that were cached in a call of one length are as a call of another would write them where their classes agree.
    """
    if config.rope.rope_type == "dynamic":
        return max(seq_len, config.max_position_embeddings)
    if config.rope.rope_type == "longrope":
        original = config.rope.original_max_position_embeddings
        assert original is not None
        return int(seq_len > original)
    return 0


@functools.lru_cache(maxsize=16)
def _cached(config: LlamaConfig, seq_len: int) -> tuple[np.ndarray, float]:
    frequencies, attention_scaling = _TYPES[config.rope.rope_type](config, seq_len)
    frequencies.setflags(write=False)  # it is everybody's
    return frequencies, attention_scaling


def cos_sin(config: LlamaConfig, positions: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of int `positions` [T], attention scaling included: two float32 [T, head_dim // 2]."""
    frequencies, attention_scaling = inverse_frequencies(config, seq_len)
    angles = positions.astype(F32)[:, None] * frequencies  # rounded to float32, as transformers does
    scaling = F32(attention_scaling)
    wide = angles.astype(np.float64)
    return np.cos(wide).astype(F32) * scaling, np.sin(wide).astype(F32) * scaling


def _powers(base: float, head_dim: int) -> np.ndarray:
    """float32 [head_dim // 2]: base ** (0/d, 2/d, 4/d, ...), base and exponents rounded to float32 first."""
    exponents = np.arange(0, head_dim, 2, dtype=F32) / F32(head_dim)
    return np.power(np.float64(F32(base)), exponents.astype(np.float64)).astype(F32)


def _default(config: LlamaConfig, seq_len: int) -> tuple[np.ndarray, float]:
    """`LlamaRotaryEmbedding.compute_default_rope_parameters`"""
    return F32(1) / _powers(config.rope.rope_theta, config.head_dim), 1.0


def _linear(config: LlamaConfig, seq_len: int) -> tuple[np.ndarray, float]:
    """`_compute_linear_scaling_rope_parameters`"""
    frequencies, scaling = _default(config, seq_len)
    return frequencies / F32(config.rope.factor), scaling


def _dynamic(config: LlamaConfig, seq_len: int) -> tuple[np.ndarray, float]:
    """`_compute_dynamic_ntk_parameters`, whose sequence length is a float32 tensor in a forward pass"""
    rope, dim, max_positions = config.rope, config.head_dim, config.max_position_embeddings
    if seq_len <= max_positions:
        return _default(config, seq_len)
    growth = F32(rope.factor) * F32(seq_len) / F32(max_positions) - F32(rope.factor - 1)
    stretch = F32(np.float64(growth) ** np.float64(F32(dim / (dim - 2))))
    return F32(1) / _powers(float(F32(rope.rope_theta) * stretch), dim), 1.0


def _yarn(config: LlamaConfig, seq_len: int) -> tuple[np.ndarray, float]:
    """`_compute_yarn_parameters`"""
    rope, dim = config.rope, config.head_dim

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention_factor = rope.attention_factor
    if attention_factor is None:
        if rope.mscale and rope.mscale_all_dim:
            attention_factor = mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
        else:
            attention_factor = mscale(rope.factor)

    def dimension_of(rotations: float) -> float:
        """The (fractional) dimension that turns `rotations` times over the original context."""
        assert rope.original_max_position_embeddings is not None
        turns = math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi))
        return dim * turns / (2 * math.log(rope.rope_theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=F32) - F32(low)) / F32(high - low), F32(0), F32(1))

    powers = _powers(rope.rope_theta, dim)
    extrapolated = F32(1) / powers
    interpolated = F32(1) / (F32(rope.factor) * powers)
    keep = F32(1) - ramp
    return interpolated * (F32(1) - keep) + extrapolated * keep, attention_factor


def _longrope(config: LlamaConfig, seq_len: int) -> tuple[np.ndarray, float]:
    """`_compute_longrope_parameters`"""
    rope = config.rope
    original = rope.original_max_position_embeddings
    assert original is not None
    attention_factor = rope.attention_factor
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(rope.factor) / math.log(original)) if rope.factor > 1.0 else 1.0
    factors = np.asarray(rope.long_factor if seq_len > original else rope.short_factor, F32)
    return F32(1) / (factors * _powers(rope.rope_theta, config.head_dim)), attention_factor


def _llama3(config: LlamaConfig, seq_len: int) -> tuple[np.ndarray, float]:
    """`_compute_llama3_parameters`"""
    rope = config.rope
    original, factor = rope.original_max_position_embeddings, F32(rope.factor)
    assert original is not None
    frequencies, scaling = _default(config, seq_len)
    wavelengths = F32(2 * math.pi) / frequencies
    long = wavelengths > F32(original / rope.low_freq_factor)
    short = wavelengths < F32(original / rope.high_freq_factor)
    smooth = (F32(original) / wavelengths - F32(rope.low_freq_factor)) / F32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (F32(1) - smooth) * frequencies / factor + smooth * frequencies
    return np.where(long, frequencies / factor, np.where(short, frequencies, blended)), scaling


_TYPES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
DEPEND_ON_LENGTH = {"dynamic", "longrope"}
"""Types whose frequencies follow the sequence's length."""
