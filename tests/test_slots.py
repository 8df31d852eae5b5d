"""What backends do with slots as a whole (copy, read, write) and the hidden states that `hidden` returns."""

import numpy as np
import pytest

from checkpoints import make_checkpoint
from closeness import relative_error

pytest.importorskip("numba")
from edgellama.backends.cpu import CpuBackend
from edgellama.backends.reference import ReferenceBackend
from edgellama.errors import CancelledError
from edgellama.format import open_model
from edgellama.kv_cache import slot_arrays
from edgellama_convert import convert

VOCAB = 277
KINDS = ("float16", "int8", "float32")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A head_dim of 40: neither keys nor values fill whole vectors."""
    folder = tmp_path_factory.mktemp("slots")
    make_checkpoint(folder / "hf", head_dim=40)
    convert(folder / "hf", folder / "m.edgellama", method="rtn")
    with open_model(folder / "m.edgellama") as file:
        yield file


def make(file, kind, n_ctx=128, n_slots=3, **options):
    if kind == "float32":
        return ReferenceBackend(file, n_ctx, n_slots)
    return CpuBackend(file, n_ctx, n_slots, kv_cache=kind, **{"n_threads": 2, **options})


def tokens_of(n, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, n).astype(np.int32)


def run(backend, tokens, start=0, slot=0, method="forward"):
    n = len(tokens)
    return getattr(backend, method)(tokens, np.arange(start, start + n), np.full(n, slot), np.arange(n))


@pytest.mark.parametrize("n", [1, 16, 37, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_slot_goes_on_with_the_same_bits(model_file, kind, n):
    backend, tokens = make(model_file, kind), tokens_of(n + 20)
    run(backend, tokens_of(128, seed=5), slot=2)  # what was there before must not matter
    run(backend, tokens[:n])
    expected = run(backend, tokens[n:], n)
    backend.copy_slot(0, 2, n)
    assert (run(backend, tokens[n:], n, slot=2) == expected).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_changes_those_positions_and_no_other(model_file, kind):
    backend = make(model_file, kind)
    for slot in range(3):
        run(backend, tokens_of(128, seed=slot), slot=slot)
    before = [backend.read_slot(slot, 128) for slot in range(3)]
    for start, n in [(0, 128), (0, 5), (3, 9), (3, 16), (16, 48), (17, 33), (30, 30), (100, 127)]:
        backend.write_slot(2, before[2])
        backend.copy_slot(1, 2, n, start)
        for slot in range(3):
            for name, array in backend.read_slot(slot, 128).items():
                expected = before[slot][name].copy()
                if slot == 2:
                    expected[:, :, start:n] = before[1][name][:, :, start:n]
                assert array.tobytes() == expected.tobytes(), (start, n, slot, name)


@pytest.mark.parametrize("n", [1, 23, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_from_a_slot_can_be_written_to_another_context(model_file, kind, n):
    source, tokens = make(model_file, kind), tokens_of(n + 10)
    run(source, tokens[:n], slot=1)
    data = source.read_slot(1, n)
    config = model_file.config
    assert {name: (a.dtype, a.shape) for name, a in data.items()} == slot_arrays(config, kind, n)
    expected = run(source, tokens[n:], n, slot=1)
    target = make(model_file, kind, n_ctx=n + 10, n_slots=2)
    run(target, tokens_of(n + 10, seed=3), slot=1)
    target.write_slot(1, data)
    assert (run(target, tokens[n:], n, slot=1) == expected).all()
    assert data["keys"].tobytes() == target.read_slot(1, n)["keys"].tobytes()


def test_float16_slots_hold_the_oracles_numbers(model_file):
    """The same dimension of the same position on both backends, to rounding: the arrays are what they say."""
    tokens = tokens_of(50)
    cpu, reference = make(model_file, "float16"), make(model_file, "float32")
    for backend in (cpu, reference):
        run(backend, tokens)
    got, expected = cpu.read_slot(0, 50), reference.read_slot(0, 50)
    for name in ("keys", "values"):
        # float16's half unit in the last place, and 15-bit activations through a layer.
        assert relative_error(got[name].astype(np.float32), expected[name]) < 4 * 2.0**-11


@pytest.mark.parametrize("kind", KINDS)
def test_slots_and_data_that_do_not_fit_are_refused(model_file, kind):
    backend = make(model_file, kind, n_ctx=32)
    for bad in [(0, 3, 5), (-1, 0, 5), (0, 1, 33), (0, 1, 4, 5)]:
        with pytest.raises(ValueError, match="must be from 0"):
            backend.copy_slot(*bad)
    with pytest.raises(ValueError, match="slot must be from 0 to 2"):
        backend.read_slot(3, 1)
    data = backend.read_slot(0, 8)
    with pytest.raises(ValueError, match="slot must be from 0 to 2"):
        backend.write_slot(3, data)
    for bad in [
        {},
        {"keys": data["keys"]},
        {**data, "values": data["values"][:, :, :7]},
        {**data, "keys": data["keys"].astype(np.float64)},
        {**data, "more": data["keys"]},
    ]:
        with pytest.raises(ValueError, match="not the contents of a slot"):
            backend.write_slot(0, bad)
    with pytest.raises(ValueError, match="33 positions do not fit"):
        backend.write_slot(0, make(model_file, kind, n_ctx=40).read_slot(0, 33))


def test_hidden_bits_do_not_depend_on_threads_chunks_or_batches(model_file):
    tokens = tokens_of(90)
    expected = run(make(model_file, "float16", n_threads=1), tokens, method="hidden")
    assert expected.shape == (90, model_file.config.hidden_size)
    for options in [{"n_threads": 3}, {"prefill_chunk": 7}, {"prefill_chunk": 1, "n_threads": 2}]:
        backend = make(model_file, "float16", **options)
        assert (run(backend, tokens, method="hidden", slot=1) == expected).all()
        parts = [run(backend, tokens[i : i + 30], i, method="hidden") for i in range(0, 90, 30)]
        assert (np.concatenate(parts) == expected).all()
    other = tokens_of(90, seed=1)
    together = make(model_file, "float16").hidden(
        np.concatenate([other, tokens]), np.tile(np.arange(90), 2), np.repeat([0, 1], 90), np.arange(90, 180, 3)
    )
    assert (together == expected[::3]).all()


def test_hidden_is_the_oracles_and_leaves_logits_alone(model_file):
    tokens = tokens_of(60)
    backend, reference = make(model_file, "float16"), make(model_file, "float32")
    logits = run(backend, tokens)
    expected = run(reference, tokens, method="hidden")
    # As for logits (test_cpu_backend): two roundings of 2**-11 in each of two layers.
    assert relative_error(run(backend, tokens, method="hidden"), expected) < 4 * 2.0**-11
    assert (run(backend, tokens) == logits).all()
    from edgellama.quant import load_matrix

    assert np.array_equal(expected @ load_matrix(model_file, "lm_head").T, run(reference, tokens))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["forward", "hidden"])
def test_a_cancelled_call_raises_once(model_file, kind, method):
    backend, tokens = make(model_file, kind), tokens_of(20)
    expected = run(backend, tokens, method=method)
    backend.cancel()
    with pytest.raises(CancelledError):
        run(backend, tokens, method=method)
    assert (run(backend, tokens, method=method) == expected).all()
