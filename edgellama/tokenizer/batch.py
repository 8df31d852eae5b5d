"""Several texts as rows of ids: truncation, padding, and the object that holds them, as transformers shapes them.

Works on the finished `tokenizers.Encoding` of each text: a shorter row is the same encoding with some of its tokens
left out, a padded one has more at an end. So the shared tokenizer keeps no padding and no truncation of its own, and
calls from several threads cannot disturb each other.

Knows encodings and numbers, not how text becomes either.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellama.tokenizer.limits import Padding, Truncation

if TYPE_CHECKING:
    import tokenizers


class Row:
    """One row of a batch: an encoding, the indices of its tokens that were kept (None: all), and padding."""

    def __init__(self, encoding: "tokenizers.Encoding", kept: Sequence[int] | None = None):
        self.encoding, self._kept = encoding, kept
        self._left = self._right = 0
        self._padding: Padding | None = None

    def __len__(self) -> int:
        return (len(self.encoding) if self._kept is None else len(self._kept)) + self._left + self._right

    def pad(self, padding: Padding, width: int) -> None:
        missing = max(0, width - len(self))
        self._padding = padding
        self._left, self._right = (missing, 0) if padding.side == "left" else (0, missing)

    def _values(self, name: str, filler: Any) -> list:
        values = getattr(self.encoding, name)
        if self._kept is not None:
            values = [values[index] for index in self._kept]
        return [filler] * self._left + values + [filler] * self._right

    @property
    def ids(self) -> list[int]:
        return self._values("ids", self._padding.token_id if self._padding else 0)

    @property
    def tokens(self) -> list[str]:
        return self._values("tokens", self._padding.token if self._padding else "")

    @property
    def type_ids(self) -> list[int]:
        return self._values("type_ids", 0)

    @property
    def attention_mask(self) -> list[int]:
        return self._values("attention_mask", 0)

    @property
    def special_tokens_mask(self) -> list[int]:
        return self._values("special_tokens_mask", 1)

    @property
    def offsets(self) -> list[tuple[int, int]]:
        return self._values("offsets", (0, 0))

    @property
    def word_ids(self) -> list[int | None]:
        return self._values("word_ids", None)

    @property
    def sequence_ids(self) -> list[int | None]:
        return self._values("sequence_ids", None)


def truncated(encoding: "tokenizers.Encoding", limit: Truncation | None) -> list[Row]:
    """The row of an encoding within the limit, then those that overflow it. ValueError where it cannot be kept."""
    if limit is None or len(encoding) <= limit.max_length:
        return [Row(encoding)]
    of = encoding.sequence_ids  # None: a special token that was put around the text
    places = [[index for index, sequence in enumerate(of) if sequence == number] for number in (0, 1)]
    room = limit.max_length - of.count(None)
    if room < 0:
        raise ValueError(f"max_length {limit.max_length} is less than the {of.count(None)} special tokens of a text")
    first, second = (len(each) for each in places)
    has_pair = second > 0 or encoding.n_sequences > 1
    if limit.strategy == "longest_first" and has_pair:
        sizes = _share(first, second, room)
        windows = [tuple(_windows(place, size, 0, limit.side)[0] for place, size in zip(places, sizes, strict=True))]
    else:
        which = 1 if limit.strategy == "only_second" else 0
        size = room - (first, second)[1 - which]
        if size < (1 if has_pair else 0):
            raise ValueError(
                f"max_length {limit.max_length} cannot be reached by truncating the "
                f"{('first', 'second')[which]} text alone; use truncation='longest_first'"
            )
        cut = _windows(places[which], size, limit.stride, limit.side)
        windows = [(window, places[1]) if which == 0 else (places[0], window) for window in cut]
    around = [index for index, sequence in enumerate(of) if sequence is None]
    return [Row(encoding, sorted([*around, *a, *b])) for a, b in windows]


def _share(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts fit: the longer one gives way until both are equal, the first then has the less."""
    short, long = sorted((first, second))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room - room // 2
    return (short, long) if first <= second else (long, short)


