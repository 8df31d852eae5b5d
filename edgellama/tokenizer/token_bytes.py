"""The bytes that each token stands for. Knows a vocabulary and the JSON form of a decoder."""

from collections.abc import Callable

from edgellama.errors import TokenizerError
from edgellama.tokenizer.stream import byte_level_bytes, fallback_byte


def token_bytes_function(decoder: dict | None) -> Callable[[str], bytes]:
    """Maps a token's string to the UTF-8 bytes, or part of a character's, that it adds in the middle of a text.

    TokenizerError for a decoder that does more than rewrite one token after the other.
    """
    parts = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    replacements: list[tuple[str, str]] = []
    byte_fallback = byte_level = False
    for part in parts:
        kind = part["type"]
        if kind == "Replace" and part["pattern"].get("String") and not byte_level:
            replacements.append((part["pattern"]["String"], part["content"]))
        elif kind == "Metaspace":
            replacements.append((part["replacement"], " "))
        elif kind == "ByteFallback":
            byte_fallback = True
        elif kind == "ByteLevel":
            byte_level = True
        elif kind not in ("Fuse", "Strip"):  # `Strip` takes the space before a text's first word
            raise TokenizerError(f"its tokens have no bytes of their own: decoder step {kind} is not supported")
    if decoder is None:
        raise TokenizerError("its tokens have no bytes of their own: it has no decoder and joins them with spaces")

    def convert(token: str) -> bytes:
        byte = fallback_byte(token) if byte_fallback else None
        if byte is not None:
            return bytes([byte])
        for old, new in replacements:
            token = token.replace(old, new)
        return byte_level_bytes(token) if byte_level else token.encode("utf-8")

    return convert
