"""Whole conversions of tiny checkpoints: what is in the file, that it never depends on anything it should not."""

import json
import os
import shutil

import numpy as np
import pytest

from checkpoints import make_checkpoint, random_weights
from edgellama.errors import ConvertError, EdgellamaError
from edgellama.format import open_model
from edgellama.quant import dequantize, load_matrix, quantize_rtn
from edgellama_convert import convert


def rounded(values, dtype):
    """float32 values as a checkpoint of `dtype` holds them."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def check_against_oracle(model, config, dtype, seed=0, lm_head_bits=8):
    """Every tensor of a file made with `rtn` against the NumPy quantizer on the checkpoint's own weights."""
    weights = {name: rounded(w, dtype) for name, w in random_weights(config, seed).items()}
    tied = config["tie_word_embeddings"]
    seen = set()
    for name, weight in weights.items():
        base = name.removesuffix(".weight")
        if weight.ndim == 1:
            np.testing.assert_array_equal(model.array(name), weight, err_msg=name)
            seen.add(name)
            continue
        head = base == "lm_head" or (base == "model.embed_tokens" and tied)
        bits = lm_head_bits if head else 4
        if base == "model.embed_tokens" and not tied:
            bits = 16
        got = load_matrix(model, base)
        if bits == 16:
            want = weight.astype(np.float16).astype(np.float32)
            seen.add(name)
        else:
            want = dequantize(*quantize_rtn(weight, bits), bits)
            seen |= {f"{base}.qweight", f"{base}.scales"}
        np.testing.assert_array_equal(got, want, err_msg=name)
    assert seen == set(model.tensors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_the_oracles(tmp_path, dtype, shards):
    config = make_checkpoint(tmp_path / "model", dtype=dtype, shards=shards)
    report = convert(tmp_path / "model", tmp_path / "m.edgellama", method="rtn")
    with open_model(report.out) as model:
        model.verify()
        check_against_oracle(model, config, dtype)


@pytest.mark.parametrize("lm_head_bits", [4, 8, 16])
@pytest.mark.parametrize("tied", [False, True])
def test_lm_head_bits_and_tied_embeddings(tmp_path, tied, lm_head_bits):
    config = make_checkpoint(tmp_path / "model", tie_word_embeddings=tied, dtype="bfloat16")
    report = convert(tmp_path / "model", tmp_path / "m.edgellama", method="rtn", lm_head_bits=lm_head_bits)
    with open_model(report.out) as model:
        assert model.lm_head_bits == lm_head_bits
        check_against_oracle(model, config, "bfloat16", lm_head_bits=lm_head_bits)


@pytest.mark.parametrize(
    "overrides",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1},
        {"head_dim": 48},
        {"hidden_size": 288, "num_attention_heads": 6, "vocab_size": 401},
        {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3},
        {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256, "vocab_size": 320},
    ],
)
def test_shapes_of_all_kinds(tmp_path, overrides):
    config = make_checkpoint(tmp_path / "model", **overrides)
    report = convert(tmp_path / "model", tmp_path / "m.edgellama", method="rtn")
    with open_model(report.out) as model:
        check_against_oracle(model, config, "float16")


def test_same_bytes_for_any_threads_memory_and_place(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "a" / "model", hidden_size=288, intermediate_size=1000, vocab_size=999)
    shutil.copytree(tmp_path / "a" / "model", tmp_path / "b" / "model")
    files = []
    for i, (place, options) in enumerate(
        [
            ("a", {"n_threads": 1}),
            ("a", {"n_threads": 2}),
            ("b", {"n_threads": 3}),
            ("b", {"n_threads": 2, "max_ram": 2**32}),
        ]
    ):
        out = tmp_path / f"{i}.edgellama"
        convert(tmp_path / place / "model", out, **options)
        files.append(out.read_bytes())
    # Slabs and chunks of a single row block.
    monkeypatch.setattr("edgellama_convert.resources.DEFAULT_SLAB_WEIGHTS", 1)
    monkeypatch.setattr("edgellama_convert.resources._CHUNK_WEIGHTS", 1)
    convert(tmp_path / "a" / "model", tmp_path / "small.edgellama", n_threads=2, method="search")
    files.append((tmp_path / "small.edgellama").read_bytes())
    assert all(data == files[0] for data in files)
    assert str(tmp_path).encode() not in files[0]


