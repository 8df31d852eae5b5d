"""Decodes token by token: each `push` returns the text that is certain by now, and nothing is ever taken back.

`"".join(pushes) + flush() == decode(ids)` for any ids. A `tokenizers` decoder is a chain of steps over a list of token
strings; here each step is a small machine that takes one string at a time and keeps only what a later token could still
change: an unfinished UTF-8 character (`ByteLevel`), a run of byte tokens (`ByteFallback`: one invalid byte turns the
whole run into U+FFFD, so it is certain only when the run ends), whether the text has begun (`Strip`, `Metaspace`).
Work per token is constant. A chain with a step that is not known here is decoded at `flush`.

Knows the JSON form of a decoder, not where tokens come from.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial

_BYTE_TOKEN = re.compile(r"<0x([0-9a-fA-F]{2})>", re.ASCII)
_CLEAN_UP = [(f" {text}", text) for text in (".", "?", "!", ",")]
_CLEAN_UP += [(" ' ", "'"), *((f" {text}", text) for text in ("n't", "'m", "'s", "'ve", "'re"))]


def clean_up(text: str) -> str:
    """transformers' `clean_up_tokenization`: no space before punctuation and English contractions."""
    for old, new in _CLEAN_UP:
        text = text.replace(old, new)
    return text


class _Step:
    """One step of a decoder: strings in, strings out, in order."""

    def push(self, item: str) -> Iterable[str]:
        raise NotImplementedError

    def flush(self) -> Iterable[str]:
        return ()


class _Each(_Step):
    """Maps each string alone."""

    def __init__(self, function: Callable[[str], str]):
        self.function = function

    def push(self, item):
        return (self.function(item),)


class _ByteFallback(_Step):
    """`<0xE2>`-like tokens become the character their run spells, or one U+FFFD a byte if the run is not UTF-8."""

    def __init__(self) -> None:
        self.run = bytearray()

    def push(self, item):
        byte = fallback_byte(item)
        if byte is not None:
            self.run.append(byte)
            return ()
        return (*self.flush(), item)

    def flush(self):
        run, self.run = self.run, bytearray()
        if not run:
            return ()
        try:
            return (run.decode("utf-8"),)
        except UnicodeDecodeError:
            return ("\ufffd",) * len(run)


class _ByteLevel(_Step):
    """GPT-2's alphabet of printable characters back to bytes, and those to text."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, item):
        return (self.decoder.decode(byte_level_bytes(item)),)

    def flush(self):
        return (self.decoder.decode(b"", final=True),)


class _Metaspace(_Step):
    def __init__(self, replacement: str, prepended: bool):
        self.replacement, self.first = replacement, prepended

    def push(self, item):
        item = item.replace(self.replacement, "" if self.first else " ")
        self.first = False
        return (item,)


class _StripText(_Step):
    """Takes up to `start` characters `content` off the beginning of the whole text and up to `stop` off its end."""

    def __init__(self, content: str, start: int, stop: int):
        self.content, self.start, self.stop, self.held = content, start, stop, ""

    def push(self, item):
        while self.start and item:
            if item[0] != self.content:
                self.start = 0
            else:
                item, self.start = item[1:], self.start - 1
        if not self.stop:
            return (item,)
        text = self.held + item
        cut = len(text)
        while cut > 0 and len(text) - cut < self.stop and text[cut - 1] == self.content:
            cut -= 1
        self.held = text[cut:]
        return (text[:cut],)


class _CleanUpLines(_Step):
    """`clean_up` a line at a time: none of its patterns spans a line's end."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, item):
        self.held += item
        if "\n" not in item:
            return ()
        done, _, self.held = self.held.rpartition("\n")
        return (clean_up(done + "\n"),)

    def flush(self):
        return (clean_up(self.held),)


class _JoinWithSpaces(_Step):
    """What `tokenizers` does where a tokenizer.json has no decoder."""

    def __init__(self) -> None:
        self.begun = False

    def push(self, item):
        item = " " + item if self.begun else item
        self.begun = True
        return (item,)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 bytes are themselves, the other 68 follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(0x100 + position): byte for position, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a token in GPT-2's alphabet; one that is not written in it, an added token, is taken as it is."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, token))
    except KeyError:
        return token.encode("utf-8")


def fallback_byte(token: str) -> int | None:
    """0xE2 for `<0xE2>`; None for other tokens."""
    match = _BYTE_TOKEN.fullmatch(token)
    return int(match[1], 16) if match else None


def decoder_steps(decoder: dict | None) -> list[_Step] | None:
    """Fresh machines for a decoder's JSON; None if it has a step that can't be followed token by token."""
    if decoder is None:
        return [_JoinWithSpaces()]
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    steps: list[_Step] = []
    fused = False  # from here on strings are parts of one text, not tokens
    for part in parts:
        kind = part["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "Replace" and "String" in part["pattern"] and part["pattern"]["String"]:
            old, new = part["pattern"]["String"], part["content"]
            if fused and len(old) > 1:
                return None
            steps.append(_Each(partial(_replace, old, new)))
        elif kind == "Strip" and len(part["content"]) == 1:
            content, start, stop = part["content"], part["start"], part["stop"]
            if fused:
                steps.append(_StripText(content, start, stop))
            else:
                steps.append(_Each(partial(_strip, content, start, stop)))
        elif kind == "ByteFallback" and not fused:
            steps.append(_ByteFallback())
        elif kind == "ByteLevel" and not fused:
            steps.append(_ByteLevel())
            fused = True
        elif kind == "Metaspace" and not fused:
            steps.append(_Metaspace(part["replacement"], part.get("prepend_scheme", "always") != "never"))
        else:
            return None
    return steps


def _replace(old: str, new: str, item: str) -> str:
    return item.replace(old, new)


def _strip(content: str, start: int, stop: int, item: str) -> str:
    machine = _StripText(content, start, stop)
    return "".join(machine.push(item))


class StreamDecoder:
    """The incremental form of `decode`; made by `Tokenizer.stream`.

    >>> stream.push(15043), stream.push(445), stream.flush()     # Llama-2's
    ('Hello', ' this', '')
    """

    def __init__(
        self,
        token_text: Callable[[int], str | None],
        decode: Callable[[Sequence[int]], str],
        decoder: dict | None,
        clean_up_lines: bool = False,
    ):
        """`token_text`: a token's string, None for one that is not shown. `decode`: for chains not followed here."""
        self._token_text, self._decode = token_text, decode
        self._decoder, self._clean_up_lines = decoder, clean_up_lines
        self._start()

    def _start(self) -> None:
        steps = decoder_steps(self._decoder)
        self._held_ids: list[int] | None = [] if steps is None else None
        self._steps = steps or []
        if self._clean_up_lines:
            self._steps.append(_CleanUpLines())

    def push(self, token_id: int) -> str:
        """The text that this token completes; often all of it, "" if a character or the like is still open."""
        if self._held_ids is not None:
            self._held_ids.append(token_id)
            return ""
        item = self._token_text(token_id)
        return "" if item is None else self._run([item], 0)

    def flush(self) -> str:
        """What is left at the end, an unfinished character as U+FFFD. The next push starts a new text."""
        if self._held_ids is not None:
            text = self._decode(self._held_ids)
        else:
            text = "".join(self._run(list(step.flush()), i + 1) for i, step in enumerate(self._steps))
        self._start()
        return text

    def _run(self, items: list[str], first: int) -> str:
        """Sends strings through the steps from `first` on."""
        for step in self._steps[first:]:
            items = [out for item in items for out in step.push(item)]
        return "".join(items)
