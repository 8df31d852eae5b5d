"""Calibrated conversions as a whole: the forward pass, the file, its quality, and how unfinished ones go on."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import edgellama_convert
from checkpoints import make_checkpoint, random_weights, write_safetensors
from closeness import ORACLE_TOLERANCE, relative_error
from conftest import byte_tokenizer
from edgellama.backends.reference import ReferenceBackend
from edgellama.cli import main
from edgellama.errors import ConvertError
from edgellama.format import open_model, storage
from edgellama.quant import load_matrix
from edgellama_convert import conversion as conversion_module
from edgellama_convert import convert
from edgellama_convert.checkpoint import Checkpoint
from edgellama_convert.comparison import compare
from edgellama_convert.gptq import CalibratedLayers, WorkFolder, driver
from edgellama_convert.receipt import heldout_text
from edgellama_convert.resources import private_bytes

SMALL = {"hidden_size": 96, "intermediate_size": 144, "num_hidden_layers": 3, "max_position_embeddings": 64}
LAYERS_TO_KILL = 4
PROSE = Path(edgellama_convert.__file__).parent / "calibration_text" / "prose.txt"  # a short part of the builtin text
OPTIONS = {"method": "gptq", "calibration": PROSE, "calibration_tokens": 256, "receipt": False}


def make_source(folder, **changes):
    make_checkpoint(folder, **{**SMALL, **changes})
    (folder / "tokenizer.json").write_text(byte_tokenizer(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("gptq") / "source")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """The report of a conversion with a receipt. Do not change its file."""
    return convert(source, tmp_path_factory.mktemp("made") / "m.edgellama", method="gptq", calibration_tokens=2048)


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    """The bytes that an undisturbed conversion with `OPTIONS` gives."""
    return convert(source, tmp_path_factory.mktemp("expected") / "m.edgellama", **OPTIONS).out.read_bytes()


@pytest.fixture
def layers_worked_on(monkeypatch):
    """Numbers of the layers that were quantized since, in order."""
    numbers = []
    original = CalibratedLayers._layer

    def layer(self, i, pool):
        numbers.append(i)
        original(self, i, pool)

    monkeypatch.setattr(CalibratedLayers, "_layer", layer)
    return numbers


def interrupted(source, out, matrices, **options):
    """Convert until so many matrices are quantized, then stop as Ctrl-C would."""
    calls = []

    def progress(done, total):
        calls.append(done)
        if len(calls) == matrices:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, **{**OPTIONS, **options}, progress=progress)
    assert not out.exists()


def work_folder(out):
    return out.with_name(f".{out.name}.gptq")


def only(out):
    """Whether the destination is alone in its folder."""
    return [path.name for path in out.parent.iterdir()] == [out.name]


# -- what is computed ----------------------------------------------------------------------------------------------


def check_streams(changes, device, tmp_path, monkeypatch):
    """What goes into the final norm is the reference backend's: of the source's float weights, and of the file's."""
    source = make_source(tmp_path / "source", **{"dtype": "float32", "num_hidden_layers": 2, **changes})
    monkeypatch.setattr(driver, "_CHUNK_BYTES", 3 * 64 * 4 * 144)  # 3 sequences at a time, where 6 are
    ids, streams = [], {}
    run = CalibratedLayers.run

    def run_and_look(self):
        discard = self._work.discard
        self._work.discard = lambda pattern: None if pattern == "x-*" else discard(pattern)
        run(self)
        ids.append(self._ids)
        with self._streams("x-00002", self._config.hidden_size) as (source, quantized):
            streams["source"], streams["quantized"] = (each.read(0, self._ids.size) for each in (source, quantized))

    monkeypatch.setattr(CalibratedLayers, "run", run_and_look)
    options = {"method": "gptq", "calibration_tokens": 6 * 64, "receipt": False, "device": device}
    report = convert(source, tmp_path / "m.edgellama", **options)
    assert report.device == device and ids[0].shape == (6, 64)

    with open_model(report.out) as file, Checkpoint(source) as checkpoint:
        files = {"quantized": file, "source": SourceFile(file, checkpoint)}
        for name, each in files.items():
            backend = ReferenceBackend(each, 64)
            for row, sequence in zip(streams[name].reshape(6, 64, -1), ids[0], strict=True):
                positions = np.arange(64)
                want = backend.hidden(sequence, positions, 0 * positions, positions)
                variance = np.mean(row * row, axis=-1, keepdims=True)
                got = row / np.sqrt(variance + file.config.rms_norm_eps) * each.array("model.norm.weight")
                assert relative_error(got, want) < ORACLE_TOLERANCE
    assert relative_error(streams["quantized"], streams["source"]) > 10 * ORACLE_TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"num_key_value_heads": 6, "attention_bias": True},
        {"num_key_value_heads": 1, "mlp_bias": True, "tie_word_embeddings": True},
        {"head_dim": 24, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        {"hidden_size": 132, "intermediate_size": 150, "hidden_act": "relu"},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "hidden_act": "gelu_pytorch_tanh"},
        {"hidden_size": 6, "intermediate_size": 5, "num_attention_heads": 3, "num_key_value_heads": 1},
    ],
    ids=",".join,
)
def test_both_streams_are_the_reference_backends(changes, tmp_path, monkeypatch):
    check_streams(changes, "cpu", tmp_path, monkeypatch)


