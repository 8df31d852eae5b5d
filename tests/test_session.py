"""Sessions: the same bits after loading; every cut, flip and foreign file refused in one line; written atomically."""

import errno
import os
import struct

import numpy as np
import pytest
import xxhash

import edgellama
from checkpoints import make_checkpoint
from edgellama.errors import ContextError, EdgellamaError, FormatError
from edgellama.format import storage
from edgellama_convert import convert

PROMPT = "The quick brown fox jumps over the lazy dog"
GREEDY = {"temperature": 0, "eos_token_id": [], "logprobs": True}
PROLOGUE = struct.Struct("<8sHHIQQ16s16s")


@pytest.fixture(scope="module")
def llm(tiny_model):
    with edgellama.load(tiny_model, n_ctx=128, n_slots=2, n_threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def saved(llm, tmp_path_factory):
    """(the file's bytes, the ids in it)"""
    path = tmp_path_factory.mktemp("session") / "a.session"
    llm.reset()
    reply = llm.generate(PROMPT, 12, **GREEDY)
    llm.save_session(path)
    return path.read_bytes(), reply.prompt_token_ids + reply.token_ids[:-1]


@pytest.mark.parametrize("n_ctx", [64, 128, 200])
@pytest.mark.parametrize("kind", ["float16", "int8", "reference"])
def test_what_comes_after_a_loaded_session_has_the_same_bits(tiny_model, tmp_path, kind, n_ctx):
    options = {"device": "reference"} if kind == "reference" else {"kv_cache": kind}
    path = tmp_path / "a.session"
    with edgellama.load(tiny_model, n_ctx=128, n_slots=2, n_threads=1, **options) as first:
        ids = first.tokenizer.encode(PROMPT)
        first.forward(ids[:20])
        first.forward(ids[20:])
        first.save_session(path)
        expected = first.forward([50, 51, 52])
    with edgellama.load(tiny_model, n_ctx=n_ctx, n_slots=3, n_threads=2, **options) as second:
        second.generate("something else", 5)
        assert second.load_session(path) == ids
        assert second.n_past == len(ids)
        assert (second.forward([50, 51, 52]) == expected).all()
        assert second.n_past == len(ids) + 3


def test_a_conversation_goes_on_without_computing_it_again(llm, tiny_model, saved, tmp_path):
    data, ids = saved
    (tmp_path / "a.session").write_bytes(data)
    more = [*ids, 60, 61, 62]
    llm.reset()
    expected = llm.generate(more, 15, **GREEDY)
    assert expected.timings.cached_tokens == 0
    with edgellama.load(tiny_model, n_ctx=90) as other:
        assert other.load_session(str(tmp_path / "a.session")) == ids
        got = other.generate(more, 15, **GREEDY)
        assert got.timings.cached_tokens == len(ids)
        assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)
        other.save_session(tmp_path / "b.session")  # and so on
        assert other.load_session(tmp_path / "b.session") == more + got.token_ids[:-1]


def test_only_what_is_filled_is_saved(llm, saved, tmp_path):
    data, ids = saved
    config = llm.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    assert len(data) == 72 + len(ids) * (8 + per_token)
    llm.generate("x", 1, temperature=0)
    llm.save_session(tmp_path / "x.session")
    assert (tmp_path / "x.session").stat().st_size == 72 + 2 * (8 + per_token)


def test_rope_that_depends_on_the_length_of_a_call(tmp_path):
    """How the positions were rotated is saved with them."""
    make_checkpoint(tmp_path / "hf", max_position_embeddings=24, rope_scaling={"type": "dynamic", "factor": 2.0})
    convert(tmp_path / "hf", tmp_path / "m.edgellama", method="rtn")
    prompt = list(range(40, 60))
    with edgellama.load(tmp_path / "m.edgellama", n_ctx=64) as llm:
        first = llm.generate(prompt, 20, **GREEDY)
        llm.save_session(tmp_path / "a.session")
        more = [*prompt, *first.token_ids[:-1], 7, 8]
        expected = llm.generate(more, 9, **GREEDY)
    with edgellama.load(tmp_path / "m.edgellama", n_ctx=64) as llm:
        llm.load_session(tmp_path / "a.session")
        got = llm.generate(more, 9, **GREEDY)
        assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)
        assert got.timings.cached_tokens == expected.timings.cached_tokens


