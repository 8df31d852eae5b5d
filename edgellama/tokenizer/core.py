"""`CoreTokenizer`: one interface over every kind of tokenizer. Assembled by `loader`; knows no files."""

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from edgellama.errors import TokenizerError
from edgellama.tokenizer.guard import refusing
from edgellama.tokenizer.stream import StreamDecoder, clean_up
from edgellama.tokenizer.token_bytes import token_bytes_function

if TYPE_CHECKING:
    import tokenizers


class CoreTokenizer:
    """Text to ids and back, as Hugging Face's tokenizer of the same checkpoint does it. Safe to share between threads.

    `vocab_size`: ids the tokenizer knows, added tokens included (a model may have more rows). `bos_id`, `eos_id`: None
    if there is none. `special_ids`: those that `skip_special_tokens` leaves out. `chat_template`: Jinja source, or
    several by name, unrendered; `special_tokens`: what it is given of them, text by role ("bos_token", ...). `kind`:
    "tokenizer.json" or "tokenizer.model".
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        kind: str,
        bos_id: int | None,
        eos_id: int | None,
        chat_template: str | dict[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
        clean_up_spaces: bool = False,
    ):
        self._backend, self._clean_up = backend, clean_up_spaces
        self.kind, self.bos_id, self.eos_id, self.chat_template = kind, bos_id, eos_id, chat_template
        self.special_tokens = dict(special_tokens or {})
        self._decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        self._read_vocabulary()

    def _read_vocabulary(self) -> None:
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)

    def _changed(self) -> None:
        """To be called after the backend was changed."""
        self._read_vocabulary()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; `add_special_tokens` puts BOS and EOS where the checkpoint's settings want them.

        Special tokens spelt out in `text` ("</s>") become their ids, as with Hugging Face. TokenizerError for text that
        is not valid Unicode (a lone surrogate).
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be str, got {type(text).__name__}")
        check_unicode(text)
        with refusing("the text cannot be tokenized"):
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_pair(self, text: str, pair: str) -> list[int]:
        """The ids of two texts that belong together, with the special tokens that the checkpoint wants around them."""
        self.encode(text), self.encode(pair)  # which refuse what is no text
        with refusing("the text cannot be tokenized"):
            return self._backend.encode(text, pair).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids` (integers of any kind); ids that the tokenizer does not know have none."""
        numbers = [operator.index(index) for index in ids]
        if numbers and not 0 <= min(numbers) <= max(numbers) < 1 << 32:
            raise TokenizerError(f"{min(numbers) if min(numbers) < 0 else max(numbers)} is not a token id")
        with refusing("the ids cannot be decoded"):
            text = self._backend.decode(numbers, skip_special_tokens=skip_special_tokens)
        return clean_up(text) if self._clean_up else text

    @property
    def decoder_fields(self) -> dict | None:
        """The decoder's JSON; None without one."""
        return self._decoder

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's own string ("▁Hello"); None if there is no such token."""
        with refusing("not a token"):
            return self._backend.token_to_id(token)

    def stream(self, skip_special_tokens: bool = False, after: Sequence[int] = ()) -> StreamDecoder:
        """A decoder that takes one id at a time and never emits half a character.

        `after`: ids that come before, whose own text is not wanted. Text after a prompt keeps the space of its first
        word only if the decoder knows that it is not the beginning.
        """
        stream = StreamDecoder(
            partial(self._token_text, skip_special_tokens),
            partial(self.decode, skip_special_tokens=skip_special_tokens),
            self._decoder,
            self._clean_up,
        )
        for index in after:
            stream.push(index)
        return stream

    def token_bytes(self) -> list[bytes]:
        """For each id the bytes that it adds in the middle of a text; a special token's own, b"" for an unused id.

        A character may be spread over tokens, so they need not be UTF-8. TokenizerError for a tokenizer whose text is
        not its tokens' one after the other.
        """
        if self._clean_up:
            raise TokenizerError(
                "its tokens have no bytes of their own: clean_up_tokenization_spaces rewrites the text"
            )
        convert = token_bytes_function(self._decoder)
        tokens = [b""] * (max(self._backend.get_vocab().values(), default=-1) + 1)
        for token, index in self._backend.get_vocab().items():
            tokens[index] = token.encode("utf-8") if index in self.special_ids else convert(token)
        return tokens

    def _token_text(self, skip_special_tokens: bool, index: int) -> str | None:
        number = operator.index(index)
        if skip_special_tokens and number in self.special_ids:
            return None
        with refusing(f"{number} is not a token id"):
            return self._backend.id_to_token(number)


def check_unicode(text: str) -> None:
    """TokenizerError for text with a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text is not valid Unicode: a lone surrogate U+{ord(text[error.start]):04X} at {error.start}"
        ) from None
