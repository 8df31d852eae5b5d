"""A session: what one slot of the cache holds, in a file, to go on from there another day.

The file is fixed-size records and plain arrays, all little-endian; nothing in it is interpreted:

    offset  bytes
    0       8      "EDGLSESS"
    8       2+2    version: major 1, minor 0
    12      4      kind of cache: 0 float16, 1 int8, 2 float32
    16      8      n, the number of tokens
    24      8      bytes of the arrays
    32      16     xxh3-128 of the model file's header: whose session it is
    48      16     xxh3-128 of the arrays
    64      8      xxh3-64 of the 64 bytes before
    72             int32 [n] tokens; int32 [n] length classes (see `rope.length_class`); then what
                   `kv_cache.slot_arrays` says: keys, values and, of an int8 cache, their scales

A reader MUST refuse a file unless all of this holds, n fits into its context, the arrays have just the bytes that the
model's config and n demand, the file ends where they end, and every token is in the vocabulary. It allocates nothing
before that is proven against the size of the file. The digests tell damage, not malice: whoever can write the file can
say what the model has seen, and nothing worse. This module knows files and arrays, not engines.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from .config import LlamaConfig
from .errors import ContextError, EdgellamaError, FormatError
from .format.atomic import write_file
from .format.container import hash64
from .format.reader import FileSource, at_path, open_regular
from .kv_cache import slot_arrays

MAGIC = b"EDGLSESS"
MAJOR, MINOR = 1, 0
KINDS = ("float16", "int8", "float32")
WHAT, MAKER = "an edgellama session", "save_session"
_PROLOGUE = struct.Struct("<8sHHIQQ16s16s")
_SIZE = _PROLOGUE.size + 8
_PIECE = 4 << 20
assert _SIZE == 72


@dataclass(frozen=True)
class Session:
    """`tokens`, `classes`: int32 [n]; `data`: their keys and values, as `Backend.read_slot` gives them."""

    tokens: np.ndarray
    classes: np.ndarray
    data: dict[str, np.ndarray]


def write_session(path: str | os.PathLike[str], session: Session, model_hash: bytes) -> None:
    """Write `session` of the model with this header hash; EdgellamaError if that cannot be, and nothing has changed."""
    arrays = [_little(a).data for a in (session.tokens, session.classes, *session.data.values())]
    hasher = xxhash.xxh3_128()
    for array in arrays:
        hasher.update(array)
    kind = KINDS.index(session.data["keys"].dtype.name)
    n_bytes = sum(array.nbytes for array in arrays)
    head = _PROLOGUE.pack(MAGIC, MAJOR, MINOR, kind, session.tokens.size, n_bytes, model_hash, hasher.digest())
    write_file(path, [head + hash64(head), *arrays], MAGIC, WHAT)


def read_session(
    path: str | os.PathLike[str], config: LlamaConfig, model_hash: bytes, kind: str, n_ctx: int
) -> Session:
    """The session in the file at `path`, for a model and a cache like these.

    FormatError for a damaged file (field, byte offset), EdgellamaError for one of another model or kind of cache or one
    that cannot be read, ContextError for one that does not fit into `n_ctx` positions.
    """
    path, fd = Path(path), -1
    try:
        fd = open_regular(path, WHAT, MAKER)
        return _read(FileSource(fd, os.fstat(fd).st_size), path, config, model_hash, kind, n_ctx)
    except FormatError as error:
        raise at_path(error, path) from None
    except OSError as error:
        raise EdgellamaError(f"{path}: cannot be read: {error.strerror or error}") from None
    finally:
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


def _read(source: FileSource, path: Path, config: LlamaConfig, model_hash: bytes, kind: str, n_ctx: int) -> Session:
    raw = source.read(0, min(_SIZE, source.size))
    if raw[:8] != MAGIC:
        raise FormatError("session.magic", 0, f"not {WHAT}: must start with {MAGIC!r}, got {raw[:8]!r}")
    if len(raw) < _SIZE:
        raise FormatError("session", len(raw), "the file is cut: save the session again")
    _, major, minor, kind_number, n, n_bytes, of_model, digest = _PROLOGUE.unpack(raw[:-8])
    if major != MAJOR:
        raise FormatError(
            "session.major", 8, f"version {major}.{minor} is not supported, {MAJOR}.x is: update edgellama"
        )
    if raw[-8:] != hash64(raw[:-8]):
        raise FormatError("session.hash", 64, f"the first {_SIZE} bytes are damaged")
    if kind_number >= len(KINDS):
        raise FormatError("session.kind", 12, f"must be below {len(KINDS)}, got {kind_number}")
    if of_model != model_hash:
        raise EdgellamaError(f"{path}: a session of another model, or of another conversion of it; load that one")
    if KINDS[kind_number] != kind:
        raise EdgellamaError(
            f"{path}: a session with a {KINDS[kind_number]} cache, this model's is {kind}; load the model with the same"
        )
    if n > n_ctx:
        raise ContextError(
            f"{path}: the session has {n} tokens, the context {n_ctx}; load the model with at least as much (n_ctx)"
        )
    if n == 0:
        raise FormatError("session.n", 16, "must be at least 1, got 0")
    shapes = {
        "tokens": (np.dtype(np.int32), (n,)),
        "classes": (np.dtype(np.int32), (n,)),
        **slot_arrays(config, kind, n),
    }
    expected = sum(dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for dtype, shape in shapes.values())
    if n_bytes != expected:
        raise FormatError("session.bytes", 24, f"must be {expected} for {n} tokens of this model, got {n_bytes}")
    if source.size != _SIZE + n_bytes:
        raise FormatError("session.bytes", 24, f"the file must have {_SIZE + n_bytes} bytes, it has {source.size}")
    arrays, found = {}, xxhash.xxh3_128()
    at = _SIZE
    for name, (dtype, shape) in shapes.items():
        array = np.empty(shape, dtype.newbyteorder("<"))
        for piece in _pieces(array.reshape(-1).view(np.uint8).data):
            piece[:] = source.read(at, len(piece))
            found.update(piece)
            at += len(piece)
        arrays[name] = array.astype(dtype, copy=False)
    if found.digest() != digest:
        raise FormatError("session.digest", 48, "the arrays are damaged")
    tokens, classes = arrays.pop("tokens"), arrays.pop("classes")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise FormatError("session.tokens", _SIZE, f"must be from 0 to {config.vocab_size - 1}")
    if classes.min() < 0:
        raise FormatError("session.classes", _SIZE + 4 * n, "must not be negative")
    return Session(tokens, classes, arrays)


def _pieces(view: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(view), _PIECE):
        yield view[start : start + _PIECE]


def _little(array: np.ndarray) -> np.ndarray:
    """uint8 [nbytes]: its little-endian bytes."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
