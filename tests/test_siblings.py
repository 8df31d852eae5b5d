"""Architectures that are Llama with other names: the same file as from the Llama itself, transformers' own logits."""

import json
import re

import numpy as np
import pytest

from checkpoints import DEFAULTS, make_checkpoint, random_weights, write_weights
from closeness import ORACLE_TOLERANCE, all_logits, relative_error
from edgellama.backends.reference import ReferenceBackend
from edgellama.config import LlamaConfig
from edgellama.errors import ConfigError, ConvertError
from edgellama.format import open_model
from edgellama_convert import convert, export_hf
from edgellama_convert.files import read_config
from edgellama_convert.siblings import REASONS, SIBLINGS, as_llama_files, open_checkpoint, to_llama
from edgellama_convert.walk import Stream, Walk
from edgellama_convert.weights import CheckpointWeights
from test_walk import run

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 32


def tensors_of(path):
    with open_model(path) as file:
        return {name: file.array(name).tobytes() for name in file.tensors}, file.config


def fuse_internlm2(weights):
    """The layout of InternLM2's wqkv, written out head by head."""
    result = {}
    for name, weight in weights.items():
        prefix = name.split("self_attn")[0]
        if "q_proj" in name:
            kind = name.rsplit(".", 1)[1]
            k, v = (weights[name.replace("q_proj", other)] for other in ("k_proj", "v_proj"))
            rows = []
            for head in range(KV_HEADS):
                share = HEADS // KV_HEADS
                rows += [weight[q * HEAD_DIM : (q + 1) * HEAD_DIM] for q in range(head * share, (head + 1) * share)]
                rows += [each[head * HEAD_DIM : (head + 1) * HEAD_DIM] for each in (k, v)]
            result[f"{prefix}attention.wqkv.{kind}"] = np.concatenate(rows)
        elif "k_proj" not in name and "v_proj" not in name:
            renames = [("self_attn.o_proj", "attention.wo"), ("mlp.gate_proj", "feed_forward.w1")]
            renames += [("mlp.up_proj", "feed_forward.w3"), ("mlp.down_proj", "feed_forward.w2")]
            renames += [("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm")]
            renames += [("model.embed_tokens", "model.tok_embeddings"), ("lm_head", "output")]
            for old, new in renames:
                name = name.replace(old, new)
            result[name] = weight
    return result


def fuse_phi3(weights):
    result = {}
    for name, weight in weights.items():
        if "q_proj" in name:
            parts = [weights[name.replace("q_proj", each)] for each in ("q_proj", "k_proj", "v_proj")]
            result[name.replace("q_proj", "qkv_proj")] = np.concatenate(parts)
        elif "gate_proj" in name:
            up = weights[name.replace("gate_proj", "up_proj")]
            result[name.replace("gate_proj", "gate_up_proj")] = np.concatenate([weight, up])
        elif not re.search("[kv]_proj|up_proj", name):
            result[name] = weight
    return result


def rename_yi(weights):
    names = {"post_attention_layernorm": "ln2", "input_layernorm": "ln1"}
    return {re.sub("|".join(names), lambda match: names[match[0]], name): w for name, w in weights.items()}


