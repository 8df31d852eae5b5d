"""The chain checkpoint -> converter -> file -> forward pass against logits that transformers computed (tests/data).

`reference` must equal them up to rounding; `cpu` must give the same distribution as `reference` up to its int8
activations. The live form, with transformers installed, is test_oracle_transformers.py.
"""

from pathlib import Path

import numpy as np
import pytest

from closeness import (
    MAX_KL,
    MIN_GREEDY_AGREEMENT,
    ORACLE_TOLERANCE,
    TIE_MARGIN,
    all_logits,
    greedy_agreement,
    kl_divergence,
    relative_error,
    stepwise_logits,
)
from edgellama.backends.cpu import CpuBackend
from edgellama.backends.reference import ReferenceBackend
from edgellama.format import open_model
from golden_cases import CASES, GOLDEN_DIR, KEPT_ROWS, convert_case, weights_sha256

N_SEQUENCES = 4  # of each model, for the shares and means that `cpu` is held to


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """case name -> its `.edgellama` file, converted once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = convert_case(CASES[name], tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_transformers(name, model_path):
    golden = np.load(GOLDEN_DIR / f"{name}.npz", allow_pickle=False)
    np.testing.assert_array_equal(golden["tokens"], CASES[name].tokens())
    with open_model(model_path(name)) as model_file:
        assert weights_sha256(model_file) == str(golden["weights_sha256"]), "the converter's rtn gave other weights"
        backend = ReferenceBackend(model_file, n_ctx=CASES[name].n_tokens)
        logits = all_logits(backend, golden["tokens"])
    assert relative_error(logits[-KEPT_ROWS:], golden["logits"]) < ORACLE_TOLERANCE


def test_golden_logits_are_worth_comparing():
    """Every case has logits that spread, and no two cases that must differ are the same."""
    seen = []
    for name, case in CASES.items():
        logits = np.load(GOLDEN_DIR / f"{name}.npz", allow_pickle=False)["logits"]
        assert logits.shape == (KEPT_ROWS, case.config.get("vocab_size", 277))
        assert logits.std() > 1.5
        seen.append((name, logits))
    for name, logits in seen:
        for other_name, other in seen:
            if name < other_name and logits.shape == other.shape and {name, other_name} != SAME_MODEL:
                assert relative_error(logits, other) > 10 * ORACLE_TOLERANCE, f"{name} and {other_name} are the same"


# Three shards hold the same tensors as one, and dynamic scaling does nothing below its length.
SAME_MODEL = {"shards_3", "dynamic_below"}


@pytest.mark.parametrize("ceiling", [None, 1e9], ids=["default", "8-bit"])
@pytest.mark.parametrize("name", CASES)
def test_cpu_is_close_to_reference(name, ceiling, model_path):
    """With the activations that models of this width get, and with 8 bits for all values, outliers too."""
    case = CASES[name]
    reference_logits, cpu_logits = [], []
    with open_model(model_path(name)) as model_file:
        reference = ReferenceBackend(model_file, n_ctx=case.n_tokens)
        backend = CpuBackend(model_file, case.n_tokens, n_threads=1, ceiling=ceiling)
        for i in range(N_SEQUENCES):
            tokens = (case.tokens() * (i + 1) + i) % model_file.config.vocab_size
            # Where the frequencies follow the call's length, the same calls must be compared.
            prefill = case.n_tokens if i % 2 == 0 else case.n_tokens // 2
            reference_logits.append(stepwise_logits(reference, tokens, prefill))
            cpu_logits.append(stepwise_logits(backend, tokens, prefill))
        backend.close()
    expected, logits = np.concatenate(reference_logits), np.concatenate(cpu_logits)
    assert kl_divergence(expected, logits) <= MAX_KL
    assert greedy_agreement(expected, logits, 0.0 if ceiling is None else TIE_MARGIN) >= MIN_GREEDY_AGREEMENT


def test_closeness_measures():
    """KL of two coins is p log(p/q); the agreement counts argmaxima."""
    fair, loaded = np.log([[0.5, 0.5]]), np.log([[0.8, 0.2]])
    assert kl_divergence(fair, loaded) == pytest.approx(0.5 * np.log(0.5 / 0.8) + 0.5 * np.log(0.5 / 0.2))
    assert kl_divergence(loaded, loaded + 7) == pytest.approx(0)
    assert greedy_agreement(np.eye(4), np.eye(4)[[0, 1, 3, 2]]) == 0.5
    assert greedy_agreement(np.eye(4), np.eye(4)[[0, 1, 3, 2]], tie_margin=1.0) == 1.0
    assert relative_error(np.array([0.0, 5.0]), np.array([0.0, 10.0])) == 0.5
