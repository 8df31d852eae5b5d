"""What a terminal is like: whether a stream is one, whether it knows colours, how wide a text is on it."""

import os
import unicodedata
from typing import IO


def is_terminal(stream: IO[str]) -> bool:
    try:
        return stream.isatty()
    except (OSError, ValueError):
        return False


def has_colours(stream: IO[str]) -> bool:
    """no-color.org: any value but an empty one says no. The old Windows console would show the codes."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return is_terminal(stream) and (os.name != "nt" or "WT_SESSION" in os.environ)


def cells(text: str) -> int:
    """Columns that printable text takes: two for what is wide (Chinese, most emoji), none for what combines.

    >>> cells("abc"), cells("日本"), cells("e\u0301")
    (3, 4, 1)
    """
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def fitted(text: str, width: int) -> str:
    """`text` padded with spaces, or cut with an ellipsis, to exactly `width` cells.

    >>> fitted("日本語", 5)
    '日本…'
    """
    if cells(text) > width:
        kept = ""
        for c in text:
            if cells(kept + c) > width - 1:
                break
            kept += c
        text = kept + "…"
    return text + " " * (width - cells(text))
