"""The proof that a file is a whole, well-formed `.edgellama` file, made before any of it is mapped.

Knows every rule of FORMAT.md section 6, in its order. Works on any `Source` of bytes and never reads tensor data: their
hashes are `ModelFile.verify`'s business. Cost: a few small reads and one pass over header and metadata.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NoReturn

from ..config import LlamaConfig
from ..errors import ConfigError, FormatError
from .container import (
    DATA_ALIGNMENT,
    PROLOGUE_SIZE,
    TENSOR_ALIGNMENT,
    TRAILER_SIZE,
    Prologue,
    align,
    hash128,
)
from .fields import HASH128, Fields, show
from .layout import GROUP_SIZE, LAYOUTS, ROW_BLOCK
from .metadata import Metadata, Source, check_metadata, check_trailers, check_zero
from .schema import LM_HEAD_BITS, TensorSpec, iter_tensors, tensor_count, unit_names

SCHEME = "int4.g128"
METHOD = re.compile(r"[a-z0-9][a-z0-9._+-]{0,63}")
"""What `quantization.method` may look like; it is shown to people."""
MIXED_BITS = "mixed_bits"
"""The feature of files in which some of the layers' matrices have 8 bits: `quantization.int8_units`."""
SUPPORTED_FEATURES: frozenset[str] = frozenset({MIXED_BITS})
"""Values of `required_features` that this reader implements."""

_CONFIG_KEY = re.compile(r"(?:config\.json: )?([A-Za-z0-9_.]+)")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the file. `shape` is logical, without padding; `offset` counts from the start of the file."""

    name: str
    layout: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Contents:
    """All that a valid file says about itself."""

    prologue: Prologue
    header: dict[str, Any]
    config: LlamaConfig
    quantization: dict[str, Any]
    tensors: dict[str, TensorEntry]
    metadata: Metadata


def validate(source: Source) -> Contents:
    """Check everything but the tensors' bytes; FormatError names the field and the byte offset."""
    smallest = DATA_ALIGNMENT + TENSOR_ALIGNMENT + 2 * TRAILER_SIZE
    if source.size < smallest:
        if source.size >= 8:
            Prologue.check_magic(source.read(0, 8))
        raise FormatError("file", source.size, f"too short: {source.size} bytes, at least {smallest} are needed")
    prologue = Prologue.parse(source.read(0, PROLOGUE_SIZE), source.size)
    trailers = check_trailers(source, prologue.data_end)
    raw = source.read(PROLOGUE_SIZE, prologue.header_length)
    if hash128(raw) != prologue.header_hash:
        raise FormatError("prologue.header_hash", 40, "the header is damaged")
    header_end = PROLOGUE_SIZE + prologue.header_length
    check_zero(source.read(header_end, prologue.data_offset - header_end), "header.padding", header_end)

    header = Fields.parse(raw, "header", PROLOGUE_SIZE)
    features = _check_features(header)
    quantization = _check_quantization(header)
    config = _check_config(header)
    int8_units = _check_units(header.object("quantization"), config, MIXED_BITS in features)
    tensors = _check_tensors(header, prologue, config, quantization["lm_head_bits"], int8_units)
    metadata = check_metadata(source, trailers)
    return Contents(prologue, header.value, config, quantization, tensors, metadata)


def _check_features(header: Fields) -> set[str]:
    features: set[str] = set()
    for i in range(header.list_length("required_features")):
        feature = header.value["required_features"][i]
        if not isinstance(feature, str) or feature not in SUPPORTED_FEATURES:
            header.fail(("required_features", i), f"{show(feature)} is not supported: update edgellama")
        if feature in features:
            header.fail(("required_features", i), f"{show(feature)} is named twice")
        features.add(feature)
    return features


def _check_quantization(header: Fields) -> dict[str, Any]:
    quantization = header.object("quantization")
    quantization.expect("scheme", SCHEME)
    quantization.expect("group_size", GROUP_SIZE)
    quantization.expect("row_block", ROW_BLOCK)
    if not METHOD.fullmatch(quantization.string("method")):
        quantization.fail(("method",), f"must match {METHOD.pattern}, got {show(quantization.get('method'))}")
    bits = quantization.integer("lm_head_bits")
    if bits not in LM_HEAD_BITS:
        quantization.fail(("lm_head_bits",), f"must be 4, 8 or 16, got {bits}")
    return quantization.value


