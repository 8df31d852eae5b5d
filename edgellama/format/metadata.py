"""The metadata behind the tensor data: embedded files, provenance, receipt, and the chain of edits.

Knows FORMAT.md section 5: how one section is built and how a chain of them is checked. Does not open or change files
(`edit.py` does) and does not interpret tokenizers.

A section is `files | index JSON | zeros to 64 | trailer`. The first one follows the data; each edit adds one behind the
last, whose index may point at files of earlier sections, so that a new chat template costs kilobytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import xxhash

from ..errors import FormatError
from . import strict_json
from .container import (
    MAX_JSON,
    MAX_METADATA,
    MAX_SECTIONS,
    TENSOR_ALIGNMENT,
    TRAILER_SIZE,
    Trailer,
    align,
    hash128,
)
from .fields import Fields

FILE_NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""The files a model may carry. A reader skips others: a later minor version may add some."""


def has_tokenizer(files: Iterable[str]) -> bool:
    """Whether one of these files says how text becomes ids."""
    return not {"tokenizer.json", "tokenizer.model"}.isdisjoint(files)


CHUNK = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


class Source(Protocol):
    """Bytes to check: a file that is not mapped yet, or a test's buffer."""

    size: int

    def read(self, offset: int, n: int) -> bytes:
        """Exactly `n` bytes at `offset`; FormatError if the file has become shorter."""
        ...


@dataclass(frozen=True)
class FileEntry:
    """An embedded file: `offset` counts from the start of the `.edgellama` file."""

    name: str
    offset: int
    nbytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Metadata:
    """What the newest section says, and the trailers of all sections, oldest first."""

    files: dict[str, bytes]
    entries: list[FileEntry]
    provenance: dict[str, Any]
    receipt: dict[str, Any] | None
    trailers: list[Trailer]


def build_section(
    start: int,
    files: Mapping[str, bytes],
    kept: list[FileEntry],
    provenance: Mapping[str, Any],
    receipt: Mapping[str, Any] | None,
) -> bytes:
    """The bytes of a section that starts at byte `start`, its trailer included.

    `files` go into it; `kept` lie in earlier sections and stay listed.
    """
    body = bytearray()
    entries = list(kept)
    for name in sorted(files, key=FILE_NAMES.index):
        data = bytes(files[name])
        entries.append(FileEntry(name, start + len(body), len(data), hash128(data).hex()))
        body += data
        body += bytes(-len(body) % TENSOR_ALIGNMENT)
    index = strict_json.dump(
        {
            "files": [vars(entry) for entry in sorted(entries, key=lambda entry: entry.offset)],
            "provenance": dict(provenance),
            "receipt": None if receipt is None else dict(receipt),
        },
        "metadata",
    )
    if len(index) > MAX_JSON:
        raise FormatError("metadata", None, f"provenance and receipt take {len(index)} bytes, {MAX_JSON} at most")
    index_offset = start + len(body)
    body += index
    body += bytes(-len(body) % TENSOR_ALIGNMENT)
    end = start + len(body) + TRAILER_SIZE
    return bytes(body) + Trailer(start, index_offset, len(index), end, hash128(bytes(body))).pack()


def check_names(files: Iterable[str]) -> None:
    """FormatError if a writer is asked to embed a file that readers do not know."""
    for name in files:
        if name not in FILE_NAMES:
            raise FormatError("files", None, f"{name!r} cannot be embedded, only {', '.join(FILE_NAMES)}")


def check_trailers(source: Source, data_end: int) -> list[Trailer]:
    """Walk the chain of trailers from the end of the file back to the data; prove that the sections tile the space."""
    if source.size - data_end > MAX_METADATA:
        raise FormatError(
            "trailer.section_offset", source.size - TRAILER_SIZE, f"more than {MAX_METADATA} bytes of metadata"
        )
    trailers: list[Trailer] = []
    end = source.size
    while end > data_end:
        if end - data_end < 2 * TRAILER_SIZE:
            raise FormatError("trailer", end, f"no metadata section fits between {data_end} and {end}")
        if len(trailers) == MAX_SECTIONS:
            raise FormatError("trailer", end, f"more than {MAX_SECTIONS} metadata sections")
        raw = source.read(end - TRAILER_SIZE, TRAILER_SIZE)
        trailer = Trailer.parse(raw, end, data_end, newest=not trailers)
        trailers.append(trailer)
        end = trailer.section_offset
    if not trailers:
        raise FormatError("trailer", source.size, "the file ends with the tensor data: it is cut")
    return trailers[::-1]


