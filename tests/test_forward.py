"""A forward pass over batches: padding, positions, caches, states, attentions, hooks, losses; cpu against reference."""

import math

import numpy as np
import pytest

import edgellama
from checkpoints import make_checkpoint
from closeness import ORACLE_TOLERANCE, relative_error
from edgellama.errors import ContextError, DeviceError
from edgellama_convert import convert
from fakes import fake_llama

IDS = [5, 9, 2, 60, 33, 120, 7, 250]
LEFT = [[0, 0, 5, 9, 2], [60, 33, 120, 7, 250]]
LEFT_MASK = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


@pytest.fixture(scope="module", params=["reference", "cpu"])
def llm(request, tiny_model):
    with edgellama.load(tiny_model, device=request.param, n_ctx=64, n_threads=2, n_slots=4) as model:
        yield model


def close(llm, a, b):
    """Equal on the CPU, whose bits do not depend on the batch; nearly so on the reference."""
    if llm._backend.batch_invariant:
        np.testing.assert_array_equal(a, b)
    else:
        assert relative_error(a, b) < ORACLE_TOLERANCE


def alone(llm, ids):
    llm.reset()
    return llm.forward(ids)


def test_a_batch_is_each_sequence_alone(llm):
    out = llm.forward([IDS, IDS[::-1]])
    assert out.logits.shape == (2, 8, 277) and out.logits.dtype == np.float32
    for row, ids in zip(out.logits, (IDS, IDS[::-1]), strict=True):
        close(llm, row, alone(llm, ids))
    assert out.loss is None and out.hidden_states is None and out.keys() == ["logits", "past_key_values"]
    assert out[0] is out["logits"] is out.logits
    with pytest.raises(KeyError):
        out["loss"]


def test_padding_on_either_side_changes_nothing_and_is_zero(llm):
    want = alone(llm, [5, 9, 2])
    right = llm.forward([[5, 9, 2, -1, 999], LEFT[1]], attention_mask=[[1, 1, 1, 0, 0], [1] * 5])
    close(llm, right.logits[0, :3], want)
    assert (right.logits[0, 3:] == 0).all()
    positions = np.maximum(np.cumsum(LEFT_MASK, axis=1) - 1, 0)
    left = llm.forward(LEFT, attention_mask=LEFT_MASK, position_ids=positions)
    close(llm, left.logits[0, 2:], want)
    # By default positions are the columns, as in transformers: RoPE is relative, so only rounding differs.
    shifted = llm.forward(LEFT, attention_mask=LEFT_MASK)
    bar = ORACLE_TOLERANCE if llm._backend.kv_cache == "float32" else 2e-3
    assert relative_error(shifted.logits[0, 2:], want) < bar
    assert (shifted.logits[0, :2] == 0).all()


def test_logits_to_keep(llm):
    whole = llm.forward([IDS, IDS[::-1]]).logits
    close(llm, llm.forward([IDS, IDS[::-1]], 2).logits, whole[:, -2:])
    close(llm, llm.forward([IDS, IDS[::-1]], [0, -1, 3]).logits, whole[:, [0, -1, 3]])
    for bad in (-1, [8], [], "x", 1.5):
        with pytest.raises((ValueError, TypeError), match="logits_to_keep"):
            llm.forward([IDS], bad)


def test_layer_by_layer_gives_the_same_bits(llm):
    plain = llm.forward([IDS, IDS[::-1]])
    out = llm.forward([IDS, IDS[::-1]], output_hidden_states=True, output_attentions=True)
    np.testing.assert_array_equal(out.logits, plain.logits)
    assert [each.shape for each in out.hidden_states] == [(2, 8, 192)] * 3
    assert [each.shape for each in out.attentions] == [(2, 6, 8, 8)] * 2
    for weights in out.attentions:
        np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
        assert (np.triu(weights, 1) == 0).all()
    with llm.lent() as engine:
        slot = engine.slots.take(np.array(IDS, np.int32), reuse=False)
        last = engine.hidden(IDS, range(8), [slot.index] * 8, range(8))
    close(llm, out.hidden_states[-1][0], last)


