"""A model written back as a Hugging Face folder: the very weights that the kernels use, in files others can load."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoints import make_checkpoint
from edgellama.errors import EdgellamaError
from edgellama.format import open_model
from edgellama.quant import load_matrix
from edgellama_convert import convert, export_hf
from edgellama_convert.checkpoint import Checkpoint


@pytest.fixture
def model(tmp_path):
    make_checkpoint(tmp_path / "source", attention_bias=True)
    return convert(tmp_path / "source", tmp_path / "m.edgellama", method="search").out


def stored_weights(path):
    """Hugging Face's name -> float32 values of everything in a model file."""
    values = {}
    with open_model(path) as file:
        for name, entry in file.tensors.items():
            base, _, kind = name.rpartition(".")
            if kind == "qweight" or entry.layout in ("f16", "f16.r16"):
                values[f"{base}.weight"] = load_matrix(file, base)
            elif entry.layout == "f32":
                values[name] = np.array(file.array(name))
    return values


def test_weights_are_those_of_the_file(model, tmp_path):
    report = export_hf(model, tmp_path / "hf")
    loaded = load_file(tmp_path / "hf" / "model.safetensors")
    want = stored_weights(model)
    assert set(loaded) == set(want)
    for name, values in want.items():
        assert loaded[name].dtype == np.float32
        np.testing.assert_array_equal(loaded[name], values, err_msg=name)
    assert report.shards == 1 and report.weights == sum(values.size for values in want.values())
    assert report.nbytes == sum(path.stat().st_size for path in (tmp_path / "hf").iterdir())


@pytest.mark.parametrize("lm_head_bits", [4, 8, 16])
def test_tied_models_stay_tied(tmp_path, lm_head_bits):
    make_checkpoint(tmp_path / "source", tie_word_embeddings=True)
    convert(tmp_path / "source", tmp_path / "m.edgellama", lm_head_bits=lm_head_bits, method="search")
    export_hf(tmp_path / "m.edgellama", tmp_path / "hf")
    loaded = load_file(tmp_path / "hf" / "model.safetensors")
    assert "lm_head.weight" not in loaded
    np.testing.assert_array_equal(
        loaded["model.embed_tokens.weight"], stored_weights(tmp_path / "m.edgellama")["model.embed_tokens.weight"]
    )


def test_slabs_do_not_show(model, tmp_path, monkeypatch):
    export_hf(model, tmp_path / "whole")
    monkeypatch.setattr("edgellama_convert.export._SLAB_WEIGHTS", 1)
    export_hf(model, tmp_path / "rows")
    name = "model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "rows" / name).read_bytes()


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 10), ("bfloat16", 7)])
def test_other_dtypes_are_rounded_once_to_nearest(model, tmp_path, dtype, bits):
    export_hf(model, tmp_path / "hf", dtype=dtype)
    want = stored_weights(model)
    with Checkpoint(tmp_path / "hf") as checkpoint:
        assert set(checkpoint.tensors) == set(want)
        for name, tensor in checkpoint.tensors.items():
            got = checkpoint.read(tensor)
            spacing = np.exp2(np.floor(np.log2(np.maximum(np.abs(want[name]), 2.0**-14))) - bits)
            assert (np.abs(got - want[name]) <= spacing / 2).all(), name
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["torch_dtype"] == dtype


def test_shards_have_an_index_and_the_same_weights(model, tmp_path):
    report = export_hf(model, tmp_path / "hf", max_shard_bytes=500_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) == report.shards > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    loaded = {}
    for shard in shards:
        part = load_file(tmp_path / "hf" / shard)
        assert {index["weight_map"][name] for name in part} == {shard}
        loaded.update(part)
    want = stored_weights(model)
    assert set(loaded) == set(want)
    assert index["metadata"]["total_size"] == 4 * sum(values.size for values in want.values())
    for name, values in want.items():
        np.testing.assert_array_equal(loaded[name], values)


def test_config_and_tokenizer_files_come_along(tiny_model, tiny_checkpoint, tmp_path):
    export_hf(tiny_model, tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (tiny_checkpoint / "tokenizer.json").read_bytes()
    before = json.loads((tiny_checkpoint / "config.json").read_text())
    after = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert after == {**before, "torch_dtype": "float32"}


def test_an_exported_folder_converts_again(model, tmp_path):
    export_hf(model, tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "again.edgellama", method="search")
    assert report.worst_tensor[1] < 0.02  # what 4 bits can say is found again, almost everywhere exactly


def test_targets_that_are_refused(model, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("words")
    for target, message in [
        (full, "is not empty"),
        (full / "thesis.tex", "is not a folder"),
        (tmp_path / "no" / "where", "does not exist"),
    ]:
        with pytest.raises(EdgellamaError, match=message):
            export_hf(model, target)
    assert [path.name for path in full.iterdir()] == ["thesis.tex"]
    with pytest.raises(EdgellamaError, match="dtype 'int8'"):
        export_hf(model, tmp_path / "x", dtype="int8")
    (tmp_path / "empty").mkdir()
    export_hf(model, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_nothing(model, tmp_path, monkeypatch, error):
    import edgellama_convert.export as module

    def fail(*args):
        raise error

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(module, "_cast", fail)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else EdgellamaError):
        export_hf(model, tmp_path / "hf")
    assert sorted(tmp_path.iterdir()) == before


def test_weights_beyond_float16_are_refused_by_name(tmp_path):
    from checkpoints import random_weights, write_safetensors

    config = make_checkpoint(tmp_path / "source")
    weights = random_weights(config, 0)
    weights["lm_head.weight"][0, 0] = 1e6
    write_safetensors(tmp_path / "source" / "model.safetensors", weights, "float32")
    convert(tmp_path / "source", tmp_path / "m.edgellama", method="search")
    with pytest.raises(EdgellamaError, match=r"lm_head\.weight has values too large for float16"):
        export_hf(tmp_path / "m.edgellama", tmp_path / "hf", dtype="float16")
    export_hf(tmp_path / "m.edgellama", tmp_path / "bf16", dtype="bfloat16")


@pytest.mark.torch
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_it(tmp_path, tied):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    make_checkpoint(tmp_path / "source", tie_word_embeddings=tied, attention_bias=True, dtype="bfloat16")
    convert(tmp_path / "source", tmp_path / "m.edgellama", method="search")
    want = stored_weights(tmp_path / "m.edgellama")
    for name, options in {"one": {}, "many": {"max_shard_bytes": 300_000}, "half": {"dtype": "bfloat16"}}.items():
        export_hf(tmp_path / "m.edgellama", tmp_path / name, **options)
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info.values()), info
        assert model.dtype == (torch.bfloat16 if name == "half" else torch.float32)
        if name != "half":
            state = model.state_dict()
            for key, values in want.items():
                np.testing.assert_array_equal(state[key].numpy(), values, err_msg=key)