def _windows(places: Sequence[int], size: int, stride: int, side: str) -> list[Sequence[int]]:
    """Windows of `size` neighbours that overlap by `stride`, from the side that is kept on."""
    if len(places) <= size or size == 0:
        return [places[:size]]
    if stride >= size:
        raise ValueError(f"stride {stride} must be less than the {size} tokens of a window")
    windows = []
    for start in range(0, len(places), size - stride):
        if side == "right":
            windows.append(places[start : start + size])
        else:
            end = len(places) - start
            windows.append(places[max(0, end - size) : end])
        if start + size >= len(places):
            break
    return windows


class BatchEncoding(dict[str, Any]):
    """transformers' result of a tokenizer's call: a dict ("input_ids", "attention_mask", ...), also by attribute.

    Values are lists of ints, a list of them for each text of a batch; int64 arrays with `return_tensors="np"`.
    """

    def __init__(self, data: Mapping[str, Any], rows: Sequence[Row] = (), return_tensors: str | None = None):
        if return_tensors == "pt":
            raise ValueError("edgellama returns NumPy arrays: return_tensors='np', and torch.from_numpy makes tensors")
        if return_tensors not in (None, "np"):
            raise ValueError(f"return_tensors must be 'np' or None, got {return_tensors!r}")
        super().__init__(data)
        self.encodings = list(rows)
        if return_tensors == "np":
            for name, value in self.items():
                self[name] = _array(name, value)

    def __getitem__(self, key: str | int) -> Any:
        """A value by name; by number the `Row` of that text."""
        return self.encodings[key] if isinstance(key, int) else super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this encoding has no {name!r}, only {', '.join(self)}") from None

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of one text as strings."""
        return self.encodings[batch_index].tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Which word each token belongs to; None for special tokens and padding."""
        return self.encodings[batch_index].word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """0 for tokens of the first text, 1 for those of its pair, None for special tokens and padding."""
        return self.encodings[batch_index].sequence_ids

    def token_to_chars(self, batch_index: int, token_index: int) -> tuple[int, int] | None:
        """(start, end) in the text of one token; None for special tokens and padding."""
        row = self.encodings[batch_index]
        return None if row.sequence_ids[token_index] is None else row.offsets[token_index]

    def char_to_token(self, batch_index: int, char_index: int, sequence_index: int = 0) -> int | None:
        """The token that holds a character of the text."""
        row = self.encodings[batch_index]
        for index, ((start, end), sequence) in enumerate(zip(row.offsets, row.sequence_ids, strict=True)):
            if sequence == sequence_index and start <= char_index < end:
                return index
        return None


def _array(name: str, value: Any) -> np.ndarray:
    if value and isinstance(value[0], list) and len({len(row) for row in value}) > 1:
        raise ValueError(
            f"{name}: the texts have different numbers of tokens; an array needs padding=True and truncation=True"
        )
    return np.array(value, np.int64)


def pad_lists(data: Mapping[str, Any], padding: Padding | None, return_mask: bool) -> dict[str, Any]:
    """Rows of "input_ids" (or a single row) and what goes with them, padded alike; a mask is made if wanted."""
    ids = data["input_ids"]
    single = not ids or not isinstance(ids[0], list)
    columns = {name: [value] if single else value for name, value in data.items()}
    rows = columns["input_ids"]
    if any(len(value) != len(rows) for value in columns.values()):
        raise ValueError("the values of a batch must have as many rows as input_ids")
    if return_mask and "attention_mask" not in columns:
        columns["attention_mask"] = [[1] * len(row) for row in rows]
    if padding is not None:
        fillers = {"input_ids": padding.token_id, "special_tokens_mask": 1, "attention_mask": 0, "token_type_ids": 0}
        width = padding.width(max((len(row) for row in rows), default=0))
        for name in fillers.keys() & columns.keys():
            columns[name] = [_filled(row, fillers[name], width, padding.side) for row in columns[name]]
    return {name: value[0] if single else value for name, value in columns.items()}


def _filled(row: list[int], filler: int, width: int, side: str) -> list[int]:
    missing = [filler] * max(0, width - len(row))
    return missing + row if side == "left" else row + missing


def as_lists(value: Any) -> Any:
    """Arrays of any library, and what contains them, as lists of Python's numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [as_lists(each) for each in value]
    return value


def each_text(text: Any) -> Iterator[str]:
    """Every string in a text, a list of words, a pair, or a batch of them."""
    if isinstance(text, str):
        yield text
    else:
        for part in text:
            yield from each_text(part)