def test_the_cpu_gives_what_the_reference_gives(tiny_model):
    outs = []
    for device in ("reference", "cpu"):
        with edgellama.load(tiny_model, device=device, n_ctx=64, n_threads=2, n_slots=4) as model:
            kwargs = {"attention_mask": LEFT_MASK, "output_hidden_states": True, "output_attentions": True}
            outs.append(model.forward(LEFT, **kwargs))
    exact, fast = outs
    for a, b in zip(exact.hidden_states, fast.hidden_states, strict=True):
        assert relative_error(b, a) < 0.02
    for a, b in zip(exact.attentions, fast.attentions, strict=True):
        assert np.abs(a - b).max() < 0.02
    assert (fast.attentions[0][0, :, :, :2] == 0).all() and (fast.attentions[0][0, :, :2] == 0).all()


def test_embeddings_in_place_of_ids(llm):
    out = llm.forward([IDS], output_hidden_states=True)
    again = llm.forward(inputs_embeds=out.hidden_states[0])
    np.testing.assert_array_equal(again.logits, out.logits)
    with pytest.raises(ValueError, match="exactly one"):
        llm.forward([IDS], inputs_embeds=out.hidden_states[0])
    with pytest.raises(ValueError, match=r"\[batch, tokens, 192\]"):
        llm.forward(inputs_embeds=np.zeros((1, 2, 3)))


def test_hooks_see_and_change_the_stream(llm):
    seen = {}
    out = llm.forward([IDS], output_hidden_states=True, hooks=lambda layer, x: seen.update({layer: x.copy()}))
    assert sorted(seen) == [0, 1]
    np.testing.assert_array_equal(seen[0], out.hidden_states[1])

    def halve(x):
        x *= np.float32(0.5)

    in_place = llm.forward([IDS], hooks={0: halve})
    returned = llm.forward([IDS], hooks={0: lambda x: x * np.float32(0.5)})
    np.testing.assert_array_equal(in_place.logits, returned.logits)
    assert np.abs(returned.logits - out.logits).max() > 0.1
    # What a hook puts there is what comes next: another sequence's stream gives that one's logits.
    streams = {}
    other = llm.forward([IDS[::-1]], hooks={1: lambda x: streams.update(last=x.copy())})
    swapped = llm.forward([IDS], hooks={1: lambda x: streams["last"]})
    np.testing.assert_array_equal(swapped.logits, other.logits)
    for bad, error in [({2: print}, ValueError), ({0: 1}, TypeError), (3, TypeError)]:
        with pytest.raises(error, match="hook"):
            llm.forward([IDS], hooks=bad)
    with pytest.raises(ValueError, match="must return"):
        llm.forward([IDS], hooks=lambda layer, x: x[:, :2])


def test_a_cache_goes_on(llm):
    whole = llm.forward([IDS, IDS[::-1]]).logits
    out = llm.forward([IDS[:3], IDS[::-1][:3]])
    cache = out.past_key_values
    assert cache.get_seq_length() == len(cache) == 3 and cache.batch_size == 2
    close(llm, out.logits, whole[:, :3])
    for t in range(3, 8):
        step = llm.forward([[IDS[t]], [IDS[::-1][t]]], past_key_values=cache, cache_position=[t])
        assert step.past_key_values is cache
        close(llm, step.logits[:, 0], whole[:, t])
    cache.crop(4)
    close(llm, llm.forward([IDS[4:6], IDS[::-1][4:6]], past_key_values=cache).logits, whole[:, 4:6])
    cache.crop(-1)
    assert cache.get_seq_length() == 5


