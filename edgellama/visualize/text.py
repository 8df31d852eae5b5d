"""Attention for a terminal: a row for each token, a column of two cells for each that it may see.

    >>> print(render(attention))
                 0 1 2
    <s>        0 ■ · ·
    ▁Hello     1 ■ ■ ·
    ▁this      2 ■ ■ ■

Wide characters are measured, so columns stay below each other. Knows numbers and labels, not where they come from.
"""

from __future__ import annotations

import shutil
from typing import IO

import numpy as np

from edgellama.terminal import cells, fitted, has_colours, is_terminal
from edgellama.visualize.attention import Attention

_MAX_LABEL = 24
_SEEN, _HIDDEN = "■", "·"
_SHADES, _LIMITS = " ░▒▓█", (0.05, 0.2, 0.4, 0.6)
_ASCII = str.maketrans({"■": "#", "·": ".", "░": ".", "▒": "-", "▓": "+", "█": "#", "▁": "_", "…": "~"})
_GREEN, _DIM, _BOLD, _END = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"


def show(attention: Attention, stream: IO[str]) -> None:
    """Print it, in colour and no wider than the terminal where the stream is one."""
    width = shutil.get_terminal_size().columns if is_terminal(stream) else None
    text = render(attention, colours=has_colours(stream), width=width)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    if encoding.lower().replace("-", "") not in ("utf8", "utf16"):
        text = text.translate(_ASCII).encode(encoding, "backslashreplace").decode(encoding)
    stream.write(text + "\n")


def render(attention: Attention, *, colours: bool = False, width: int | None = None) -> str:
    """The picture as lines; columns that do not fit into `width` cells follow below."""
    n = len(attention.ids)
    digits = len(str(n - 1))
    label_width = min(_MAX_LABEL, max(cells(label) for label in attention.labels))
    margin = label_width + 1 + digits + 1
    at_once = n if width is None else max(8, (width - margin) // 2)
    title = f"{_BOLD}{attention.title}{_END}" if colours else attention.title
    lines = [title, _legend(attention, colours)]
    for first in range(0, n, at_once):
        columns = range(first, min(first + at_once, n))
        lines.append("")
        for digit in range(digits):  # the numbers of the columns, from top to bottom
            numbers = " ".join(str(column).rjust(digits)[digit] for column in columns)
            lines.append((" " * margin + numbers).rstrip())
        for row in range(first, n):  # rows above see none of these columns
            squares = " ".join(_square(attention, row, column, colours) for column in columns)
            lines.append(f"{fitted(attention.labels[row], label_width)} {row:>{digits}} {squares}".rstrip())
    return "\n".join(lines)


def _legend(attention: Attention, colours: bool) -> str:
    if attention.weights is None:
        own = f"{_GREEN}{_SEEN}{_END} itself   " if colours else ""
        return f"rows see columns: {own}{_SEEN} seen   {_HIDDEN} hidden"
    steps = [*(f"< {limit:.0%}" for limit in _LIMITS), "more"]
    shades = ("' '" if shade == " " else shade for shade in _SHADES)
    return "rows look at columns: " + "   ".join(f"{shade} {step}" for shade, step in zip(shades, steps, strict=True))


def _square(attention: Attention, row: int, column: int, colours: bool) -> str:
    if not attention.mask[row, column]:
        return f"{_DIM}{_HIDDEN}{_END}" if colours else _HIDDEN
    square = _SEEN
    if attention.weights is not None:
        square = _SHADES[int(np.searchsorted(_LIMITS, attention.weights[row, column], side="right"))]
    return f"{_GREEN}{square}{_END}" if colours and row == column else square
