"""How long a row of ids may be and must be: transformers' parameters `padding`, `truncation`, `max_length`, understood.

Knows the parameters and their rules, not the rows.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

NO_LIMIT = 10**20
"""A `model_max_length` beyond this means that nobody said one."""

PADDINGS = ("longest", "max_length", "do_not_pad")
TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
SIDES = ("left", "right")


@dataclass(frozen=True)
class Padding:
    """What a row is filled up with. `length` None: to the longest of the batch."""

    token: str
    token_id: int
    side: str
    length: int | None = None
    multiple_of: int | None = None

    def width(self, longest: int) -> int:
        """Columns that a batch gets whose longest row has so many."""
        width = longest if self.length is None else self.length
        return width if not self.multiple_of else -(-width // self.multiple_of) * self.multiple_of


@dataclass(frozen=True)
class Truncation:
    """`max_length` counts the special tokens, too; `stride` tokens of a window are repeated in the next."""

    max_length: int
    strategy: str
    side: str
    stride: int = 0


def choose_truncation(
    truncation: bool | str | None, padding: bool | str, max_length: int | None, longest: int, *, side: str, stride: int
) -> Truncation | None:
    """What is meant; `longest` is the tokenizer's `model_max_length`. ValueError for what means nothing.

    A `max_length` alone asks for truncation, too.
    """
    if truncation is None:
        truncation = max_length is not None and padding is False
    strategy = truncation
    if isinstance(truncation, bool):
        strategy = "longest_first" if truncation else "do_not_truncate"
    _one_of("truncation", strategy, TRUNCATIONS)
    limit = longest if max_length is None else natural("max_length", max_length)
    if strategy == "do_not_truncate" or (max_length is None and limit > NO_LIMIT):
        return None
    _one_of("truncation_side", side, SIDES)
    return Truncation(limit, str(strategy), side, natural("stride", stride))


def choose_padding(
    padding: bool | str,
    max_length: int | None,
    longest: int,
    *,
    side: str,
    token: str | None,
    token_id: int | None,
    multiple_of: int | None,
) -> Padding | None:
    """What is meant. ValueError for what means nothing, and where there is no token to pad with."""
    strategy = {True: "longest", False: "do_not_pad"}[padding] if isinstance(padding, bool) else padding
    _one_of("padding", strategy, PADDINGS)
    _one_of("padding_side", side, SIDES)
    length = None
    if strategy == "max_length":
        length = longest if max_length is None else natural("max_length", max_length)
    if strategy == "do_not_pad" or (max_length is None and length is not None and length > NO_LIMIT):
        return None
    if token is None or token_id is None:
        raise ValueError(
            "padding needs a pad token: tokenizer.pad_token = tokenizer.eos_token, or "
            "tokenizer.add_special_tokens({'pad_token': '<pad>'}) for a model converted with --add-pad-token"
        )
    multiple_of = None if multiple_of is None else natural("pad_to_multiple_of", multiple_of)
    return Padding(token, token_id, side, length, multiple_of)


def natural(name: str, value: int) -> int:
    """A whole number of at least 0, of any integer type."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}")
    return number


def _one_of(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
