"""The torch backend on the CPU (plain torch operations) against the float32 oracle, on every golden model."""

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
from edgellama.backends.gpu import plain
from edgellama.backends.gpu.backend import TorchBackend
from edgellama.backends.gpu.selection import Choice, as_rows, choose
from edgellama.backends.reference import ReferenceBackend
from edgellama.errors import CancelledError, ContextError, DeviceError, EdgellamaError
from edgellama.format import open_model
from edgellama.sampling import Sampler, SamplingParams
from golden_cases import CASES, convert_case

pytestmark = pytest.mark.torch


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


def torch_backend(file, n_ctx: int, n_slots: int = 1, **options) -> TorchBackend:
    return TorchBackend(file, n_ctx, n_slots, device="cpu", **options)


def run(backend, tokens, start: int = 0, slot: int = 0) -> np.ndarray:
    n = len(tokens)
    return backend.forward(tokens, np.arange(start, start + n), np.full(n, slot), np.arange(n))


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_the_oracle(name, model_file):
    """Every kind of model: only the order of float32 sums differs, as between the oracle and transformers."""
    case, file = CASES[name], model_file(name)
    for prefill in (case.n_tokens, case.n_tokens // 2):
        expected = stepwise_logits(ReferenceBackend(file, case.n_tokens), case.tokens(), prefill)
        backend = torch_backend(file, case.n_tokens, kv_cache="float32")
        assert relative_error(stepwise_logits(backend, case.tokens(), prefill), expected) < ORACLE_TOLERANCE


@pytest.mark.parametrize("dtype, kv_cache", [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "int8")])
@pytest.mark.parametrize("name", ["gqa", "mqa", "biases", "tied", "lm_head_16", "hidden_576", "gelu", "yarn_mscale"])
def test_sixteen_bits_are_close_to_the_oracle(name, dtype, kv_cache, model_file):
    """What a GPU computes in, held to the bars of the CPU backend."""
    case, file = CASES[name], model_file(name)
    expected = stepwise_logits(ReferenceBackend(file, case.n_tokens), case.tokens(), case.n_tokens // 2)
    backend = torch_backend(file, case.n_tokens, dtype=dtype, kv_cache=kv_cache)
    logits = stepwise_logits(backend, case.tokens(), case.n_tokens // 2)
    assert 0 < kl_divergence(expected, logits) <= MAX_KL
    assert greedy_agreement(expected, logits, TIE_MARGIN) >= MIN_GREEDY_AGREEMENT


def test_chunks_calls_and_masks_change_nothing_but_rounding(model_file, monkeypatch):
    file, tokens = model_file("gqa"), np.arange(100) * 7 % 277
    expected = run(torch_backend(file, 128, kv_cache="float32"), tokens)
    for chunk, scores in ((7, 1 << 26), (64, 1 << 26), (64, 6 * 100 * 5)):  # the last one: five queries at a time
        monkeypatch.setattr(plain, "MASKED_SCORES", scores)
        got = run(torch_backend(file, 128, kv_cache="float32", chunk=chunk), tokens)
        assert relative_error(got, expected) < ORACLE_TOLERANCE
    backend = torch_backend(file, 128, kv_cache="float32", chunk=30)
    for rows in ([99], [0], [3, 29, 30, 61, 99], []):
        got = backend.forward(tokens, np.arange(100), np.zeros(100, int), np.array(rows, int))
        assert got.shape == (len(rows), 277)
        if rows:
            assert relative_error(got, expected[rows]) < ORACLE_TOLERANCE


def test_a_flat_batch_of_interleaved_slots(model_file):
    file = model_file("mqa")
    sequences = [np.random.default_rng(n).integers(0, 277, n).astype(np.int32) for n in (20, 13, 31)]
    alone = [run(ReferenceBackend(file, 64), tokens) for tokens in sequences]
    order = sorted((position, slot) for slot, tokens in enumerate(sequences) for position in range(len(tokens)))
    positions, slots = np.array(order).T
    flat = np.array([sequences[slot][position] for position, slot in order], np.int32)
    backend = torch_backend(file, 64, 3, kv_cache="float32", chunk=16)
    logits = backend.forward(flat, positions, slots, np.arange(len(flat)))
    for slot, expected in enumerate(alone):
        assert relative_error(logits[slots == slot], expected) < ORACLE_TOLERANCE


def test_weights_too_large_to_keep_are_multiplied_in_pieces(model_file, monkeypatch):
    """As on a GPU: nothing is kept, and the scratch holds less than one matrix."""
    from edgellama.backends.gpu import weights

    for name in ("biases", "tied_lm_head_4", "lm_head_16"):
        file, tokens = model_file(name), CASES[name].tokens()
        expected = run(ReferenceBackend(file, 64), tokens)
        monkeypatch.setattr(weights, "KEEP_BYTES", 0)
        monkeypatch.setattr(weights, "SCRATCH_BYTES", 100_000)
        backend = torch_backend(file, 64, kv_cache="float32")
        assert relative_error(run(backend, tokens), expected) < ORACLE_TOLERANCE
        assert 0 < backend._weights._scratch.numel() <= 100_000


def test_hidden_is_what_the_head_multiplies(model_file):
    file, tokens = model_file("lm_head_16"), CASES["lm_head_16"].tokens()
    backend = torch_backend(file, 64, kv_cache="float32")
    batch = tokens, np.arange(40), np.zeros(40, int), np.array([3, 39])
    hidden = backend.hidden(*batch)
    assert hidden.shape == (2, 192) and hidden.dtype == np.float32
    from edgellama.quant import load_matrix

    assert relative_error(hidden @ load_matrix(file, "lm_head").T, backend.forward(*batch)) < ORACLE_TOLERANCE


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8", "float32"])
def test_slots_are_copied_saved_and_put_back_bit_by_bit(model_file, kind):
    file, tokens = model_file("gqa"), np.arange(30) * 11 % 277
    backend = torch_backend(file, 64, 3, kv_cache=kind)
    run(backend, tokens, slot=1)
    following = run(backend, tokens[:1], 30, slot=1)
    backend.copy_slot(1, 2, 30)
    saved = backend.read_slot(1, 30)
    assert saved["keys"].shape == (2, 3, 30, 32) and {"int8": 4}.get(kind, 2) == len(saved)
    other = torch_backend(file, 40, 1, kv_cache=kind)  # another n_ctx
    other.write_slot(0, saved)
    assert (run(backend, tokens[:1], 30, slot=2) == following).all()
    assert (run(other, tokens[:1], 30) == following).all()
    again = other.read_slot(0, 30)
    assert all((again[name] == saved[name]).all() for name in saved)


def test_a_saved_slot_that_does_not_fit_is_refused(model_file):
    backend = torch_backend(model_file("gqa"), 16)
    saved = backend.read_slot(0, 8)
    for wrong in (
        {**saved, "keys": saved["keys"][:1]},
        {**saved, "values": saved["values"].astype(np.float32)},
        {**saved, "values": saved["values"][:, :, :4]},
        {"keys": saved["keys"]},
        torch_backend(model_file("gqa"), 16, kv_cache="int8").read_slot(0, 8),
        torch_backend(model_file("gqa"), 32).read_slot(0, 20),
    ):
        with pytest.raises(ValueError, match=r"not the contents of a slot|do not fit"):
            backend.write_slot(0, wrong)
    with pytest.raises(ValueError, match="slot must be from 0 to 0"):
        backend.copy_slot(0, 1, 4)


def test_cancel_from_another_thread_stops_and_the_backend_goes_on(model_file):
    file, tokens = model_file("gqa"), np.arange(2000) % 277
    backend = torch_backend(file, 2000, chunk=16)
    expected = run(backend, tokens[:20])
    raised = []

    def prefill():
        try:
            while True:
                run(backend, tokens)
        except CancelledError as error:
            raised.append(error)

    thread = threading.Thread(target=prefill)
    thread.start()
    backend.cancel()
    thread.join(timeout=60)
    assert not thread.is_alive() and len(raised) == 1
    assert (run(backend, tokens[:20]) == expected).all()


def test_wrong_input_never_reaches_torch(model_file):
    backend = torch_backend(model_file("gqa"), 16)
    zero = np.zeros(1, np.int64)
    with pytest.raises(ContextError):
        backend.forward(zero, zero + 16, zero, zero)
    with pytest.raises(ContextError):
        backend.decode(zero, zero + 10, zero, 7)
    for tokens, slots in ((zero + 277, zero), (zero - 1, zero), (zero, zero + 1)):
        with pytest.raises(ValueError):
            backend.forward(tokens, zero, slots, zero)
    with pytest.raises(ValueError, match="another slot"):
        torch_backend(model_file("gqa"), 16).decode([1, 2], [0, 1], [0, 0], 2)
    with pytest.raises(ValueError, match="kv_cache"):
        torch_backend(model_file("gqa"), 16, kv_cache="int4")
    with pytest.raises(DeviceError, match="float32"):
        torch_backend(model_file("gqa"), 16, kv_cache="float32", kernels=True)
    backend.close()
    backend.close()
    with pytest.raises(EdgellamaError, match="closed"):
        backend.forward(zero, zero, zero, zero)


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_choices_are_the_samplers():
    """The same logits and seed: the tokens that `sampling.Sampler` draws, ties and all."""
    rng = np.random.default_rng(0)
    for seed in range(60):
        values = {
            "temperature": float(rng.choice([0.0, 0.3, 1.0, 2.5])),
            "top_k": int(rng.choice([0, 1, 5, 40, 1000])),
            "top_p": float(rng.choice([0.1, 0.9, 1.0])),
            "min_p": float(rng.choice([0.0, 0.05, 1.0])),
        }
        logits = (rng.standard_normal((4, 300)) * 3).round(int(rng.integers(1, 4))).astype(np.float32)  # ties
        sampler = Sampler(SamplingParams(**values, seed=seed))
        expected = [sampler(row) for row in logits]
        draws = np.random.Generator(np.random.PCG64(seed))
        choices = [Choice(**values, u=draws.random()) for _ in range(4)]
        greedy = all(each.greedy for each in choices)
        got = choose(torch.from_numpy(logits), None if greedy else as_rows(choices))
        assert got.tolist() == expected, values


def test_logits_that_are_not_finite_are_told():
    logits = torch.zeros(3, 8)
    logits[0, 3], logits[1, 5] = float("nan"), float("inf")
    for table in (None, as_rows([Choice(0.8)] * 3)):
        assert choose(logits, table)[:2].tolist() == [-1, -1]


def test_generate_is_the_references(tiny_model):
    """Greedy and sampled: one Sampler over the logits of both."""
    with (
        edgellama.load(tiny_model, device="torch-cpu") as torch_cpu,
        edgellama.load(tiny_model, "reference") as reference,
    ):
        for values in ({"temperature": 0}, {"temperature": 1.2, "top_k": 20, "seed": 3}):
            replies = [each.generate("Hello", 24, **values) for each in (torch_cpu, reference)]
            assert replies[0].token_ids == replies[1].token_ids
        assert torch_cpu.notes == ()
        assert torch_cpu.forward([1, 2, 3], logits_to_keep=1).shape == (1, torch_cpu.config.vocab_size)


def test_decode_feeds_its_choices_back(model_file):
    file = model_file("gqa")
    backend = torch_backend(file, 64, 2)
    start = np.array([5, 9])
    ids = backend.decode(start, np.array([0, 3]), np.array([0, 1]), 6)
    tokens = start
    other = torch_backend(file, 64, 2)
    for step in range(6):
        logits = other.forward(tokens, np.array([0, 3]) + step, np.array([0, 1]), np.arange(2))
        tokens = logits.argmax(axis=1)
        assert (ids[step] == tokens).all()