def _check_config(header: Fields) -> LlamaConfig:
    raw = header.object("config").value
    try:
        return LlamaConfig.from_dict(raw)
    except ConfigError as error:
        match = _CONFIG_KEY.match(str(error))
        key = match.group(1).split(".")[0] if match else ""
        header.fail(("config", key) if key in raw else ("config",), str(error))


def _check_units(quantization: Fields, config: LlamaConfig, mixed: bool) -> list[str]:
    """The units with 8 bits: with the feature some, each one of the config's, in file order; without it no list."""
    if "int8_units" not in quantization.value:
        if mixed:
            quantization.fail((), f"'int8_units' is missing, which the feature {MIXED_BITS!r} demands")
        return []
    if not mixed:
        quantization.fail(("int8_units",), f"needs {MIXED_BITS!r} among the required features")
    if quantization.list_length("int8_units") == 0:
        quantization.fail(("int8_units",), f"must not be empty with the feature {MIXED_BITS!r}")
    units: list[str] = quantization.value["int8_units"]
    names = unit_names(config)
    for i, unit in enumerate(units):
        if unit not in names:  # which goes on from the unit before: the order is checked, too, and all in one pass
            quantization.fail(("int8_units", i), f"{show(unit)} is no unit of this config, or not in file order")
    return units


def _check_tensors(
    header: Fields, prologue: Prologue, config: LlamaConfig, lm_head_bits: int, int8_units: list[str]
) -> dict[str, TensorEntry]:
    """The list must be the schema's, entry by entry; the offsets must tile the data region."""
    count, expected = header.list_length("tensors"), tensor_count(config, lm_head_bits)
    if count != expected:
        header.fail(("tensors",), f"must list {expected} tensors for this config, got {count}")
    items = header.value["tensors"]
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}  # layers repeat the same few
    tensors: dict[str, TensorEntry] = {}
    end = 0  # of the last tensor, from the start of the data region
    for i, spec in enumerate(iter_tensors(config, lm_head_bits, int8_units)):
        kind = (spec.layout, spec.shape)
        nbytes = sizes.get(kind) or sizes.setdefault(kind, LAYOUTS[spec.layout].nbytes(spec.shape))
        offset = align(end, TENSOR_ALIGNMENT)
        end = offset + nbytes
        if not _equals(items[i], spec, offset, nbytes):
            _refuse_tensor(header.object("tensors", i), spec, offset, nbytes)
        if end > prologue.data_length:
            length = prologue.data_length
            header.fail(("tensors", i, "nbytes"), f"bytes {offset}..{end} exceed the data region of {length}")
        start = prologue.data_offset + offset
        tensors[spec.name] = TensorEntry(spec.name, spec.layout, spec.shape, start, nbytes, items[i]["xxh3_128"])
    if align(end, TENSOR_ALIGNMENT) != prologue.data_length:
        raise FormatError(
            "prologue.data_length", 32, f"must be {align(end, TENSOR_ALIGNMENT)}, got {prologue.data_length}"
        )
    return tensors


def _equals(item: Any, spec: TensorSpec, offset: int, nbytes: int) -> bool:
    """Whether an entry of the list says exactly what it must. Types count: JSON's 1.0 and true are not 1."""
    if not isinstance(item, dict):
        return False
    shape, xxh3_128 = item.get("shape"), item.get("xxh3_128")
    return (
        item.get("name") == spec.name
        and item.get("layout") == spec.layout
        and shape == list(spec.shape)
        and all(type(size) is int for size in shape)
        and item.get("offset") == offset
        and type(item["offset"]) is int
        and item.get("nbytes") == nbytes
        and type(item["nbytes"]) is int
        and isinstance(xxh3_128, str)
        and HASH128.fullmatch(xxh3_128) is not None
    )


def _refuse_tensor(item: Fields, spec: TensorSpec, offset: int, nbytes: int) -> NoReturn:
    """Say what is wrong with an entry that `_equals` did not accept."""
    item.expect("name", spec.name)
    layout = item.string("layout")
    if layout not in LAYOUTS:
        item.fail(("layout",), f"{show(layout)} is not a layout of format 1: update edgellama")
    item.expect("layout", spec.layout)
    item.expect("shape", list(spec.shape))
    item.expect("offset", offset)
    item.expect("nbytes", nbytes)
    item.hash128("xxh3_128")
    raise AssertionError("an entry that is refused has something wrong with it")
