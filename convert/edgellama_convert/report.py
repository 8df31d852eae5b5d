"""What a conversion tells when it is done. Plain data, ready for a terminal or for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ConvertReport:
    """Sizes in bytes, times in seconds; errors are relative: rms of (stored - source) / rms of source."""

    out: Path
    source: str
    commit: str | None
    method: str
    bpw: float | None
    """The budget that was asked for."""
    device: str | None
    """Where it was calibrated: "cpu", "cuda" or "torch-cpu"; None where it was not."""
    lm_head_bits: int
    int8_matrices: int
    """How many of the layers' matrices have 8 bits; the others have 4."""
    layer_matrices: int
    source_bytes: int
    """All safetensors files of the source."""
    file_bytes: int
    weights: int
    """Weights of the source that were converted, tied ones counted once."""
    linear_bits_per_weight: float
    """Of the layers' matrices: codes, scales and padding."""
    bits_per_weight: float
    """Of the whole file."""
    worst_tensor: tuple[str, float]
    errors: dict[str, float]
    """Relative rms error of every tensor that is not stored exactly as float32."""
    ignored: dict[str, str]
    """Tensors of the source that were left out -> why."""
    ignored_config_keys: dict[str, str]
    seconds: float
    n_threads: int
    weights_per_second: float
    """Reading, quantizing and writing only, with `n_threads` threads."""
    receipt_seconds: float
    """Measuring the quality, and finishing the file."""
    quality: dict[str, Any] | None
    """The figures that are kept in the file (`receipt`); None where nothing was measured."""
    peak_rss: int | None
    """Most memory seen during the conversion, without pages of mapped files."""
    files: tuple[str, ...]
    """Tokenizer and generation files taken along."""
    warnings: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "out": str(self.out)}


@dataclass(frozen=True)
class ExportReport:
    """An exported folder. Sizes in bytes."""

    directory: Path
    auto_class: str  # of transformers, which loads it
    dtype: str
    shards: int
    weights: int
    nbytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "directory": str(self.directory)}