def test_report_says_what_happened(tmp_path):
    make_checkpoint(tmp_path / "model")
    calls = []
    report = convert(
        tmp_path / "model", tmp_path / "m.edgellama", progress=lambda *args: calls.append(args), method="search"
    )
    assert report.file_bytes == report.out.stat().st_size
    assert report.source_bytes == (tmp_path / "model" / "model.safetensors").stat().st_size
    assert report.weights == sum(w.size for w in random_weights(json.loads(_config(tmp_path)), 0).values())
    assert [total for _, total in calls] == [report.weights] * len(calls)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls) and calls[-1][0] == report.weights
    assert 4.125 <= report.linear_bits_per_weight < 6  # 192 inputs are padded to 256, 352 to 384
    name, error = report.worst_tensor
    assert report.errors[name] == error == max(report.errors.values())
    assert 0.05 < error < 0.15
    assert report.errors["lm_head.weight"] < 0.01
    assert report.errors["model.embed_tokens.weight"] == 0  # float16 kept as float16
    assert report.warnings and "no tokenizer" in report.warnings[0]
    json.dumps(report.to_dict(), allow_nan=False)


def _config(tmp_path):
    return (tmp_path / "model" / "config.json").read_text()


def test_reported_error_is_that_of_the_file(tmp_path):
    config = make_checkpoint(tmp_path / "model", dtype="float32")
    report = convert(tmp_path / "model", tmp_path / "m.edgellama", method="search")
    weights = random_weights(config, 0)
    with open_model(report.out) as model:
        for name, error in report.errors.items():
            exact = weights[name].astype(np.float64)
            stored = load_matrix(model, name.removesuffix(".weight"))
            assert error == pytest.approx(np.sqrt(np.square(exact - stored).sum() / np.square(exact).sum()), rel=1e-6)


def test_default_destination_is_named_after_the_source(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "models" / "Tiny-1.5")
    monkeypatch.chdir(tmp_path)
    assert convert("models/Tiny-1.5/", method="search").out.resolve() == tmp_path / "Tiny-1.5.edgellama"
    monkeypatch.chdir(tmp_path / "models" / "Tiny-1.5")
    assert convert(".", method="rtn").out.name == "Tiny-1.5.edgellama"


def test_tokenizer_files_are_kept_verbatim(tmp_path, models_dir):
    make_checkpoint(tmp_path / "model", vocab_size=6400)
    extra = {
        "generation_config.json": b'{"temperature":  0.5}\n',
        "chat_template.jinja": "{{ 'h\u00e9' }}\r\n".encode(),
    }
    for name, data in extra.items():
        (tmp_path / "model" / name).write_bytes(data)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        extra[name] = (models_dir / "minimind2-small" / name).read_bytes()
        (tmp_path / "model" / name).write_bytes(extra[name])
    (tmp_path / "model" / "README.md").write_bytes(b"not a part of the model")
    report = convert(tmp_path / "model", tmp_path / "m.edgellama", method="search")
    assert set(report.files) == set(extra) and not report.warnings
    with open_model(report.out) as model:
        assert dict(model.files) == extra


