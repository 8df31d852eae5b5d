"""Batches, losses, states, attentions, caches and classifiers against transformers itself, on exported checkpoints."""

import numpy as np
import pytest

import edgellama
from checkpoints import make_checkpoint
from closeness import MAX_KL, ORACLE_TOLERANCE, kl_divergence, relative_error
from conftest import byte_tokenizer
from edgellama_convert import convert, export_hf

pytestmark = pytest.mark.torch

IDS = np.array([[0, 0, 0, 17, 9, 101, 44], [5, 60, 33, 120, 7, 250, 2], [8, 8, 31, 200, 0, 0, 0]])
MASK = np.array([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [1, 1, 1, 1, 0, 0, 0]])
KEPT = MASK.astype(bool)
ROPE = {
    "default": {},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@pytest.fixture(scope="module", params=ROPE)
def both(request, tmp_path_factory):
    """(edgellama's reference, transformers' model) of the same weights."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("causal")
    rope = {"rope_scaling": ROPE[request.param]} if ROPE[request.param] else {}
    make_checkpoint(folder / "source", max_position_embeddings=5 if request.param == "dynamic" else 64, **rope)
    convert(folder / "source", folder / "m.edgellama", receipt=False, method="search")
    export_hf(folder / "m.edgellama", folder / "hf")
    theirs = LlamaForCausalLM.from_pretrained(folder / "hf", attn_implementation="eager").eval()
    with edgellama.load(folder / "m.edgellama", device="reference", n_ctx=64, n_slots=4) as llm, torch.no_grad():
        yield llm, theirs


def tensors(**arrays):
    import torch

    return {name: torch.as_tensor(np.array(value)) for name, value in arrays.items() if value is not None}


@pytest.mark.parametrize("positions", [None, "of tokens", "odd"])
def test_states_attentions_and_logits(both, positions):
    llm, theirs = both
    given = {"of tokens": np.maximum(MASK.cumsum(1) - 1, 0), "odd": np.arange(7)[None] * 2}.get(positions)
    kwargs = {"attention_mask": MASK, "position_ids": given}
    ours = llm.forward(IDS, output_hidden_states=True, output_attentions=True, **kwargs)
    want = theirs(
        **tensors(input_ids=IDS, **kwargs), output_hidden_states=True, output_attentions=True, use_cache=False
    )
    assert relative_error(ours.logits[KEPT], want.logits.numpy()[KEPT]) < ORACLE_TOLERANCE
    assert len(ours.hidden_states) == len(want.hidden_states) and len(ours.attentions) == len(want.attentions)
    for a, b in zip(ours.hidden_states, want.hidden_states, strict=True):
        assert relative_error(a[KEPT], b.numpy()[KEPT]) < ORACLE_TOLERANCE
    for a, b in zip(ours.attentions, want.attentions, strict=True):
        rows = np.broadcast_to(KEPT[:, None, :], a.shape[:3])
        assert a.shape == b.shape and relative_error(a[rows], b.numpy()[rows]) < ORACLE_TOLERANCE
    plain = llm.forward(IDS, **kwargs).logits
    assert relative_error(plain[KEPT], want.logits.numpy()[KEPT]) < ORACLE_TOLERANCE
    keep = theirs(**tensors(input_ids=IDS, **kwargs), logits_to_keep=2).logits.numpy()
    assert relative_error(llm.forward(IDS, 2, **kwargs).logits[:2], keep[:2]) < ORACLE_TOLERANCE


def skip_with_a_memory(llm):
    if llm.config.rope.rope_type == "dynamic":
        pytest.skip("transformers remembers the longest call that came before")


def test_loss(both):
    llm, theirs = both
    skip_with_a_memory(llm)
    labels = np.where(KEPT, IDS, -100)
    labels[0, 3] = -100  # a padding column would predict it
    labels[1, :3] = -100
    want = theirs(**tensors(input_ids=IDS, attention_mask=MASK, labels=labels)).loss
    ours = llm.forward(IDS, attention_mask=MASK, labels=labels).loss
    assert abs(ours - float(want)) < 1e-5


def test_cache_and_embeddings(both):
    llm, theirs = both
    skip_with_a_memory(llm)
    ours = llm.forward(IDS[:, :4], attention_mask=MASK[:, :4])
    want = theirs(**tensors(input_ids=IDS[:, :4], attention_mask=MASK[:, :4]), use_cache=True)
    rows = [0, 1]  # in the third, nothing but padding is left
    for t in range(4, 7):
        ours = llm.forward(IDS[:, t : t + 1], attention_mask=MASK[:, : t + 1], past_key_values=ours.past_key_values)
        want = theirs(
            **tensors(input_ids=IDS[:, t : t + 1], attention_mask=MASK[:, : t + 1]),
            past_key_values=want.past_key_values,
        )
        assert relative_error(ours.logits[rows], want.logits.numpy()[rows]) < ORACLE_TOLERANCE
    ours.past_key_values.crop(-2)
    want.past_key_values.crop(-2)
    embeds = np.random.default_rng(0).normal(size=(3, 2, 192)).astype(np.float32)
    mask = np.concatenate([MASK[:, :5], np.ones((3, 2), int)], axis=1)
    a = llm.forward(inputs_embeds=embeds, attention_mask=mask, past_key_values=ours.past_key_values.copy()).logits
    b = theirs(
        **tensors(inputs_embeds=embeds, attention_mask=mask), past_key_values=want.past_key_values
    ).logits.numpy()
    assert relative_error(a, b) < ORACLE_TOLERANCE


def test_a_hook_is_torchs_forward_hook(both):
    llm, theirs = both
    skip_with_a_memory(llm)
    handle = theirs.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 0.5)
    want = theirs(**tensors(input_ids=IDS[1:2])).logits.numpy()
    handle.remove()
    ours = llm.forward(IDS[1:2], hooks={0: lambda x: x * np.float32(0.5)}).logits
    assert relative_error(ours, want) < ORACLE_TOLERANCE


def test_generate_with_a_generation_config(both):
    from transformers import GenerationConfig

    llm, theirs = both
    skip_with_a_memory(llm)
    config = GenerationConfig(max_length=19, repetition_penalty=1.3, suppress_tokens=[7], cache_implementation="static")
    want = theirs.generate(**tensors(input_ids=IDS[1:2]), generation_config=config, pad_token_id=0)[0, 7:].tolist()
    assert llm.generate(IDS[1].tolist(), generation_config=config).token_ids == want


CLASSIFIERS = {
    "single": ({"id2label": {"0": "a", "1": "b", "2": "c"}}, [2, 0, 1]),
    "multi": ({"num_labels": 3, "problem_type": "multi_label_classification"}, [[1.0, 0, 1], [0, 0, 1], [1, 1, 0]]),
    "regression": ({"num_labels": 1}, [0.5, -1.0, 2.0]),
    "regression of three": ({"num_labels": 3, "problem_type": "regression"}, [[0.1, 0.2, 0.3]] * 3),
}


def classifier(folder, **keys):
    from transformers import AutoModelForSequenceClassification

    make_checkpoint(folder / "source", architectures=["LlamaForSequenceClassification"], **keys)
    (folder / "source" / "tokenizer.json").write_text(byte_tokenizer(), encoding="utf-8")
    convert(folder / "source", folder / "m.edgellama", method="search")
    export_hf(folder / "m.edgellama", folder / "hf")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder / "hf", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()) and type(model).__name__ == "LlamaForSequenceClassification"
    return model.eval()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(tmp_path, name):
    import torch

    keys, labels = CLASSIFIERS[name]
    theirs = classifier(tmp_path, pad_token_id=0, **keys)
    right = np.where(KEPT, IDS, 0)
    labels = np.array(labels) if name == "single" else np.array(labels, np.float32)
    with torch.no_grad():
        for mask in (None, MASK):
            want = theirs(**tensors(input_ids=right, attention_mask=mask, labels=labels))
            for device in ("reference", "cpu"):
                with edgellama.load(tmp_path / "m.edgellama", device=device, n_ctx=32, n_threads=2, n_slots=4) as llm:
                    ours = llm.forward(right, attention_mask=mask, labels=labels)
                    assert llm.config.id2label == tuple(theirs.config.id2label.values())
                if device == "reference":
                    np.testing.assert_allclose(ours.logits, want.logits.numpy(), atol=5e-5)
                    assert abs(ours.loss - float(want.loss)) < 1e-4 * max(1, float(want.loss))
                elif ours.logits.shape[1] > 1:
                    assert kl_divergence(want.logits.numpy(), ours.logits) <= MAX_KL


def test_a_classifier_on_torchs_backend(tmp_path):
    make_checkpoint(tmp_path / "source", architectures=["LlamaForSequenceClassification"], num_labels=3, pad_token_id=0)
    convert(tmp_path / "source", tmp_path / "m.edgellama", method="search")
    scores = []
    for device in ("reference", "torch-cpu"):
        with edgellama.load(tmp_path / "m.edgellama", device=device, n_ctx=32, n_slots=4) as llm:
            scores.append(llm.classify(list(IDS)).logits)
            if device == "torch-cpu":
                np.testing.assert_allclose(llm.forward(IDS).logits, scores[1], atol=1e-3)
                with pytest.raises(edgellama.DeviceError, match="cpu and reference"):
                    llm.forward(IDS, output_attentions=True)
    assert kl_divergence(*scores) <= MAX_KL


def test_a_classifier_without_a_pad_token(tmp_path):
    import torch

    theirs = classifier(tmp_path, num_labels=2)
    with torch.no_grad(), edgellama.load(tmp_path / "m.edgellama", device="reference", n_ctx=32) as llm:
        want = theirs(**tensors(input_ids=IDS[2:])).logits.numpy()
        np.testing.assert_allclose(llm.forward(IDS[2:]).logits, want, atol=5e-5)
        for model in (lambda: theirs(**tensors(input_ids=IDS)), lambda: llm.forward(IDS)):
            with pytest.raises(ValueError, match="pad"):
                model()


@pytest.mark.parametrize(
    "keys", [{"num_labels": 3}, {"num_labels": 1}, {"num_labels": 3, "problem_type": "multi_label_classification"}]
)
def test_the_classification_pipeline(tmp_path, keys):
    from transformers import PreTrainedTokenizerFast, pipeline

    theirs = classifier(tmp_path, pad_token_id=0, **keys)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "hf" / "tokenizer.json"), pad_token="<unk>")
    want = pipeline("text-classification", model=theirs, tokenizer=tokenizer)
    with edgellama.pipeline("text-classification", tmp_path / "m.edgellama", device="reference", n_ctx=64) as ours:
        calls = [{}, {"top_k": 1}, {"top_k": None}, {"top_k": 2, "function_to_apply": "none"}]
        for inputs in ("some text", ["one", "other text"], {"text": "a", "text_pair": "b"}):
            for kwargs in calls:
                if isinstance(inputs, dict) and not kwargs:
                    continue  # a dict instead of a list there: transformers takes a text to be one only if it is a str
                assert_alike(ours(inputs, **kwargs), want(inputs, **kwargs))


def assert_alike(ours, theirs):
    """The same lists, dicts and texts, numbers nearly so."""
    assert type(ours) is type(theirs)
    if isinstance(ours, list):
        assert len(ours) == len(theirs), (ours, theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_alike(a, b)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_alike(ours[key], theirs[key])
    elif isinstance(ours, float):
        assert abs(ours - theirs) < 1e-4
    else:
        assert ours == theirs


def test_the_generation_pipeline(tmp_path):
    from transformers import AutoTokenizer, LlamaForCausalLM, pipeline

    from edgellama.demo import checkpoint_dir

    convert(checkpoint_dir(), tmp_path / "demo.edgellama", receipt=False, method="search")
    export_hf(tmp_path / "demo.edgellama", tmp_path / "hf")
    theirs = pipeline(
        "text-generation",
        model=LlamaForCausalLM.from_pretrained(tmp_path / "hf"),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
    with edgellama.pipeline("text-generation", tmp_path / "demo.edgellama", device="reference", n_ctx=128) as ours:
        kwargs = {"do_sample": False, "max_new_tokens": 12}
        for inputs in ("Once upon a time", ["Once upon a time", "The dog"]):
            for extra in ({}, {"return_full_text": False}, {"return_tensors": True}):
                assert_alike(ours(inputs, **kwargs, **extra), theirs(inputs, **kwargs, **extra))