class SourceFile:
    """Stands in for a ModelFile: a checkpoint's weights as float32."""

    def __init__(self, file, checkpoint):
        self.config, self._checkpoint, self.tensors = file.config, checkpoint, {}
        for name, tensor in checkpoint.tensors.items():
            self.tensors[name] = type("Entry", (), {"layout": "f32", "shape": tensor.shape})

    def array(self, name):
        return self._checkpoint.read(self._checkpoint.tensors[name])


def test_the_file_tells_how_it_was_calibrated(made, source, capsys):
    with open_model(made.out) as file:
        file.verify()
        quantization, receipt = file.header["quantization"], file.receipt
    summary = quantization["calibration"]
    assert quantization["method"] == receipt["method"] == made.method == "gptq"
    assert receipt["calibration"] == summary
    assert summary.pop("xxh3_128") and summary == {"sources": ["builtin"], "sequences": 32, "sequence_tokens": 64}
    assert main(["verify", str(made.out)]) == 0
    assert main(["info", str(made.out)]) == 0
    assert "builtin" in capsys.readouterr().out
    assert only(made.out)


def test_reported_errors_are_those_of_what_is_stored(made, source):
    with open_model(made.out) as file, Checkpoint(source) as checkpoint:
        for name, error in made.errors.items():
            weights = checkpoint.read(checkpoint.tensors[name]).astype(np.float64)
            stored = load_matrix(file, name.removesuffix(".weight"))
            exact = (np.square(stored - weights).sum() / np.square(weights).sum()) ** 0.5
            assert error == pytest.approx(exact, rel=1e-6)
        layers = [name for name in made.errors if ".layers." in name]
        assert len(layers) == 3 * 7 and set(made.errors) == {*layers, "lm_head.weight", "model.embed_tokens.weight"}
    assert all(0.02 < made.errors[name] < 0.3 for name in layers)


def test_nearer_to_the_source_than_search_on_other_text(made, source, tmp_path):
    plain = convert(source, tmp_path / "s.edgellama", method="search", receipt=False)
    text = heldout_text()
    ours, theirs = (compare(report.out, source, text, ctx=64, max_windows=16) for report in (made, plain))
    assert ours.kl_mean < 0.6 * theirs.kl_mean and ours.top1 > theirs.top1
    assert (np.array(ours.layer_errors[1:]) < np.array(theirs.layer_errors[1:])).all()
    rms = [max(report.errors[name] for name in report.errors if ".layers." in name) for report in (made, plain)]
    assert rms[0] > rms[1]  # not because its weights were nearer