def test_provenance_names_every_source_file_with_its_hash(tmp_path):
    import xxhash

    make_checkpoint(tmp_path / "model", shards=2)
    out = convert(tmp_path / "model", tmp_path / "m.edgellama", method="search").out
    with open_model(out) as model:
        provenance = model.provenance
    files = provenance["files"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert set(files) == {"config.json", *shards}
    for shard in shards:
        data = (tmp_path / "model" / shard).read_bytes()
        n = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:n])
        header.pop("__metadata__")
        whole = xxhash.xxh3_128(data[:n])
        for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
            begin, end = entry["data_offsets"]
            whole.update(xxhash.xxh3_128_digest(data[n + begin : n + end]))
        assert files[shard] == {"bytes": len(data), "xxh3_128_by_tensor": whole.hexdigest()}
    assert provenance["source"] == "model" and provenance["commit"] is None
    # One changed weight changes the hash of its shard and no other.
    path = tmp_path / "model" / shards[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x80
    path.write_bytes(data)
    convert(tmp_path / "model", tmp_path / "m2.edgellama", method="search")
    with open_model(tmp_path / "m2.edgellama") as model:
        assert model.provenance["files"][shards[0]] == files[shards[0]]
        assert model.provenance["files"][shards[1]] != files[shards[1]]


def test_max_ram_too_small_says_how_much_is_needed(tmp_path):
    make_checkpoint(tmp_path / "model")
    with pytest.raises(ConvertError, match=r"--max-ram 1 MiB is too little .* at least (\d+) MiB"):
        convert(tmp_path / "model", tmp_path / "m.edgellama", max_ram=1 << 20, method="search")
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_memory_measured_above_max_ram_stops_the_conversion(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "model")
    held = iter([100 << 20] * 3)
    monkeypatch.setattr("edgellama_convert.tensors.private_bytes", lambda: next(held, 600 << 20))
    monkeypatch.setattr("edgellama_convert.resources.private_bytes", lambda: 100 << 20)
    with pytest.raises(ConvertError, match="holds 600 MiB, more than --max-ram 512 MiB"):
        convert(tmp_path / "model", tmp_path / "m.edgellama", max_ram=512 << 20, method="search")
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_buffers_fit_into_max_ram_or_the_least_that_is_named(monkeypatch):
    from edgellama_convert.resources import MIB, plan_buffers

    monkeypatch.setattr("edgellama_convert.resources.private_bytes", lambda: 150 * MIB)
    options = {"widest": 11008, "weight_bytes": 2, "held_bytes": 5 * MIB, "n_threads": 4}
    with pytest.raises(ConvertError, match=r"at least (\d+) MiB") as error:
        plan_buffers(100 * MIB, **options)
    least = int(str(error.value).split("at least ")[1].split()[0])
    sizes = []
    for limit in (least, 200, 400, 4000):
        buffers = plan_buffers(limit * MIB, **options)
        sizes.append(buffers.slab_weights)
        assert buffers.slab_rows(11008) % 16 == 0 and buffers.slab_rows(11008) >= 16
        used = 155 * MIB + buffers.slab_weights * 2 * (2 + 2) + buffers.chunk_weights * 4 * 12
        assert used <= limit * MIB
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_existing_destinations(tmp_path):
    make_checkpoint(tmp_path / "model")
    out = tmp_path / "m.edgellama"
    first = convert(tmp_path / "model", out, method="search").out.read_bytes()
    convert(tmp_path / "model", out, method="rtn")  # a model file is replaced
    assert out.read_bytes() != first
    precious = tmp_path / "thesis.tex"
    precious.write_text("words")
    with pytest.raises(EdgellamaError, match=r"thesis\.tex.* not an \.edgellama file"):
        convert(tmp_path / "model", precious, method="search")
    assert precious.read_text() == "words"
    with pytest.raises(EdgellamaError, match="is a folder"):
        convert(tmp_path / "model", tmp_path, method="search")
    with pytest.raises(EdgellamaError, match="does not exist"):
        convert(tmp_path / "model", tmp_path / "nowhere" / "m.edgellama", method="search")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, error):
    make_checkpoint(tmp_path / "model")
    out = tmp_path / "m.edgellama"
    convert(tmp_path / "model", out, method="rtn")
    before = out.read_bytes()

    def interrupt(done, total):
        if done > total // 2:
            raise error

    with pytest.raises(error):
        convert(tmp_path / "model", out, method="search", progress=interrupt)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.edgellama", "model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method 'magic'"),
        ({"lm_head_bits": 3}, "lm_head_bits 3"),
        ({"n_threads": 0}, "n_threads 0"),
        ({"max_ram": -1}, "max_ram -1"),
        ({"revision": "main"}, "local folder, which has no revisions"),
    ],
)
def test_options_are_checked(tmp_path, options, message):
    make_checkpoint(tmp_path / "model")
    with pytest.raises(ConvertError, match=message):
        convert(tmp_path / "model", tmp_path / "m.edgellama", **options)