SAME_FILE = {
    # model_type: (Llama's config, the sibling's own keys, its tensors)
    "mistral": ({}, {"sliding_window": None}, dict),
    "Yi": ({}, {}, rename_yi),
    "internlm": (
        {"attention_bias": True, "num_key_value_heads": HEADS, "rope_theta": 20000.0},
        {"bias": True, "attention_bias": None, "rotary": {"base": 20000, "type": "origin"}},
        dict,
    ),
    "internlm2": ({}, {"bias": False}, fuse_internlm2),
    "internlm2 with biases": ({"attention_bias": True}, {"bias": True, "attention_bias": None}, fuse_internlm2),
    "internlm3": (
        {"attention_bias": True, "mlp_bias": True},
        {"qkv_bias": True, "bias": True, "attention_bias": None, "mlp_bias": None, "head_dim": 32},
        dict,
    ),
    "phi3": ({}, {"sliding_window": 4096, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, fuse_phi3),
    "phi3 tied, head_dim": ({"tie_word_embeddings": True, "head_dim": 32}, {}, fuse_phi3),
}


@pytest.mark.parametrize("name", SAME_FILE)
def test_the_same_tensors_as_from_the_llama(name, tmp_path):
    """Renamed, fused and split again: bit for bit what the Llama of the same weights gives."""
    llama, own, fuse = SAME_FILE[name]
    model_type = name.split()[0]
    config = make_checkpoint(tmp_path / "llama", **llama)
    folder = tmp_path / "sibling"
    folder.mkdir()
    changed = {**config, **own, "model_type": model_type, "architectures": [SIBLINGS[model_type].architecture]}
    if "rotary" in own:
        del changed["rope_theta"]
    (folder / "config.json").write_text(json.dumps(changed))
    write_weights(folder, fuse(random_weights(config, 0)), dtype="float16", shards=3)
    convert(folder, tmp_path / "sibling.edgellama", method="search")
    convert(tmp_path / "llama", tmp_path / "llama.edgellama", method="search")
    got, read = tensors_of(tmp_path / "sibling.edgellama")
    want, llama_config = tensors_of(tmp_path / "llama.edgellama")
    assert got == want
    keys = "hidden_size num_key_value_heads head_dim attention_bias mlp_bias tie_word_embeddings rope rms_norm_eps"
    for key in keys.split():
        assert getattr(read, key) == getattr(llama_config, key), key
    assert read.raw["model_type"] == "llama"


@pytest.mark.parametrize("name", ["internlm2", "phi3"])
def test_heads_of_a_fused_matrix_are_pooled(name, tmp_path):
    """Cut out of wqkv or qkv_proj as the source's config says, then averaged."""
    config = make_checkpoint(tmp_path / "llama", num_key_value_heads=KV_HEADS)
    (tmp_path / "sibling").mkdir()
    changed = {**config, "model_type": name, "architectures": [SIBLINGS[name].architecture]}
    changed |= {"bias": False} if name == "internlm2" else {}
    (tmp_path / "sibling" / "config.json").write_text(json.dumps(changed))
    write_weights(tmp_path / "sibling", SAME_FILE[name][2](random_weights(config, 0)), dtype="float16")
    for folder in ("llama", "sibling"):
        convert(
            tmp_path / folder,
            tmp_path / f"{folder}.edgellama",
            num_key_value_heads=1,
            add_pad_token=None,
            method="search",
        )
    assert tensors_of(tmp_path / "sibling.edgellama")[0] == tensors_of(tmp_path / "llama.edgellama")[0]


def test_streams_of_few_rows_cross_the_borders_of_spans(tmp_path):
    """Slabs of one row block, which no span of a fused tensor is a multiple of."""
    config = {**DEFAULTS, "head_dim": 10, "num_hidden_layers": 1, "bias": False}
    config |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = np.arange((HEADS + 2 * KV_HEADS) * 10, dtype=np.float32)[:, None] * np.ones((1, 192), np.float32)
    weights = random_weights(config, 0)
    weights = {name: w for name, w in weights.items() if not re.search("[qkv]_proj", name)}
    weights["model.layers.0.attention.wqkv.weight"] = rows
    write_weights(tmp_path, weights, dtype="float32")
    llama = LlamaConfig.from_dict(to_llama(config))
    q = [*range(0, 30), *range(50, 80)]
    with open_checkpoint(tmp_path, llama) as checkpoint:
        for name, want in {
            "q": q,
            "k": [*range(30, 40), *range(80, 90)],
            "v": [*range(40, 50), *range(90, 100)],
        }.items():
            tensor = checkpoint.tensors[f"model.layers.0.self_attn.{name}_proj.weight"]
            assert tensor.shape == (len(want), 192)
            for step in (1, 7, 16, 100):
                got = []
                for first in range(0, len(want), step):
                    raw = np.empty((min(step, len(want) - first), 192), "<f4")
                    checkpoint.read_rows(tensor, first, raw)
                    got += raw[:, 5].tolist()
                assert got == want


TINY = {
    "vocab_size": 203,
    "hidden_size": 160,
    "intermediate_size": 272,
    "num_hidden_layers": 2,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.08,
    "pad_token_id": 0,
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1 + i / 9 for i in range(8)]}
LONGROPE |= {"long_factor": [1.0 + i for i in range(8)], "original_max_position_embeddings": 16}
FAMILY = {
    "mistral": {"sliding_window": None, "head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "phi3": {"num_key_value_heads": 10},
    "phi3 longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    "internlm3": {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
    # Of Llama's own name: what is large about them is in the table of sizes, what is special is here.
    "llama code": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "llama 3.1": {
        "vocab_size": 1024,
        "eos_token_id": [1001, 1008, 1009],
        "bos_token_id": 1000,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama pretraining_tp": {"pretraining_tp": 4},
    "llama pad_id -1": {"pad_token_id": -1},
}


@pytest.mark.torch
@pytest.mark.parametrize("name", FAMILY)
def test_logits_are_transformers(name, tmp_path):
    """The source's weights under our reading of them, and the file against its export: both transformers' logits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(len(name))
    config = AutoConfig.for_model(name.split()[0], **{**TINY, **FAMILY[name]})
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if key.endswith("norm.weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif key.endswith(".bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "saved")
    tokens = np.arange(40) * 37 % TINY["vocab_size"]

    def logits(model):
        with torch.no_grad():
            return model(torch.from_numpy(tokens)[None]).logits[0].numpy()

    _, ours = read_config(tmp_path / "saved")
    with open_checkpoint(tmp_path / "saved", ours) as checkpoint:
        stream = Stream(CheckpointWeights(ours, checkpoint), [tokens.astype(np.int32)])
        with Walk([stream], 1) as walk:
            (source,) = run(walk)
    assert relative_error(source, logits(theirs)) < ORACLE_TOLERANCE

    convert(tmp_path / "saved", tmp_path / "m.edgellama", receipt=False, method="search")
    export_hf(tmp_path / "m.edgellama", tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager").eval()
    assert type(exported).__name__ == "LlamaForCausalLM"
    with open_model(tmp_path / "m.edgellama") as file:
        assert relative_error(all_logits(ReferenceBackend(file, 64), tokens), logits(exported)) < ORACLE_TOLERANCE
        if "eos_token_id" in FAMILY[name]:
            assert file.config.eos_token_ids == (1001, 1008, 1009)


@pytest.mark.torch
@pytest.mark.parametrize("name", SIBLINGS)
def test_defaults_are_those_of_its_config_class(name):
    """What a config.json leaves out is what transformers fills in."""
    from transformers import AutoConfig

    try:
        theirs = AutoConfig.for_model(name)
    except ValueError:
        pytest.skip(f"transformers has no {name} of its own")
    ours = to_llama({"model_type": name})
    llama = LlamaConfig.from_dict(
        {**ours, "sliding_window": None, "num_hidden_layers": 1, "vocab_size": 9, "num_attention_heads": 32}
        | {"hidden_size": 32 * (theirs.hidden_size // theirs.num_attention_heads), "intermediate_size": 8}
    )
    assert llama.max_position_embeddings == theirs.max_position_embeddings
    assert llama.rms_norm_eps == theirs.rms_norm_eps
    assert llama.num_key_value_heads == theirs.num_key_value_heads
    assert llama.rope.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (llama.bos_token_id, llama.eos_token_ids) == (
        theirs.bos_token_id,
        () if theirs.eos_token_id is None else (theirs.eos_token_id,),
    )
    assert (ours.get("sliding_window") or None) == (theirs.sliding_window if name == "mistral" else None)


REFUSED = {
    "window": ({"model_type": "mistral"}, "sliding_window: 4096: attention with a sliding window is not supported"),
    "qwen2 window": ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
    "experts": ({"model_type": "mixtral"}, "'mixtral' is not supported: it is a mixture of experts (llama, mistral"),
    "unknown": ({"model_type": "nobody"}, "'nobody' is not supported (llama, mistral"),
    "partial rotary": ({"model_type": "phi3", "partial_rotary_factor": 0.75}, "partial_rotary_factor"),
    "another head": (
        {"model_type": "mistral", "architectures": ["MistralForSequenceClassification"]},
        "'MistralForSequenceClassification' is not supported (MistralForCausalLM is)",
    ),
    "unlike biases": ({"model_type": "internlm3", "qkv_bias": True, "bias": False}, "qkv_bias"),
    "bias of a wrong type": ({"model_type": "internlm2", "bias": "yes"}, "attention_bias: must be true or false"),
    "rotary": ({"model_type": "internlm", "rotary": {"type": "xpos"}}, "rotary"),
    "its own key": ({"model_type": "mistral", "sliding_window": None, "logit_scale": 2}, "logit_scale"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_computes_something_else_is_refused_by_name(name):
    keys, message = REFUSED[name]
    sizes = {key: DEFAULTS[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    with pytest.raises(ConfigError, match=re.escape(message)) as info:
        LlamaConfig.from_dict(to_llama({**sizes, "num_attention_heads": 8, "max_position_embeddings": 32768, **keys}))
    assert "\n" not in str(info.value) and len(str(info.value)) < 250


def test_every_reason_is_for_an_architecture_that_is_refused():
    assert not set(REASONS) & {"llama", *SIBLINGS}
    for model_type in REASONS:
        with pytest.raises(ConfigError, match=f"{model_type}.*is not supported: "):
            to_llama({"model_type": model_type})


def test_a_fused_tensor_of_another_size_is_named(tmp_path):
    config = make_checkpoint(tmp_path, model_type="phi3", architectures=["Phi3ForCausalLM"])
    weights = fuse_phi3(random_weights(config, 0))
    weights["model.layers.1.self_attn.qkv_proj.weight"] = np.zeros((100, 192), np.float32)
    write_weights(tmp_path, weights, dtype="float16")
    with pytest.raises(ConvertError, match=r"layers.1.self_attn.qkv_proj.weight: config.json makes it 320 rows"):
        convert(tmp_path, tmp_path / "m.edgellama", method="search")
    assert not (tmp_path / "m.edgellama").exists()


def test_a_tensor_under_both_names_and_a_scalar_are_refused(tmp_path):
    config = make_checkpoint(tmp_path, model_type="Yi", architectures=["YiForCausalLM"])
    weights = rename_yi(random_weights(config, 0))
    for name, value, message in (
        ("model.layers.0.input_layernorm.weight", np.ones(192, np.float32), "input_layernorm.weight is there twice"),
        ("model.layers.1.ln2.weight", np.ones((), np.float32), r"post_attention_layernorm.weight: .*the file has \[\]"),
    ):
        write_weights(tmp_path, {**weights, name: value}, dtype="float16")
        with pytest.raises(ConvertError, match=message):
            convert(tmp_path, tmp_path / "m.edgellama", method="search")


def test_a_tokenizer_that_transformers_takes_as_it_is():
    files = {"tokenizer.json": b"{}", "tokenizer_config.json": b'{"tokenizer_class": "LlamaTokenizer", "x": 1}'}
    edited = as_llama_files(files, "phi3")
    assert json.loads(edited["tokenizer_config.json"]) == {"tokenizer_class": "PreTrainedTokenizerFast", "x": 1}
    assert as_llama_files(files, "mistral") == as_llama_files(files, None) == files
