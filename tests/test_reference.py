"""The reference backend's cache, slots and input checks, on float32 weights; test_oracle.py is about its numbers."""

from types import SimpleNamespace

import numpy as np
import pytest

from checkpoints import DEFAULTS, random_weights
from edgellama.backends import check_batch
from edgellama.backends.reference import ACTIVATIONS, ReferenceBackend
from edgellama.config import LlamaConfig
from edgellama.errors import ContextError

# Matrix products of other shapes add in another order; logits are around 10 and pass through some 20 products.
ATOL = 2e-4


class FloatModelFile:
    """Stands in for a ModelFile: random weights, float32 as they are."""

    def __init__(self, seed: int = 0, **overrides):
        raw = {**DEFAULTS, **overrides}
        self.config = LlamaConfig.from_dict(raw)
        self._weights = random_weights(raw, seed)
        self.tensors = {name: SimpleNamespace(layout="f32", shape=w.shape) for name, w in self._weights.items()}

    def array(self, name: str) -> np.ndarray:
        return self._weights[name]


TOKENS = np.arange(20) * 13 % 277


def prefill(backend, tokens=TOKENS, slot=0):
    n = len(tokens)
    return backend.forward(tokens, np.arange(n), np.full(n, slot), np.arange(n))


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_give_the_logits_of_one_call(chunk):
    backend = ReferenceBackend(FloatModelFile(), n_ctx=32)
    whole = prefill(backend)
    assert whole.shape == (20, 277)
    assert whole.dtype == np.float32
    pieces = []
    for start in range(0, len(TOKENS), chunk):
        positions = np.arange(start, min(start + chunk, len(TOKENS)))
        pieces.append(
            backend.forward(TOKENS[positions], positions, np.zeros_like(positions), np.arange(len(positions)))
        )
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=ATOL)


def test_slots_do_not_see_each_other():
    backend = ReferenceBackend(FloatModelFile(), n_ctx=32, n_slots=3)
    alone = prefill(backend)
    other = prefill(backend, TOKENS[::-1], slot=2)
    # One flat batch: the next token of slot 0 and, in any order, a whole sequence in slot 1.
    tokens = np.concatenate([TOKENS[::-1], [5]])
    positions = np.concatenate([np.arange(20), [20]])
    order = np.random.default_rng(0).permutation(21)
    logits = np.empty((21, 277), np.float32)
    logits[order] = backend.forward(tokens[order], positions[order], np.array([1] * 20 + [0])[order], np.arange(21))
    np.testing.assert_allclose(logits[:20], other, atol=ATOL)
    longer = prefill(ReferenceBackend(FloatModelFile(), n_ctx=32), np.append(TOKENS, 5))
    np.testing.assert_allclose(longer[:20], alone, atol=ATOL)
    np.testing.assert_allclose(logits[20], longer[20], atol=ATOL)


def test_rows_selects_and_orders_logits():
    backend = ReferenceBackend(FloatModelFile(tie_word_embeddings=True), n_ctx=32)
    whole = prefill(backend)
    some = backend.forward(TOKENS, np.arange(20), np.zeros(20, int), [19, 3])
    np.testing.assert_allclose(some, whole[[19, 3]], atol=ATOL)
    assert backend.forward(TOKENS, np.arange(20), np.zeros(20, int), np.array([], int)).shape == (0, 277)


def test_a_position_overwrites_what_the_cache_held():
    backend = ReferenceBackend(FloatModelFile(), n_ctx=32)
    prefill(backend, (TOKENS + 100) % 277)
    np.testing.assert_array_equal(prefill(backend), prefill(ReferenceBackend(FloatModelFile(), n_ctx=32)))


def test_large_models_are_dequantized_anew_with_the_same_result(monkeypatch):
    kept = prefill(ReferenceBackend(FloatModelFile(), n_ctx=32))
    monkeypatch.setattr("edgellama.backends.reference.KEEP_BYTES", 0)
    backend = ReferenceBackend(FloatModelFile(), n_ctx=32)
    np.testing.assert_array_equal(prefill(backend), kept)
    assert backend._kept is None


def test_close_twice():
    backend = ReferenceBackend(FloatModelFile(), n_ctx=32)
    backend.close()
    backend.close()


LIMITS = SimpleNamespace(n_ctx=8, n_slots=2)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"tokens": [1, 100]}, ValueError, "tokens must be below 100, got 100"),
        ({"tokens": [1, -1]}, ValueError, "tokens must not be negative, got -1"),
        ({"tokens": [1.0, 2.0]}, ValueError, "whole numbers"),
        ({"tokens": [[1, 2]]}, ValueError, "whole numbers"),
        ({"tokens": [2**40, 1]}, ValueError, "below 100"),
        ({"tokens": [True, False]}, ValueError, "whole numbers"),
        ({"positions": [7, 8]}, ContextError, "9 tokens do not fit into a context of 8"),
        ({"positions": [0]}, ValueError, "positions has 1 entries for 2 tokens"),
        ({"slots": [0, 2]}, ValueError, "slots must be below 2"),
        ({"rows": [2]}, ValueError, "rows must be below 2"),
        ({"positions": [3, 3], "slots": [1, 1]}, ValueError, "same slot and position"),
        ({"tokens": np.zeros(0, int), "positions": [], "slots": [], "rows": []}, ValueError, "not be empty"),
    ],
)
def test_check_batch_refuses(change, error, words):
    batch = {"tokens": [1, 2], "positions": [0, 1], "slots": [0, 0], "rows": [1], **change}
    with pytest.raises(error, match=words):
        check_batch(**batch, vocab_size=100, backend=LIMITS)


def test_check_batch_gives_contiguous_int32():
    arrays = check_batch(np.arange(6, dtype=np.uint16)[::2], [0, 1, 0], [0, 0, 1], [], vocab_size=100, backend=LIMITS)
    assert [a.tolist() for a in arrays] == [[0, 2, 4], [0, 1, 0], [0, 0, 1], []]
    assert all(a.dtype == np.int32 and a.flags.c_contiguous for a in arrays)


@pytest.mark.parametrize(
    "name, expected",  # at -1 and 2, from the functions' definitions
    [
        ("silu", [-0.26894143, 1.76159418]),
        ("gelu", [-0.15865526, 1.95449972]),
        ("gelu_pytorch_tanh", [-0.15880801, 1.95459769]),
        ("relu", [0.0, 2.0]),
    ],
)
def test_activations(name, expected):
    x = np.array([-1, 2, -1e4, 1e4, 0], np.float32)
    y = ACTIVATIONS[name](x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, [*expected, 0, 1e4, 0], rtol=1e-6)
