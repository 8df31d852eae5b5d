"""Llama and load: the cache's bookkeeping, ids that are none, closing, the context's size."""

import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import edgellama
from closeness import MAX_KL, kl_divergence
from edgellama.errors import ContextError, DeviceError, EdgellamaError
from edgellama.memory import available_bytes
from edgellama.model import choose_n_ctx, kv_bytes_per_token
from edgellama.paths import cache_dir, find_model
from edgellama.sizing import choose_n_slots
from fakes import FakeFile, fake_llama


def test_forward_continues_where_it_was():
    llm = fake_llama()
    assert llm.forward([5, 6, 7]).shape == (3, 30)
    assert llm.forward([8]).argmax() == 9
    llm.reset()
    llm.forward([9])
    assert [call[1] for call in llm.backend.calls] == [[0, 1, 2], [3], [0]]


@pytest.mark.parametrize(("keep", "rows"), [(0, [0, 1, 2]), (1, [2]), (2, [1, 2]), (9, [0, 1, 2])])
def test_logits_to_keep(keep, rows):
    llm = fake_llama()
    logits = llm.forward([5, 6, 7], logits_to_keep=keep)
    assert logits.dtype == np.float32
    assert llm.backend.calls[0][3] == rows
    assert logits.argmax(axis=1).tolist() == [6 + row for row in rows]


@pytest.mark.parametrize("ids", [[5, 6], (5, 6), np.array([5, 6]), np.array([5, 6], np.uint16), np.array([[5, 6]])])
def test_ids_in_every_usual_form(ids):
    llm = fake_llama()
    llm.forward(ids)
    assert llm.backend.calls[0][0] == [5, 6]


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        ("ab", TypeError, "encode"),
        ([], ValueError, "empty"),
        ([1.5], TypeError, "integers"),
        ([True], TypeError, "integers"),
        (["a"], TypeError, "integers"),
        (None, TypeError, "integers"),
        ([3, -1], ValueError, r"input_ids\[1\] is -1"),
        ([30], ValueError, "vocabulary of 30"),
        ([2**40], ValueError, "vocabulary of 30"),
        ([[[1, 2]]], ValueError, "one dimension"),
        (7, ValueError, "one dimension"),
    ],
)
def test_ids_that_are_none(ids, error, says):
    llm = fake_llama()
    with pytest.raises(error, match=says):
        llm.forward(ids)
    assert llm.backend.calls == []


@pytest.mark.parametrize("keep", [-1, 1.0, True, "1"])
def test_logits_to_keep_is_a_natural_number(keep):
    with pytest.raises(ValueError, match="logits_to_keep"):
        fake_llama().forward([1], keep)


def test_a_full_cache_is_an_error_and_changes_nothing():
    llm = fake_llama(n_ctx=4)
    llm.forward([1, 2, 3])
    with pytest.raises(ContextError, match=r"3 tokens.*2 new.*context of 4"):
        llm.forward([4, 5])
    assert llm.n_past == 3
    llm.forward([4])


def test_after_close_everything_says_so():
    llm = fake_llama()
    with llm:
        llm.forward([1])
    llm.close()
    assert llm.file.closed
    assert llm.backend.closed
    for call in (lambda: llm.forward([1]), llm.reset, lambda: llm.generate("a"), lambda: llm.generate([1])):
        with pytest.raises(EdgellamaError, match="closed"):
            call()
    assert "closed" in repr(llm)


def test_close_ends_a_stream_of_this_thread():
    with fake_llama() as llm:
        stream = llm.generate("a", stream=True)
        next(stream)
    assert llm.backend.closed
    assert list(stream) == []


def test_close_waits_for_another_thread():
    llm = fake_llama(delay=0.05)
    entered = threading.Event()
    results = []

    def run():
        entered.set()
        results.append(llm.generate("a", 5, temperature=0).text)

    thread = threading.Thread(target=run)
    thread.start()
    entered.wait()
    time.sleep(0.02)
    llm.close()
    thread.join(20)
    assert results == ["bcdef"]


def test_n_ctx_is_the_models_where_memory_allows():
    config = FakeFile(max_position_embeddings=4096).config
    assert choose_n_ctx(config, None, 1000, 64 << 30) == (4096, [])
    assert choose_n_ctx(config, None, 1000, None) == (4096, [])


def test_n_ctx_is_cut_to_memory_and_says_so():
    config = FakeFile(max_position_embeddings=1 << 20).config
    free = (256 << 20) + 10_000 * kv_bytes_per_token(config) * 4 // 3
    n_ctx, notes = choose_n_ctx(config, None, 0, free)
    assert n_ctx == 9984
    assert "9984" in notes[0]
    assert "1048576" in notes[0]
    assert choose_n_ctx(config, None, 1 << 40, free)[0] == 512


