"""Fixtures that several test modules share."""

import os
import signal
from pathlib import Path

import pytest

# OpenBLAS's threads spin while they wait: where others use the machine too, tiny products take ten times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is imported

from checkpoints import make_checkpoint

# What a shell script starts in the background ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The folder of real models (`EDGELLAMA_TEST_MODELS`); the test skips where there is none."""
    folder = Path(os.environ.get("EDGELLAMA_TEST_MODELS", REPOSITORY.parent / "shared" / "models"))
    if not folder.is_dir():
        pytest.skip(f"no real models at {folder}; set EDGELLAMA_TEST_MODELS")
    return folder


@pytest.fixture(scope="session")
def minimind_dir(models_dir: Path) -> Path:
    """MiniMind2-Small in Hugging Face layout: a small real chat model with a byte-level BPE tokenizer."""
    folder = models_dir / "minimind2-small"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama checkpoint with a tokenizer of 256 bytes and 3 special tokens."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make_checkpoint(folder, eos_token_id=2)
    (folder / "tokenizer.json").write_text(byte_tokenizer(), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` converted: an `.edgellama` file. Do not change it."""
    from edgellama_convert import convert

    out = tmp_path_factory.mktemp("models") / "tiny.edgellama"
    convert(tiny_checkpoint, out, method="search")
    return out


def byte_tokenizer() -> str:
    """A byte-level tokenizer.json without merges: ids 0..2 are special, 3 + byte otherwise; <s> goes first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<unk>", "<s>", "</s>"]
    letters = [_gpt2_letter(byte) for byte in range(256)]
    vocab = {token: index for index, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str()


def _gpt2_letter(byte: int) -> str:
    """GPT-2's printable stand-in for a byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in plain else chr(256 + sum(other not in plain for other in range(byte)))


@pytest.fixture(autouse=True)
def little_calibration(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A conversion that is calibrated by default looks at a little text, but where that is what is tested.

    It does so on the CPU, but for tests of a GPU: another device's bytes are others.
    """
    pytest.importorskip("numba")
    from edgellama_convert import calibration

    monkeypatch.setattr(calibration, "SMALL_MODEL_TOKENS", 1024)
    if request.node.get_closest_marker("cuda") is None:
        monkeypatch.setattr("edgellama.devices._cuda_works", lambda: False)