def test_a_cache_is_forked_copied_and_outlives_its_slot(llm):
    whole = llm.forward([IDS]).logits
    cache = llm.forward([IDS[:5]]).past_key_values
    twins = cache.fork(2)
    other = cache.copy()
    assert (twins.batch_size, other.get_seq_length()) == (2, 5)
    out = llm.forward([[IDS[5]], [1]], past_key_values=twins)
    close(llm, out.logits[0, 0], whole[0, 5])
    # Everyone else uses all the slots meanwhile.
    llm.forward([[7] * 4] * 4)
    llm.generate([3, 4, 5], max_new_tokens=2, temperature=0)
    close(llm, llm.forward([IDS[5:]], past_key_values=other).logits[0], whole[0, 5:])
    close(llm, llm.forward([IDS[5:]], past_key_values=cache).logits[0], whole[0, 5:])
    close(llm, llm.forward([[IDS[6]]], past_key_values=twins.select([0])).logits[0, 0], whole[0, 6])
    with pytest.raises(ValueError, match="no sequence 2"):
        twins.select([2])


def test_a_cache_with_padding(llm):
    want = llm.forward(LEFT, attention_mask=LEFT_MASK).logits
    cache = llm.forward([row[:3] for row in LEFT], attention_mask=[row[:3] for row in LEFT_MASK]).past_key_values
    out = llm.forward(
        [row[3:] for row in LEFT], attention_mask=LEFT_MASK, past_key_values=cache, output_attentions=True
    )
    close(llm, out.logits, want[:, 3:])
    assert out.attentions[0].shape == (2, 6, 2, 5)
    with pytest.raises(ValueError, match="differs from"):
        llm.forward([[1], [1]], attention_mask=[[1] * 6, [1] * 6], past_key_values=cache)
    with pytest.raises(ValueError, match=r"shape \[2, 6\]"):
        llm.forward([[1], [1]], attention_mask=[[1], [1]], past_key_values=cache)
    with pytest.raises(ValueError, match="cache has 2 sequences"):
        llm.forward([[1]], past_key_values=cache)
    with pytest.raises(ValueError, match="cache_position must be 5 to 5"):
        llm.forward([[1], [1]], past_key_values=cache, cache_position=[3])


def test_labels_give_the_mean_cross_entropy(llm):
    ids = np.array([IDS, IDS[::-1]])
    labels = ids.copy()
    labels[0, :3] = -100
    out = llm.forward(ids, labels=labels)
    assert out.past_key_values is None  # nobody goes on from a loss
    rows = out.logits.astype(np.float64)
    log_p = rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    terms = [-log_p[b, t, labels[b, t + 1]] for b in range(2) for t in range(7) if labels[b, t + 1] != -100]
    assert math.isclose(out.loss, np.mean(terms), rel_tol=1e-9)
    assert math.isnan(llm.forward([IDS], labels=[[-100] * 8]).loss)
    for bad in ([[1]], [[277] * 8], [[0.5] * 8]):
        with pytest.raises(ValueError, match="labels must be"):
            llm.forward([IDS], labels=bad)
    with pytest.raises(ValueError, match="padding must be -100"):
        llm.forward([IDS], attention_mask=[[0] + [1] * 7], labels=[IDS])
    with pytest.raises(ValueError, match="every column"):
        llm.forward([IDS], 1, labels=[IDS])


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({}, TypeError, "integers"),
        ({"input_ids": [[1, 2], [3]]}, ValueError, "different lengths"),
        ({"input_ids": [[1.5]]}, TypeError, "integers"),
        ({"input_ids": [[277]]}, ValueError, r"input_ids\[0, 0\] is 277"),
        ({"input_ids": [[1]], "attention_mask": [[2]]}, ValueError, "0 and 1"),
        ({"input_ids": [[1]], "attention_mask": [[0]]}, ValueError, "no token"),
        ({"input_ids": [[1]], "attention_mask": [[[[1]]]]}, ValueError, "shape"),
        ({"input_ids": [[1]], "position_ids": [[-1]]}, ValueError, "position_ids"),
        ({"input_ids": [[1]], "position_ids": [[1, 2]]}, ValueError, "position_ids"),
        ({"input_ids": [[1] * 65]}, ContextError, "context of 64"),
        ({"input_ids": [[1]] * 5}, ContextError, "n_slots=5"),
    ],
)
def test_arguments_that_are_wrong(llm, kwargs, error, says):
    with pytest.raises(error, match=says):
        llm.forward(**kwargs)


