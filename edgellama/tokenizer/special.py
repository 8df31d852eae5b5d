"""The special tokens of a tokenizer: their names and ids, adding some, and what is put around a text.

The methods are those of transformers' LlamaTokenizer. Those that change the tokenizer are not for use while another
thread encodes with it: that raises TokenizerError.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

from edgellama.errors import TokenizerError
from edgellama.tokenizer import rebuild
from edgellama.tokenizer.core import CoreTokenizer
from edgellama.tokenizer.guard import refusing
from edgellama.tokenizer.settings import NAMED_TOKENS

if TYPE_CHECKING:
    import tokenizers

Token = Union[str, "tokenizers.AddedToken"]


class _Named:
    """`bos_token` and the like: the token's text, or None; may be set to a token that the tokenizer knows or not."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, tokenizer: "SpecialTokens", owner: type) -> str | None:
        return tokenizer.special_tokens.get(self.name)

    def __set__(self, tokenizer: "SpecialTokens", value: Token | None) -> None:
        tokenizer._name_token(self.name, value)


class _NamedId:
    """`bos_token_id` and the like: an int, or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removesuffix("_id")

    def __get__(self, tokenizer: "SpecialTokens", owner: type) -> int | None:
        token = tokenizer.special_tokens.get(self.name)
        return None if token is None else tokenizer.convert_tokens_to_ids(token)

    def __set__(self, tokenizer: "SpecialTokens", value: int | None) -> None:
        tokenizer._name_token(self.name, None if value is None else tokenizer.convert_ids_to_tokens(value))


class SpecialTokens(CoreTokenizer):
    """A `CoreTokenizer` whose special tokens can be asked for and changed."""

    extra_special_tokens: list[str]
    _adds: tuple[bool, bool] | None = None  # whether BOS and EOS are put around a text; None: not looked at yet

    bos_token, bos_token_id = _Named(), _NamedId()
    eos_token, eos_token_id = _Named(), _NamedId()
    unk_token, unk_token_id = _Named(), _NamedId()
    sep_token, sep_token_id = _Named(), _NamedId()
    pad_token, pad_token_id = _Named(), _NamedId()
    cls_token, cls_token_id = _Named(), _NamedId()
    mask_token, mask_token_id = _Named(), _NamedId()

    def _name_token(self, name: str, value: Any) -> None:
        self._adds_around()  # as it was with the old ones
        if value is None:
            self.special_tokens.pop(name, None)
        else:
            content = value if isinstance(value, str) else getattr(value, "content", None)
            if content is None:
                raise TypeError(f"{name} must be a str or an AddedToken, got {type(value).__name__}")
            self.special_tokens[name] = content
        if name in ("bos_token", "eos_token"):
            setattr(self, name.removesuffix("_token") + "_id", self.token_to_id(self.special_tokens.get(name, "")))

    # -- the vocabulary ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Tokens, added ones included: what a model's embedding must have at least."""
        return self.vocab_size

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, of all."""
        return self._backend.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        """Token -> id, of those that are found in a text before it is tokenized."""
        return {token.content: index for index, token in sorted(self.added_tokens_decoder.items())}

    added_tokens_encoder = property(get_added_vocab)

    @property
    def added_tokens_decoder(self) -> "dict[int, tokenizers.AddedToken]":
        """Id -> AddedToken."""
        return self._backend.get_added_tokens_decoder()

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or those of a list of them; unk's, or None without one, for what is no token."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self.token_to_id(tokens)
        if index is None and "unk_token" in self.special_tokens:
            index = self.token_to_id(self.special_tokens["unk_token"])
        return index

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or those of several; None for an id that is none."""
        if not isinstance(ids, Iterable):
            return self._token_text(False, ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [self._token_text(False, index) for index in ids if index not in skipped]

    # -- the special ones ----------------------------------------------------------------------------------------

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Role ("bos_token", ...) -> token, in transformers' order."""
        order = [*NAMED_TOKENS, *(key for key in self.special_tokens if key not in NAMED_TOKENS)]
        return {key: self.special_tokens[key] for key in order if key in self.special_tokens}

    @property
    def all_special_tokens(self) -> list[str]:
        """Each once: those with a role, then the others."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    additional_special_tokens = property(lambda self: self.extra_special_tokens)

    def add_tokens(self, new_tokens: Token | Sequence[Token], special_tokens: bool = False) -> int:
        """Add tokens that are found in a text as they stand; returns how many were new. New ids follow the last one.

        The model must have rows for them: `edgellama convert --add-pad-token` makes one.
        """
        if not new_tokens:
            return 0
        tokens = [new_tokens] if not isinstance(new_tokens, list | tuple) else list(new_tokens)
        with refusing("the tokens cannot be added"):
            add = self._backend.add_special_tokens if special_tokens else self._backend.add_tokens
            added = add(tokens)
        self._changed()
        return added

    def add_special_tokens(
        self,
        special_tokens_dict: Mapping[str, Token | Sequence[Token]],
        replace_extra_special_tokens: bool = True,
    ) -> int:
        """Give tokens a role ({"pad_token": "<pad>"}) and add those that are new; returns how many were.

        "extra_special_tokens" (or "additional_special_tokens") takes a list of tokens without a role.
        """
        from tokenizers import AddedToken

        wanted = dict(special_tokens_dict)
        if "additional_special_tokens" in wanted:
            wanted.setdefault("extra_special_tokens", wanted.pop("additional_special_tokens"))
        allowed = [*NAMED_TOKENS, *(key for key in self.special_tokens if key not in NAMED_TOKENS)]
        tokens: list[Any] = []
        for key, value in wanted.items():
            given = value if key == "extra_special_tokens" else [value]
            if key not in (*allowed, "extra_special_tokens"):
                raise ValueError(
                    f"{key!r} is not a special token's role: {', '.join(allowed)}, extra_special_tokens are"
                )
            if not isinstance(given, list | tuple) or not all(isinstance(each, str | AddedToken) for each in given):
                raise ValueError(f"{key} must be a str or an AddedToken, or for extra_special_tokens a list of them")
            tokens += [AddedToken(t, normalized=False, special=True) if isinstance(t, str) else t for t in given]
        added = self.add_tokens(tokens, special_tokens=True)
        for key, value in wanted.items():
            if isinstance(value, list | tuple):
                contents = [str(getattr(each, "content", each)) for each in value]
                kept = [] if replace_extra_special_tokens and contents else self.extra_special_tokens
                self.extra_special_tokens = [*kept, *(each for each in contents if each not in kept)]
            else:
                self._name_token(key, value)
        return added

    # -- around a text -------------------------------------------------------------------------------------------

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many tokens `encode` puts around a text, or around two."""
        return self._backend.num_special_tokens_to_add(pair)

    @property
    def add_bos_token(self) -> bool:
        """Whether `encode` puts BOS before a text. Setting it calls `update_post_processor`."""
        return self._adds_around()[0]

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._set_around(bool(value), self.add_eos_token)

    @property
    def add_eos_token(self) -> bool:
        """Whether `encode` puts EOS after a text. Setting it calls `update_post_processor`."""
        return self._adds_around()[1]

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._set_around(self.add_bos_token, bool(value))

    def update_post_processor(self) -> None:
        """Put the present BOS and EOS around texts: to be called after `bos_token` or `eos_token` was changed."""
        self._set_around(*self._adds_around())

    def _adds_around(self) -> tuple[bool, bool]:
        if self._adds is None:
            ids = super().encode("")
            bos = self.bos_id is not None and ids[:1] == [self.bos_id]
            eos = self.eos_id is not None and ids[bos:][-1:] == [self.eos_id]
            self._adds = bos, eos
        return self._adds

    def _set_around(self, bos: bool, eos: bool) -> None:
        tokens = []
        for name, index, wanted in (("bos_token", self.bos_id, bos), ("eos_token", self.eos_id, eos)):
            token = self.special_tokens.get(name) if wanted else None
            if token is None and wanted and index is not None:  # named by the model's config alone
                token = self._token_text(False, index)
            if token is not None and self.token_to_id(token) is None:
                raise TokenizerError(f"{name} {token!r} is not in the vocabulary: add it with add_special_tokens")
            tokens.append(token)
        with refusing("the special tokens cannot be changed"):
            rebuild.set_post_processor(self._backend, *tokens)
        self._adds = tokens[0] is not None, tokens[1] is not None
        self._changed()

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """The ids of one text, or of two, with BOS and EOS around each where this tokenizer adds them."""
        before, after = self._around()
        ids = [*before, *token_ids_0, *after]
        return ids if token_ids_1 is None else [*ids, *before, *token_ids_1, *after]

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for a special token, 0 for others, of what `build_inputs_with_special_tokens` makes of the ids.

        With `already_has_special_tokens` the ids are taken as they are.
        """
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise ValueError("ids that have their special tokens already are one list: leave token_ids_1 out")
            special = set(self.all_special_ids)
            return [int(index in special) for index in token_ids_0]
        before, after = self._around()
        mask: list[int] = []
        for ids in (token_ids_0, token_ids_1):
            if ids is not None:
                mask += [1] * len(before) + [0] * len(ids) + [1] * len(after)
        return mask

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """0 for the first text and its special tokens, 1 for the second and its own."""
        around = sum(map(len, self._around()))
        types = [0] * (len(token_ids_0) + around)
        return types if token_ids_1 is None else types + [1] * (len(token_ids_1) + around)

    def _around(self) -> tuple[list[int], list[int]]:
        bos, eos = self.bos_id, self.eos_id
        return (
            [bos] if bos is not None and self.add_bos_token else [],
            [eos] if eos is not None and self.add_eos_token else [],
        )
