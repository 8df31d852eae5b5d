"""A second, independent writer of `.edgellama` files, made from FORMAT.md alone, that can also write wrong ones.

Takes a valid file apart into header, data and metadata sections; every part can be changed, and `build()` puts them
together with right hashes and lengths, unless one of those is overridden. Uses nothing of `edgellama.format`.
"""

from __future__ import annotations

import copy
import json
import struct
from dataclasses import dataclass, field
from typing import Any

import xxhash

PROLOGUE = ("magic", "major", "minor", "reserved", "header_length", "data_offset", "data_length", "header_hash", "hash")
TRAILER = ("section_offset", "index_offset", "index_length", "end", "section_hash", "hash", "magic")
MASK = 2**64 - 1


def align(n: int, to: int) -> int:
    return (n + to - 1) // to * to


def pad(data: bytes, to: int, fill: int = 0) -> bytes:
    return data + bytes([fill]) * (align(len(data), to) - len(data))


def dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


@dataclass
class Section:
    """A metadata section; `raw` and `trailer` override what `index` and `files` give."""

    index: dict[str, Any]
    files: bytes
    raw: bytes | None = None
    fill: int = 0
    trailer: dict[str, Any] = field(default_factory=dict)


@dataclass
class Parts:
    """A file in parts; `header_raw` overrides `header`, and `prologue` single fields."""

    header: dict[str, Any]
    data: bytes
    sections: list[Section]
    header_raw: bytes | None = None
    prologue: dict[str, Any] = field(default_factory=dict)
    header_fill: int = 0
    tail: bytes = b""

    @classmethod
    def take_apart(cls, raw: bytes) -> Parts:
        values = dict(zip(PROLOGUE, struct.unpack("<8sHHIQQQ16s8s", raw[:64]), strict=True))
        end = values["data_offset"] + values["data_length"]
        header = json.loads(raw[64 : 64 + values["header_length"]])
        sections = []
        stop = len(raw)
        while stop > end:
            trailer = dict(zip(TRAILER, struct.unpack("<QQQQ16s8s8s", raw[stop - 64 : stop]), strict=True))
            start, at, length = trailer["section_offset"], trailer["index_offset"], trailer["index_length"]
            kept = {"magic": trailer["magic"]} if sections else {}
            sections.append(Section(json.loads(raw[at : at + length]), raw[start:at], trailer=kept))
            stop = start
        return cls(header, raw[values["data_offset"] : end], sections[::-1])

    def copy(self) -> Parts:
        return copy.deepcopy(self)

    @property
    def data_offset(self) -> int:
        raw = dump(self.header) if self.header_raw is None else self.header_raw
        return align(64 + len(raw), 4096)

    @property
    def data_end(self) -> int:
        return self.data_offset + len(self.data)

    def build(self) -> bytes:
        raw = dump(self.header) if self.header_raw is None else self.header_raw
        values = {
            "magic": b"EDGLLAMA",
            "major": 1,
            "minor": 0,
            "reserved": 0,
            "header_length": len(raw),
            "data_offset": self.data_offset,
            "data_length": len(self.data),
            "header_hash": xxhash.xxh3_128_digest(raw),
            **self.prologue,
        }
        head = struct.pack("<8sHHIQQQ16s", *(values[name] for name in PROLOGUE[:-1]))
        out = pad(head + values.get("hash", xxhash.xxh3_64_digest(head)) + raw, 4096, self.header_fill) + self.data
        for section in self.sections:
            out = self._add(out, section)
        return out + self.tail

    def _add(self, out: bytes, section: Section) -> bytes:
        start = len(out)
        index = dump(section.index) if section.raw is None else section.raw
        body = section.files + pad(index, 64, section.fill)
        values = {
            "section_offset": start,
            "index_offset": start + len(section.files),
            "index_length": len(index),
            "end": start + len(body) + 64,
            "section_hash": xxhash.xxh3_128_digest(body),
            "magic": b"EDGL-END",
            **section.trailer,
        }
        head = struct.pack("<QQQQ16s", *(values[name] for name in TRAILER[:5]))
        return out + body + head + values.get("hash", xxhash.xxh3_64_digest(head)) + values["magic"]
