"""The format's happy path: what is written is what is read, for every layout and any ragged shape."""

from __future__ import annotations

import gc
import os
import pickle
import sys

import numpy as np
import pytest

from edgellama import quant
from edgellama.config import LlamaConfig
from edgellama.errors import EdgellamaError, FormatError
from edgellama.format import LAYOUTS, ModelWriter, TensorSpec, model_tensors, open_model
from edgellama.format.schema import tensor_count
from edgellama.format.strict_json import locate, parse_object
from format_builder import Parts, dump
from format_files import CONFIG, FILES, PROVENANCE, tensor_bytes, write_file

SHAPES = [
    {},
    {"tie_word_embeddings": False},
    {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 2},
    {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    {"hidden_size": 128, "intermediate_size": 256, "head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 1},
    {"vocab_size": 1, "hidden_size": 2, "intermediate_size": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("overrides", SHAPES, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_round_trip(tmp_path, overrides, bits):
    path = write_file(tmp_path / "m.edgellama", lm_head_bits=bits, **overrides)
    with open_model(path) as model:
        specs = model_tensors(model.config, bits)
        assert list(model.tensors) == [spec.name for spec in specs]
        assert len(specs) == tensor_count(model.config, bits)
        for spec in specs:
            entry, stored = model.tensors[spec.name], model.array(spec.name)
            assert (entry.layout, entry.shape) == (spec.layout, spec.shape)
            assert np.array_equal(stored, tensor_bytes(spec)), spec.name
            assert stored.nbytes == entry.nbytes
            assert stored.ctypes.data == model.address(spec.name)
            assert model.address(spec.name) % 64 == 0
        assert next(iter(model.tensors.values())).offset % 4096 == 0
        assert model.config == LlamaConfig.from_dict({**CONFIG, **overrides})
        assert model.header["config"] == {**CONFIG, **overrides}
        assert (model.lm_head_bits, model.quantization["method"]) == (bits, "rtn")
        assert dict(model.files) == FILES
        assert model.provenance == PROVENANCE
        assert model.receipt is None
        assert model.size == path.stat().st_size
        model.verify()


@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (17, 129), (37, 48), (576, 576), (15, 1000)])
def test_layouts_agree_with_quant(shape):
    """Sizes here, packing in quant.py: both follow FORMAT.md section 4."""
    n, k = shape
    packed = {
        "int4.g128": quant.pack_int4(np.zeros(shape, np.uint8)),
        "int8.g128": quant.pack_int8(np.zeros(shape, np.uint8)),
        "scales.g128": quant.pack_scales(np.zeros((n, -(-k // 128)), np.float16)),
        "f16.r16": quant.pack_f16(np.zeros(shape, np.float16)),
        "f16": np.zeros(shape, np.float16),
    }
    for name, array in packed.items():
        layout = LAYOUTS[name]
        assert layout.stored_shape(shape) == array.shape
        assert layout.dtype == array.dtype
        assert layout.nbytes(shape) == array.nbytes


def test_a_real_matrix_comes_back(tmp_path):
    """Quantize, pack, write, map, unpack: the same numbers."""
    rng = np.random.default_rng(1)
    weights = {}
    with ModelWriter(tmp_path / "m.edgellama", CONFIG, lm_head_bits=16, method="rtn") as writer:
        scales = {}
        for spec in writer.specs:
            base = spec.name.rpartition(".")[0]
            if spec.layout == "int4.g128":
                w = rng.standard_normal(spec.shape).astype(np.float32)
                codes, scales[base] = quant.quantize_rtn(w, 4)
                weights[base] = quant.dequantize(codes, scales[base], 4)
                writer.write(spec.name, quant.pack_int4(codes))
            elif spec.layout == "scales.g128":
                writer.write(spec.name, quant.pack_scales(scales[base]))
            else:
                writer.write(spec.name, tensor_bytes(spec))
        writer.finish({}, {})
    with open_model(tmp_path / "m.edgellama") as model:
        for name, w in weights.items():
            assert np.array_equal(quant.load_matrix(model, name), w)


def test_the_schema_in_full():
    config = LlamaConfig.from_dict({**CONFIG, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True})
    a, m = "model.layers.0.self_attn", "model.layers.0.mlp"
    qkv, gate_up = [f"{a}.{x}_proj" for x in "qkv"], [f"{m}.gate_proj", f"{m}.up_proj"]
    assert [spec.name for spec in model_tensors(config, 8)] == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        *[f"{x}.qweight" for x in qkv],
        *[f"{x}.scales" for x in qkv],
        *[f"{x}.bias" for x in qkv],
        *[f"{a}.o_proj.{part}" for part in ("qweight", "scales", "bias")],
        "model.layers.0.post_attention_layernorm.weight",
        *[f"{x}.qweight" for x in gate_up],
        *[f"{x}.scales" for x in gate_up],
        *[f"{x}.bias" for x in gate_up],
        *[f"{m}.down_proj.{part}" for part in ("qweight", "scales", "bias")],
        "model.norm.weight",
        "lm_head.qweight",
        "lm_head.scales",
    ]
    shapes = {spec.name: (spec.layout, spec.shape) for spec in model_tensors(config, 4)}
    assert shapes[f"{a}.k_proj.qweight"] == ("int4.g128", (24, 48))
    assert shapes[f"{a}.k_proj.bias"] == ("f32", (24,))
    assert shapes[f"{m}.down_proj.scales"] == ("scales.g128", (48, 150))
    assert shapes["lm_head.qweight"] == ("int4.g128", (37, 48))


def test_views_are_read_only(tmp_path):
    with open_model(write_file(tmp_path / "m.edgellama")) as model:
        array = model.array("model.norm.weight")
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
        del array


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_close_releases_the_map_with_the_last_view(tmp_path):
    path = write_file(tmp_path / "m.edgellama")

    def mapped() -> bool:
        with open("/proc/self/maps") as maps:
            return any(str(path) in line for line in maps)

    model = open_model(path)
    array = model.array("model.norm.weight")
    expected = array.copy()
    model.close()
    model.close()
    assert model.closed and mapped()
    assert np.array_equal(array, expected)
    with pytest.raises(EdgellamaError, match="closed"):
        model.array("model.norm.weight")
    with pytest.raises(EdgellamaError, match="closed"):
        model.address("model.norm.weight")
    del array
    gc.collect()
    assert not mapped()
    assert not any(str(path) in os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))


def test_a_forgotten_model_is_collected(tmp_path):
    path = write_file(tmp_path / "m.edgellama")
    array = open_model(path).array("model.norm.weight")
    gc.collect()
    assert np.isfinite(array).all()


def test_unknown_tensor(tmp_path):
    with open_model(write_file(tmp_path / "m.edgellama")) as model, pytest.raises(KeyError):
        model.array("lm_head.weight")


def test_verify_reports_progress(tmp_path):
    seen: list[tuple[int, int]] = []
    with open_model(write_file(tmp_path / "m.edgellama")) as model:
        model.verify(lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0


def test_later_minor_versions_are_read(tmp_path):
    """Unknown keys, files and minor numbers are ignored; the bytes of an unknown file are still checked."""
    parts = Parts.take_apart(write_file(tmp_path / "m.edgellama").read_bytes())
    parts.prologue["minor"] = 7
    parts.header["new"] = {"a": [1, None]}
    parts.header["tensors"][0]["new"] = 1
    parts.header["quantization"]["new"] = 1
    index = parts.sections[0].index
    index["new"] = 1
    index["files"][0]["name"] = "vocab.v2"
    path = tmp_path / "later.edgellama"
    path.write_bytes(parts.build())
    with open_model(path) as model:
        model.verify()
        assert list(model.files) == ["chat_template.jinja"]


def test_gaps_between_tensors_are_checked_by_verify(tmp_path):
    path = write_file(tmp_path / "m.edgellama", hidden_size=50, num_attention_heads=5, num_key_value_heads=5)
    raw = bytearray(path.read_bytes())
    with open_model(path) as model:
        entries = list(model.tensors.values())
        ends = [entry.offset + entry.nbytes for entry in entries]
        gaps = [end for end, entry in zip(ends, entries[1:], strict=False) if entry.offset > end]
    assert gaps
    gaps.append(ends[-1])  # hidden_size 50: the last norm does not fill its 64 bytes
    for gap in [gaps[0], gaps[-1]]:
        damaged = bytearray(raw)
        damaged[gap] = 1
        path.write_bytes(damaged)
        with open_model(path) as model, pytest.raises(FormatError, match=rf"data.padding \(byte {gap}\)"):
            model.verify()


def test_format_error_survives_pickling():
    error = FormatError("a.b", 3, "must be 1", "x.edgellama")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "x.edgellama: a.b (byte 3): must be 1"


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": 1}',
        b'{"a": [1.5, -3, "\\ud83d\\ude00", null, true]}',
        b' {"\xc3\xa9": {}} \n',
        b'{"a": 9223372036854775807}',
    ],
)
def test_strict_json_reads_what_json_reads(text):
    import json

    assert parse_object(text, "x", 0) == json.loads(text)


def test_locate():
    document = {"é": [1, {"b": "]}"}, {"c": {"d": [True]}}]}
    data = dump(document)
    assert data[locate(data, ("é", 1)) :].startswith(b'{"b"')
    assert data[locate(data, ("é", 2, "c", "d", 0)) :].startswith(b"true")
    assert locate(data, ("é", 3)) is None
    assert locate(data, ("x",)) is None


def test_the_file_opens_with_few_reads(tmp_path, monkeypatch):
    """Opening must not read tensor data: a 3.6 GB file has to open at once."""
    path = write_file(tmp_path / "m.edgellama", hidden_size=256, intermediate_size=4096)
    from edgellama.format.reader import FileSource

    read, original = [], FileSource.read
    monkeypatch.setattr(
        FileSource, "read", lambda self, offset, n: read.append((offset, n)) or original(self, offset, n)
    )
    with open_model(path) as model:
        first = next(iter(model.tensors.values())).offset
        last = list(model.tensors.values())[-1]
        assert not [r for r in read if first < r[0] + r[1] and r[0] < last.offset + last.nbytes and r[1]]


def test_spec_is_hashable():
    assert len({TensorSpec("a", "f32", (1,)), TensorSpec("a", "f32", (1,))}) == 1


def test_without_pread(tmp_path, monkeypatch):
    """Windows has none."""
    path = write_file(tmp_path / "m.edgellama")
    monkeypatch.delattr(os, "pread", raising=False)
    with open_model(path) as model:
        model.verify()


def test_a_file_that_is_cut_after_opening(tmp_path):
    """`verify` reads instead of touching the map: an error, not SIGBUS."""
    path = write_file(tmp_path / "m.edgellama")
    with open_model(path) as model:
        os.truncate(path, 10_000)
        with pytest.raises(FormatError, match="became shorter"):
            model.verify()
