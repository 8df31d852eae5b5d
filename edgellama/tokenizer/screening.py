"""Refuses what the `tokenizers` library could not survive. Knows the file's JSON, not its meaning.

Found by fuzzing `tokenizers` 0.23.3, where both abort the process, which cannot be caught:
- A BPE with a `continuing_subword_prefix` cuts merges at that many bytes; inside a character this panics while another
  panic unwinds. No Llama tokenizer has one.
- A `Precompiled` normalizer allocates as many bytes as its first four say.
And replacement steps multiply: ten of "a" -> "aaaa" make a text a million times longer.
"""

import base64
import json
import re

from edgellama.errors import TokenizerError
from edgellama.tokenizer.guard import refusing

MAX_GROWTH = 4096
"""How many times longer a tokenizer's replacements may make a text."""

_PREFIX = "continuing_subword_prefix"
_PREFIX_SET = re.compile(rb'"continuing_subword_prefix"\s*+:\s*+(?!null\b|"")')
_PRECOMPILED = b'"Precompiled"'
_ESCAPED_ASCII = re.compile(rb"\\u00[2-7]")  # a key can be spelt with escapes; ordinary files don't


def check_before_parsing(data: bytes) -> None:
    """TokenizerError if no native parser should see the file. Parses it only if a search finds something suspicious."""
    if _PREFIX_SET.search(data) or _PRECOMPILED in data or _ESCAPED_ASCII.search(data):
        with refusing("tokenizer.json: not valid JSON"):
            json.loads(data.decode("utf-8"), object_pairs_hook=_check_object)


def _check_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Looks at every object, duplicate keys included: which of them a parser takes is its own affair."""
    value = dict(pairs)
    is_bpe = "merges" in value or value.get("type") not in ("WordPiece", "WordLevel", "Unigram")
    if is_bpe and any(key == _PREFIX and prefix not in (None, "") and not _is_id(prefix) for key, prefix in pairs):
        raise TokenizerError(f"tokenizer.json: a BPE model with {_PREFIX} is not supported")
    for key, charsmap in pairs:
        if key == "precompiled_charsmap" and not _is_id(charsmap):
            with refusing("tokenizer.json: a Precompiled normalizer is broken"):
                check_charsmap(base64.b64decode(str(charsmap), validate=True))
    return value


def check_charsmap(charsmap: bytes) -> None:
    """ValueError unless the four-byte size of the trie at its beginning fits: 32-bit units, inside the bytes."""
    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 8 or size % 4 or not 0 < size <= len(charsmap) - 4:
        raise ValueError(f"a trie of {size} bytes in a map of {len(charsmap)}")


def _is_id(value: object) -> bool:
    """The entry of a vocabulary that has such a token."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_growth(part: dict) -> None:
    """TokenizerError if a normalizer's or decoder's replacements multiply to more than `MAX_GROWTH`."""
    growth = 1.0
    pending = [part]
    while pending:
        step = pending.pop()
        pending += [*(step.get("normalizers") or ()), *(step.get("decoders") or ())]
        if step.get("type") == "Replace":
            pattern = step.get("pattern", {}).get("String")
            growth *= max(1.0, len(step.get("content", "")) / max(1, len(pattern or "")))
        elif step.get("type") == "Prepend":
            growth *= 1 + len(step.get("prepend", ""))
    if growth > MAX_GROWTH:
        raise TokenizerError(f"tokenizer.json: its replacements make a text up to {growth:.3g} times longer; refused")
