"""Attention as a picture file. Needs matplotlib, the extra `plot`.

Labels are tokens, so anything may be in them: no dollar sign begins a formula, and a character that no installed font
has is written as an escape rather than as an empty box.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import EdgellamaError
from edgellama.terminal import fitted
from edgellama.visualize.attention import Attention

KINDS = (".png", ".svg", ".pdf")
_LONGEST = 24  # cells of a label
_SMALLEST = 6.5  # points that can be read
_SEEN, _ITSELF, _HIDDEN = "#3b6fb6", "#2a9d5c", "#f2f2f2"


def check_path(path: str | os.PathLike[str]) -> None:
    """EdgellamaError or ValueError where no picture could be written: before the work, not after it."""
    if Path(path).suffix.lower() not in KINDS:
        raise ValueError(f"{os.fspath(path)}: a picture's name ends with {', '.join(KINDS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise EdgellamaError("a picture needs matplotlib: pip install 'edgellama[plot]'")


def draw(attention: Attention, path: str | os.PathLike[str]) -> None:
    """Write the picture. EdgellamaError if it cannot be written."""
    check_path(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    n = len(attention.ids)
    cell = 0.3 if n <= 40 else max(12 / n, 0.16 if n <= 120 else 0.02)  # inches
    room = cell * 50  # points of type that a cell has room for
    size = min(9.0, max(_SMALLEST, room))
    step = int(np.ceil(_SMALLEST / room))  # of more tokens, every so many are labelled
    families, known = _fonts({c for label in attention.labels for c in label})
    labels = [fitted(_spelt(label, known), _LONGEST).rstrip() for label in attention.labels]
    side = max(3.6, n * cell) + 0.6 + 0.1 * max(map(len, labels))
    figure = Figure(figsize=(side + (0.9 if attention.weights is not None else 0.0), side + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    if attention.weights is None:
        values = attention.mask.astype(int) + np.eye(n, dtype=int)
        axes.imshow(values, cmap=ListedColormap([_HIDDEN, _SEEN, _ITSELF]), vmin=0, vmax=2)
        caption = "a row's token sees the columns in blue, and itself (green)"
    else:
        shown = np.ma.masked_array(attention.weights, ~attention.mask)
        # The first token has nothing but itself to look at: its 1 must not set the scale.
        most = float(attention.weights[1:].max(initial=0.0)) or 1.0
        image = axes.imshow(shown, cmap="viridis", vmin=0, vmax=most)
        axes.set_facecolor(_HIDDEN)
        figure.colorbar(image, ax=axes, shrink=0.7, label="attention weight", extend="max" if most < 1 else "neither")
        caption = "how much a row's token looks at each column's; a row sums to 1"
    places = range(0, n, step)
    shown_labels = [labels[place] for place in places]
    axes.set_xticks(places, shown_labels, rotation=90, fontsize=size, parse_math=False, family=families)
    axes.set_yticks(places, shown_labels, fontsize=size, parse_math=False, family=families)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    if n <= 120:
        axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
    figure.suptitle(attention.title, parse_math=False, fontsize=11)
    axes.set_xlabel(caption, fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "edgellama"}):
        kind = Path(path).suffix.lower()[1:]
        dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        try:
            figure.savefig(path, format=kind, dpi=120, metadata=dates)
        except OSError as error:
            raise EdgellamaError(f"{os.fspath(path)}: cannot be written: {error.strerror or error}") from None


def _fonts(characters: set[str]) -> tuple[list[str], set[str]]:
    """Font families that together have as many of the characters as the installed ones do; and those they have."""
    from matplotlib import font_manager

    families = ["DejaVu Sans"]
    missing = _without(font_manager.findfont("DejaVu Sans"), characters)
    if missing:  # reading every font takes a second or so, once in a while
        for font in font_manager.fontManager.ttflist:
            left = _without(font.fname, missing)
            if len(left) < len(missing) and "LastResort" not in font.fname:
                families.append(font.name)
                missing = left
            if not missing:
                break
    return families, characters - missing


def _without(path: str, characters: Iterable[str]) -> set[str]:
    """Those that the font in this file has no glyph for."""
    from matplotlib import font_manager

    try:
        font = font_manager.get_font(path)
    except (OSError, RuntimeError):
        return set(characters)
    return {c for c in characters if not font.get_char_index(ord(c))}


def _spelt(label: str, known: set[str]) -> str:
    return "".join(c if c in known else ascii(c)[1:-1] for c in label)