def test_ignored_tensors_are_named(tmp_path):
    from checkpoints import write_safetensors

    config = make_checkpoint(tmp_path / "model")
    weights = random_weights(config, 0)
    plain = convert(tmp_path / "model", tmp_path / "plain.edgellama", method="search")
    for name in ("model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"):
        weights[name] = np.ones(16, np.float32)
    write_safetensors(tmp_path / "model" / "model.safetensors", weights, "float16")
    report = convert(tmp_path / "model", tmp_path / "m.edgellama", method="search")
    assert set(report.ignored) == {"model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"}
    assert report.errors == plain.errors


def test_a_tied_model_may_store_its_lm_head_if_it_is_equal(tmp_path):
    from checkpoints import write_safetensors

    config = make_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    weights = random_weights(config, 0)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    write_safetensors(tmp_path / "model" / "model.safetensors", weights, "float16")
    report = convert(tmp_path / "model", tmp_path / "m.edgellama", method="search")
    assert "tied" in report.ignored["lm_head.weight"]
    weights["lm_head.weight"][-1, -1] += 1
    write_safetensors(tmp_path / "model" / "model.safetensors", weights, "float16")
    with pytest.raises(ConvertError, match='different values; set "tie_word_embeddings": false'):
        convert(tmp_path / "model", tmp_path / "m2.edgellama", method="search")


@pytest.mark.parametrize(
    ("name", "index", "value", "problem"),
    [
        ("model.layers.1.mlp.up_proj.weight", (17, 3), np.nan, "is nan; the checkpoint is damaged"),
        ("model.layers.0.self_attn.o_proj.weight", (191, 191), np.inf, "is inf; the checkpoint is damaged"),
        ("model.embed_tokens.weight", (276, 0), np.nan, "is nan; the checkpoint is damaged"),
        ("lm_head.weight", (1, 130), 1e30, "too large for a float16"),
        ("model.embed_tokens.weight", (2, 1), 1e5, "too large for a float16"),
        ("model.norm.weight", (7,), np.nan, "is nan"),
    ],
)
def test_weights_that_are_no_numbers_are_named_with_their_place(tmp_path, name, index, value, problem):
    from checkpoints import write_safetensors

    config = make_checkpoint(tmp_path / "model")
    weights = random_weights(config, 0)
    weights[name][index] = value
    write_safetensors(tmp_path / "model" / "model.safetensors", weights, "float32")
    with pytest.raises(ConvertError) as error:
        convert(tmp_path / "model", tmp_path / "m.edgellama", method="search")
    assert name in str(error.value) and str(list(index)) in str(error.value) and problem in str(error.value)
    assert not (tmp_path / "m.edgellama").exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_source_that_may_not_be_read(tmp_path):
    make_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").chmod(0)
    with pytest.raises(ConvertError, match=r"model\.safetensors: Permission denied"):
        convert(tmp_path / "model", tmp_path / "m.edgellama", method="search")


def test_an_error_of_the_operating_system_is_one_line(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "model")

    def fail(*args):
        raise OSError(5, "Input/output error", str(tmp_path / "model"))

    monkeypatch.setattr("edgellama_convert.conversion.read_files", fail)
    with pytest.raises(ConvertError, match="model: Input/output error"):
        convert(tmp_path / "model", tmp_path / "m.edgellama", method="search")


def test_the_config_is_kept_but_for_where_it_once_lay(tmp_path):
    config = make_checkpoint(tmp_path / "model", _name_or_path="/home/somebody/secret-project")
    with open_model(convert(tmp_path / "model", tmp_path / "m.edgellama", method="search").out) as model:
        assert model.header["config"] == {key: value for key, value in config.items() if key != "_name_or_path"}
        assert b"somebody" not in (tmp_path / "m.edgellama").read_bytes()
