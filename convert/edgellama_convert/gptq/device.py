"""Where a calibrated conversion computes, and whether there is the memory and the disk space for it, before the hours.

Knows sizes and devices, not what is computed there.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgellama import devices
from edgellama.config import LlamaConfig
from edgellama.errors import ConvertError, DeviceError
from edgellama.format import LAYOUTS, TensorSpec
from edgellama.format.writer import check_space

from ..resources import MIB, check_calibration_memory
from .driver import disk_needed, memory_needed
from .work import WorkFolder

_GPU_MARGIN = 256 * MIB  # torch's own, and what lies between its blocks


def choose_device(device: str, config: LlamaConfig, seq_len: int) -> tuple[str, list[str]]:
    """The device that is meant, and what the user should know: "auto" is "cuda" where a GPU does, else "cpu".

    DeviceError says what is missing, ConvertError that the GPU is too small.
    """
    check_name(device)
    resolved = devices.resolve(device)
    if resolved == "cuda":
        from edgellama.backends.gpu import total_bytes

        needed, total = _gpu_memory_needed(config, seq_len), total_bytes()
        if needed > total:
            short = f"calibrating this model takes {needed // MIB} MiB of the GPU's memory, it has {total // MIB} MiB"
            if device == "auto":
                return "cpu", [f"{short}: done on the CPU"]
            raise ConvertError(f"{short}: use --device cpu")
    return resolved, []


def check_name(device: str) -> None:
    """DeviceError for what is no device to calibrate on."""
    if device not in devices.CALIBRATION_DEVICES:
        *others, last = devices.CALIBRATION_DEVICES
        raise DeviceError(f"device {device!r} does not calibrate; choose {', '.join(others)} or {last}")


def check_memory(device: str, config: LlamaConfig, seq_len: int, max_ram: int | None) -> None:
    """ConvertError if the GPU, or `max_ram` bytes of this process, do not suffice."""
    needed = memory_needed(config, seq_len)
    if device == "cuda":
        from edgellama.backends.gpu import free_bytes

        needed, free = _gpu_memory_needed(config, seq_len), free_bytes()
        if needed > free:
            raise ConvertError(
                f"calibrating this model takes {needed // MIB} MiB of the GPU's memory, {free // MIB} MiB are free: "
                "end what else uses it, or use --device cpu"
            )
        widest = max(config.intermediate_size, config.num_attention_heads * config.head_dim)
        # A matrix as it is read, in float32, and as codes on their way to the disk; a chunk of a stream.
        needed = 12 * config.hidden_size * widest + 256 * MIB
    check_calibration_memory(max_ram, needed)


def check_disk(folder: WorkFolder, config: LlamaConfig, tokens: int, specs: Sequence[TensorSpec]) -> None:
    """EdgellamaError if the disk has no room for the streams of a layer and all layers' codes, then for the file."""
    nbytes = {spec.name: LAYOUTS[spec.layout].nbytes(spec.shape) for spec in specs}
    layers = sum(n for name, n in nbytes.items() if ".layers." in name and name.endswith((".qweight", ".scales")))
    needed = layers + max(disk_needed(config, tokens), sum(nbytes.values()))
    check_space(folder.destination, folder.path.parent, needed, "calibrating needs", folder.held())


def _gpu_memory_needed(config: LlamaConfig, seq_len: int) -> int:
    return memory_needed(config, seq_len) * 5 // 4 + _GPU_MARGIN
