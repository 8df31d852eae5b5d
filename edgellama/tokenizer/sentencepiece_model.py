"""Reads a SentencePiece `tokenizer.model`: its pieces, and the merges that its scores imply.

The file is one protobuf message (sentencepiece_model.proto); only the fields that matter are read, by a bounded reader
in Python, so that no native parser meets untrusted bytes. `SpmModel.merges` gives the ranked pairs with which a plain
BPE (`tokenizers`') produces the ids that SentencePiece itself does: tested against it.

Knows the file, not what a tokenizer class makes of it.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from edgellama.errors import TokenizerError
from edgellama.tokenizer.guard import refusing

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
_MODEL_NAMES = {3: "WORD", 4: "CHAR"}
_MAX_PIECES = 1 << 20
_MAX_PIECE_CHARS = 1024
_MAX_TOTAL_CHARS = 8 << 20  # merges look at each way to split each piece


@dataclass
class SpmModel:
    """The parts of a SentencePiece model that decide ids. Index in `pieces` is the id."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    model_type: int = UNIGRAM
    unk_id: int = 0
    byte_fallback: bool = False
    precompiled_charsmap: bytes = b""
    remove_extra_whitespaces: bool = True

    def merges(self) -> list[tuple[str, str]]:
        """Pairs of pieces that join to a piece, best score first.

        The order within one score is that of transformers' converter (longer left part first).
        """
        ids = {piece: number for number, piece in enumerate(self.pieces)}
        ranked = []
        for index, (piece, score) in enumerate(zip(self.pieces, self.scores, strict=True)):
            for cut in range(1, len(piece)):
                left = ids.get(piece[:cut])
                if left is not None:
                    right = ids.get(piece[cut:])
                    if right is not None:
                        ranked.append((-score, -cut, cut - len(piece), index, left, right))
        ranked.sort()
        return [(self.pieces[left], self.pieces[right]) for *_, left, right in ranked]


def read_spm_model(data: bytes) -> SpmModel:
    """The model in `data`; TokenizerError if it is none, or one that no Llama tokenizer uses."""
    if not data:
        raise TokenizerError("tokenizer.model: the file is empty")
    if _looks_like_tiktoken(data):
        raise TokenizerError(
            "tokenizer.model: this is a tiktoken file, not a SentencePiece model; use the checkpoint in Hugging Face "
            "layout, which has a tokenizer.json"
        )
    model = SpmModel()
    with refusing("tokenizer.model: not a SentencePiece model"):
        for number, value in _fields(data):
            if number == 1:
                _read_piece(model, _message(value))
            elif number == 2:
                _read_trainer_spec(model, _message(value))
            elif number == 3:
                _read_normalizer_spec(model, _message(value))
    _check(model)
    return model


def _looks_like_tiktoken(data: bytes) -> bool:
    """Lines of "base64 rank", as Meta ships Llama-3's under the same name."""
    encoded, space, rank = data[: data.find(b"\n", 0, 500)].partition(b" ")
    return bool(space) and rank.strip().isdigit() and encoded.rstrip(b"=").isalnum()


def _check(model: SpmModel) -> None:
    if not model.pieces:
        raise TokenizerError("tokenizer.model: has no pieces")
    if model.model_type not in (UNIGRAM, BPE):
        kind = _MODEL_NAMES.get(model.model_type, str(model.model_type))
        raise TokenizerError(f"tokenizer.model: model type {kind} is not supported, only BPE and UNIGRAM")
    if not 0 <= model.unk_id < len(model.pieces):
        raise TokenizerError(f"tokenizer.model: unk_id {model.unk_id} is not a piece")
    if sum(map(len, model.pieces)) > _MAX_TOTAL_CHARS:
        raise TokenizerError(f"tokenizer.model: the pieces have more than {_MAX_TOTAL_CHARS} characters together")
    if len(set(model.pieces)) != len(model.pieces):
        raise TokenizerError("tokenizer.model: a piece occurs twice")
    if "" in model.pieces:
        raise TokenizerError(f"tokenizer.model: piece {model.pieces.index('')} is empty")


def _read_piece(model: SpmModel, message: bytes) -> None:
    piece, score, kind = "", 0.0, NORMAL
    for number, value in _fields(message):
        if number == 1:
            piece = _message(value).decode("utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", _message(value))
        elif number == 3:
            kind = _integer(value)
    if math.isnan(score):
        raise ValueError(f"piece {len(model.pieces)} has the score NaN")
    if len(model.pieces) >= _MAX_PIECES or len(piece) > _MAX_PIECE_CHARS:
        raise ValueError("too many pieces, or too long a one")
    model.pieces.append(piece)
    model.scores.append(score)
    model.types.append(kind)


def _read_trainer_spec(model: SpmModel, message: bytes) -> None:
    for number, value in _fields(message):
        if number == 3:
            model.model_type = _integer(value)
        elif number == 35:
            model.byte_fallback = bool(_integer(value))
        elif number == 40:
            model.unk_id = _integer(value)


def _read_normalizer_spec(model: SpmModel, message: bytes) -> None:
    for number, value in _fields(message):
        if number == 2:
            model.precompiled_charsmap = _message(value)
        elif number == 4:
            model.remove_extra_whitespaces = bool(_integer(value))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: an int for a varint, else the raw bytes."""
    position, end = 0, len(data)
    while position < end:
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if kind == 2:
            size, position = _varint(data, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {position}")
        if size > end - position:
            raise ValueError(f"a field of {size} bytes at byte {position} runs past the end")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError(f"a broken number at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _integer(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("a number is expected")
    return value - (1 << 64) if value >= 1 << 63 else value


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("bytes are expected")
    return value
