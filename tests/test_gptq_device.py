"""Where a calibrated conversion computes, and what is checked before the work; without torch."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from edgellama import devices
from edgellama.backends import gpu
from edgellama.cli import main
from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError, DeviceError, EdgellamaError
from edgellama.format import writer as writer_module
from edgellama_convert import convert
from edgellama_convert.gptq import check_memory, choose_device
from edgellama_convert.resources import private_bytes
from test_gptq import OPTIONS, interrupted, make_source, only

LLAMA_2_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "num_hidden_layers": 32, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "source", num_hidden_layers=2)


@pytest.fixture
def a_gpu(monkeypatch):
    """A GPU as far as asking goes: `free` and `total` bytes."""
    memory = SimpleNamespace(free=80 << 30, total=80 << 30)
    monkeypatch.setattr(devices, "_cuda_works", lambda: True)
    monkeypatch.setattr(gpu, "device_problem", lambda device: None)
    monkeypatch.setattr(gpu, "free_bytes", lambda: memory.free)
    monkeypatch.setattr(gpu, "total_bytes", lambda: memory.total)
    return memory


def test_auto_is_the_gpu_where_there_is_one_that_is_large_enough(a_gpu):
    config = LlamaConfig.from_dict(LLAMA_2_7B)
    assert choose_device("auto", config, 512) == ("cuda", [])
    assert choose_device("cpu", config, 512) == ("cpu", [])
    check_memory("cuda", config, 512, None)
    a_gpu.total = 2 << 30  # 7B takes more
    device, notes = choose_device("auto", config, 512)
    assert device == "cpu" and "of the GPU's memory, it has 2048 MiB: done on the CPU" in notes[0]
    with pytest.raises(ConvertError, match=r"takes \d+ MiB of the GPU's memory, it has 2048 MiB: use --device cpu"):
        choose_device("cuda", config, 512)


def test_a_gpu_that_others_fill_is_told_before_the_work(a_gpu):
    config = LlamaConfig.from_dict(LLAMA_2_7B)
    a_gpu.free = 1 << 30
    assert choose_device("auto", config, 512) == ("cuda", [])  # a resumed conversion must not change its mind
    with pytest.raises(ConvertError, match=r"takes \d+ MiB of the GPU's memory, 1024 MiB are free: end what else"):
        check_memory("cuda", config, 512, None)


def test_max_ram_is_the_hosts(a_gpu):
    config, held = LlamaConfig.from_dict(LLAMA_2_7B), private_bytes() or 0
    check_memory("cuda", config, 512, held + (1 << 30))
    with pytest.raises(ConvertError, match="--max-ram"):
        check_memory("cuda", config, 512, held + (500 << 20))
    with pytest.raises(ConvertError, match="--max-ram"):
        check_memory("cpu", config, 512, held + (1 << 30))


def test_without_a_gpu_auto_is_numpy(source, tmp_path):
    auto, numpys = (convert(source, tmp_path / f"{each}.edgellama", **OPTIONS, device=each) for each in ("auto", "cpu"))
    assert auto.device == numpys.device == "cpu" and auto.warnings == numpys.warnings
    assert auto.out.read_bytes() == numpys.out.read_bytes()
    assert convert(source, tmp_path / "s.edgellama", method="search", receipt=False).device is None


def test_torch_is_not_imported_for_it(source, tmp_path):
    code = (
        "import sys, edgellama_convert as c\n"
        f"c.convert({str(source)!r}, {str(tmp_path / 'm.edgellama')!r}, method='gptq', calibration_tokens=64,\n"
        "          device='cpu', receipt=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("device", ["cuda", "torch-cpu"])
def test_torch_that_is_missing_is_one_line_with_what_to_install(device, source, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    out = tmp_path / "m.edgellama"
    with pytest.raises(DeviceError, match=r"torch .*pip install 'edgellama\[cuda\]'") as caught:
        convert(source, out, **OPTIONS, device=device)
    assert "\n" not in str(caught.value) and not out.exists()
    assert main(["convert", str(source), "-o", str(out), "--method", "gptq", "--device", device]) == 1
    assert "pip install 'edgellama[cuda]'" in capsys.readouterr().err
    assert convert(source, out, **OPTIONS).device == "cpu"  # auto


@pytest.mark.parametrize("device", ["reference", "tpu", ""])
def test_devices_that_do_not_calibrate(device, source, tmp_path):
    for method in ("gptq", "search"):
        with pytest.raises(DeviceError, match=r"does not calibrate; choose auto, cpu, cuda or torch-cpu"):
            convert(source, tmp_path / "m.edgellama", method=method, device=device)
    assert main(["convert", str(source), "--device", device]) == 2


def test_a_device_without_calibration_is_told(source, tmp_path, capsys):
    report = convert(source, tmp_path / "m.edgellama", method="search", device="cuda", receipt=False)
    assert any("device 'cuda' is for calibrating" in line for line in report.warnings)
    assert main(["convert", str(source), "--method", "rtn", "--device", "cuda"]) == 2
    assert "--method rtn runs on the CPU: drop --device" in capsys.readouterr().err


def test_a_disk_without_room_is_told_before_the_work(source, tmp_path, monkeypatch):
    out = tmp_path / "out" / "m.edgellama"
    out.parent.mkdir()
    free = SimpleNamespace(free=10**12)
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda folder: free)
    expected = convert(source, out, **OPTIONS).out.read_bytes()
    out.unlink()
    # For 4 sequences of 64 tokens the streams of a layer take 256 * 4 * (7 * 96 + 144) bytes, more than the file.
    free.free = 500_000
    with pytest.raises(
        EdgellamaError, match=r"m\.edgellama: calibrating needs .* of disk space, .* has 0\.50 MB: make room"
    ):
        convert(source, out, **OPTIONS)
    assert list(out.parent.iterdir()) == []
    free.free = 10**12
    interrupted(source, out, 8)
    held = sum(path.stat().st_size for path in out.parent.glob(".*/*"))
    free.free = 1_050_000 - held  # what is there already is not needed again
    assert convert(source, out, **OPTIONS).out.read_bytes() == expected and only(out)
