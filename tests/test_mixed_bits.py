"""Files in which some of the layers' matrices have 8 bits: the format's rules, and the backends that read them."""

import itertools
import re

import numpy as np
import pytest

pytest.importorskip("numba")
from checkpoints import DEFAULTS, random_weights
from closeness import MAX_KL, kl_divergence, relative_error
from edgellama import quant
from edgellama.backends.cpu import CpuBackend
from edgellama.backends.reference import ReferenceBackend
from edgellama.cli import main
from edgellama.config import LlamaConfig
from edgellama.errors import FormatError
from edgellama.format import ModelWriter, append_metadata, model_tensors, open_model, unit_names
from edgellama.format.schema import UNITS, tensor_count
from edgellama_convert.checkpoint import Checkpoint
from edgellama_convert.export import export_hf
from format_builder import Parts
from format_files import CONFIG, write_file
from mixed_files import CODE_BITS, units, write_mixed
from test_cpu_backend import check_batches, run, tokens_of

VOCAB = DEFAULTS["vocab_size"]
BIASES = {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6, "tie_word_embeddings": True}
MIXES = {
    "qkv of the last": (units("1.qkv"), {}),
    "every other": (units("0.o", "0.down", "1.qkv", "1.gate_up"), BIASES),
    "gate and up": (units("0.gate_up", "1.gate_up"), {"num_key_value_heads": 1, "head_dim": 40}),
    "all": (units(*(f"{i}.{name}" for i in range(2) for name in ("qkv", "o", "gate_up", "down"))), {}),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """name of MIXES -> an open file."""
    opened = {}

    def get(name):
        if name not in opened:
            int8_units, overrides = MIXES[name]
            path = tmp_path_factory.mktemp("mixed") / "m.edgellama"
            opened[name] = open_model(write_mixed(path, int8_units, max_position_embeddings=512, **overrides))
        return opened[name]

    yield get
    for file in opened.values():
        file.close()


# -- the format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXES)
def test_the_header_gives_every_layout(mixed, name):
    """The units' matrices and no others have 8 bits; the rest is as ever, adjacency included."""
    file, (int8_units, _) = mixed(name), MIXES[name]
    assert file.header["required_features"] == ["mixed_bits"]
    assert file.quantization["int8_units"] == list(file.int8_units) == int8_units
    assert file.quantization["scheme"] == "int4.g128"
    plain = {spec.name: spec for spec in model_tensors(file.config, 8)}
    assert list(file.tensors) == list(plain) and len(plain) == tensor_count(file.config, 8)
    eight = {f"{unit.rsplit('.', 2)[0]}.{part}" for unit in int8_units for part in UNITS[".".join(unit.split(".")[3:])]}
    for entry in file.tensors.values():
        layout = plain[entry.name].layout
        if entry.name.removesuffix(".qweight") in eight:
            assert layout == "int4.g128" and entry.layout == "int8.g128"
        else:
            assert entry.layout == layout
    for layer in range(file.config.num_hidden_layers):
        for unit, parts in UNITS.items():
            entries = [file.tensors[f"model.layers.{layer}.{part}.qweight"] for part in parts]
            assert len({entry.layout for entry in entries}) == 1, unit
            for a, b in itertools.pairwise(entries):
                assert a.offset + a.nbytes == b.offset
    file.verify()


def test_unit_names_are_in_file_order():
    names = list(unit_names(LlamaConfig.from_dict(DEFAULTS)))
    assert names == [f"model.layers.{i}.{unit}" for i in range(2) for unit in UNITS]
    assert names == MIXES["all"][0]


def test_without_units_the_file_says_nothing_of_them(tmp_path):
    with open_model(write_mixed(tmp_path / "m.edgellama", [])) as file:
        assert file.header["required_features"] == [] and "int8_units" not in file.quantization
        assert file.int8_units == ()


@pytest.mark.parametrize(
    "int8_units",
    [
        ["model.layers.0.mlp.up_proj"],
        ["model.layers.2.mlp.down_proj"],
        units("0.o", "1.o")[::-1],
        units("0.o") * 2,
    ],
)
def test_the_writer_takes_canonical_lists_only(int8_units, tmp_path):
    with pytest.raises(ValueError, match="int8_units must be units of the config"):
        ModelWriter(tmp_path / "m.edgellama", DEFAULTS, method="rtn", int8_units=int8_units)
    assert list(tmp_path.iterdir()) == []


def test_metadata_of_a_mixed_file_can_be_edited(tmp_path):
    path = write_mixed(tmp_path / "m.edgellama", units("0.down"))
    append_metadata(path, {"chat_template.jinja": b"{{ 1 }}"})
    with open_model(path) as file:
        assert file.files == {"chat_template.jinja": b"{{ 1 }}"} and file.int8_units == tuple(units("0.down"))


O, DOWN = units("0.o", "0.down")
LIST = "header.quantization.int8_units"
HOSTILE = {
    "feature without a list": (["mixed_bits"], None, "header.quantization "),
    "list without the feature": ([], [O, DOWN], LIST),
    "empty list": (["mixed_bits"], [], LIST),
    "feature twice": (["mixed_bits", "mixed_bits"], [O, DOWN], "header.required_features[1]"),
    "another feature": (["mixed_bits", "sparse"], [O, DOWN], "header.required_features[1]"),
    "an object": (["mixed_bits"], {O: 1}, LIST),
    "a string": (["mixed_bits"], O, LIST),
    "wrong order": (["mixed_bits"], [DOWN, O], f"{LIST}[1]"),
    "duplicate": (["mixed_bits"], [O, O, DOWN], f"{LIST}[1]"),
    "a matrix's name": (["mixed_bits"], [O, "model.layers.0.mlp.up_proj"], f"{LIST}[1]"),
    "a layer beyond": (["mixed_bits"], [O, "model.layers.1.mlp.down_proj"], f"{LIST}[1]"),
    "a number": (["mixed_bits"], [O, 7], f"{LIST}[1]"),
    "a list within": (["mixed_bits"], [[O]], f"{LIST}[0]"),
    "an object within": (["mixed_bits"], [{}], f"{LIST}[0]"),
    "null": (["mixed_bits"], [None, DOWN], f"{LIST}[0]"),
    "a unit too many": (["mixed_bits"], [O, "model.layers.0.mlp.gate_up_proj", DOWN], "header.tensors[12].layout"),
    "a unit too few": (["mixed_bits"], [DOWN], "header.tensors[9].layout"),
    "very many": (["mixed_bits"], [O, *[DOWN] * 20_000], f"{LIST}[2]"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_by_name(case, tmp_path):
    features, int8_units, field = HOSTILE[case]
    path = write_file(tmp_path / "m.edgellama", int8_units=[O, DOWN])
    parts = Parts.take_apart(path.read_bytes())
    assert parts.header["quantization"]["int8_units"] == [O, DOWN]
    parts.header["required_features"] = features
    del parts.header["quantization"]["int8_units"]
    if int8_units is not None:
        parts.header["quantization"]["int8_units"] = int8_units
    path.write_bytes(parts.build())
    with pytest.raises(FormatError, match=re.escape(field)) as info:
        open_model(path)
    assert "\n" not in str(info.value) and len(str(info.value)) < 300


def test_layouts_that_the_list_does_not_give_are_refused(tmp_path):
    """A header without the list, tensors with 8 bits: what a backend would read far beyond the end."""
    path = write_file(tmp_path / "m.edgellama", int8_units=[DOWN])
    parts = Parts.take_apart(path.read_bytes())
    parts.header["required_features"] = []
    del parts.header["quantization"]["int8_units"]
    path.write_bytes(parts.build())
    with pytest.raises(FormatError, match=r"header\.tensors\[\d+\]\.layout .*int4\.g128"):
        open_model(path)


def test_a_reader_of_before_refuses_by_name(tmp_path, monkeypatch):
    from edgellama.format import validate

    path = write_file(tmp_path / "m.edgellama", int8_units=[DOWN])
    monkeypatch.setattr(validate, "SUPPORTED_FEATURES", frozenset())
    with pytest.raises(FormatError, match="'mixed_bits' is not supported: update edgellama"):
        open_model(path)


# -- the CPU backend -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ceiling", [0.0, 2.0])
@pytest.mark.parametrize("name", MIXES)
def test_bits_do_not_depend_on_threads_chunks_or_calls(mixed, name, ceiling):
    file, tokens = mixed(name), tokens_of(100)
    expected = run(CpuBackend(file, 128, n_threads=1, ceiling=ceiling), tokens)
    for n_threads, chunk, calls in [(2, 256, [100]), (3, 7, [100]), (2, 64, [70, 1, 1, 21, 7]), (1, 1, [100])]:
        backend = CpuBackend(file, 128, 1, n_threads, chunk, ceiling)
        ends = np.cumsum(calls)
        parts = [run(backend, tokens[end - n : end], end - n) for n, end in zip(calls, ends, strict=True)]
        assert (np.concatenate(parts) == expected).all(), (n_threads, chunk, calls)
        backend.close()


def test_bits_do_not_depend_on_what_shares_the_batch(mixed):
    check_batches(mixed("every other"), (50, 33), 64)


@pytest.mark.parametrize("name", MIXES)
def test_the_cpu_backend_equals_the_oracle(mixed, name):
    file, tokens = mixed(name), tokens_of(80)
    expected = run(ReferenceBackend(file, 80), tokens)
    # 15-bit activations and a float16 cache: two roundings of 2**-11 in each of two layers, seen through the logits.
    assert relative_error(run(CpuBackend(file, 80), tokens), expected) < 4 * 2.0**-11
    assert kl_divergence(expected, run(CpuBackend(file, 80, ceiling=1e9), tokens)) <= MAX_KL


def test_the_oracle_reads_eight_bits_where_they_are(mixed):
    """Weights closer to the source there, by the step's size, and only there."""
    file = mixed("every other")
    weights = random_weights(file.config.raw, 0)
    for entry in file.tensors.values():
        if entry.layout in CODE_BITS and entry.name.startswith("model.layers."):
            name = entry.name.removesuffix(".qweight")
            error = np.abs(quant.load_matrix(file, name) - weights[f"{name}.weight"]).max()
            largest = np.abs(weights[f"{name}.weight"]).max()
            assert error < largest / 200 if entry.layout == "int8.g128" else error > largest / 50


# -- torch ---------------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("name", MIXES)
def test_the_torch_backend_equals_the_oracle(mixed, name, monkeypatch):
    pytest.importorskip("torch")
    from closeness import ORACLE_TOLERANCE
    from edgellama.backends.gpu import weights
    from edgellama.backends.gpu.backend import TorchBackend

    file, tokens = mixed(name), tokens_of(40)
    expected = run(ReferenceBackend(file, 64), tokens)
    for keep, scratch in ((1 << 30, 1 << 30), (0, 50_000)):  # dequantized once; a piece at a time, as on a GPU
        monkeypatch.setattr(weights, "KEEP_BYTES", keep)
        monkeypatch.setattr(weights, "SCRATCH_BYTES", scratch)
        backend = TorchBackend(file, 64, device="cpu", kv_cache="float32")
        assert relative_error(run(backend, tokens), expected) < 1e-5 == ORACLE_TOLERANCE


# -- what is told and taken out ------------------------------------------------------------------------------------


def test_export_gives_the_weights_that_are_multiplied(mixed, tmp_path):
    file = mixed("every other")
    export_hf(file.path, tmp_path / "hf")
    with Checkpoint(tmp_path / "hf") as checkpoint:
        for name in file.tensors:
            if name.endswith(".qweight"):
                matrix = name.removesuffix(".qweight")
                stored = checkpoint.read(checkpoint.tensors[f"{matrix}.weight"])
                assert (stored == quant.load_matrix(file, matrix)).all()


def test_info_and_verify(mixed, capsys):
    path = str(mixed("every other").path)
    assert main(["info", path]) == 0
    assert re.search(r"weights +int4\.g128 rtn, 7 of 14 matrices in 8 bits; output layer", capsys.readouterr().out)
    assert main(["verify", path]) == 0
    assert CONFIG["num_hidden_layers"] == 1  # what the hostile cases count on