def test_an_explicit_n_ctx_is_obeyed_or_refused():
    config = FakeFile(max_position_embeddings=100).config
    assert choose_n_ctx(config, 50, 0, 1 << 40) == (50, [])
    assert "beyond the model's 100" in choose_n_ctx(config, 200, 0, 1 << 40)[1][0]
    with pytest.raises(ContextError, match="n_ctx 1000000000 needs"):
        choose_n_ctx(config, 10**9, 0, 1 << 30)


def test_kv_bytes():
    config = FakeFile(head_dim=16).config
    assert kv_bytes_per_token(config) == kv_bytes_per_token(config, "bfloat16") == 2 * 1 * 2 * 16 * 2
    assert kv_bytes_per_token(config, "float32") == 2 * kv_bytes_per_token(config)


def test_available_memory_is_plausible():
    free = available_bytes()
    assert free is None or 1 << 20 < free < 1 << 50


@pytest.mark.parametrize("device", ["cuda", "tpu", ""])
def test_devices_that_are_not_there(device):
    with pytest.raises(DeviceError, match="cpu"):
        edgellama.load("whatever", device=device)


@pytest.mark.parametrize("argument", ["n_ctx", "n_threads", "n_slots"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "4", True])
def test_sizes_are_positive_integers(argument, value):
    with pytest.raises((ValueError, TypeError), match=argument):
        edgellama.load("whatever", **{argument: value})


def test_a_missing_file_names_close_ones(tmp_path):
    (tmp_path / "llama-2-7b.edgellama").touch()
    with pytest.raises(EdgellamaError, match=r"no such file: .*did you mean .*llama-2-7b\.edgellama\?"):
        edgellama.load(tmp_path / "lama-2-7b.edgellama")
    with pytest.raises(EdgellamaError, match=r"did you mean .*llama-2-7b\.edgellama\?"):
        find_model(tmp_path / "llama-2-7b")
    (tmp_path / "x.edgellama").touch()
    with pytest.raises(EdgellamaError, match=r"did you mean .*x\.edgellama\?"):
        find_model(tmp_path / "x.edgelama")


def test_what_is_no_model_file_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGELLAMA_HOME", str(tmp_path / "home"))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "x.gguf").touch()
    for name, says in {
        "hf": "edgellama convert hf",
        "other": "is a folder",
        "x.gguf": "is a .gguf file",
        "org/name": "edgellama run org/name",
        "nothing.edgellama": "edgellama demo",
    }.items():
        with pytest.raises(EdgellamaError) as caught:
            find_model(name)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_cache_folder_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELLAMA_HOME", str(tmp_path / "x"))
    assert cache_dir() == tmp_path / "x"
    monkeypatch.delenv("EDGELLAMA_HOME")
    assert cache_dir().is_absolute()
    assert "edgellama" in str(cache_dir())


def test_public_names_are_lazy_and_complete():
    code = (
        "import sys, edgellama; heavy = {'numba', 'numpy', 'tokenizers', 'torch', 'jinja2'} & set(sys.modules); "
        "assert not heavy, heavy; [getattr(edgellama, name) for name in edgellama.__all__]; "
        "assert 'numba' not in sys.modules; assert dir(edgellama) == sorted(edgellama.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nonsense"):
        edgellama.nonsense  # noqa: B018


# -- with a real file ------------------------------------------------------------------------------------------------


def test_a_real_file_end_to_end(tiny_model):
    with edgellama.load(tiny_model, device="reference") as llm:
        ids = llm.tokenizer.encode("Hello")
        assert ids[0] == 1
        logits = llm.forward(ids)
        assert logits.shape == (6, llm.config.vocab_size)
        llm.reset()
        np.testing.assert_allclose(llm.forward(ids[:3])[-1], logits[2], rtol=1e-4, atol=1e-4)
        greedy = llm.generate(ids, 8, temperature=0)
        assert greedy.token_ids[0] == int(logits[-1].argmax())
        again = llm.generate("Hello", 8, temperature=0)
        assert again.token_ids == greedy.token_ids
        assert again.text == llm.tokenizer.decode(again.token_ids, skip_special_tokens=True)
        seeded = [llm.generate("Hello", 8, seed=3).token_ids for _ in range(2)]
        assert seeded[0] == seeded[1]


def test_cpu_and_reference_agree(tiny_model):
    ids = [1, 75, 104, 111, 111, 114]
    with edgellama.load(tiny_model, device="reference") as reference, edgellama.load(tiny_model) as cpu:
        expected, got = reference.forward(ids), cpu.forward(ids)
    assert np.abs(got - expected).max() < 0.05 * np.ptp(expected)
    with edgellama.load(tiny_model) as cpu:
        assert not any("compiling" in note for note in cpu.notes)  # not the first run any more