def test_the_same_bytes_for_any_threads_and_again(made, source, expected, tmp_path):
    for threads in (1, 2, 3):
        out = convert(source, tmp_path / "m.edgellama", **OPTIONS, n_threads=threads).out
        assert out.read_bytes() == expected


@pytest.mark.parametrize("lm_head_bits", [4, 8, 16])
@pytest.mark.parametrize("tied", [False, True])
def test_lm_head_bits_and_tied_embeddings(tied, lm_head_bits, tmp_path):
    source = make_source(tmp_path / "source", tie_word_embeddings=tied, num_hidden_layers=1)
    ours = convert(source, tmp_path / "m.edgellama", **OPTIONS, lm_head_bits=lm_head_bits)
    plain = convert(source, tmp_path / "s.edgellama", method="search", lm_head_bits=lm_head_bits, receipt=False)
    with open_model(ours.out) as file, open_model(plain.out) as other:
        file.verify()
        assert file.lm_head_bits == lm_head_bits and set(file.tensors) == set(other.tensors)
        for name in file.tensors:
            same = file.array(name).tobytes() == other.array(name).tobytes()
            assert same != (".layers." in name and name.endswith((".qweight", ".scales"))), name


def test_text_of_the_users_and_the_models_own(source, expected, tmp_path):
    (tmp_path / "text.txt").write_text(heldout_text(), encoding="utf-8")
    out = tmp_path / "out" / "m.edgellama"
    out.parent.mkdir()
    for calibration in ("self", tmp_path / "text.txt", ["builtin", "self", str(tmp_path / "text.txt")]):
        found = [
            convert(source, out, **{**OPTIONS, "calibration": calibration}, n_threads=threads).out.read_bytes()
            for threads in (2, 1)
        ]
        assert found[0] == found[1] != expected and only(out)
        with open_model(out) as file:
            stored = file.header["quantization"]["calibration"]
        names = [calibration] if not isinstance(calibration, list) else calibration
        assert stored["sources"] == [os.path.basename(name) for name in names]


def test_progress_counts_every_weight_once(source, made, tmp_path):
    calls = []
    convert(source, tmp_path / "m.edgellama", **OPTIONS, progress=lambda *args: calls.append(args))
    done = [done for done, _ in calls]
    assert done == sorted(done) and len(done) >= 3 * 7
    assert calls[-1] == (made.weights, made.weights)


# -- what cannot be done -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e17, 1e19, 1e25, 1e38])
def test_activations_that_overflow_are_an_error_not_a_hang(factor, tmp_path, recwarn):
    make_source(tmp_path / "source", tie_word_embeddings=True, num_hidden_layers=1)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    weights = random_weights(config, 0)
    weights["model.layers.0.input_layernorm.weight"] *= np.float32(factor)
    write_safetensors(tmp_path / "source" / "model.safetensors", weights, "float32")
    out = tmp_path / "out" / "m.edgellama"
    out.parent.mkdir()
    if factor > 1e17:
        with pytest.raises(ConvertError, match="layer 0: its activations are not finite"):
            convert(tmp_path / "source", out, **OPTIONS)
        assert list(out.parent.iterdir()) == []
    else:
        convert(tmp_path / "source", out, **OPTIONS)
    assert not [each for each in recwarn if "overflow" in str(each.message) or "invalid" in str(each.message)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e7])
