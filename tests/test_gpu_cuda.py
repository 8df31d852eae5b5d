"""On a GPU: kernels, graphs, upload and memory, against the oracle. `benchmarks/gpu.py` runs these."""

import threading

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")
import torch

import edgellama
from closeness import (
    MAX_KL,
    MIN_GREEDY_AGREEMENT,
    ORACLE_TOLERANCE,
    TIE_MARGIN,
    greedy_agreement,
    kl_divergence,
    relative_error,
    stepwise_logits,
)
from edgellama.backends.gpu import graph
from edgellama.backends.gpu.availability import device_problem, triton_problem
from edgellama.backends.gpu.backend import TorchBackend
from edgellama.backends.gpu.selection import Choice
from edgellama.backends.reference import ReferenceBackend
from edgellama.cli import main
from edgellama.errors import CancelledError, ContextError
from edgellama.format import open_model
from golden_cases import CASES, convert_case

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
]
N_SEQUENCES = 3


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """case name -> its open file, converted once."""
    opened = {}

    def get(name: str):
        if name not in opened:
            opened[name] = open_model(convert_case(CASES[name], tmp_path_factory.mktemp(name)))
        return opened[name]

    yield get
    for file in opened.values():
        file.close()


def run(backend, tokens, start: int = 0, slot: int = 0) -> np.ndarray:
    n = len(tokens)
    return backend.forward(tokens, np.arange(start, start + n), np.full(n, slot), np.arange(n))


def test_this_gpu_has_what_is_needed():
    """What else fails, fails behind these."""
    assert device_problem("cuda") is None
    assert triton_problem() is None


