"""Handcrafted bad files: what is wrong, and the field that the error must name.

Each case changes one thing of a valid file and keeps every hash right unless the hash is the point, so that it reaches
the rule it is made for. `cases()` gives (name, bytes, field pattern).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from format_builder import MASK, Parts, Section, dump

Change = Callable[[Parts], None]


def _set(path: str, value: Any) -> Change:
    """Set `a.b.0.c` of the header; `value` may be a function of the old value. DELETE removes it."""

    def change(parts: Parts) -> None:
        *parents, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        node: Any = parts.header
        for step in parents:
            node = node[step]
        if value is DELETE:
            del node[last]
        else:
            node[last] = value(node[last]) if callable(value) else value

    return change


def _index(key: str, value: Any) -> Change:
    """The same for the newest index."""

    def change(parts: Parts) -> None:
        wrapped = Parts(parts.sections[-1].index, b"", [])
        _set(key, value)(wrapped)

    return change


def _prologue(**values: Any) -> Change:
    def change(parts: Parts) -> None:
        for name, value in values.items():
            parts.prologue[name] = value(parts) if callable(value) else value

    return change


def _trailer(**values: Any) -> Change:
    def change(parts: Parts) -> None:
        for name, value in values.items():
            parts.sections[-1].trailer[name] = value(parts) if callable(value) else value

    return change


def _header_raw(edit: Callable[[bytes], bytes]) -> Change:
    def change(parts: Parts) -> None:
        parts.header_raw = edit(dump(parts.header))

    return change


def _index_raw(edit: Callable[[bytes], bytes]) -> Change:
    def change(parts: Parts) -> None:
        parts.sections[-1].raw = edit(dump(parts.sections[-1].index))

    return change


def _with_key(text: bytes) -> Callable[[bytes], bytes]:
    """Add `"x": text` as the first key of a JSON object."""
    return lambda raw: b'{"x":' + text + b"," + raw[1:]


def _swap_tensors(parts: Parts) -> None:
    tensors = parts.header["tensors"]
    tensors[1], tensors[2] = tensors[2], tensors[1]


def _bigger_config(parts: Parts) -> None:
    """Everything agrees with itself, but the weights would be far beyond the file."""
    parts.header["config"]["vocab_size"] = 2**24
    end = 0
    for tensor in parts.header["tensors"]:
        if "embed_tokens" in tensor["name"]:
            tensor["shape"][0] = 2**24
            tensor["nbytes"] = 2**24 * 128 if "qweight" in tensor["name"] else 2**24 * 2
        tensor["offset"] = (end + 63) // 64 * 64
        end = tensor["offset"] + tensor["nbytes"]


def _prologue_length_of_bigger_config(parts: Parts) -> None:
    _bigger_config(parts)
    last = parts.header["tensors"][-1]
    parts.prologue["data_length"] = (last["offset"] + last["nbytes"] + 63) // 64 * 64


def _many_layers(parts: Parts) -> None:
    parts.header["config"]["num_hidden_layers"] = 900
    parts.header["tensors"] = [{}] * (16 * 900 + 3)


def _large_metadata(parts: Parts) -> None:
    parts.sections[-1].files = b"x" * (42 << 20)


def _large_damaged_file(parts: Parts) -> None:
    """The largest metadata that is allowed, wrong at its very end."""
    section = parts.sections[-1]
    section.files = bytes(39 << 20)
    section.index["files"] = [
        {"name": "tokenizer.json", "offset": parts.data_end, "nbytes": 39 << 20, "xxh3_128": "0" * 32}
    ]


def _too_many_sections(parts: Parts) -> None:
    empty = {"files": [], "provenance": {}, "receipt": None}
    old = {"magic": b"EDGL-OLD"}
    parts.sections = [Section(empty, b"", trailer=old) for _ in range(64)] + [Section(empty, b"")]


def _hidden_bytes(parts: Parts) -> None:
    parts.sections[-1].files += b"x" * 64


def _file_padding(parts: Parts) -> None:
    section = parts.sections[-1]
    end = section.index["files"][0]["nbytes"]
    section.files = section.files[:end] + b"\1" + section.files[end + 1 :]


def _file_in_weights(parts: Parts) -> None:
    parts.sections[-1].index["files"][0]["offset"] = parts.data_offset


def _files_twice(parts: Parts) -> None:
    files = parts.sections[-1].index["files"]
    files.insert(1, {**files[0], "name": "tokenizer.json"})


def _many_files(parts: Parts) -> None:
    parts.sections[-1].index["files"] *= 20


def _no_sections(parts: Parts) -> None:
    parts.sections = []


def _classifier(**keys: Any) -> Change:
    """The file calls itself a classifier, with these keys of its config."""

    def change(parts: Parts) -> None:
        parts.header["config"] |= {"architectures": ["LlamaForSequenceClassification"], **keys}

    return change


class _Delete:
    pass


DELETE = _Delete()
_HUGE = b"9" * 5000

# Name, change, pattern of the field that the error must name.
CHANGES: list[tuple[str, Change, str]] = [
    ("magic-wrong", _prologue(magic=b"EDGLLAMB"), "prologue.magic"),
    ("magic-gguf", _prologue(magic=b"GGUF\3\0\0\0"), "prologue.magic"),
    ("major-0", _prologue(major=0), "prologue.major"),
    ("major-2", _prologue(major=2), "prologue.major"),
    ("major-65535", _prologue(major=65535), "prologue.major"),
    ("prologue-hash", _prologue(hash=bytes(8)), "prologue.hash"),
    ("reserved", _prologue(reserved=1), "prologue.reserved"),
    ("header-length-0", _prologue(header_length=0), "prologue.header_length"),
    ("header-length-1", _prologue(header_length=1), "prologue.header_length"),
    ("header-length-over-cap", _prologue(header_length=(1 << 20) + 1), "prologue.header_length"),
    ("header-length-over-file", _prologue(header_length=1 << 20), "prologue.header_length"),
    ("header-length-max", _prologue(header_length=MASK), "prologue.header_length"),
    ("header-length-less", _prologue(header_length=lambda p: len(dump(p.header)) - 1), "prologue.header_hash"),
    ("data-offset-0", _prologue(data_offset=0), "prologue.data_offset"),
    ("data-offset-less", _prologue(data_offset=lambda p: p.data_offset - 4096), "prologue.data_offset"),
    ("data-offset-more", _prologue(data_offset=lambda p: p.data_offset + 4096), "prologue.data_offset"),
    ("data-offset-misaligned", _prologue(data_offset=lambda p: p.data_offset + 64), "prologue.data_offset"),
    ("data-offset-max", _prologue(data_offset=MASK), "prologue.data_offset"),
    ("data-length-0", _prologue(data_length=0), "prologue.data_length"),
    ("data-length-misaligned", _prologue(data_length=lambda p: len(p.data) - 1), "prologue.data_length"),
    ("data-length-less", _prologue(data_length=lambda p: len(p.data) - 64), "trailer"),
    ("data-length-more", _prologue(data_length=lambda p: len(p.data) + 64), "trailer.section_offset"),
    ("data-length-over-file", _prologue(data_length=1 << 40), "prologue.data_length"),
    ("data-length-overflows", _prologue(data_length=MASK - 63), "prologue.data_length"),
    ("header-hash", _prologue(header_hash=bytes(16)), "prologue.header_hash"),
    ("header-padding", lambda p: setattr(p, "header_fill", 1), "header.padding"),
    # the header as JSON
    ("json-not-utf8", _header_raw(_with_key(b'"\xff"')), "header"),
    ("json-bom", _header_raw(lambda raw: b"\xef\xbb\xbf" + raw), "header"),
    ("json-utf16", _header_raw(lambda raw: raw.decode().encode("utf-16")), "header"),
    ("json-duplicate-key", _header_raw(_with_key(b'1,"x":2')), "header"),
    ("json-duplicate-key-deep", _header_raw(_with_key(b'[{"a":{"y":1,"y":1}}]')), "header"),
    ("json-nan", _header_raw(_with_key(b"NaN")), "header"),
    ("json-infinity", _header_raw(_with_key(b"-Infinity")), "header"),
    ("json-1e999", _header_raw(_with_key(b"1e999")), "header"),
    ("json-int-2-63", _header_raw(_with_key(b"9223372036854775808")), "header"),
    ("json-int-5000-digits", _header_raw(_with_key(_HUGE)), "header"),
    ("json-int-1m-digits", _header_raw(_with_key(b"9" * 1_000_000)), "header"),
    ("json-fraction-5000-digits", _header_raw(_with_key(b"0." + _HUGE)), "header"),
    ("json-lone-surrogate", _header_raw(_with_key(b'"\\ud800"')), "header"),
    ("json-lone-surrogate-key", _header_raw(_with_key(b'{"\\uDFFF":0}')), "header"),
    ("json-reversed-surrogates", _header_raw(_with_key(b'"\\udc00\\ud800"')), "header"),
    ("json-control-character", _header_raw(_with_key(b'"\n"')), "header"),
    ("json-nul", _header_raw(lambda raw: raw + b"\0"), "header"),
    ("json-deep-lists", _header_raw(_with_key(b"[" * 20_000 + b"]" * 20_000)), "header"),
    ("json-deep-objects", _header_raw(_with_key(b'{"a":' * 20_000 + b"0" + b"}" * 20_000)), "header"),
    ("json-deep-unclosed", _header_raw(_with_key(b"[" * 20_000)), "header"),
    ("json-many-values", _header_raw(_with_key(b"[" + b"0," * 500_000 + b"0]")), "header"),
    ("json-many-lists", _header_raw(_with_key(b"[" + b"[]," * 340_000 + b"0]")), "header"),
    ("json-quotes", _header_raw(lambda raw: b'{"' + b'"\\' * 500_000), "header"),
    ("json-unterminated", _header_raw(lambda raw: b'{"' + b"\\n" * 500_000), "header"),
    ("json-trailing", _header_raw(lambda raw: raw + b"{}"), "header"),
    ("json-cut", _header_raw(lambda raw: raw[:-1]), "header"),
    ("json-list", _header_raw(lambda raw: b"[" + raw + b"]"), "header"),
    ("json-comment", _header_raw(lambda raw: b"/**/" + raw), "header"),
    ("json-empty", _header_raw(lambda raw: b"  "), "header"),
    ("json-pickle", _header_raw(lambda raw: b"cos\nsystem\n(S'true'\ntR."), "header"),
    # what the header says
    ("features-missing", _set("required_features", DELETE), "header"),
    ("features-object", _set("required_features", {}), "header.required_features"),
    ("features-unknown", _set("required_features", ["sparse"]), "header.required_features[0]"),
    ("features-number", _set("required_features", [1]), "header.required_features[0]"),
    ("features-list", _set("required_features", [[]]), "header.required_features[0]"),
    ("quantization-missing", _set("quantization", DELETE), "header"),
    ("scheme-unknown", _set("quantization.scheme", "int3.g64"), "header.quantization.scheme"),
    ("group-size-64", _set("quantization.group_size", 64), "header.quantization.group_size"),
    ("group-size-0", _set("quantization.group_size", 0), "header.quantization.group_size"),
    ("group-size-float", _set("quantization.group_size", 128.0), "header.quantization.group_size"),
    ("row-block-32", _set("quantization.row_block", 32), "header.quantization.row_block"),
    ("method-missing", _set("quantization.method", DELETE), "header.quantization"),
    ("method-escape", _set("quantization.method", "\x1b]0;owned\x07"), "header.quantization.method"),
    ("lm-head-bits-5", _set("quantization.lm_head_bits", 5), "header.quantization.lm_head_bits"),
    ("lm-head-bits-4", _set("quantization.lm_head_bits", 4), "header.tensors[0].layout"),
    ("lm-head-bits-16", _set("quantization.lm_head_bits", 16), "header.tensors"),
    ("lm-head-bits-true", _set("quantization.lm_head_bits", True), "header.quantization.lm_head_bits"),
    ("config-missing", _set("config", DELETE), "header"),
    ("config-list", _set("config", []), "header.config"),
    ("config-empty", _set("config", {}), "header.config"),
    ("config-negative", _set("config.hidden_size", -48), "header.config.hidden_size"),
    ("config-zero", _set("config.num_attention_heads", 0), "header.config.num_attention_heads"),
    ("config-huge", _set("config.vocab_size", 2**62), "header.config.vocab_size"),
    ("config-overflow", _set("config.intermediate_size", 2**24 + 1), "header.config.intermediate_size"),
    ("config-string", _set("config.hidden_size", "48"), "header.config.hidden_size"),
    ("config-bool", _set("config.num_hidden_layers", True), "header.config.num_hidden_layers"),
    ("config-float", _set("config.num_hidden_layers", 1.0), "header.config.num_hidden_layers"),
    ("config-kv-heads", _set("config.num_key_value_heads", 3), "header.config.num_key_value_heads"),
    ("config-unknown-key", _set("config.sparse_attention", True), "header.config"),
    ("config-architecture", _set("config.architectures", ["GPT2LMHeadModel"]), "header.config.architectures"),
    ("classifier-without-score", _classifier(), "header.tensors[0].name"),
    ("classifier-tied-too", _classifier(tie_word_embeddings=False), "header.tensors[0].name"),
    ("classifier-labels-list", _classifier(id2label=["a", "b"]), "header.config.id2label"),
    ("classifier-labels-none", _classifier(id2label={}), "header.config.id2label"),
    ("classifier-labels-gap", _classifier(id2label={"0": "a", "2": "b"}), "header.config.id2label"),
    ("classifier-labels-number", _classifier(id2label={"0": "a", "1": 5}), "header.config.id2label"),
    ("classifier-labels-differ", _classifier(id2label={"0": "a"}, num_labels=2), "header.config.num_labels"),
    ("classifier-labels-zero", _classifier(num_labels=0), "header.config.num_labels"),
    ("classifier-labels-huge", _classifier(num_labels=2**62), "header.config.num_labels"),
    ("classifier-labels-true", _classifier(num_labels=True), "header.config.num_labels"),
    ("classifier-problem", _classifier(problem_type="guessing"), "header.config.problem_type"),
    ("classifier-problem-list", _classifier(problem_type=[]), "header.config.problem_type"),
    ("config-more-layers", _set("config.num_hidden_layers", 2), "header.tensors"),
    ("config-4096-layers", _set("config.num_hidden_layers", 4096), "header.tensors"),
    ("config-many-layers", _many_layers, "header.tensors[0]"),
    ("config-other-vocab", _set("config.vocab_size", 38), "header.tensors[0].shape"),
    ("config-untied", _set("config.tie_word_embeddings", False), "header.tensors"),
    ("config-biases", _set("config.attention_bias", True), "header.tensors"),
    ("config-head-dim", _set("config.head_dim", 14), "header.tensors[3].shape"),
    ("config-beyond-file", _bigger_config, "header.tensors[0].nbytes"),
    ("config-beyond-file-2", _prologue_length_of_bigger_config, "prologue.data_length"),
    # the tensor list
    ("tensors-missing", _set("tensors", DELETE), "header"),
    ("tensors-object", _set("tensors", {}), "header.tensors"),
    ("tensors-empty", _set("tensors", []), "header.tensors"),
    ("tensors-one-less", _set("tensors", lambda t: t[:-1]), "header.tensors"),
    ("tensors-one-more", _set("tensors", lambda t: [*t, t[-1]]), "header.tensors"),
    ("tensors-null", _set("tensors.4", None), "header.tensors[4]"),
    ("tensors-swapped", _swap_tensors, "header.tensors[1].name"),
    ("name-wrong", _set("tensors.3.name", "x"), "header.tensors[3].name"),
    ("name-number", _set("tensors.3.name", 3), "header.tensors[3].name"),
    ("name-missing", _set("tensors.3.name", DELETE), "header.tensors[3]"),
    ("name-twice", _set("tensors.1.name", "model.embed_tokens.qweight"), "header.tensors[1].name"),
    ("layout-unknown", _set("tensors.3.layout", "int2.g32"), "header.tensors[3].layout"),
    ("layout-other", _set("tensors.3.layout", "f16"), "header.tensors[3].layout"),
    ("layout-list", _set("tensors.3.layout", []), "header.tensors[3].layout"),
    ("shape-larger", _set("tensors.3.shape.0", lambda n: n + 16), "header.tensors[3].shape"),
    ("shape-smaller", _set("tensors.3.shape.1", lambda n: n - 1), "header.tensors[3].shape"),
    ("shape-zero", _set("tensors.3.shape.0", 0), "header.tensors[3].shape"),
    ("shape-negative", _set("tensors.3.shape.0", lambda n: -n), "header.tensors[3].shape"),
    ("shape-overflow", _set("tensors.3.shape", [2**32, 2**32]), "header.tensors[3].shape"),
    ("shape-float", _set("tensors.3.shape.0", float), "header.tensors[3].shape"),
    ("shape-nested", _set("tensors.3.shape.0", [[1]]), "header.tensors[3].shape"),
    ("shape-transposed", _set("tensors.9.shape", lambda s: [*s[::-1], 1]), "header.tensors[9].shape"),
    ("shape-rank", _set("tensors.3.shape", lambda s: s[:1]), "header.tensors[3].shape"),
    ("shape-missing", _set("tensors.3.shape", DELETE), "header.tensors[3]"),
    ("offset-first", _set("tensors.0.offset", 64), "header.tensors[0].offset"),
    ("offset-hole", _set("tensors.3.offset", lambda n: n + 64), "header.tensors[3].offset"),
    ("offset-overlap", _set("tensors.3.offset", lambda n: n - 64), "header.tensors[3].offset"),
    ("offset-misaligned", _set("tensors.3.offset", lambda n: n + 1), "header.tensors[3].offset"),
    ("offset-negative", _set("tensors.3.offset", -64), "header.tensors[3].offset"),
    ("offset-huge", _set("tensors.3.offset", 2**63 - 64), "header.tensors[3].offset"),
    ("offset-float", _set("tensors.3.offset", float), "header.tensors[3].offset"),
    ("offset-false", _set("tensors.0.offset", False), "header.tensors[0].offset"),
    ("offset-null", _set("tensors.3.offset", None), "header.tensors[3].offset"),
    ("nbytes-less", _set("tensors.3.nbytes", lambda n: n - 64), "header.tensors[3].nbytes"),
    ("nbytes-more", _set("tensors.3.nbytes", lambda n: n + 64), "header.tensors[3].nbytes"),
    ("nbytes-zero", _set("tensors.3.nbytes", 0), "header.tensors[3].nbytes"),
    ("nbytes-negative", _set("tensors.3.nbytes", lambda n: -n), "header.tensors[3].nbytes"),
    ("nbytes-huge", _set("tensors.3.nbytes", 2**63 - 1), "header.tensors[3].nbytes"),
    ("nbytes-float", _set("tensors.3.nbytes", float), "header.tensors[3].nbytes"),
    ("nbytes-string", _set("tensors.3.nbytes", str), "header.tensors[3].nbytes"),
    ("hash-short", _set("tensors.3.xxh3_128", lambda h: h[:-1]), "header.tensors[3].xxh3_128"),
    ("hash-upper", _set("tensors.3.xxh3_128", "A" * 32), "header.tensors[3].xxh3_128"),
    ("hash-number", _set("tensors.3.xxh3_128", 0), "header.tensors[3].xxh3_128"),
    ("hash-digits", _set("tensors.3.xxh3_128", "٣" * 32), "header.tensors[3].xxh3_128"),
    ("hash-missing", _set("tensors.3.xxh3_128", DELETE), "header.tensors[3]"),
    ("data-longer", lambda p: setattr(p, "data", p.data + bytes(64)), "prologue.data_length"),
    ("data-shorter", lambda p: setattr(p, "data", p.data[:-64]), "header.tensors[18].nbytes"),
    # the trailer
    ("no-metadata", _no_sections, "trailer|prologue.data_length"),
    ("trailer-magic", _trailer(magic=b"EDGL-ENE"), "trailer.magic"),
    ("trailer-superseded", _trailer(magic=b"EDGL-OLD"), "trailer.magic"),
    ("trailer-hash", _trailer(hash=bytes(8)), "trailer.hash"),
    ("trailer-end-0", _trailer(end=0), "trailer.end"),
    ("trailer-end-max", _trailer(end=MASK), "trailer.end"),
    ("trailer-appended-byte", lambda p: setattr(p, "tail", b"\0"), "trailer.magic"),
    ("trailer-appended-64", lambda p: setattr(p, "tail", bytes(64)), "trailer.magic"),
    ("section-offset-0", _trailer(section_offset=0), "trailer.section_offset"),
    ("section-offset-in-data", _trailer(section_offset=lambda p: p.data_end - 64), "trailer.section_offset"),
    ("section-offset-later", _trailer(section_offset=lambda p: p.data_end + 64), "trailer"),
    ("section-offset-misaligned", _trailer(section_offset=lambda p: p.data_end + 1), "trailer.section_offset"),
    ("section-offset-max", _trailer(section_offset=MASK - 63), "trailer.section_offset"),
    ("index-offset-0", _trailer(index_offset=0), "trailer.index_offset"),
    ("index-offset-max", _trailer(index_offset=MASK - 63), "trailer.index_offset"),
    ("index-offset-misaligned", _trailer(index_offset=lambda p: p.data_end + 1), "trailer.index_offset"),
    ("index-offset-less", _trailer(index_offset=lambda p: p.data_end), "trailer.index_length"),
    ("index-length-0", _trailer(index_length=0), "trailer.index_length"),
    ("index-length-max", _trailer(index_length=MASK), "trailer.index_length"),
    (
        "index-length-more",
        _trailer(index_length=lambda p: len(dump(p.sections[-1].index)) + 64),
        "trailer.index_length",
    ),
    ("index-length-less", _trailer(index_length=lambda p: len(dump(p.sections[-1].index)) - 1), "metadata.*"),
    ("section-hash", _trailer(section_hash=bytes(16)), "trailer.section_hash"),
    ("metadata-too-large", _large_metadata, "trailer.section_offset"),
    ("metadata-large-damaged", _large_damaged_file, "metadata.files[0].xxh3_128"),
    ("sections-too-many", _too_many_sections, "trailer"),
    # the index
    ("index-not-json", _index_raw(lambda raw: b"nonsense"), "metadata"),
    ("index-duplicate-key", _index_raw(_with_key(b'1,"x":1')), "metadata"),
    ("index-padding", lambda p: setattr(p.sections[-1], "fill", 1), "metadata.padding"),
    ("provenance-missing", _index("provenance", DELETE), "metadata"),
    ("provenance-list", _index("provenance", []), "metadata.provenance"),
    ("receipt-number", _index("receipt", 1), "metadata.receipt"),
    ("files-missing", _index("files", DELETE), "metadata"),
    ("files-object", _index("files", {}), "metadata.files"),
    ("files-unlisted", _index("files", []), "trailer.index_offset"),
    ("files-first-unlisted", _index("files", lambda files: files[1:]), "metadata.files[0].offset"),
    ("files-number", _index("files.0", 7), "metadata.files[0]"),
    ("files-twice", _files_twice, "metadata.files[1].offset"),
    ("files-too-many", _many_files, "metadata.files"),
    ("files-reversed", _index("files", lambda files: files[::-1]), "metadata.files[1].offset"),
    ("file-name-parent", _index("files.0.name", "../../evil"), "metadata.files[0].name"),
    ("file-name-slash", _index("files.0.name", "a/b"), "metadata.files[0].name"),
    ("file-name-hidden", _index("files.0.name", ".bashrc"), "metadata.files[0].name"),
    ("file-name-newline", _index("files.0.name", "a\n"), "metadata.files[0].name"),
    ("file-name-empty", _index("files.0.name", ""), "metadata.files[0].name"),
    ("file-name-long", _index("files.0.name", "a" * 65), "metadata.files[0].name"),
    ("file-name-twice", _index("files.1.name", "tokenizer_config.json"), "metadata.files[1].name"),
    ("file-offset-in-weights", _file_in_weights, "metadata.files[0].offset"),
    ("file-offset-0", _index("files.0.offset", 0), "metadata.files[0].offset"),
    ("file-offset-negative", _index("files.0.offset", -64), "metadata.files[0].offset"),
    ("file-offset-misaligned", _index("files.0.offset", lambda n: n + 1), "metadata.files[0].offset"),
    ("file-offset-huge", _index("files.1.offset", 2**63 - 64), "metadata.files[1].nbytes"),
    ("file-nbytes-huge", _index("files.1.nbytes", 2**63 - 1), "metadata.files[1].nbytes"),
    ("file-nbytes-negative", _index("files.0.nbytes", -1), "metadata.files[0].nbytes"),
    ("file-nbytes-less", _index("files.0.nbytes", lambda n: n - 1), "metadata.padding"),
    ("file-nbytes-more", _index("files.0.nbytes", lambda n: n + 1), "metadata.files[0].xxh3_128"),
    ("file-hash", _index("files.0.xxh3_128", "0" * 32), "metadata.files[0].xxh3_128"),
    ("file-padding", _file_padding, "metadata.padding"),
    ("file-hidden-bytes", _hidden_bytes, "trailer.index_offset"),
]


def cases(valid: bytes) -> Iterator[tuple[str, bytes, str]]:
    """(name, the bad file, regular expression for the field) of every case."""
    parts = Parts.take_apart(valid)
    for name, change, field in CHANGES:
        changed = parts.copy()
        change(changed)
        pattern = field if "|" in field or "*" in field else re.escape(field)
        yield name, changed.build(), pattern
    for size in (0, 1, 7, 8, 63, 64, 4095, 4096, 4287):
        yield f"first-{size}-bytes", valid[:size], "file" if size not in (4287,) else ".*"
    for part in range(1, 8):
        size = len(valid) * part // 8
        yield f"cut-{part}-eighths", valid[:size], r"file|prologue\.data_length|trailer.*"
    yield "zeros", bytes(len(valid)), "prologue.magic"
    yield "text", b"once upon a time " * 1000, "prologue.magic"
    yield "twice", valid + valid, "trailer.*"
