"""What a conversion changes on purpose: a pad token's rows, averaged heads; and the page's notes about them."""

import json

import numpy as np
import pytest

from checkpoints import make_checkpoint, random_weights, write_weights
from closeness import ORACLE_TOLERANCE, all_logits, relative_error
from conftest import byte_tokenizer
from edgellama.backends.reference import ReferenceBackend
from edgellama.cli import main
from edgellama.errors import ConvertError
from edgellama.format import open_model
from edgellama.quant import load_matrix
from edgellama.tokenizer import load_tokenizer
from edgellama_convert import convert, export_hf


def with_tokenizer(folder, vocab_size=259, **config):
    """A checkpoint whose vocabulary is the byte tokenizer's 259 ids, or larger."""
    made = make_checkpoint(folder, vocab_size=vocab_size, **config)
    (folder / "tokenizer.json").write_text(byte_tokenizer(), encoding="utf-8")
    return made


@pytest.mark.parametrize("lm_head_bits", [4, 8, 16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_pad_token_gets_rows_of_zeros(tied, lm_head_bits, tmp_path):
    config = with_tokenizer(tmp_path / "m", tie_word_embeddings=tied)
    report = convert(
        tmp_path / "m",
        tmp_path / "p.edgellama",
        add_pad_token="<pad>",
        lm_head_bits=lm_head_bits,
        receipt=False,
        method="search",
    )
    assert any("'<pad>' is the pad token, id 259" in line for line in report.warnings)
    convert(tmp_path / "m", tmp_path / "o.edgellama", lm_head_bits=lm_head_bits, receipt=False, method="search")
    with open_model(tmp_path / "p.edgellama") as padded, open_model(tmp_path / "o.edgellama") as plain:
        assert padded.config.vocab_size == config["vocab_size"] + 1 == 260
        assert padded.config.pad_token_id == 259
        for name in ("model.embed_tokens", *([] if tied else ["lm_head"])):
            matrix = load_matrix(padded, name)
            assert not matrix[259].any()
            np.testing.assert_array_equal(matrix[:259], load_matrix(plain, name))
        tokens = np.arange(20) * 11 % 259
        logits = all_logits(ReferenceBackend(padded, 64), tokens)
        np.testing.assert_array_equal(logits[:, 259], 0.0)
        np.testing.assert_allclose(logits[:, :259], all_logits(ReferenceBackend(plain, 64), tokens), atol=1e-5)
        tokenizer = load_tokenizer(padded.files, padded.config)
        assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("<pad>", 259, 260)
        batch = tokenizer(["Hello", "Hi"], padding=True)
        assert batch.input_ids[1].count(259) == 3
        assert padded.provenance["changes"] == [line for line in report.warnings if "<pad>" in line]
        source = (tmp_path / "m" / "tokenizer.json").stat().st_size
        assert padded.provenance["files"]["tokenizer.json"]["bytes"] == source


def test_a_model_with_rows_to_spare_keeps_its_size(tmp_path):
    """The id is the tokenizer's next; a row that is there already is emptied."""
    with_tokenizer(tmp_path / "m", vocab_size=300)
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {}, "pad_token": "</s>"}))
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    convert(tmp_path / "m", tmp_path / "p.edgellama", add_pad_token="[PAD]", receipt=False, method="search")
    with open_model(tmp_path / "p.edgellama") as file:
        assert (file.config.vocab_size, file.config.pad_token_id) == (300, 259)
        assert json.loads(file.files["generation_config.json"]) == {"temperature": 0.5, "pad_token_id": 259}
        matrix = load_matrix(file, "model.embed_tokens")
        assert not matrix[259].any() and matrix[258].any() and matrix[260].any()