def test_weights_that_cannot_be_quantized_are_located(bad, tmp_path):
    make_source(tmp_path / "source", num_hidden_layers=2)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    weights = random_weights(config, 0)
    weights["model.layers.1.mlp.up_proj.weight"][100, 7] = bad
    write_safetensors(tmp_path / "source" / "model.safetensors", weights, "float32")
    with pytest.raises(ConvertError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: weight \[100, 7\]"):
        convert(tmp_path / "source", tmp_path / "m.edgellama", **OPTIONS)
    assert not (tmp_path / "m.edgellama").exists()


def test_too_little_memory_is_told_before_the_work(source, tmp_path):
    with pytest.raises(
        ConvertError, match=r"--max-ram \d+ MiB is too little to calibrate this model: it takes \d+ MiB"
    ):
        convert(source, tmp_path / "m.edgellama", **OPTIONS, max_ram=(private_bytes() or 0) + (250 << 20))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(source, tmp_path, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(ConvertError, match=r"\.m\.edgellama\.gptq: Permission denied$"):
        convert(source, tmp_path / "m.edgellama", **OPTIONS)


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files the POSIX way")
@pytest.mark.parametrize(
    "tokens, limit, where",
    [
        (256, 100, "state.json"),
        (256, 50_000, "x-00000"),
        (256, 120_000, "scratch-gated"),
        (64, 45_000, "layer-00000"),
    ],
)
def test_a_full_disk_is_one_line_and_then_it_goes_on(tokens, limit, where, source, tmp_path):
    import resource

    options = {**OPTIONS, "calibration_tokens": tokens}
    want = convert(source, tmp_path / "m.edgellama", **options).out.read_bytes()
    (tmp_path / "m.edgellama").unlink()
    descriptors = open_descriptors()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(ConvertError) as error:
            convert(source, tmp_path / "m.edgellama", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written: File too large" in str(error.value) and "\n" not in str(error.value)
    assert where in str(error.value)
    assert open_descriptors() == descriptors
    assert list(tmp_path.iterdir()) == []  # nothing was done yet
    assert convert(source, tmp_path / "m.edgellama", **options).out.read_bytes() == want


def open_descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None


# -- unfinished work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrices", [1, 8, 14, 15, 22])
def test_an_interrupted_conversion_goes_on_and_gives_the_same_bytes(
    matrices, source, expected, tmp_path, layers_worked_on
):
    out = tmp_path / "m.edgellama"
    descriptors = open_descriptors()
    interrupted(source, out, matrices)
    assert open_descriptors() == descriptors
    done = (matrices - 1) // 7  # a layer is kept when its last matrix has been counted, and its file written
    assert work_folder(out).exists() == (done > 0)
    layers_worked_on.clear()
    calls = []
    assert convert(source, out, **OPTIONS, progress=lambda *args: calls.append(args)).out.read_bytes() == expected
    assert layers_worked_on == list(range(done, 3))
    assert calls[-1][0] == calls[-1][1]
    assert only(out)


def test_interrupted_again_and_again(source, expected, tmp_path, layers_worked_on):
    out = tmp_path / "m.edgellama"
    for matrices in (8, 3, 1 + 7, 2 + 7):  # a layer that is done is counted at once
        interrupted(source, out, matrices)
    assert convert(source, out, **OPTIONS).out.read_bytes() == expected
    assert layers_worked_on == [0, 1, 1, 1, 1, 2, 2] and only(out)


def touch_weights(folder, monkeypatch):
    file = folder / "model.safetensors"
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


def other_weights(folder, monkeypatch):
    make_source(folder, seed=7, num_hidden_layers=2)


def other_norm(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))


def other_tokenizer(folder, monkeypatch):
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")


def other_text(folder, monkeypatch):
    (folder.parent / "text.txt").write_text(heldout_text()[::-1], encoding="utf-8")


def other_version(folder, monkeypatch):
    monkeypatch.setattr(conversion_module, "__version__", "0.0.0")


@pytest.mark.parametrize(
    "change",
    [touch_weights, other_weights, other_norm, other_tokenizer, other_text, other_version,
     {"calibration_tokens": 300}, {"calibration": "builtin"}, {"lm_head_bits": 4}],
    ids=lambda change: change.__name__ if callable(change) else next(iter(change)),
)  # fmt: skip
def test_what_the_work_depends_on_begins_it_anew(change, tmp_path, monkeypatch, layers_worked_on):
    folder, out = make_source(tmp_path / "source", num_hidden_layers=2), tmp_path / "m.edgellama"
    (tmp_path / "text.txt").write_text(heldout_text(), encoding="utf-8")
    options = {**OPTIONS, "calibration": tmp_path / "text.txt"}
    interrupted(folder, out, 8, **options)
    if callable(change):
        change(folder, monkeypatch)
    else:
        options |= change
    layers_worked_on.clear()
    found = convert(folder, out, **options).out.read_bytes()
    assert layers_worked_on == [0, 1] and not work_folder(out).exists()
    (tmp_path / "fresh").mkdir()
    assert convert(folder, tmp_path / "fresh" / "m.edgellama", **options).out.read_bytes() == found


def test_threads_memory_and_progress_do_not_begin_it_anew(source, expected, tmp_path, layers_worked_on):
    out = tmp_path / "m.edgellama"
    interrupted(source, out, 15, n_threads=2)
    layers_worked_on.clear()
    assert convert(source, out, **OPTIONS, n_threads=1, max_ram=32 << 30).out.read_bytes() == expected
    assert layers_worked_on == [2]


def shorten(path, nbytes):
    with open(path, "r+b") as file:
        file.truncate(nbytes)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    {
        "no stream of the source": lambda folder: (folder / "x-00002.source").unlink(),
        "no stream of the quantized": lambda folder: (folder / "x-00002.quantized").unlink(),
        "a stream cut short": lambda folder: shorten(folder / "x-00002.source", 99_999),
        "an empty stream": lambda folder: shorten(folder / "x-00002.quantized", 0),
        "no first layer": lambda folder: (folder / "layer-00000.npz").unlink(),
        "a layer cut short": lambda folder: shorten(folder / "layer-00001.npz", 20_000),
        "an empty layer": lambda folder: shorten(folder / "layer-00001.npz", 0),
        "a bit of a layer": lambda folder: flip(folder / "layer-00000.npz", 7_000),
        "a state of nobody's": lambda folder: (folder / "state.json").write_bytes(b"{"),
        "no state": lambda folder: (folder / "state.json").unlink(),
    }.items(),
    ids=lambda item: item[0],
)
def test_damaged_work_is_begun_anew(damage, source, expected, tmp_path, layers_worked_on):
    out = tmp_path / "m.edgellama"
    interrupted(source, out, 15)
    damage[1](work_folder(out))
    layers_worked_on.clear()
    assert convert(source, out, **OPTIONS).out.read_bytes() == expected
    assert layers_worked_on == [0, 1, 2] and only(out)


def test_leftovers_of_a_kill_do_no_harm(source, expected, tmp_path, layers_worked_on):
    out = tmp_path / "m.edgellama"
    interrupted(source, out, 15)
    folder = work_folder(out)
    (folder / "layer-00002.npz.part").write_bytes(b"half")
    for name in ("x-00001.source", "x-00003.source", "x-00003.quantized", "scratch-gated", "scratch-middle.source"):
        (folder / name).write_bytes(b"\xff" * 1_000_001)
    layers_worked_on.clear()
    assert convert(source, out, **OPTIONS).out.read_bytes() == expected
    assert layers_worked_on == [2] and only(out)


def test_any_damaged_byte_of_a_layers_file_is_noticed_or_does_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"q.codes": rng.integers(0, 255, 300, np.uint8), "q.error": rng.random(2)}
    with WorkFolder(tmp_path / "m", {}) as folder:
        folder.save_arrays("layer-00000.npz", arrays)
        path = folder.path / "layer-00000.npz"
        data, noticed = path.read_bytes(), 0
        for place in range(0, len(data), 3):
            flip(path, place)
            if folder.is_whole(path.name, arrays):
                assert all((folder.load_array(path.name, key) == arrays[key]).all() for key in arrays)
            else:
                noticed += 1
            path.write_bytes(data)
        assert noticed > len(data) / 6 and folder.is_whole(path.name, arrays)


