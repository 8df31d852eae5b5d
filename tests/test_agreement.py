"""`verify --device A,B`, and devices by name."""

import json
import sys

import numpy as np
import pytest

import edgellama
from closeness import greedy_agreement, kl_divergence
from edgellama import agreement, devices
from edgellama.cli import main
from edgellama.errors import ContextError, DeviceError
from edgellama.format import open_model


def test_the_same_measures_as_the_tests_have():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 50, 30)).astype(np.float32)
    b = a + 0.1 * b
    assert agreement._kl(a, b) == pytest.approx(kl_divergence(a, b))
    assert agreement._greedy(a, b) == greedy_agreement(a, b, agreement.TIE_MARGIN)


def test_cpu_and_reference_agree(tiny_model, capsys):
    assert main(["verify", str(tiny_model), "--device", "reference,cpu"]) == 0
    out = capsys.readouterr().out
    assert "reference and cpu agree" in out and out.count("\n") == 1
    assert main(["verify", str(tiny_model), "--device", "cpu,reference", "--kv-cache", "int8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["passed"] and 0 < facts["kl"] <= facts["max_kl"] and facts["tokens"] > 100


class Wrong:
    """A backend that shifts what another one says."""

    def __init__(self, backend, change):
        self._backend, self._change = backend, change

    def forward(self, *batch):
        return self._change(self._backend.forward(*batch))

    def close(self):
        self._backend.close()


def nan(logits):
    return np.full_like(logits, np.nan)


@pytest.mark.parametrize("change", [lambda logits: logits * 1.2, lambda logits: np.roll(logits, 1, axis=1), nan])
def test_devices_that_disagree_fail(tiny_model, capsys, monkeypatch, change):
    make = devices.make_backend

    def wrong(name, *arguments, **options):
        backend = make(name, *arguments, **options)
        return Wrong(backend, change) if name == "cpu" else backend

    monkeypatch.setattr(devices, "make_backend", wrong)
    assert main(["verify", str(tiny_model), "--device", "reference,cpu", "-q"]) == 1
    assert "DISAGREE" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["gpu", "cpu,gpu", "cpu,reference,cpu", ""])
def test_one_or_two_known_devices_are_wanted(tiny_model, capsys, value):
    assert main(["verify", str(tiny_model), "--device", value]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_without_tokenizer_gets_random_ids(tiny_model):
    with open_model(tiny_model) as file:
        texts = agreement.default_prompts(file)
        files = dict(file.files)
        file.files = {}
        ids = agreement.default_prompts(file)
        assert len(ids) == len(texts) and all(0 <= each < file.config.vocab_size for prompt in ids for each in prompt)
        file.files = files
        with pytest.raises(ContextError, match=r"129 tokens"):
            agreement.compare(file, "cpu", "reference", [[1] * 129])


def test_torch_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for device in devices.TORCH_DEVICES:
        with pytest.raises(DeviceError, match=r"torch .*pip install 'edgellama\[cuda\]'") as caught:
            devices.resolve(device)
        assert "\n" not in str(caught.value)
    assert devices.resolve("auto") == "cpu"


def test_auto_takes_the_cpu_where_the_gpu_is_too_small(tiny_model, monkeypatch):
    resolve, free = devices.resolve, devices.free_bytes
    monkeypatch.setattr(devices, "resolve", lambda name, kv: "cuda" if name == "auto" else resolve(name, kv))
    monkeypatch.setattr(devices, "free_bytes", lambda name: 1000 if name == "cuda" else free(name))
    with edgellama.load(tiny_model, device="auto", n_threads=1) as llm:
        assert type(llm._backend).__name__ == "CpuBackend"
        assert any("does not fit into the GPU" in note for note in llm.notes)


def test_names():
    assert devices.resolve("cpu", "int8") == "cpu"
    for device, kv_cache in (("tpu", "float16"), ("cpu", "int4"), ("cpu", "bfloat16")):
        with pytest.raises(DeviceError):
            devices.resolve(device, kv_cache)
    assert devices.available()[0] == "cpu"
    assert devices.free_bytes("cpu") is None or devices.free_bytes("cpu") > 0


@pytest.mark.torch
def test_torch_cpu_agrees_with_both(tiny_model, capsys):
    for pair, kv_cache in (("torch-cpu,cpu", "int8"), ("reference,torch-cpu", "bfloat16")):
        assert main(["verify", str(tiny_model), "--device", pair, "--kv-cache", kv_cache]) == 0
    assert "agree" in capsys.readouterr().out


@pytest.mark.torch
def test_torch_without_cuda_is_one_line():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match="use device 'cpu'") as caught:
        devices.resolve("cuda")
    assert "\n" not in str(caught.value)
    assert devices.resolve("auto") == "cpu"
