"""The demo checkpoint that ships in the package: complete, small, consistent with its own config."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from edgellama import demo
from edgellama.demo import PROMPTS, checkpoint_dir
from edgellama.errors import EdgellamaError

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def config() -> dict:
    return json.loads((checkpoint_dir() / "config.json").read_text(encoding="utf-8"))


def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint_dir() / "tokenizer.json"))


def test_files_are_complete_and_small():
    sizes = {path.name: path.stat().st_size for path in checkpoint_dir().iterdir()}
    assert set(sizes) == FILES
    assert sum(sizes.values()) < 5_000_000


def test_a_missing_checkpoint_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(EdgellamaError, match="install edgellama again") as caught:
        checkpoint_dir()
    assert "\n" not in str(caught.value)


def test_tensors_match_the_config():
    c = config()
    hidden, ffn = c["hidden_size"], c["intermediate_size"]
    q = c["num_attention_heads"] * c["head_dim"]
    kv = c["num_key_value_heads"] * c["head_dim"]
    expected = {"model.embed_tokens.weight": (c["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for i in range(c["num_hidden_layers"]):
        shapes = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        expected |= {f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()}
    tensors = load_file(checkpoint_dir() / "model.safetensors")
    assert c["architectures"] == ["LlamaForCausalLM"] and c["tie_word_embeddings"] is True
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float16 and np.isfinite(tensor).all(), name


def test_weights_are_trained():
    """A trained matrix has a few strong directions; at random init all singular values would be of one size."""
    tensors = load_file(checkpoint_dir() / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"].astype(np.float32)
    values = np.linalg.svd(embedding, compute_uv=False)
    assert values[0] > 3 * np.median(values)


def test_tokenizer_round_trips_and_starts_with_bos():
    tok, c = tokenizer(), config()
    assert tok.get_vocab_size() == c["vocab_size"]
    assert (tok.token_to_id("<s>"), tok.token_to_id("</s>")) == (c["bos_token_id"], c["eos_token_id"])
    for text in [*PROMPTS, "Two\n\nlines,  spaces", "naïve 東京 🙂\tx"]:
        ids = tok.encode(text).ids
        assert ids[0] == c["bos_token_id"]
        assert tok.decode(ids) == text


def test_prompts_are_ordinary_words_to_the_tokenizer():
    tok = tokenizer()
    for prompt in PROMPTS:
        assert len(tok.encode(prompt).ids) <= 1 + 2 * len(prompt.split()) + prompt.count(","), prompt


@pytest.mark.torch
def test_transformers_tells_a_story_from_int4_weights():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory: Path = checkpoint_dir()
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = hf_tokenizer(PROMPTS[0]).input_ids
    assert ids == tokenizer().encode(PROMPTS[0]).ids
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name, weight in model.model.layers.named_parameters():
        if weight.ndim == 2:
            groups = weight.data.unflatten(1, (math.ceil(weight.shape[1] / 128), -1))
            scale = groups.abs().amax(-1, keepdim=True) / 7
            weight.data = ((groups / scale).round() * scale).flatten(1)
            assert weight.isfinite().all(), name
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=400, do_sample=False)[0].tolist()
    text = hf_tokenizer.decode(out, skip_special_tokens=True)
    assert out[-1] == config()["eos_token_id"], text
    assert len(text.split()) > 60 and text.rstrip()[-1] in '.!?"', text