def test_own_text_is_kept_over_an_interruption(source, tmp_path, monkeypatch):
    out = tmp_path / "m.edgellama"
    options = {**OPTIONS, "calibration": "self"}
    want = convert(source, out, **options).out.read_bytes()
    out.unlink()
    interrupted(source, out, 3, **options)
    assert sorted(path.name for path in work_folder(out).glob("*.edgellama")) == []
    monkeypatch.setattr(conversion_module, "sample", None)  # not called again
    assert convert(source, out, **options).out.read_bytes() == want and only(out)


def test_two_conversions_to_one_destination_at_once(source, expected, tmp_path):
    out = tmp_path / "m.edgellama"
    out.write_bytes(expected)
    link = tmp_path / "link.edgellama"
    link.symlink_to(out)
    with WorkFolder(out, {"other": 1}) as folder:
        if storage.fcntl is None:
            pytest.skip("no locks on this system")
        folder.save_arrays("layer-00000.npz", {"a": np.zeros(1)})
        for name in (out, link):
            with pytest.raises(ConvertError, match=r"another conversion to it is running; wait for it"):
                convert(source, name, **OPTIONS)
        assert folder.is_whole("layer-00000.npz", ["a"]) and out.read_bytes() == expected
    assert convert(source, out, **OPTIONS).out.read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.edgellama", "m.edgellama"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="races processes the POSIX way")