def test_a_token_that_means_something_else_is_refused(tmp_path):
    with_tokenizer(tmp_path / "m")
    with pytest.raises(ConvertError, match="the tokenizer knows '</s>' already, as id 2; choose another"):
        convert(tmp_path / "m", tmp_path / "p.edgellama", add_pad_token="</s>", method="search")
    with pytest.raises(ConvertError, match="must have 1 to 100 characters"):
        convert(tmp_path / "m", tmp_path / "p.edgellama", add_pad_token="", method="search")
    make_checkpoint(tmp_path / "none")
    with pytest.raises(ConvertError, match="only be added where there is a tokenizer"):
        convert(tmp_path / "none", tmp_path / "p.edgellama", add_pad_token="<pad>", method="search")
    assert not (tmp_path / "p.edgellama").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_pooled_heads_are_the_means(dtype, tmp_path):
    """6 heads to 3: the same file as from a checkpoint that holds the means, which two float16s always have exactly."""
    config = make_checkpoint(tmp_path / "mha", num_key_value_heads=6, attention_bias=True, dtype=dtype)
    report = convert(tmp_path / "mha", tmp_path / "gqa.edgellama", num_key_value_heads=3, method="search")
    assert any("6 heads of keys and values averaged to 3" in line for line in report.warnings)
    weights = random_weights(config, 0)
    write_weights(tmp_path / "mha", weights, dtype=dtype)
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            rounded = _rounded(weight, dtype)
            shape = (3, 2, 32, *weight.shape[1:])
            weights[name] = rounded.reshape(shape).mean(axis=1, dtype=np.float32).reshape(96, *weight.shape[1:])
        else:
            weights[name] = _rounded(weight, dtype)
    (tmp_path / "means").mkdir()
    (tmp_path / "means" / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 3}))
    write_weights(tmp_path / "means", weights, dtype="float32")
    convert(tmp_path / "means", tmp_path / "means.edgellama", method="search")
    with open_model(tmp_path / "gqa.edgellama") as got, open_model(tmp_path / "means.edgellama") as want:
        assert got.config.num_key_value_heads == 3 == got.config.raw["num_key_value_heads"]
        assert set(got.tensors) == set(want.tensors)
        for name in want.tensors:
            np.testing.assert_array_equal(got.array(name), want.array(name), err_msg=name)


def _rounded(weight, dtype):
    if dtype == "float16":
        return weight.astype(np.float16).astype(np.float32)
    if dtype == "float32":
        return weight
    bits = weight.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def test_heads_that_do_not_divide_are_refused(tmp_path):
    make_checkpoint(tmp_path / "m", num_key_value_heads=6)
    for heads in (4, 12, 0, True):
        with pytest.raises(ConvertError, match=f"num_key_value_heads {heads} must divide the checkpoint's 6"):
            convert(tmp_path / "m", tmp_path / "g.edgellama", num_key_value_heads=heads, method="search")
    assert (
        convert(tmp_path / "m", tmp_path / "g.edgellama", num_key_value_heads=6, method="search")
        .warnings[0]
        .startswith("the source")
    )


def test_the_command_line(tmp_path, capsys):
    with_tokenizer(tmp_path / "m", num_key_value_heads=6)
    out = tmp_path / "g.edgellama"
    command = ["convert", str(tmp_path / "m"), "-o", str(out), "--no-receipt", "--num-key-value-heads", "2"]
    assert main([*command, "--add-pad-token"]) == 0
    notes = capsys.readouterr().err
    assert "averaged to 2" in notes and "'<pad>' is the pad token, id 259" in notes
    with open_model(out) as file:
        assert (file.config.num_key_value_heads, file.config.vocab_size) == (2, 260)
    assert main([*command, "--add-pad-token", "<fill>"]) == 0
    with open_model(out) as file:
        assert load_tokenizer(file.files).pad_token == "<fill>"


