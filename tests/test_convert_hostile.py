"""Hostile config, tokenizer, index and safetensors inputs (F5): exit 1 and one line, no panic, nothing left behind.

Each case damages a good checkpoint in one way and says what the line must name.
"""

import base64
import json
import os
import subprocess
import sys

import pytest

from checkpoints import make_checkpoint, random_weights, write_safetensors
from edgellama.cli import main


def good_tokenizer():
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []},
    }


@pytest.fixture
def checkpoint(tmp_path):
    make_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(good_tokenizer()))
    return tmp_path / "model"


# --- safetensors -----------------------------------------------------------------------------------------------------


def header(change):
    """Damage the parsed header; `change(header, data)` returns the data to write, or None to keep it."""

    def damage(folder):
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        n = 8 + int.from_bytes(raw[:8], "little")
        parsed, data = json.loads(raw[8:n]), raw[n:]
        data = change(parsed, data) or data
        text = json.dumps(parsed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)

    return damage


def raw_header(text):
    def damage(folder):
        text_bytes = text if isinstance(text, bytes) else text.encode()
        (folder / "model.safetensors").write_bytes(len(text_bytes).to_bytes(8, "little") + text_bytes)

    return damage


def weights_file(data):
    return lambda folder: (folder / "model.safetensors").write_bytes(data)


NORM = "model.norm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def _set(name, key, value):
    return header(lambda parsed, data: parsed[name].__setitem__(key, value))


def _shift(name, begin, end):
    def change(parsed, data):
        offsets = parsed[name]["data_offsets"]
        parsed[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return header(change)


def _hole(parsed, data):
    last = max(parsed, key=lambda name: parsed[name].get("data_offsets", [0])[0])
    parsed[last]["data_offsets"] = [x + 64 for x in parsed[last]["data_offsets"]]
    return data + bytes(64)


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _appended(folder):
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"payload")


def _duplicate(folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + n].rstrip()
    text = text[:-1] + b',"model.norm.weight":{"dtype":"F16","shape":[0],"data_offsets":[0,0]}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])


def _extra(name, shape=(4,)):
    def change(parsed, data):
        size = 2
        for n in shape:
            size *= n
        parsed[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [len(data), len(data) + size]}
        return data + bytes(size)

    return header(change)


def _without(name):
    def damage(folder):
        weights = random_weights(json.loads((folder / "config.json").read_text()), 0)
        del weights[name]
        write_safetensors(folder / "model.safetensors", weights, "float16")

    return damage