def test_folders_that_come_and_go_are_never_shared(tmp_path):
    """Two processes make, use and remove the same work folder as fast as they can."""

    def use(number):
        used = 0
        while used < 25:
            try:
                folder = WorkFolder(tmp_path / "m", {"process": number})
            except ConvertError:
                continue
            with folder:
                folder.save("mine", str(number).encode())
                assert {path.name for path in folder.path.iterdir()} == {"lock", "state.json", "mine"}
                assert (folder.path / "mine").read_bytes() == str(number).encode()
                folder.remove()
                used += 1

    children = []
    for number in range(2):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                use(number)
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    assert list(tmp_path.iterdir()) == []


def kill_at_random_moments(source, folder, times, seed):
    """Start the same conversion again and again, each killed a random while after a random layer is done."""
    out = folder / "m.edgellama"
    started = time.perf_counter()
    assert os.waitpid(in_child(source, out), 0)[1] == 0
    a_layer = (time.perf_counter() - started) / LAYERS_TO_KILL
    expected = out.read_bytes()
    out.unlink()
    moments, killed, layers = random.Random(seed), 0, set()
    for _ in range(times):
        layer = work_folder(out) / f"layer-{moments.randrange(LAYERS_TO_KILL):05d}.npz"
        pid, status = in_child(source, out), None
        while status is None and not layer.exists():
            ended, code = os.waitpid(pid, os.WNOHANG)
            status = code if ended else None
        time.sleep(moments.uniform(0, a_layer))
        if status is None:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        killed += os.WIFSIGNALED(status)
        layers.add(len(list(work_folder(out).glob("layer-*.npz"))))
        if out.exists():
            assert out.read_bytes() == expected
            out.unlink()
            shutil.rmtree(work_folder(out), ignore_errors=True)
    assert killed > times // 3 and len(layers) > 1
    assert convert(source, out, **OPTIONS).out.read_bytes() == expected
    assert only(out)