def check_metadata(source: Source, trailers: list[Trailer]) -> Metadata:
    """Check every byte of all sections and read the newest."""
    for trailer in trailers:
        _check_section_hash(source, trailer)
    newest = trailers[-1]
    raw = source.read(newest.index_offset, newest.index_length)
    padding = source.read(
        newest.index_offset + newest.index_length,
        newest.end - TRAILER_SIZE - newest.index_offset - newest.index_length,
    )
    check_zero(padding, "metadata.padding", newest.index_offset + newest.index_length)
    index = Fields.parse(raw, "metadata", newest.index_offset)
    provenance = index.object("provenance").value
    receipt_fields = index.get("receipt")
    receipt = None if receipt_fields is None else index.object("receipt").value
    entries = _check_entries(index, trailers)
    files: dict[str, bytes] = {}
    at = newest.section_offset  # the newest section's own files tile [section_offset, index_offset)
    for i, entry in enumerate(entries):
        if entry.offset >= newest.section_offset:
            if entry.offset != at:
                index.fail(("files", i, "offset"), f"must be {at}, got {entry.offset}")
            at = align(entry.offset + entry.nbytes, TENSOR_ALIGNMENT)
            end = entry.offset + entry.nbytes
            check_zero(source.read(end, at - end), "metadata.padding", end)
        data = source.read(entry.offset, entry.nbytes)
        if hash128(data).hex() != entry.xxh3_128:
            index.fail(("files", i, "xxh3_128"), f"{entry.name} is damaged")
        if entry.name in FILE_NAMES:
            files[entry.name] = data
    if at != newest.index_offset:
        raise FormatError("trailer.index_offset", newest.end - TRAILER_SIZE + 8, f"must be {at}: files end there")
    return Metadata(files, entries, provenance, receipt, trailers)


def _check_section_hash(source: Source, trailer: Trailer) -> None:
    hasher = xxhash.xxh3_128()
    stop = trailer.end - TRAILER_SIZE
    for offset in range(trailer.section_offset, stop, CHUNK):
        hasher.update(source.read(offset, min(CHUNK, stop - offset)))
    if hasher.digest() != trailer.section_hash:
        raise FormatError("trailer.section_hash", stop + 32, f"the metadata at {trailer.section_offset} is damaged")


def _check_entries(index: Fields, trailers: list[Trailer]) -> list[FileEntry]:
    """The file list: known ranges, in order, without overlaps, each within the files of one section."""
    count = index.list_length("files")
    if count > 2 * len(FILE_NAMES):
        index.fail(("files",), f"more than {2 * len(FILE_NAMES)} files")
    entries: list[FileEntry] = []
    end = trailers[0].section_offset
    for i in range(count):
        item = index.object("files", i)
        name = item.string("name")
        if not _NAME.fullmatch(name):
            item.fail(("name",), "must be letters, digits, '_', '-' and '.', not starting with '.' or '-'")
        if any(name == entry.name for entry in entries):
            item.fail(("name",), f"{name} is listed twice")
        entry = FileEntry(name, item.integer("offset"), item.integer("nbytes"), item.hash128("xxh3_128"))
        if entry.offset < end or entry.offset % TENSOR_ALIGNMENT:
            item.fail(("offset",), f"must be a multiple of {TENSOR_ALIGNMENT} and at least {end}, got {entry.offset}")
        end = entry.offset + entry.nbytes
        if not any(t.section_offset <= entry.offset and end <= t.index_offset for t in trailers):
            item.fail(("nbytes",), f"bytes {entry.offset}..{end} do not lie among the files of a metadata section")
        entries.append(entry)
    return entries


def check_zero(data: bytes, field: str, offset: int) -> None:
    """FormatError at the first byte of padding that is not zero."""
    rest = data.lstrip(b"\0")
    if rest:
        raise FormatError(field, offset + len(data) - len(rest), f"padding must be 0, got {rest[0]}")