def _folder_instead(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def _pickle_instead(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


SAFETENSORS = {
    "empty": (weights_file(b""), "model.safetensors: only 0 bytes"),
    "seven_bytes": (weights_file(b"1234567"), "only 7 bytes"),
    "huge_header": (weights_file(b"\xff" * 8 + b"{}"), "header of 18446744073709551615 bytes"),
    "header_beyond_the_file": (weights_file((1000).to_bytes(8, "little") + b"{}"), "header of 1000 bytes"),
    "pickle_in_disguise": (weights_file(b"\x80\x04\x95" + bytes(100)), "model.safetensors"),
    "not_json": (raw_header("{nope}"), "not JSON"),
    "a_list": (raw_header("[]"), "must be a JSON object"),
    "not_utf8": (raw_header(b'{"\xff":1}'), "not UTF-8"),
    "deep": (raw_header('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "header"),
    "many": (raw_header('{"a":[' + "0," * 5_000_000 + "0]}"), "header"),
    "nan": (raw_header('{"a":NaN}'), "NaN"),
    "duplicate_name": (_duplicate, 'duplicate key "model.norm.weight"'),
    "unknown_dtype": (_set(NORM, "dtype", "F17"), "unknown dtype 'F17'"),
    "dtype_not_a_string": (_set(NORM, "dtype", ["F16"]), "unknown dtype"),
    "quantized_dtype": (_set(NORM, "dtype", "I16"), "dtype I16 is not supported"),
    "negative_shape": (_set(NORM, "shape", [-192]), "is not a list of sizes"),
    "overflowing_shape": (_set(NORM, "shape", [2**40, 2**40, 2**40]), "does not take"),
    "bool_shape": (_set(NORM, "shape", [True, 192]), "is not a list of sizes"),
    "float_shape": (_set(NORM, "shape", [192.0]), "is not a list of sizes"),
    "many_dimensions": (_set(NORM, "shape", [1] * 40), "is not a list of sizes"),
    "offset_beyond_the_end": (_shift(NORM, 0, 10**9), "lie outside the file"),
    "offset_overflows": (_set(NORM, "data_offsets", [2**63 - 2, 2**63 - 1]), NORM),
    "offset_negative": (_set(NORM, "data_offsets", [-2, 2]), "is not a pair of offsets"),
    "offsets_swapped": (_set(NORM, "data_offsets", [384, 0]), "lie outside the file"),
    "three_offsets": (_set(NORM, "data_offsets", [0, 1, 2]), "is not a pair of offsets"),
    "overlap": (_shift(NORM, -2, -2), "overlaps the tensor before it"),
    "hole": (header(_hole), "leaves a hole"),
    "extra_field": (_set(NORM, "exec", "rm -rf"), "needs exactly dtype, shape and data_offsets"),
    "entry_not_an_object": (header(lambda parsed, data: parsed.__setitem__(NORM, 3)), "needs exactly"),
    "metadata_not_strings": (header(lambda parsed, data: parsed.__setitem__("__metadata__", {"a": 1})), "__metadata__"),
    "cut": (_cut, "model.safetensors"),
    "appended": (_appended, "its tensors end at byte"),
    "unknown_tensor": (_extra("model.layers.0.self_attn.q_norm.weight"), "q_norm.weight is not part of"),
    "layer_too_many": (_extra("model.layers.2.mlp.up_proj.weight"), "num_hidden_layers 2 only"),
    "unannounced_bias": (_extra("model.layers.0.mlp.up_proj.bias"), "mlp_bias is false"),
    "terminal_escape_in_a_name": (_extra("a\x1b[2J\nb"), "is not part of"),
    "adapter": (_extra("base_model.model.q_proj.lora_A.weight"), "adapter"),
    "missing_tensor": (_without(Q), f"tensor {Q} is missing"),
    "missing_head": (_without("lm_head.weight"), 'lm_head.weight is missing; set "tie_word_embeddings": true'),
    "a_folder": (_folder_instead, "model.safetensors: not a regular file"),
    "pickle": (_pickle_instead, "pytorch_model.bin, a pickle, which could run code; re-save it as safetensors"),
}


# --- index -----------------------------------------------------------------------------------------------------------


def index(change):
    """Turn the checkpoint into one with an index, and damage that."""

    def damage(folder):
        (folder / "model.safetensors").unlink()
        make_checkpoint(folder, shards=2)
        path = folder / "model.safetensors.index.json"
        parsed = json.loads(path.read_text())
        change(parsed)
        path.write_text(json.dumps(parsed))

    return damage


def _point(target):
    return index(lambda parsed: parsed["weight_map"].__setitem__(NORM, target))


OUTSIDE = "shards must be .safetensors files of the same folder"
INDEX = {
    "parent_folder": (_point("../secret.safetensors"), OUTSIDE),
    "absolute": (_point("/etc/passwd.safetensors"), OUTSIDE),
    "drive": (_point("C:\\secret.safetensors"), OUTSIDE),
    "nul": (_point("a\0.safetensors"), OUTSIDE),
    "pickle_shard": (_point("pytorch_model.bin"), OUTSIDE),
    "number": (_point(7), OUTSIDE),
    "missing_shard": (_point("model-00009-of-00009.safetensors"), "model-00009-of-00009.safetensors, which is missing"),
    "wrong_shard": (_point("model-00001-of-00002.safetensors"), "is not in model-00001-of-00002.safetensors"),
    "no_map": (index(lambda parsed: parsed.pop("weight_map")), "has no weight_map"),
    "map_is_a_list": (index(lambda parsed: parsed.__setitem__("weight_map", [])), "has no weight_map"),
}


# --- config ----------------------------------------------------------------------------------------------------------


def config(**changes):
    def damage(folder):
        parsed = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**parsed, **changes}))

    return damage


def raw_config(text):
    return lambda folder: (folder / "config.json").write_text(text)


CONFIG = {
    "not_json": (raw_config("}"), "config.json"),
    "empty": (raw_config(""), "config.json"),
    "a_list": (raw_config("[1]"), "config.json"),
    "no_keys": (raw_config("{}"), "model_type"),
    "deep": (raw_config('{"a":' * 5_000 + "1" + "}" * 5_000), "nested deeper"),
    "large": (raw_config('{"a":"' + "x" * (2 << 20) + '"}'), "config.json"),
    "duplicate_key": (raw_config('{"model_type":"llama","model_type":"llama"}'), "duplicate key"),
    "other_architecture": (config(architectures=["MixtralForCausalLM"]), "MixtralForCausalLM"),
    "other_model_type": (config(model_type="gemma2"), "gemma2"),
    "auto_map_unknown_effect": (config(logit_scale=0.5), "logit_scale"),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "huge_layers": (config(num_hidden_layers=2**31), "num_hidden_layers"),
    "many_layers": (config(num_hidden_layers=4096), "model.layers.2"),
    "negative_hidden": (config(hidden_size=-192), "hidden_size"),
    "hidden_is_text": (config(hidden_size="192"), "hidden_size"),
    "zero_heads": (config(num_attention_heads=0), "num_attention_heads"),
    "other_hidden": (config(hidden_size=384), "config.json makes its shape"),
    "huge_vocab": (config(vocab_size=2**24), "model.embed_tokens.weight"),
    "infinite_eps": (raw_config('{"model_type":"llama","rms_norm_eps":1e999}'), "1e999"),
}


# --- tokenizer -------------------------------------------------------------------------------------------------------


def tokenizer(**changes):
    def damage(folder):
        (folder / "tokenizer.json").write_text(json.dumps({**good_tokenizer(), **changes}))

    return damage


def file(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def _model_only(data):
    def damage(folder):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(data)

    return damage


def _bpe(**changes):
    return {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": [], **changes}


TOKENIZER = {
    "not_json": (file("tokenizer.json", b"{"), "tokenizer.json"),
    "a_number": (file("tokenizer.json", b"3"), "tokenizer.json"),
    "deep": (file("tokenizer.json", b"[" * 200_000), "tokenizer.json"),
    # The next ones panic inside `tokenizers` 0.23: its PanicException is not an Exception.
    "panic_charsmap": (
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 3).decode()}),
        "tokenizer",
    ),
    "panic_merge": (tokenizer(model=_bpe(merges=["a b"], vocab={"a": 0, "b": 1})), "tokenizer"),
    "panic_template": (
        tokenizer(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        "tokenizer",
    ),
    "bad_regex": (
        tokenizer(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        "tokenizer",
    ),
    "merge_of_unknown": (tokenizer(model=_bpe(merges=[["x", "y"]])), "tokenizer"),
    "no_model": (tokenizer(model=None), "tokenizer"),
    "ids_are_text": (tokenizer(model=_bpe(vocab={"a": "0"})), "tokenizer"),
    "config_not_json": (file("tokenizer_config.json", b"{,}"), "tokenizer_config.json"),
    "config_is_a_list": (file("tokenizer_config.json", b"[]"), "tokenizer_config.json"),
    "large": (lambda folder: os.truncate(folder / "tokenizer.json", 1 << 30), "tokenizer.json: 1073741824 bytes"),
    "sentencepiece_noise": (_model_only(b"\xff" * 1000), "tokenizer.model"),
    "sentencepiece_empty": (_model_only(b""), "tokenizer.model"),
}

CASES = {
    f"{kind}-{name}": case
    for kind, cases in {
        "safetensors": SAFETENSORS,
        "index": INDEX,
        "config": CONFIG,
        "tokenizer": TOKENIZER,
    }.items()
    for name, case in cases.items()
}


def test_the_checkpoint_is_good_before_it_is_damaged(checkpoint, tmp_path):
    assert main(["convert", str(checkpoint), "-o", str(tmp_path / "m.edgellama"), "-q"]) == 0


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_left_behind(case, checkpoint, tmp_path, capfd):
    damage, names = CASES[case]
    damage(checkpoint)
    out = tmp_path / "out"
    out.mkdir()
    assert main(["convert", str(checkpoint), "-o", str(out / "m.edgellama")]) == 1
    stdout, stderr = capfd.readouterr()
    assert stdout == ""
    assert stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    assert "\x1b" not in stderr and len(stderr) < 600
    assert names in stderr
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("case", ["tokenizer-panic_charsmap", "safetensors-huge_header"])
def test_the_same_in_a_process_of_its_own(case, checkpoint, tmp_path):
    """Exit status and stderr as a shell sees them: a panic's message goes past `sys.stderr`."""
    damage, names = CASES[case]
    damage(checkpoint)
    command = [sys.executable, "-m", "edgellama", "convert", str(checkpoint), "-o", str(tmp_path / "m.edgellama")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and names in done.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_does_not_hang(name, checkpoint, tmp_path, capfd):
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    assert main(["convert", str(checkpoint), "-o", str(tmp_path / "m.edgellama")]) == 1
    assert f"{name}: not a regular file" in capfd.readouterr().err
