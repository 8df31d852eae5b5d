"""The token ids that a calibrated conversion looks at: from the text that ships, from the user's, or from the model.

Every source gives its share of sequences, spread evenly over its text. A sequence starts with BOS if the tokenizer has
one. Knows text and ids; `self_text` makes the model's own, `gptq` uses them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.tokenizer import Tokenizer

from .checkpoint import read_small

BUILTIN, SELF = "builtin", "self"
SEQUENCE_TOKENS = 512
DEFAULT_TOKENS = 32_768
_BUILTIN_TEXT = Path(__file__).parent / "calibration_text"
_MAX_TEXT_BYTES = 64 << 20


@dataclass(frozen=True)
class Calibration:
    """`ids` int32[sequences, length]; `sources` as the user named them, folders left out."""

    ids: np.ndarray
    sources: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """For the file's header: enough to know the text again."""
        return {
            "sources": list(self.sources),
            "sequences": int(self.ids.shape[0]),
            "sequence_tokens": int(self.ids.shape[1]),
            "xxh3_128": xxhash.xxh3_128_hexdigest(np.ascontiguousarray(self.ids, "<i4").tobytes()),
        }


class CalibrationText:
    """What `--calibration` names, read and checked before the work starts."""

    def __init__(self, sources: Sequence[str | os.PathLike[str]], tokens: int | None):
        self.tokens = DEFAULT_TOKENS if tokens is None else tokens
        if self.tokens < 1:
            raise ConvertError(f"calibration_tokens {tokens} must be at least 1")
        if not sources:
            raise ConvertError(f"no calibration text is named: give {BUILTIN}, {SELF}, a file or a folder")
        self._texts = [(_label(source), _read(os.fspath(source))) for source in sources]

    @property
    def needs_tokenizer(self) -> bool:
        return any(text is not None for _, text in self._texts)

    def state(self) -> dict[str, Any]:
        """What the ids depend on, besides the model."""
        parts = [
            (label, None if text is None else xxhash.xxh3_128_hexdigest(text.encode())) for label, text in self._texts
        ]
        return {"sources": parts, "tokens": self.tokens}

    def ids(
        self, config: LlamaConfig, tokenizer: Tokenizer | None, sample: Callable[[int, int], np.ndarray]
    ) -> Calibration:
        """`sample(sequences, length)` gives int32[sequences, length] of the model's own text."""
        length = min(SEQUENCE_TOKENS, config.max_position_embeddings)
        share = max(1, round(self.tokens / length / len(self._texts)))
        parts = []
        for label, text in self._texts:
            if text is None:
                parts.append(sample(share, length))
            else:
                assert tokenizer is not None
                parts.append(_sequences(label, text, tokenizer, config, share, length))
        width = min(part.shape[1] for part in parts)  # a short text of the user's has one short sequence
        ids = np.concatenate([part[:, :width] for part in parts])
        return Calibration(np.ascontiguousarray(ids, np.int32), tuple(label for label, _ in self._texts))


def _sequences(
    label: str, text: str, tokenizer: Tokenizer, config: LlamaConfig, wanted: int, length: int
) -> np.ndarray:
    """At most `wanted` sequences of `length`, which do not overlap, spread evenly over the text."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tokens = [token for token in tokenizer.encode(text, add_special_tokens=False) if token < config.vocab_size]
    bos = [token for token in bos if token < config.vocab_size]
    body = length - len(bos)
    if len(tokens) < min(body, 64):
        raise ConvertError(f"calibration text {label}: {len(tokens)} tokens are too few; give at least {length}")
    body = min(body, len(tokens))
    n = min(wanted, len(tokens) // body)
    starts = [i * (len(tokens) - body) // max(1, n - 1) for i in range(n)]
    return np.array([bos + tokens[start : start + body] for start in starts], np.int32)


def _label(source: str | os.PathLike[str]) -> str:
    text = os.fspath(source)
    return text if text in (BUILTIN, SELF) else Path(text).name


def _read(source: str) -> str | None:
    """The text of a source; None for the model's own."""
    if source == SELF:
        return None
    if source == BUILTIN:
        return _read_folder(_BUILTIN_TEXT, "*.txt")
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, "*")
    if not path.exists():
        raise ConvertError(f"calibration text {source}: no such file; give {BUILTIN}, {SELF}, a text file or a folder")
    try:
        return read_small(path, _MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConvertError(f"calibration text {path}: not UTF-8, byte {error.start} is wrong") from None


def _read_folder(folder: Path, pattern: str) -> str:
    """All text files in a folder, in the order of their names; what is not UTF-8 is no text."""
    texts, nbytes = [], 0
    for path in sorted(folder.rglob(pattern)):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        nbytes += path.stat().st_size
        if nbytes > _MAX_TEXT_BYTES:
            raise ConvertError(
                f"calibration text {folder}: more than {_MAX_TEXT_BYTES >> 20} MiB; name some of its files"
            )
        try:
            texts.append(read_small(path, _MAX_TEXT_BYTES).decode("utf-8-sig"))
        except UnicodeDecodeError:
            continue
    if not texts:
        raise ConvertError(f"calibration text {folder}: no text files in this folder")
    return "\n\n".join(texts)