def test_positions_of_the_callers_own_move_the_tokens(llm):
    near, far = (llm.forward([IDS], position_ids=[[0, 1, 2, 3, 4, 5, 6, last]]).logits for last in (7, 40))
    close(llm, near, llm.forward([IDS]).logits)
    close(llm, near[:, :7], far[:, :7])
    assert np.abs(near[0, 7] - far[0, 7]).max() > 1e-3


def test_a_device_without_layers_says_so():
    llm = fake_llama(n_slots=2)
    assert llm.forward([[5, 6], [7, 8]], use_cache=False).logits.argmax(-1).tolist() == [[6, 7], [8, 9]]
    with pytest.raises(DeviceError, match="cpu and reference"):
        llm.forward([[5]], output_hidden_states=True)
    with pytest.raises(DeviceError, match="position_ids"):
        llm.forward([[0, 5]], attention_mask=[[0, 1]])


def test_another_models_cache_is_refused(llm, tiny_model):
    with edgellama.load(tiny_model, device="reference", n_ctx=16) as other:
        cache = other.forward([[1]]).past_key_values
        with pytest.raises(ValueError, match="another model"):
            llm.forward([[1]], past_key_values=cache)


def test_a_batch_leaves_the_simple_call_alone(llm):
    llm.reset()
    want = alone(llm, IDS)
    llm.reset()
    cache = llm.forward([IDS[:2]]).past_key_values
    assert llm.n_past == 0
    first = llm.forward(IDS[:4])
    assert isinstance(first, np.ndarray) and llm.n_past == 4
    close(llm, np.concatenate([first, llm.forward(IDS[4:])]), want)
    assert cache.get_seq_length() == 2


def test_passes_without_layers_keep_the_threads_in_step(tiny_model):
    """More threads than cores: one that is late must not read the next pass's number of layers."""
    with edgellama.load(tiny_model, n_ctx=32, n_threads=6, n_slots=1) as llm:
        plain = llm.forward([IDS], use_cache=False).logits
        for _ in range(60):
            out = llm.forward([IDS], use_cache=False, output_hidden_states=True)
            np.testing.assert_array_equal(out.logits, plain)


def test_a_batch_can_be_cancelled(llm):
    cancel = edgellama.CancelToken()
    with pytest.raises(edgellama.CancelledError):
        llm.forward([IDS], hooks=lambda layer, x: cancel.cancel(), cancel=cancel)
    close(llm, llm.forward([IDS]).logits[0], alone(llm, IDS))


@pytest.mark.parametrize("kv_cache", ["int8", "float16"])
def test_attentions_of_a_long_prompt_come_in_chunks(tmp_path, kv_cache):
    make_checkpoint(tmp_path / "s", max_position_embeddings=512)
    convert(tmp_path / "s", tmp_path / "m.edgellama", receipt=False, method="search")
    ids = [np.arange(300) * 37 % 277]
    with edgellama.load(tmp_path / "m.edgellama", device="reference", n_ctx=512, n_slots=1) as exact:
        want = exact.forward(ids, output_attentions=True).attentions
    with edgellama.load(tmp_path / "m.edgellama", n_ctx=512, n_threads=2, n_slots=1, kv_cache=kv_cache) as fast:
        plain = fast.forward(ids).logits
        out = fast.forward(ids, output_attentions=True)
    np.testing.assert_array_equal(out.logits, plain)
    for a, b in zip(want, out.attentions, strict=True):
        assert np.abs(a - b).max() < 0.05
        np.testing.assert_allclose(b.sum(axis=-1), 1, rtol=1e-5)
