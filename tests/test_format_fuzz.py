"""F2, F3, F4: random mutations, a cut at every byte, single bit flips.

A mutation that leaves the hashes wrong only tests the hashes, so most of them recompute hashes, lengths and paddings
(`format_builder`) and reach the rules behind. The full counts are `slow`; EDGELLAMA_FUZZ sets any other for F2.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import signal
import struct
from typing import Any

import pytest

from edgellama.errors import FormatError
from edgellama.format import append_metadata, open_model
from edgellama.format.layout import LAYOUTS
from edgellama.format.schema import model_tensors
from edgellama.format.validate import validate
from format_builder import PROLOGUE, TRAILER, Parts, dump
from format_files import write_file


class Bytes:
    """A file in memory."""

    def __init__(self, raw: bytes):
        self.raw, self.size = raw, len(raw)

    def read(self, offset: int, n: int) -> bytes:
        assert offset >= 0 and n >= 0 and offset + n <= self.size, "a read that was not proven"
        return self.raw[offset : offset + n]


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> bytes:
    """A file with two metadata sections."""
    path = write_file(tmp_path_factory.mktemp("fuzz") / "m.edgellama", intermediate_size=32, vocab_size=20)
    append_metadata(path, {"chat_template.jinja": b"edited"}, {"kl": 0.5})
    return path.read_bytes()


@contextlib.contextmanager
def at_most(seconds: float):
    """No hang: an alarm where there is one."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_):
        raise TimeoutError(f"more than {seconds} s")

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def outcome(raw: bytes) -> str:
    """ "ok" or the field that was refused; anything but FormatError escapes. What is accepted must be sound."""
    try:
        contents = validate(Bytes(raw))
    except FormatError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        assert error.offset is not None and 0 <= error.offset <= len(raw), str(error)
        return error.field
    specs = model_tensors(contents.config, contents.quantization["lm_head_bits"])
    end = contents.prologue.data_offset
    assert [entry.name for entry in contents.tensors.values()] == [spec.name for spec in specs]
    for entry, spec in zip(contents.tensors.values(), specs, strict=True):
        assert entry.shape == spec.shape and entry.layout == spec.layout
        assert entry.nbytes == LAYOUTS[spec.layout].nbytes(spec.shape)
        assert entry.offset >= end and entry.offset % 64 == 0
        end = entry.offset + entry.nbytes
    assert end <= contents.prologue.data_end <= len(raw) - 128
    return "ok"


NASTY: list[Any] = [
    *[0, 1, -1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 4095, 4096, 2**24, 2**24 + 1, 2**31, 2**32, 2**63 - 1],
    *[2**63, 2**64, -(2**63), 10**30, 1.0, 0.5, -0.0, 1e300, 1e-300, True, False, None, "", "0", "a" * 50, "\x00"],
    *[
        "é",
        "\U0001f600",
        "../x",
        "int4.g128",
        "f32",
        "llama3",
        [],
        {},
        [[]],
        [0],
        {"": 0},
        [None] * 50,
        {"a": {"b": 1}},
    ],
]

OPTIONAL = ["new", "rope_scaling", "rope_parameters", "head_dim", "sliding_window", "layer_types", "pretraining_tp", ""]
ROPES: list[Any] = [
    {"type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": -1},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [0] * 6},
    {"rope_type": "yarn", "factor": 1e18, "beta_fast": 0, "original_max_position_embeddings": 2**40},
    {"rope_type": []},
]


def nodes(value: Any, found: list) -> list:
    """Every (container, key) of a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        found.append((value, key))
        if isinstance(child, (dict, list)):
            nodes(child, found)
    return found


def mutate_json(rng: random.Random, document: dict) -> None:
    """Change the document in one or two places."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        if not document:
            return
        container, key = rng.choice(nodes(document, []))
        old = container[key]
        choice = rng.randrange(7)
        if choice == 0:
            del container[key]
        elif choice == 1 and isinstance(old, int):
            container[key] = old + rng.choice((-64, -16, -1, 1, 16, 64, 4096))
        elif choice == 2 and isinstance(container, list):
            container.insert(key, old)
        elif choice == 3 and isinstance(container, list):
            rng.shuffle(container)
        elif choice == 4 and isinstance(container, dict):
            container[rng.choice(OPTIONAL)] = copy.deepcopy(rng.choice([*NASTY, *ROPES]))
        elif choice == 5 and isinstance(old, str):
            container[key] = old[: rng.randrange(len(old) + 1)] + rng.choice(("", "x", "0", "é"))
        else:
            container[key] = copy.deepcopy(rng.choice(NASTY))


TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"\\u",
    b"\\ud800",
    b"1e999",
    b"NaN",
    b"-",
    b"null",
    b"9" * 30,
]
TOKENS += [b"\xff", b"\xed\xa0\x80", b"\0", b"\n", b" ", b"[" * 40, b'{"a":' * 40, b"true", b"0.", b"Infinity", b"/*"]


