"""The fixed-size records of a `.edgellama` file: prologue and trailer, and the limits a reader sets.

Knows the byte tables of FORMAT.md (sections 2 and 5) and nothing of JSON, tensors or the file system. Packing and
parsing stand side by side here so that writer and reader cannot drift apart.

    prologue (64 bytes) | header JSON | zeros to 4096 | tensor data | metadata section, trailer (64 bytes) | ...
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from ..errors import FormatError

MAGIC = b"EDGLLAMA"
TRAILER_MAGIC = b"EDGL-END"
SUPERSEDED_MAGIC = b"EDGL-OLD"
MAJOR, MINOR = 1, 0

DATA_ALIGNMENT = 4096
"""The data region starts on a multiple of this: a page, so that a map of the file is aligned wherever it lands."""
TENSOR_ALIGNMENT = 64
"""Tensors, embedded files and trailers start on multiples of this: a cache line and a full AVX-512 register."""

PROLOGUE_SIZE = 64
TRAILER_SIZE = 64
MAX_JSON = 1 << 20
"""Bytes of one JSON document (header or metadata index). Llama-3.1-405B needs 0.4 MB."""
MAX_METADATA = 40 << 20
"""Bytes from the end of the data to the end of the file. Llama-3's tokenizer.json is 9 MB."""
MAX_SECTIONS = 64
"""Metadata sections: the one of the conversion and 63 edits."""

_PROLOGUE = struct.Struct("<8sHHIQQQ16s")
_TRAILER = struct.Struct("<QQQQ16s")
assert _PROLOGUE.size == PROLOGUE_SIZE - 8 and _TRAILER.size == TRAILER_SIZE - 16


def align(n: int, alignment: int) -> int:
    """The least multiple of `alignment` that is at least `n`.

    >>> align(65, 64)
    128
    """
    return -(-n // alignment) * alignment


@dataclass(frozen=True)
class Prologue:
    """The first 64 bytes. `data_offset` and `data_length` in bytes; `header_hash` is xxh3-128 of the header JSON."""

    header_length: int
    data_offset: int
    data_length: int
    header_hash: bytes
    minor: int = MINOR

    @property
    def data_end(self) -> int:
        """The byte after the data region, where the first metadata section starts."""
        return self.data_offset + self.data_length

    def pack(self) -> bytes:
        """The 64 bytes of the file."""
        head = _PROLOGUE.pack(
            MAGIC, MAJOR, self.minor, 0, self.header_length, self.data_offset, self.data_length, self.header_hash
        )
        return head + hash64(head)

    @staticmethod
    def check_magic(magic: bytes) -> None:
        """FormatError unless these are the first 8 bytes of an `.edgellama` file."""
        if magic != MAGIC:
            raise FormatError("prologue.magic", 0, f"not an .edgellama file: must start with {MAGIC!r}, got {magic!r}")

    @classmethod
    def parse(cls, raw: bytes, file_size: int) -> Prologue:
        """Check 64 bytes and prove their ranges against the size of the file; FormatError otherwise."""
        magic, major, minor, reserved, header_length, data_offset, data_length, header_hash = _PROLOGUE.unpack(
            raw[: _PROLOGUE.size]
        )
        cls.check_magic(magic)
        if major != MAJOR:
            raise FormatError(
                "prologue.major",
                8,
                f"format version {major}.{minor} is not supported, {MAJOR}.x is: update edgellama",
            )
        if raw[_PROLOGUE.size :] != hash64(raw[: _PROLOGUE.size]):
            raise FormatError("prologue.hash", 56, "the first 64 bytes are damaged")
        if reserved != 0:
            raise FormatError("prologue.reserved", 12, f"must be 0, got {reserved}")
        room = file_size - TRAILER_SIZE
        if not 2 <= header_length <= MAX_JSON:
            raise FormatError("prologue.header_length", 16, f"must be 2..{MAX_JSON}, got {header_length}")
        if PROLOGUE_SIZE + header_length > room:
            raise FormatError("prologue.header_length", 16, f"{header_length} bytes do not fit into {file_size}")
        expected = align(PROLOGUE_SIZE + header_length, DATA_ALIGNMENT)
        if data_offset != expected:
            raise FormatError("prologue.data_offset", 24, f"must be {expected}, got {data_offset}")
        if data_length % TENSOR_ALIGNMENT or data_length == 0:
            raise FormatError(
                "prologue.data_length", 32, f"must be a positive multiple of {TENSOR_ALIGNMENT}, got {data_length}"
            )
        if data_offset + data_length > room:
            raise FormatError("prologue.data_length", 32, f"{data_length} bytes do not fit: the file has {file_size}")
        return cls(header_length, data_offset, data_length, header_hash, minor)


@dataclass(frozen=True)
class Trailer:
    """The last 64 bytes of a metadata section; all offsets count from the start of the file.

    The section's bytes are [`section_offset`, `end` - 64): embedded files, then the index JSON at `index_offset`.
    """

    section_offset: int
    index_offset: int
    index_length: int
    end: int
    section_hash: bytes
    superseded: bool = False

    def pack(self) -> bytes:
        """The 64 bytes of the file."""
        head = _TRAILER.pack(self.section_offset, self.index_offset, self.index_length, self.end, self.section_hash)
        return head + hash64(head) + (SUPERSEDED_MAGIC if self.superseded else TRAILER_MAGIC)

    @classmethod
    def parse(cls, raw: bytes, end: int, data_end: int, *, newest: bool) -> Trailer:
        """Check the 64 bytes before `end`. `newest`: it ends the file, so it must not be superseded."""
        at = end - TRAILER_SIZE
        section_offset, index_offset, index_length, stated_end, section_hash = _TRAILER.unpack(raw[: _TRAILER.size])
        magic = raw[-8:]
        if magic != TRAILER_MAGIC and (newest or magic != SUPERSEDED_MAGIC):
            raise FormatError(
                "trailer.magic", at + 56, "the file is cut or was not written to its end: convert or download it again"
            )
        if raw[_TRAILER.size : -8] != hash64(raw[: _TRAILER.size]):
            raise FormatError("trailer.hash", at + 48, "the trailer is damaged")
        if stated_end != end:
            raise FormatError("trailer.end", at + 24, f"must be {end}, got {stated_end}: bytes are missing or added")
        if not data_end <= section_offset <= at or section_offset % TENSOR_ALIGNMENT:
            raise FormatError(
                "trailer.section_offset", at, f"must be a multiple of 64 from {data_end} to {at}, not {section_offset}"
            )
        if not section_offset <= index_offset < at or index_offset % TENSOR_ALIGNMENT:
            raise FormatError(
                "trailer.index_offset",
                at + 8,
                f"must be a multiple of 64 from {section_offset} to {at}, not {index_offset}",
            )
        if not 2 <= index_length <= MAX_JSON or align(index_offset + index_length, TENSOR_ALIGNMENT) != at:
            raise FormatError(
                "trailer.index_length", at + 16, f"{index_length} bytes from {index_offset} do not end before {at}"
            )
        return cls(section_offset, index_offset, index_length, end, section_hash, magic == SUPERSEDED_MAGIC)


def hash64(data: bytes) -> bytes:
    """xxh3-64 as 8 big-endian bytes, xxHash's canonical form."""
    return xxhash.xxh3_64_digest(data)


def hash128(data: bytes) -> bytes:
    """xxh3-128 as 16 big-endian bytes, xxHash's canonical form."""
    return xxhash.xxh3_128_digest(data)