# -- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.torch
def test_transformers_loads_a_padded_model_and_its_tokenizer(tmp_path, monkeypatch):
    """And left padding changes nothing there, the pad token's embedding being zero and masked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with_tokenizer(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "p.edgellama", add_pad_token="<pad>", method="search")
    export_hf(tmp_path / "p.edgellama", tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager").eval()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert (theirs.pad_token, theirs.pad_token_id, len(theirs)) == ("<pad>", 259, 260)
    assert model.get_input_embeddings().padding_idx == 259
    with open_model(tmp_path / "p.edgellama") as file, torch.no_grad():
        ours = load_tokenizer(file.files, file.config)
        batch = ours(["Hello", "Hi, you there"], padding=True, padding_side="left", return_tensors="np")
        expected = theirs(["Hello", "Hi, you there"], padding=True, padding_side="left", return_tensors="np")
        np.testing.assert_array_equal(batch.input_ids, expected["input_ids"])
        mask = torch.from_numpy(batch.attention_mask)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(torch.from_numpy(batch.input_ids), attention_mask=mask, position_ids=positions).logits.numpy()
        for row, text in enumerate(["Hello", "Hi, you there"]):
            ids = np.array(ours.encode(text))
            alone = all_logits(ReferenceBackend(file, 64), ids)
            assert relative_error(alone, logits[row][-len(ids) :]) < ORACLE_TOLERANCE


@pytest.mark.torch
def test_pooled_heads_equal_torchs_mean_and_transformers_logits(tmp_path):
    """8 heads to 2: close to torch's own means (the order of a sum of four may differ), and the export's logits."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=203, hidden_size=128, intermediate_size=272, num_hidden_layers=2)
    config.num_attention_heads = config.num_key_value_heads = 8
    config.head_dim, config.max_position_embeddings = 16, 64
    LlamaForCausalLM(config).save_pretrained(tmp_path / "mha")
    convert(tmp_path / "mha", tmp_path / "gqa.edgellama", num_key_value_heads=2, method="search")
    export_hf(tmp_path / "gqa.edgellama", tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager").eval()
    assert model.config.num_key_value_heads == 2
    mha = LlamaForCausalLM.from_pretrained(tmp_path / "mha")
    for ours, theirs in zip(model.model.layers, mha.model.layers, strict=True):
        means = theirs.self_attn.k_proj.weight.view(2, 4, 16, 128).mean(1).reshape(32, 128)
        error = (ours.self_attn.k_proj.weight - means).norm() / means.norm()
        assert error < 0.12  # what four bits cost
    tokens = np.arange(40) * 37 % 203
    with open_model(tmp_path / "gqa.edgellama") as file, torch.no_grad():
        expected = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
        assert relative_error(all_logits(ReferenceBackend(file, 64), tokens), expected) < ORACLE_TOLERANCE


@pytest.mark.torch
def test_pretraining_tp_is_the_same_product_in_slices(tmp_path):
    """The slices that transformers 4 computed with `pretraining_tp` 2, written out, are the whole product."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 204, "hidden_size": 128, "intermediate_size": 272, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, pretraining_tp=2)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "tp")
    assert json.loads((tmp_path / "tp" / "config.json").read_text())["pretraining_tp"] == 2
    convert(tmp_path / "tp", tmp_path / "tp.edgellama", lm_head_bits=16, method="search")
    export_hf(tmp_path / "tp.edgellama", tmp_path / "exported")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "exported").eval()
    whole = torch.nn.functional.linear

    def in_slices(x, weight, bias=None):
        """Column parallel for the first half of the layers' matrices would do; row parallel sums partial products."""
        parts = zip(x.chunk(2, dim=-1), weight.chunk(2, dim=-1), strict=True)
        return sum(whole(a, w) for a, w in parts)

    tokens = np.arange(30) * 37 % 204
    with torch.no_grad(), open_model(tmp_path / "tp.edgellama") as file:
        ours = all_logits(ReferenceBackend(file, 64), tokens)
        torch.nn.functional.linear = in_slices
        try:
            sliced = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
        finally:
            torch.nn.functional.linear = whole
    assert relative_error(ours, sliced) < ORACLE_TOLERANCE