def test_loading_does_not_read_the_tokenizer(tiny_model, monkeypatch):
    import edgellama.tokenizer

    def fail(*_):
        raise AssertionError("read")

    monkeypatch.setattr(edgellama.tokenizer, "load_tokenizer", fail, raising=False)
    with edgellama.load(tiny_model, device="reference") as llm:
        llm.forward([1, 2, 3])


def test_a_model_without_a_tokenizer_takes_and_gives_ids(tiny_checkpoint, tmp_path):
    from edgellama_convert import convert

    shutil.copytree(tiny_checkpoint, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    convert(tmp_path / "hf", tmp_path / "m.edgellama", method="search")
    with edgellama.load(tmp_path / "m.edgellama", device="reference") as llm:
        reply = llm.generate([1, 2, 3], 4, temperature=0)
        assert reply.text == "" and 1 <= len(reply.token_ids) <= 4
        with pytest.raises(edgellama.TokenizerError, match="no tokenizer"):
            llm.generate("Hello")


def test_an_int8_cache_is_half_the_size_and_says_much_the_same(tiny_model):
    with edgellama.load(tiny_model) as exact, edgellama.load(tiny_model, kv_cache="int8") as half:
        expected, logits = exact.forward([1, 9, 30, 77]), half.forward([1, 9, 30, 77])
        assert kl_divergence(expected, logits) <= MAX_KL and (expected != logits).any()
        assert kv_bytes_per_token(half.config, "int8") < 0.6 * kv_bytes_per_token(half.config)
    with pytest.raises(DeviceError, match="unknown kv_cache 'int4'"):
        edgellama.load(tiny_model, kv_cache="int4")


# -- how many sequences ----------------------------------------------------------------------------------------------


def test_n_slots_are_eight_or_what_memory_allows():
    config = FakeFile(max_position_embeddings=4096).config
    slot = 4096 * kv_bytes_per_token(config)
    free = (256 << 20) + slot * 4 // 3  # one slot is three quarters of what is left
    assert choose_n_slots(config, 4096, 0, free) == 1
    assert choose_n_slots(config, 4096, 0, free + slot * 4 * 2 // 3 + 9) == 3
    assert choose_n_slots(config, 4096, 0, 64 << 30) == 8
    assert choose_n_slots(config, 4096, 1 << 40, 64 << 30) == 1  # never none
    assert choose_n_slots(config, 4096, 0, None) == 1
    assert choose_n_slots(config, 4096, 0, free + slot * 4 * 2 // 3 + 9, "int8") > 3


def test_n_ctx_is_cut_for_as_many_sequences_as_were_asked_for():
    config = FakeFile(max_position_embeddings=1 << 20).config
    free = (256 << 20) + 10_000 * kv_bytes_per_token(config) * 4 // 3
    n_ctx, notes = choose_n_ctx(config, None, 0, free, n_slots=4)
    assert n_ctx == 2304 and "2304 tokens for each of 4 sequences" in notes[0]
    assert choose_n_ctx(config, 100_000, 0, 64 << 30, n_slots=1)[0] == 100_000
    with pytest.raises(ContextError, match="for each of 64 sequences needs"):
        choose_n_ctx(config, 1 << 20, 0, 1 << 32, n_slots=64)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_slots_take_no_memory_before_they_are_used(tiny_checkpoint, tmp_path):
    """Eight slots of a long context are far more than this process has resident after a short prompt."""
    from edgellama.backends.reference import ReferenceBackend
    from edgellama.format import open_model
    from edgellama_convert import convert

    convert(tiny_checkpoint, tmp_path / "m.edgellama", method="rtn")
    with open_model(tmp_path / "m.edgellama") as file:
        n_ctx = (1 << 30) // 8 // kv_bytes_per_token(file.config, "float32")
        before = resident_bytes()
        backend = ReferenceBackend(file, n_ctx, 8)  # 1 GiB
        backend.forward([1, 2, 3], [0, 1, 2], [5, 5, 5], [2])
        assert resident_bytes() - before < 300 << 20
        assert sum(array.nbytes for array in (backend._keys, backend._values)) > 900 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_load_takes_n_slots(tiny_model):
    with edgellama.load(tiny_model, device="reference") as llm:
        assert llm.n_slots == 8
    with edgellama.load(tiny_model, device="reference", n_slots=3) as llm:
        assert llm.n_slots == 3 and len(llm.generate([[1], [2], [3], [4]], 2)) == 4