@pytest.mark.parametrize("kernels", [True, False], ids=["triton", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_every_golden_model_is_close_to_the_oracle(name, kernels, model_file):
    case, file = CASES[name], model_file(name)
    expected, logits = [], []
    backend = TorchBackend(file, case.n_tokens, kernels=kernels)
    reference = ReferenceBackend(file, case.n_tokens)
    for i in range(N_SEQUENCES):
        tokens = (case.tokens() * (i + 1) + i) % file.config.vocab_size
        prefill = case.n_tokens if i == 1 else case.n_tokens // 2
        expected.append(stepwise_logits(reference, tokens, prefill))
        logits.append(stepwise_logits(backend, tokens, prefill))
    backend.close()
    assert kl_divergence(np.concatenate(expected), np.concatenate(logits)) <= MAX_KL
    assert greedy_agreement(np.concatenate(expected), np.concatenate(logits), TIE_MARGIN) >= MIN_GREEDY_AGREEMENT


@pytest.mark.parametrize("name", ["gqa", "biases", "tied", "lm_head_16"])
def test_float32_equals_the_oracle(name, model_file):
    file, tokens = model_file(name), CASES[name].tokens()
    backend = TorchBackend(file, 64, dtype="float32", kv_cache="float32", kernels=False)
    assert relative_error(run(backend, tokens), run(ReferenceBackend(file, 64), tokens)) < ORACLE_TOLERANCE


@pytest.mark.parametrize("kv_cache", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["mha", "gqa", "mqa", "head_dim_wider"])
def test_every_cache_in_steps_of_one_and_of_several(name, kv_cache, model_file):
    file, tokens = model_file(name), CASES[name].tokens()
    expected = run(ReferenceBackend(file, 64), tokens)
    backend = TorchBackend(file, 64, kv_cache=kv_cache, step_tokens=64)
    several = run(backend, tokens)
    single = np.concatenate([run(backend, tokens[i : i + 1], i) for i in range(len(tokens))])
    for logits in (several, single):
        assert kl_divergence(expected, logits) <= MAX_KL


def test_long_contexts_in_many_splits(model_file):
    """Prefill in several chunks under a mask, then decode across every split."""
    file, tokens = model_file("gqa"), np.random.default_rng(0).integers(0, 277, 3000).astype(np.int32)
    reference = ReferenceBackend(file, 3000)
    rows = np.array([0, 127, 128, 1023, 1024, 2500, 2990])
    batch = tokens[:2991], np.arange(2991), np.zeros(2991, int), rows
    expected = reference.forward(*batch)
    backend = TorchBackend(file, 3000, chunk=1024)
    assert kl_divergence(expected, backend.forward(*batch)) <= MAX_KL
    steps = [
        np.concatenate([run(each, tokens[i : i + 1], i) for i in range(2991, 3000)]) for each in (reference, backend)
    ]
    assert kl_divergence(*steps) <= MAX_KL


def test_a_batch_of_slots_is_each_alone(model_file):
    file = model_file("mqa")
    backend, alone = TorchBackend(file, 64, 5), TorchBackend(file, 64, 5)
    tokens = np.arange(5) + 3
    for step in range(4):
        got = backend.forward(tokens, np.full(5, step), np.arange(5), np.arange(5))
        for slot in range(5):
            expected = run(alone, tokens[slot : slot + 1], step, slot)
            # Several tokens go through the tensor cores in 16 bits, one through float32.
            assert kl_divergence(expected, got[slot : slot + 1]) <= MAX_KL
        tokens = (tokens * 31 + 7) % 277


def test_a_graph_has_the_bits_of_its_launches(model_file, monkeypatch):
    file, tokens = model_file("biases"), CASES["biases"].tokens()
    captured = TorchBackend(file, 64)
    expected = np.concatenate([run(captured, tokens[i : i + 1], i) for i in range(20)])
    monkeypatch.setattr(graph.Steps, "run", graph.Steps._launch)
    launched = TorchBackend(file, 64)
    assert (np.concatenate([run(launched, tokens[i : i + 1], i) for i in range(20)]) == expected).all()


@pytest.mark.parametrize("sampled", [False, True])
def test_decode_is_select_step_by_step(model_file, sampled):
    file = model_file("gqa")
    draws = np.random.default_rng(0).random((12, 2))
    choices = [[Choice(0.9, 30, 0.9, 0.02, u) if sampled else Choice() for u in row] for row in draws]
    start, positions, slots = np.array([5, 9]), np.array([0, 3]), np.array([0, 1])
    ids = TorchBackend(file, 64, 2).decode(start, positions, slots, 12, choices)
    backend, tokens = TorchBackend(file, 64, 2), start
    for step in range(12):
        tokens = backend.select(tokens, positions + step, slots, np.arange(2), choices[step])
        assert (tokens == ids[step]).all()


def test_the_upload_is_the_file(model_file):
    file = model_file("hidden_576")
    backend = TorchBackend(file, 16)
    for name in file.tensors:
        assert (backend._weights._tensors[name].cpu().numpy() == file.array(name)).all(), name


def test_prefill_memory_is_bounded(model_file):
    """Chunks of 256 tokens: 2000 tokens take no more than a chunk's activations beyond what is there before."""
    file, tokens = model_file("hidden_576"), np.arange(2000) % 277
    backend = TorchBackend(file, 2048, chunk=256)
    run(backend, tokens[:300])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backend.forward(tokens, np.arange(2000), np.zeros(2000, int), np.array([1999]))
    inner = 256 * 1536 * 4  # float32 [chunk, intermediate_size]
    masked = 256 * 2000 * 9 * 6  # a mask in 16 bits and, at worst, unfused scores of every head
    assert torch.cuda.max_memory_allocated() - before < 20 * inner + 2 * masked


def test_slots_are_saved_and_put_back(model_file):
    file, tokens = model_file("gqa"), np.arange(30) * 11 % 277
    for kind in ("float16", "bfloat16", "int8"):
        backend = TorchBackend(file, 64, 3, kv_cache=kind)
        run(backend, tokens, slot=1)
        following = run(backend, tokens[:1], 30, slot=1)
        backend.copy_slot(1, 2, 30)
        other = TorchBackend(file, 40, kv_cache=kind)
        other.write_slot(0, backend.read_slot(1, 30))
        assert (run(backend, tokens[:1], 30, slot=2) == following).all()
        assert (run(other, tokens[:1], 30) == following).all()


def test_cancel_from_another_thread(model_file):
    file, tokens = model_file("gqa"), np.arange(4000) % 277
    backend = TorchBackend(file, 4000, chunk=64)
    expected = run(backend, tokens[:20])
    raised = []

    def prefill():
        try:
            while True:
                backend.forward(tokens, np.arange(4000), np.zeros(4000, int), np.array([3999]))
        except CancelledError as error:
            raised.append(error)

    thread = threading.Thread(target=prefill)
    thread.start()
    backend.cancel()
    thread.join(timeout=60)
    assert not thread.is_alive() and len(raised) == 1
    assert (run(backend, tokens[:20]) == expected).all()


def test_more_than_the_gpu_holds_is_one_line(model_file):
    from edgellama.backends.gpu.backend import make_backend

    with pytest.raises(ContextError, match="not enough memory on the GPU"):
        make_backend("cuda", model_file("gqa"), 1 << 30)


def test_closing_gives_the_memory_back(model_file):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    backend = TorchBackend(model_file("mha"), 4096, 4)
    run(backend, np.arange(10))
    backend.close()
    assert torch.cuda.memory_reserved() - before < 32 << 20  # a graph's pool may be cached


def test_load_generate_verify_and_bench(tiny_model, capsys):
    with edgellama.load(tiny_model, device="auto") as llm:
        assert llm._backend.device.type == "cuda"
        first = llm.generate("Hello", 20, temperature=0.9, seed=1)
        assert llm.generate("Hello", 20, temperature=0.9, seed=1).token_ids == first.token_ids
    assert main(["verify", str(tiny_model), "--device", "reference,cuda"]) == 0
    assert main(["bench", str(tiny_model), "--device", "cuda", "-p", "8", "-n", "4", "-r", "2"]) == 0
    assert "on the GPU" in capsys.readouterr().out
