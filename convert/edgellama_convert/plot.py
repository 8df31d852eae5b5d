"""Draws a comparison: the error of each layer's weights and of the activations behind it. Needs matplotlib."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import TYPE_CHECKING, Any

from edgellama.errors import ConvertError

if TYPE_CHECKING:
    from .comparison import Comparison

_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")


def require_matplotlib() -> None:
    """ConvertError where it is not installed: before the work, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConvertError("--plot needs matplotlib: pip install 'edgellama[plot]'")


def draw(comparison: Comparison, path: str | os.PathLike[str], title: str) -> None:
    """Write a PNG. ConvertError if it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    weights: Any
    weights, activations = figure.subplots(2, 1, sharex=True)
    for name, points in weights_by_kind(comparison).items():
        weights.plot(*zip(*sorted(points.items()), strict=True), marker="o", markersize=3, label=name)
    weights.set_ylabel("weights")
    if comparison.tensor_errors:
        weights.legend(fontsize="small", ncols=4)
    activations.plot(range(len(comparison.layer_errors)), comparison.layer_errors, marker="o", markersize=3, color="k")
    activations.set_ylabel("activations behind it")
    activations.set_xlabel("layer")
    for axes in (weights, activations):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{title}: relative rms error by layer\nKL {comparison.kl_mean:.4g}, top-1 agreement {comparison.top1:.1%}, "
        f"perplexity {comparison.perplexity:.4g} (source {comparison.source_perplexity:.4g})",
        fontsize="medium",
    )
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ConvertError(f"{path}: cannot be written: {error.strerror or error}") from None


def weights_by_kind(comparison: Comparison) -> dict[str, dict[int, float]]:
    """Kind of matrix ("q_proj") -> layer -> relative rms error."""
    kinds: dict[str, dict[int, float]] = {}
    for name, error in comparison.tensor_errors.items():
        match = _LAYER.fullmatch(name)
        if match:
            kinds.setdefault(match[2], {})[int(match[1])] = error
    return kinds