def mutate_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Change a document's bytes: flip, cut, repeat, insert."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at:at] = rng.choice(TOKENS)
            case 2:
                del data[at : at + rng.choice((1, 2, 10, 100))]
            case 3:
                data[at:at] = data[at : at + rng.choice((1, 5, 50))]
            case 4 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def mutated(rng: random.Random, valid: bytes, parts: Parts, documents: tuple[bytes, bytes]) -> bytes:
    """One mutation of the file, of a kind chosen at random."""
    kind = rng.randrange(8)
    if kind == 0:  # anywhere outside the data, hashes left wrong
        data = bytearray(valid)
        at = rng.choice(
            (rng.randrange(64), rng.randrange(parts.data_offset), rng.randrange(parts.data_end, len(valid)))
        )
        data[at] = rng.randrange(256)
        return bytes(data)
    changed = Parts(parts.header, parts.data, [*parts.sections], documents[0])
    if kind in (1, 2):  # a field of the prologue
        field = rng.choice(PROLOGUE[1:7])
        old = dict(zip(PROLOGUE, struct.unpack("<8sHHIQQQ16s8s", valid[:64]), strict=True))[field]
        changed.prologue[field] = number(rng, old, {"major": 16, "minor": 16, "reserved": 32}.get(field, 64))
    elif kind == 3:  # a field of a trailer
        i = rng.randrange(2)
        section = changed.sections[i] = _copy(parts.sections[i])
        field = rng.choice(TRAILER[:4])
        end = len(valid) if i else parts.data_end
        section.trailer[field] = number(rng, rng.choice((end, parts.data_end, parts.data_offset)), 64)
    elif kind in (4, 5):  # the header, as a document or as bytes
        changed.header_raw = _mutated_document(rng, documents[0])
    else:  # the newest index
        changed.sections[-1] = _copy(parts.sections[-1])
        changed.sections[-1].raw = _mutated_document(rng, documents[1])
    return changed.build()


def _copy(section):
    return type(section)(section.index, section.files, section.raw, section.fill, dict(section.trailer))


def _mutated_document(rng: random.Random, document: bytes) -> bytes:
    if rng.random() < 0.4:
        return mutate_bytes(rng, document)
    value = json.loads(document)
    small = [value[key] for key in ("config", "quantization") if key in value]  # the tensor list would drown them
    mutate_json(rng, rng.choice([value, *small]))
    return dump(value)


def number(rng: random.Random, old: int, bits: int) -> int:
    """A value near the old one or near a power of two."""
    near = rng.choice((old, old, 0, 1 << rng.randrange(bits), (1 << bits) - 1))
    return (near + rng.choice((-4096, -64, -1, 0, 1, 64, 4096))) % (1 << bits)


def fuzz(valid: bytes, count: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    parts = Parts.take_apart(valid)
    assert parts.build() == valid
    documents = dump(parts.header), dump(parts.sections[-1].index)
    for section in parts.sections:
        section.raw = dump(section.index)
    seen: dict[str, int] = {}
    for i in range(count):
        raw = mutated(rng, valid, parts, documents)
        try:
            with at_most(1.0):
                field = outcome(raw)
        except BaseException as error:
            error.add_note(f"mutation {i} of seed {seed}")
            raise
        seen[field] = seen.get(field, 0) + 1
    return seen


COUNTS = [20_000, pytest.param(100_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", [int(os.environ["EDGELLAMA_FUZZ"])] if "EDGELLAMA_FUZZ" in os.environ else COUNTS)
def test_header_mutations(valid, count):
    """F2: nothing but FormatError, no hang; and the mutations do reach the rules."""
    seen = fuzz(valid, count, seed=count)
    assert len(seen) > 100, seen
    assert seen.get("prologue.header_hash", 0) + seen.get("prologue.hash", 0) < count / 4


def test_a_cut_at_every_header_byte(tmp_path, valid):
    """F3: a real file, shortened step by step through header, metadata and 1,000 places of the data."""
    path = tmp_path / "m.edgellama"
    path.write_bytes(valid)
    parts = Parts.take_apart(valid)
    rng = random.Random(3)
    data = rng.sample(range(parts.data_offset, parts.data_end), 1000)
    sizes = {*range(parts.data_offset), *range(parts.data_end, len(valid)), *data}
    for size in sorted(sizes, reverse=True):
        os.truncate(path, size)
        with pytest.raises(FormatError):
            open_model(path)


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_single_bit_flips(tmp_path, valid, count):
    """F4: outside the data region refused at open; inside found by verify, gaps included."""
    path = tmp_path / "m.edgellama"
    parts = Parts.take_apart(valid)
    rng = random.Random(4)
    path.write_bytes(valid)
    with open(path, "r+b", buffering=0) as file:
        for i in range(count):
            inside = i % 2 == 0
            at = rng.randrange(parts.data_offset, parts.data_end) if inside else _outside(rng, parts, len(valid))
            file.seek(at)
            file.write(bytes([valid[at] ^ 1 << rng.randrange(8)]))
            if inside:
                with open_model(path) as model, pytest.raises(FormatError):
                    model.verify()
            else:
                with pytest.raises(FormatError):
                    open_model(path)
            file.seek(at)
            file.write(valid[at : at + 1])
    with open_model(path) as model:
        model.verify()


def _outside(rng: random.Random, parts: Parts, size: int) -> int:
    at = rng.randrange(parts.data_offset + size - parts.data_end)
    return at if at < parts.data_offset else at - parts.data_offset + parts.data_end
