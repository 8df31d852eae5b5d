"""The layer-by-layer forward pass against the reference backend, for weights from all three places."""

import numpy as np
import pytest

from checkpoints import make_checkpoint
from closeness import ORACLE_TOLERANCE, all_logits, relative_error
from edgellama.backends.reference import ReferenceBackend
from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError
from edgellama.format import ModelWriter, open_model
from edgellama_convert import convert, export_hf
from edgellama_convert.checkpoint import Checkpoint
from edgellama_convert.files import read_config
from edgellama_convert.walk import Stream, Walk
from edgellama_convert.weights import CheckpointWeights, StoredWeights, check_same_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
CASES = {
    "gqa": {},
    "mha, biases, gelu": {
        "num_key_value_heads": 6,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "mqa, tied, wide heads": {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 48},
    "hidden 288, yarn": {"hidden_size": 288, "vocab_size": 401, "rope_scaling": YARN},
    "dynamic": {"rope_scaling": DYNAMIC, "max_position_embeddings": 24},
}


def run(walk):
    """float32 [tokens, vocab_size] of each stream."""
    walk.embed()
    for i in range(walk.config.num_hidden_layers):
        walk.layer(i)
    sizes = [stream.x.shape[1] for stream in walk.streams]
    logits = [np.empty((n, walk.config.vocab_size), np.float32) for n in sizes]
    for first, last, products in walk.logits([np.arange(n) for n in sizes]):
        for ours, product in zip(logits, products, strict=True):
            ours[:, first:last] = product.T
    return logits


def sequences(vocab_size):
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, n).astype(np.int32) for n in (40, 17, 1)]


@pytest.mark.parametrize("lm_head_bits", [4, 8, 16])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, lm_head_bits, tmp_path):
    config = make_checkpoint(tmp_path / "model", **CASES[name])
    convert(tmp_path / "model", tmp_path / "m.edgellama", lm_head_bits=lm_head_bits, receipt=False, method="search")
    tokens = sequences(config["vocab_size"])
    with open_model(tmp_path / "m.edgellama") as file:
        want = [all_logits(ReferenceBackend(file, 64), each) for each in tokens]
        with Walk([Stream(StoredWeights.of_file(file), tokens)], 2) as walk:
            (got,) = run(walk)
    assert relative_error(got, np.concatenate(want)) < ORACLE_TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_checkpoint_and_a_file_give_the_same_bits(dtype, tmp_path):
    """The very weights: a file's, exported as float32; and a float16 or bfloat16 checkpoint's own."""
    config = make_checkpoint(tmp_path / "model", dtype=dtype, attention_bias=True)
    convert(tmp_path / "model", tmp_path / "m.edgellama", receipt=False, method="search")
    export_hf(tmp_path / "m.edgellama", tmp_path / "exported")
    tokens = sequences(config["vocab_size"])
    with open_model(tmp_path / "m.edgellama") as file, Checkpoint(tmp_path / "exported") as checkpoint:
        exported = CheckpointWeights(read_config(tmp_path / "exported")[1], checkpoint)
        with Walk([Stream(exported, tokens), Stream(StoredWeights.of_file(file), tokens)], 2, compare=True) as walk:
            a, b = run(walk)
    np.testing.assert_array_equal(a, b)
    assert {error.squared_error for error in walk.errors.values()} == {0.0}
    assert len(walk.errors) == 7 * config["num_hidden_layers"] + 1


def test_bits_do_not_depend_on_threads_company_or_other_sequences(tmp_path):
    config = make_checkpoint(tmp_path / "model", hidden_size=288)
    convert(tmp_path / "model", tmp_path / "m.edgellama", receipt=False, method="search")
    tokens = sequences(config["vocab_size"])
    with open_model(tmp_path / "m.edgellama") as file, Checkpoint(tmp_path / "model") as checkpoint:
        ours = StoredWeights.of_file(file)
        source = CheckpointWeights(read_config(tmp_path / "model")[1], checkpoint)
        with Walk([Stream(ours, tokens)], 1) as walk:
            (alone,) = run(walk)
        with Walk([Stream(source, tokens[:1]), Stream(ours, tokens[::-1])], 3, compare=True) as walk:
            _, company = run(walk)
    ends = np.cumsum([len(each) for each in tokens[::-1]])[:-1]
    np.testing.assert_array_equal(np.concatenate(np.split(company, ends)[::-1]), alone)


def test_a_file_that_is_still_being_written(tmp_path):
    config = make_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    path = convert(tmp_path / "model", tmp_path / "m.edgellama", receipt=False, method="search").out
    tokens = sequences(config["vocab_size"])
    with open_model(path) as file, ModelWriter(tmp_path / "n.edgellama", config, method="search") as writer:
        for spec in writer.specs:
            writer.write(spec.name, file.array(spec.name))
        streams = [Stream(StoredWeights.of_file(file), tokens), Stream(StoredWeights.of_writer(writer), tokens)]
        with Walk(streams, 2) as walk:
            a, b = run(walk)
        writer.finish(dict(file.files), file.provenance)
    np.testing.assert_array_equal(a, b)
    assert (tmp_path / "n.edgellama").read_bytes() == path.read_bytes()


def test_other_models_are_told_apart():
    base = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    base |= {"num_attention_heads": 4, "vocab_size": 100}
    a, b = LlamaConfig.from_dict(base), LlamaConfig.from_dict({**base, "num_hidden_layers": 3})
    check_same_model(a, a, "a", "b")
    with pytest.raises(ConvertError, match=r"x and y are not the same model: num_hidden_layers is 2 and 3"):
        check_same_model(a, b, "x", "y")
