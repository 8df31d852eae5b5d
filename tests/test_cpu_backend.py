"""The compiled program as a whole: the same bits whatever the circumstances, long contexts, slots, cancelling.

How close it is to the oracle on every kind of model: test_oracle.
"""

import os
import signal
import threading

import numpy as np
import pytest

from checkpoints import make_checkpoint
from closeness import MAX_KL, kl_divergence, relative_error

pytest.importorskip("numba")
from edgellama.backends.cpu import CpuBackend
from edgellama.backends.reference import ReferenceBackend
from edgellama.errors import CancelledError, ContextError
from edgellama.format import open_model
from edgellama.kv_cache import bytes_per_position
from edgellama_convert import convert

VOCAB = 277
KINDS = {
    "gqa": {},
    "mha_biases_tied": {
        "num_key_value_heads": 6,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
    },
    "mqa_head_dim": {"num_key_value_heads": 1, "head_dim": 40, "hidden_act": "gelu_pytorch_tanh"},
    "four_queries_a_head": {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_act": "relu"},
}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """kind -> an open model file, converted once."""
    opened = {}

    def get(kind: str, lm_head_bits: int = 8):
        if (kind, lm_head_bits) not in opened:
            folder = tmp_path_factory.mktemp(kind)
            make_checkpoint(folder / "hf", max_position_embeddings=4096, **KINDS[kind])
            convert(folder / "hf", folder / "m.edgellama", method="rtn", lm_head_bits=lm_head_bits)
            opened[kind, lm_head_bits] = open_model(folder / "m.edgellama")
        return opened[kind, lm_head_bits]

    yield get
    for file in opened.values():
        file.close()


def tokens_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, n).astype(np.int32)


def run(backend, tokens, start: int = 0, slot: int = 0) -> np.ndarray:
    """All logits of `tokens` as one call at positions start.. of a slot."""
    n = len(tokens)
    return backend.forward(tokens, np.arange(start, start + n), np.full(n, slot), np.arange(n))


