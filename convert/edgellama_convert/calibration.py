"""The token ids that a calibrated conversion looks at: from the text that ships, from the user's, or from the model.

Every source gives its share of sequences, spread evenly over its text. A sequence starts with BOS if the tokenizer has
one. A good part of the text that ships comes as chats, where the model has a chat template.

Knows text and ids; `self_text` makes the model's own, `gptq` uses them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from edgellama.chat import repeatable_text
from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.sizing import layer_weights
from edgellama.tokenizer import Tokenizer

from .checkpoint import read_small

BUILTIN, SELF = "builtin", "self"
SEQUENCE_TOKENS = 512
SMALL_MODEL = 200_000_000
"""Weights in the layers' matrices. SmolLM2-135M has 106 million, TinyLlama 970 million."""
SMALL_MODEL_TOKENS, DEFAULT_TOKENS = 65_536, 32_768
"""Calibration tokens by default: small models gain from more, and are done in minutes all the same."""
_FEWEST_TOKENS = 64
_BUILTIN_TEXT = Path(__file__).parent / "calibration_text"
_DIALOGUES = "dialogues.txt"
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
        self.tokens = tokens
        if tokens is not None and tokens < 1:
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
        read = [
            None if text is None else _encode(label, text, tokenizer, config, length) for label, text in self._texts
        ]
        bos = [] if tokenizer is None or tokenizer.bos_id is None else [tokenizer.bos_id]
        bos = [token for token in bos if token < config.vocab_size and length > 1]
        # All sequences are equally long: as long as the shortest text, if that is short.
        length = min([length, *(len(bos) + len(tokens) for tokens in read if tokens is not None)])
        wanted = self.tokens
        if wanted is None:
            wanted = SMALL_MODEL_TOKENS if layer_weights(config) <= SMALL_MODEL else DEFAULT_TOKENS
        share = max(1, round(wanted / length / len(read)))
        parts = []
        for (label, _), tokens in zip(self._texts, read, strict=True):
            if tokens is None:
                parts.append(sample(share, length))
                continue
            chats = (
                _chats(tokenizer, config, length, share // 2) if label == BUILTIN else np.empty((0, length), np.int32)
            )
            parts += [_sequences(tokens, bos, max(1, share - len(chats)), length), chats]
        ids = np.ascontiguousarray(np.concatenate(parts), np.int32)
        return Calibration(ids, tuple(label for label, _ in self._texts))


def _encode(label: str, text: str, tokenizer: Tokenizer | None, config: LlamaConfig, length: int) -> list[int]:
    """The text's tokens, without those that the model does not have."""
    assert tokenizer is not None
    tokens = [token for token in tokenizer.encode(text, add_special_tokens=False) if token < config.vocab_size]
    if len(tokens) < min(length, _FEWEST_TOKENS):
        raise ConvertError(f"calibration text {label}: {len(tokens)} tokens are too few; give at least {length}")
    return tokens


def _sequences(tokens: list[int], bos: list[int], wanted: int, length: int) -> np.ndarray:
    """At most `wanted` sequences of `length`, which do not overlap, spread evenly over the text."""
    body = length - len(bos)
    n = min(wanted, len(tokens) // body)
    starts = [i * (len(tokens) - body) // max(1, n - 1) for i in range(n)]
    return np.array([bos + tokens[start : start + body] for start in starts], np.int32)


def _chats(tokenizer: Tokenizer | None, config: LlamaConfig, length: int, wanted: int) -> np.ndarray:
    """At most `wanted` sequences of chats as the model's own template writes them; none where it has no template.

    A sequence begins where a chat does, and others follow until it is full. Chat models see little else, and their
    inputs there are unlike those of plain text.
    """
    assert tokenizer is not None
    sequences: list[list[int]] = []
    unfinished: list[int] = []
    for messages in _conversations():
        if len(sequences) == wanted:
            break
        text = repeatable_text(tokenizer, messages, add_generation_prompt=False)
        if text is None:
            break
        unfinished += [token for token in tokenizer.encode(text, add_special_tokens=False) if token < config.vocab_size]
        if len(unfinished) >= length:
            sequences.append(unfinished[:length])
            unfinished = []
    return np.array(sequences, np.int32).reshape(-1, length)


def _conversations() -> Iterator[list[dict[str, str]]]:
    """The dialogues that ship, one to three questions each, and passages of the other texts as answers."""
    pairs = [
        pair.removeprefix("User: ").split("\nAssistant: ", 1)
        for pair in (_BUILTIN_TEXT / _DIALOGUES).read_text("utf-8").strip().split("\n\nUser: ")
    ]
    passages = [
        passage
        for name in ("languages.txt", "prose.txt")
        for passage in (_BUILTIN_TEXT / name).read_text("utf-8").split("\n\n")
        if len(passage) > 80
    ]
    at = turns = 0
    while at < len(pairs) or passages:
        if at < len(pairs):
            turns = turns % 3 + 1
            talk, at = pairs[at : at + turns], at + turns
            yield [
                {"role": role, "content": content}
                for question, answer in talk
                for role, content in (("user", question), ("assistant", answer))
            ]
        if passages:
            passage = passages.pop(0)
            yield [
                {"role": "user", "content": f"{' '.join(passage.split()[:8])[:60]} ..."},
                {"role": "assistant", "content": passage},
            ]


def _label(source: str | os.PathLike[str]) -> str:
    text = os.fspath(source)
    return text if text in (BUILTIN, SELF) else Path(text).expanduser().resolve().name


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