def test_there_must_be_something_to_save(llm, tmp_path):
    path = tmp_path / "a.session"
    llm.reset()
    with pytest.raises(EdgellamaError, match="no session to save"):
        llm.save_session(path)
    llm.generate(["a", "b"], 2)
    with pytest.raises(EdgellamaError, match="no session to save"):
        llm.save_session(path)
    assert not path.exists()


# -- files that are none ---------------------------------------------------------------------------------------------


def refused(llm, path, data, error=FormatError, says=None):
    path.write_bytes(data)
    with pytest.raises(error, match=says) as caught:
        llm.load_session(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def sealed(data, **changes):
    """`data` with other numbers in its prologue, and every digest right."""
    names = ("magic", "major", "minor", "kind", "n", "n_bytes", "model", "digest")
    fields = dict(zip(names, PROLOGUE.unpack(data[:64]), strict=True))
    fields["digest"] = xxhash.xxh3_128_digest(data[72:])
    head = PROLOGUE.pack(*{**fields, **changes}.values())
    return head + xxhash.xxh3_64_digest(head) + data[72:]


def test_every_cut_is_refused(llm, saved, tmp_path):
    data, _ = saved
    random = np.random.default_rng(0)
    for end in [*range(73), *random.integers(73, len(data), 60).tolist(), len(data) - 1]:
        refused(llm, tmp_path / "a.session", data[:end])
    refused(llm, tmp_path / "a.session", data + b"\0")


def test_every_flipped_bit_is_refused(llm, saved, tmp_path):
    data, _ = saved
    random = np.random.default_rng(1)
    for bit in [*range(72 * 8), *random.integers(72 * 8, len(data) * 8, 150).tolist()]:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        refused(llm, tmp_path / "a.session", flipped)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"magic": b"EDGLLAMA"}, FormatError, "not an edgellama session"),
        ({"major": 2}, FormatError, r"session.major \(byte 8\): version 2.0 is not supported"),
        ({"kind": 4}, FormatError, r"session.kind \(byte 12\)"),
        ({"kind": 1}, EdgellamaError, "a session with a int8 cache, this model's is float16"),
        ({"model": bytes(16)}, EdgellamaError, "a session of another model"),
        ({"n": 0}, FormatError, r"session.n \(byte 16\)"),
        ({"n": 1}, FormatError, r"session.bytes \(byte 24\)"),
        ({"n": 129}, ContextError, "the session has 129 tokens, the context 128"),
        ({"n": 2**64 - 1}, ContextError, "the context 128"),
        ({"n_bytes": 0}, FormatError, "session.bytes"),
        ({"n_bytes": 2**64 - 1}, FormatError, "session.bytes"),
    ],
)
def test_numbers_that_lie_are_refused(llm, saved, tmp_path, changes, error, says):
    data, _ = saved
    assert sealed(data) == data
    refused(llm, tmp_path / "a.session", sealed(data, **changes), error, says)


@pytest.mark.parametrize("token", [277, -1, 2**31 - 1])
def test_tokens_outside_the_vocabulary_are_refused(llm, saved, tmp_path, token):
    data, ids = saved
    forged = data[:80] + struct.pack("<i", token) + data[84:]
    refused(llm, tmp_path / "a.session", sealed(forged), FormatError, r"session.tokens \(byte 72\)")
    at = 72 + 4 * len(ids)
    forged = data[:at] + struct.pack("<i", -1) + data[at + 4 :]
    refused(llm, tmp_path / "a.session", sealed(forged), FormatError, "session.classes")