@pytest.mark.parametrize("ceiling", [0.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_threads_chunks_or_calls(model_file, kind, ceiling):
    file, tokens = model_file(kind), tokens_of(150)
    expected = run(CpuBackend(file, 256, n_threads=1, ceiling=ceiling), tokens)
    for n_threads, prefill_chunk, calls in [
        (2, 256, [150]),
        (3, 256, [150]),
        (1, 1, [150]),
        (2, 7, [150]),
        (3, 64, [150]),
        (2, 64, [100, 1, 1, 41, 7]),
        (1, 256, [1] * 20 + [130]),
    ]:
        backend = CpuBackend(file, 256, 1, n_threads, prefill_chunk, ceiling)
        ends = np.cumsum(calls)
        parts = [run(backend, tokens[end - n : end], end - n) for n, end in zip(calls, ends, strict=True)]
        assert (np.concatenate(parts) == expected).all(), (n_threads, prefill_chunk, calls)
        backend.close()


@pytest.mark.parametrize("lm_head_bits", [4, 16])
def test_bits_do_not_depend_on_threads_for_every_head(model_file, lm_head_bits):
    file, tokens = model_file("mha_biases_tied", lm_head_bits), tokens_of(40)
    expected = run(CpuBackend(file, 64, n_threads=1), tokens)
    assert (run(CpuBackend(file, 64, n_threads=3, prefill_chunk=5), tokens) == expected).all()
    one_by_one = CpuBackend(file, 64, n_threads=2)
    assert (np.concatenate([run(one_by_one, tokens[i : i + 1], i) for i in range(40)]) == expected).all()


def check_batches(file, lengths, n_ctx):
    """Sequences of these lengths in one flat batch, interleaved, have the bits of each alone."""
    sequences = [tokens_of(n, seed=n) for n in lengths]
    alone = [run(CpuBackend(file, n_ctx, n_threads=1), tokens) for tokens in sequences]
    order = sorted((position, slot) for slot, tokens in enumerate(sequences) for position in range(len(tokens)))
    positions, slots = np.array(order).T
    flat = np.array([sequences[slot][position] for position, slot in order], np.int32)
    for chunk in (256, 16):
        batch = CpuBackend(file, n_ctx, n_slots=len(lengths), n_threads=2, prefill_chunk=chunk)
        logits = batch.forward(flat, positions, slots, np.arange(len(flat)))
        for slot, expected in enumerate(alone):
            assert (logits[slots == slot] == expected).all()


def test_bits_do_not_depend_on_what_shares_the_batch(model_file):
    check_batches(model_file("gqa"), (50, 33, 70), 128)


def test_a_used_cache_changes_nothing(model_file):
    file, tokens = model_file("mha_biases_tied"), tokens_of(60)
    backend = CpuBackend(file, 256, n_threads=2)
    expected = run(backend, tokens)
    run(backend, tokens_of(256, seed=9))
    assert (run(backend, tokens) == expected).all()


def test_only_the_wanted_rows_come_back(model_file):
    file, tokens = model_file("gqa"), tokens_of(50)
    backend = CpuBackend(file, 64, n_threads=2, prefill_chunk=8)
    expected = run(backend, tokens)
    for rows in ([49], [0], [3, 7, 8, 31], []):
        got = backend.forward(tokens, np.arange(50), np.zeros(50, np.int64), np.array(rows, np.int64))
        assert got.shape == (len(rows), VOCAB) and (got == expected[rows]).all()


@pytest.mark.parametrize("kind", ["gqa", "mha_biases_tied"])
def test_attention_across_splits_equals_the_oracle(model_file, kind):
    """More than eight splits of 256 positions, in prefill and in decode."""
    file, tokens = model_file(kind), tokens_of(2200)
    reference, backend = ReferenceBackend(file, 2200), CpuBackend(file, 2200, n_threads=2)
    rows = np.array([0, 63, 64, 255, 256, 257, 1023, 1024, 2047, 2048, 2198])
    arguments = tokens[:-1], np.arange(2199), np.zeros(2199, np.int64), rows
    expected, logits = reference.forward(*arguments), backend.forward(*arguments)
    # 15-bit activations and a float16 cache: two roundings of 2**-11 in each of two layers, seen through the logits.
    assert relative_error(logits, expected) < 4 * 2.0**-11
    last = run(reference, tokens[-1:], 2199), run(backend, tokens[-1:], 2199)
    assert relative_error(last[1], last[0]) < 4 * 2.0**-11


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bit_activations_are_close_to_the_oracle(model_file, kind):
    """What wide models get by default, less the outliers' further bits."""
    file, tokens = model_file(kind), tokens_of(200)
    expected = run(ReferenceBackend(file, 200), tokens)
    assert kl_divergence(expected, run(CpuBackend(file, 200, ceiling=1e9), tokens)) <= MAX_KL


def test_cancel_from_another_thread_stops_and_the_backend_goes_on(model_file):
    file, tokens = model_file("gqa"), tokens_of(4096)
    backend = CpuBackend(file, 4096, n_threads=2, prefill_chunk=64)
    expected = run(CpuBackend(file, 4096, n_threads=2), tokens[:20])
    raised = []

    def prefill():
        try:
            while True:
                run(backend, tokens)
        except CancelledError as e:
            raised.append(e)

    thread = threading.Thread(target=prefill)
    thread.start()
    backend.cancel()
    thread.join(timeout=60)
    assert not thread.is_alive() and len(raised) == 1
    assert (run(backend, tokens[:20]) == expected).all()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer signals on this platform")
def test_an_interrupt_at_any_moment_neither_hangs_nor_harms_the_next_call(model_file):
    """Rank 0 may be interrupted before it joins the others, who wait for it at a barrier, or after the pass."""
    backend, tokens = CpuBackend(model_file("gqa"), 64, n_threads=2), tokens_of(20)
    expected = run(backend, tokens)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupted = 0
    try:
        for delay in np.random.default_rng(0).uniform(5e-6, 1e-3, 400):
            try:
                # Again after a while: one that comes while garbage is collected is only reported, not raised.
                signal.setitimer(signal.ITIMER_REAL, delay, 0.5)
                while True:
                    run(backend, tokens[:1])
            except KeyboardInterrupt:
                signal.setitimer(signal.ITIMER_REAL, 0)
                interrupted += 1
            assert (run(backend, tokens) == expected).all()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted == 400


def test_indices_out_of_range_never_reach_a_kernel(model_file):
    backend = CpuBackend(model_file("gqa"), 64)
    zero = np.zeros(1, np.int64)
    with pytest.raises(ContextError):
        backend.forward(zero, zero + 64, zero, zero)
    for tokens, slots in [(zero + VOCAB, zero), (zero - 1, zero), (zero, zero + 1)]:
        with pytest.raises(ValueError):
            backend.forward(tokens, zero, slots, zero)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_can_run_the_model(model_file):
    backend, tokens = CpuBackend(model_file("gqa"), 64, n_threads=2), tokens_of(20)
    expected = run(backend, tokens)
    pid = os.fork()
    if pid == 0:  # the child has no threads but this one: it must start its own
        os._exit(0 if (run(backend, tokens) == expected).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_int8_cache_keeps_the_bits_and_the_distribution(model_file, kind):
    file, tokens = model_file(kind), tokens_of(150)
    expected = run(CpuBackend(file, 256, n_threads=1, kv_cache="int8"), tokens)
    chunked = CpuBackend(file, 256, n_threads=3, prefill_chunk=7, kv_cache="int8")
    assert (run(chunked, tokens) == expected).all()
    stepped = CpuBackend(file, 256, n_slots=2, n_threads=2, kv_cache="int8")
    parts = [run(stepped, tokens[:100], slot=1), *(run(stepped, tokens[i : i + 1], i, slot=1) for i in range(100, 150))]
    assert (np.concatenate(parts) == expected).all()
    exact = run(ReferenceBackend(file, 256), tokens)
    assert 0 < kl_divergence(exact, expected) <= MAX_KL


def test_an_int8_cache_takes_about_half_the_memory(model_file):
    file = model_file("gqa")
    half, whole = (CpuBackend(file, 1024, kv_cache=kind)._cache.nbytes for kind in ("int8", "float16"))
    assert whole == 1024 * bytes_per_position(file.config)
    assert half == 1024 * bytes_per_position(file.config, "int8") < 0.6 * whole