def in_child(source, out):
    """Start a conversion in a child process (forked: nothing to import or compile); its process id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            convert(source, out, **OPTIONS, n_threads=2)
            status = 0
        finally:
            os._exit(status)
    return pid


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes the POSIX way")
@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_and_again_gives_the_same_bytes(times, tmp_path):
    source = make_source(tmp_path / "source", num_hidden_layers=LAYERS_TO_KILL)
    convert(source, tmp_path / "warm.edgellama", **OPTIONS)  # compiles
    (tmp_path / "out").mkdir()
    kill_at_random_moments(source, tmp_path / "out", times, seed=times)


# -- the command line ----------------------------------------------------------------------------------------------


def command(source, out, *more):
    options = ["--method", "gptq", "--calibration", str(PROSE), "--calibration-tokens", "256", "--no-receipt", *more]
    return ["convert", str(source), "-o", str(out), *options]


def test_the_command(source, expected, tmp_path, capsys):
    out = tmp_path / "m.edgellama"
    assert main(command(source, out)) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout == f"{out}\n" and "error  at most" in stderr and out.read_bytes() == expected
    (tmp_path / "text.txt").write_text(heldout_text(), encoding="utf-8")
    sources = ["--calibration", "self", "--calibration", str(tmp_path / "text.txt")]
    assert main(command(source, out, *sources, "-t", "1", "--json")) == 0
    stdout, stderr = capsys.readouterr()
    report = json.loads(stdout)
    assert report["method"] == "gptq" and len(report["errors"]) == 3 * 7 + 2
    with open_model(out) as file:
        calibration = file.header["quantization"]["calibration"]
    assert calibration["sources"] == ["prose.txt", "self", "text.txt"] and calibration["sequences"] == 3


@pytest.mark.parametrize(
    "options, problem",
    [
        (["--method", "search", "--calibration", "builtin"], "--method search is not calibrated: drop --calibration"),
        (["--method", "rtn", "--calibration-tokens", "5"], "--method rtn is not calibrated: drop --calibration"),
        (["--method", "gptq", "--calibration-tokens", "0"], "--calibration-tokens"),
        (["--method", "awq"], "awq"),
    ],
)
def test_wrong_usage(options, problem, source, tmp_path, capsys):
    assert main(["convert", str(source), "-o", str(tmp_path / "m.edgellama"), *options]) == 2
    stderr = capsys.readouterr().err
    assert problem in stderr and stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_unknown_text_is_one_line(source, tmp_path, capsys):
    assert main(command(source, tmp_path / "m.edgellama", "--calibration", "nowhere.txt")) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.count("\n") == 1 and "nowhere.txt: no such file" in stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_tells_that_it_goes_on(source, expected, tmp_path, capsys, monkeypatch):
    out = tmp_path / "m.edgellama"
    original = CalibratedLayers._layer

    def layer(self, i, pool):
        if i == 1:
            raise KeyboardInterrupt
        original(self, i, pool)

    with monkeypatch.context() as patch:
        patch.setattr(CalibratedLayers, "_layer", layer)
        assert main(command(source, out)) == 130
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and not out.exists()
    assert stderr == "edgellama: interrupted; nothing was written; the same command goes on from here\n"
    assert main(command(source, out, "-q")) == 0
    assert capsys.readouterr() == (f"{out}\n", "") and out.read_bytes() == expected and only(out)


def test_which_models_are_calibrated_by_default(source, tmp_path, monkeypatch):
    out = tmp_path / "m.edgellama"
    small = convert(source, out, receipt=False)
    monkeypatch.setattr(conversion_module, "SMALL_MODEL", 1000)
    large = convert(source, out, receipt=False)
    asked = [
        convert(source, out, receipt=False, **options)
        for options in ({"calibration": PROSE, "calibration_tokens": 256}, {"calibration_tokens": 256})
    ]
    assert [each.method for each in (small, large, *asked)] == ["gptq", "search", "gptq", "gptq"]


# -- a real model --------------------------------------------------------------------------------------------------


@pytest.mark.models
@pytest.mark.slow
def test_on_a_real_model(minimind_dir, tmp_path):
    plain = convert(minimind_dir, tmp_path / "s.edgellama", method="search")
    ours = convert(minimind_dir, tmp_path / "m.edgellama", method="gptq", calibration_tokens=4096)
    assert ours.quality["kl_mean"] < 0.7 * plain.quality["kl_mean"]
