"""Pieces gathered into aligned blocks: the file's bytes are as if each piece had been written at once."""

import os
import random

import pytest

from edgellama.format import storage
from edgellama.format.blocks import BLOCK, BlockWriter


@pytest.fixture
def writes(monkeypatch):
    """(offset, size) of each write that reaches the system."""
    seen, positions = [], {}

    def seek(fd, offset):
        positions[fd] = offset
        os.lseek(fd, offset, os.SEEK_SET)

    def write(fd, data):
        seen.append((positions[fd], len(data)))
        positions[fd] += len(data)
        return os.write(fd, data)

    monkeypatch.setattr(storage, "seek", seek)
    monkeypatch.setattr(storage, "write", write)
    return seen


def test_pieces_become_whole_blocks(tmp_path, writes):
    rng = random.Random(0)
    fd = storage.create(tmp_path / "file")
    blocks, expected, offset = BlockWriter(), bytearray(), 100
    while offset < 4 * BLOCK:
        piece = rng.randbytes(rng.choice([1, 77, 4096, BLOCK // 3, BLOCK + 5]))
        blocks.write(fd, offset, piece)
        expected[len(expected) : offset] = bytes(offset - len(expected))
        expected += piece
        offset += len(piece) + rng.choice([0, 0, 63])
    blocks.write(fd, 0, b"the header, at last")
    blocks.flush(fd)
    blocks.flush(fd)
    storage.close(fd)
    expected[: len(b"the header, at last")] = b"the header, at last"
    assert (tmp_path / "file").read_bytes() == expected
    inner = writes[1:-2]  # but for both ends and the header
    assert len(inner) >= 3 and all(at % BLOCK == 0 and size == BLOCK for at, size in inner)


def test_a_far_offset_leaves_a_hole(tmp_path, writes):
    fd = storage.create(tmp_path / "file")
    blocks = BlockWriter()
    blocks.write(fd, 0, b"a")
    blocks.write(fd, 3 * BLOCK, b"b")
    blocks.flush(fd)
    storage.close(fd)
    assert writes == [(0, 1), (3 * BLOCK, 1)]
    assert (tmp_path / "file").stat().st_size == 3 * BLOCK + 1