def test_forged_numbers_are_numbers(llm, saved, tmp_path):
    """Whoever can write the file decides what the model has seen: nonsense in gives nonsense out, or an error."""
    data, ids = saved
    random = np.random.default_rng(2)
    forged = data[: 72 + 8 * len(ids)] + random.bytes(len(data) - 72 - 8 * len(ids))
    (tmp_path / "a.session").write_bytes(sealed(forged))
    assert llm.load_session(tmp_path / "a.session") == ids
    try:
        llm.generate([*ids, 5], 5, temperature=0)
    except EdgellamaError as error:
        assert "not finite" in str(error)
    finally:
        llm.reset()


def test_a_refused_session_changes_nothing(llm, saved, tmp_path):
    data, _ = saved
    llm.reset()
    llm.forward([1, 9, 30])
    refused(llm, tmp_path / "a.session", data[:-1])
    assert llm.n_past == 3
    expected = llm.forward([77])
    llm.reset()
    llm.forward([1, 9, 30])
    assert (llm.forward([77]) == expected).all()


def test_a_session_of_another_model_is_refused(saved, tmp_path):
    """The same config, other weights."""
    make_checkpoint(tmp_path / "hf", seed=5, eos_token_id=2)
    convert(tmp_path / "hf", tmp_path / "m.edgellama", method="search")
    with edgellama.load(tmp_path / "m.edgellama", n_ctx=128) as other:
        refused(other, tmp_path / "a.session", saved[0], EdgellamaError, "a session of another model")


def test_a_session_belongs_to_the_model_and_not_to_its_file(tiny_model, saved, tmp_path):
    """Another chat template, another place: the same weights."""
    from edgellama.format import append_metadata

    (tmp_path / "m.edgellama").write_bytes(tiny_model.read_bytes())
    append_metadata(tmp_path / "m.edgellama", files={"chat_template.jinja": b"{{ messages }}"})
    (tmp_path / "a.session").write_bytes(saved[0])
    with edgellama.load(tmp_path / "m.edgellama", n_ctx=128) as llm:
        assert llm.load_session(tmp_path / "a.session") == saved[1]


def test_what_is_no_file(llm, tmp_path):
    with pytest.raises(EdgellamaError, match=r"no such file; save_session makes one"):
        llm.load_session(tmp_path / "none.session")
    with pytest.raises(EdgellamaError, match="is a folder, not an edgellama session"):
        llm.load_session(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(EdgellamaError, match="is a pipe"):
            llm.load_session(tmp_path / "pipe")


# -- writing ---------------------------------------------------------------------------------------------------------


def test_an_old_session_is_replaced_and_nothing_else(llm, saved, tmp_path):
    data, _ = saved
    path, link = tmp_path / "a.session", tmp_path / "link.session"
    path.write_bytes(data)
    llm.generate("y", 3, temperature=0)
    llm.save_session(path)
    assert path.read_bytes() != data
    if os.name != "nt":
        link.symlink_to(path)
        llm.save_session(link)
        assert link.is_symlink()
    for name, content in {"notes.txt": b"my notes", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EdgellamaError, match="exists and is not an edgellama session"):
            llm.save_session(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    with pytest.raises(EdgellamaError, match="is a folder"):
        llm.save_session(tmp_path)
    with pytest.raises(EdgellamaError, match=r"the folder .* does not exist"):
        llm.save_session(tmp_path / "nowhere" / "a.session")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("call", ["create", "write", "fsync", "replace"])
def test_a_failing_disk_leaves_the_old_session(llm, saved, tmp_path, monkeypatch, call, old):
    data, _ = saved
    path = tmp_path / "a.session"
    if old:
        path.write_bytes(data)
    llm.generate("y", 3, temperature=0)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, call, fail)
    with pytest.raises(EdgellamaError, match=r"a\.session: cannot be written: No space left on device"):
        llm.save_session(path)
    assert [each.name for each in tmp_path.iterdir()] == (["a.session"] if old else [])
    assert not old or path.read_bytes() == data
