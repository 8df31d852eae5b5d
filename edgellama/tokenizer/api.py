"""`Tokenizer`: `SpecialTokens` with transformers' way to call one, for one text, pairs and batches.

What it returns equals transformers' (tested against 5.23), with two differences: arrays are NumPy's, and whatever is
asked of one call leaves no trace in the next.
"""

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from edgellama.errors import TokenizerError
from edgellama.tokenizer.batch import BatchEncoding, Row, as_lists, each_text, pad_lists, truncated
from edgellama.tokenizer.core import check_unicode
from edgellama.tokenizer.dropout import Merges
from edgellama.tokenizer.guard import refusing
from edgellama.tokenizer.limits import Padding, choose_padding, choose_truncation
from edgellama.tokenizer.settings import Settings
from edgellama.tokenizer.special import SpecialTokens
from edgellama.tokenizer.stream import clean_up

if TYPE_CHECKING:
    import tokenizers


class CallOptions(TypedDict, total=False):
    """transformers' keyword parameters of a call."""

    add_special_tokens: bool
    padding: bool | str
    truncation: bool | str | None
    max_length: int | None
    stride: int
    is_split_into_words: bool
    pad_to_multiple_of: int | None
    padding_side: str | None
    return_tensors: str | None
    return_token_type_ids: bool | None
    return_attention_mask: bool | None
    return_overflowing_tokens: bool
    return_special_tokens_mask: bool
    return_offsets_mapping: bool
    return_length: bool
    verbose: bool
    split_special_tokens: bool | None


_VOCABULARY_FILES = ("tokenizer.model", "tokenizer.json")


class Tokenizer(SpecialTokens):
    """Text to ids and back, with the methods of transformers' LlamaTokenizer. Made by `load_tokenizer`.

    `padding_side`, `truncation_side` ("left" or "right"), `model_max_length`, `model_input_names`,
    `split_special_tokens`, `clean_up_tokenization_spaces`: transformers' parameters, as tokenizer_config.json states
    them; may be set. `legacy`, `add_prefix_space`, `use_default_system_prompt`: as stated, for reading.
    `sp_model_kwargs`: {"enable_sampling": True, "alpha": 0.1, "nbest_size": -1} makes each encoding another one of the
    same text, as SentencePiece does: BPE dropout (which `random.seed` repeats), or a sampled unigram segmentation.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        settings: Settings,
        padding_side: str,
        model_input_names: Sequence[str],
        files: Mapping[str, bytes],
        **core: Any,
    ):
        super().__init__(backend, **core)
        self.padding_side, self.model_input_names = padding_side, list(model_input_names)
        self.truncation_side = settings.truncation_side or "right"
        self.model_max_length = settings.model_max_length or int(1e30)
        self.split_special_tokens = settings.split_special_tokens
        self.clean_up_tokenization_spaces = settings.clean_up_spaces
        self.legacy, self.add_prefix_space = bool(settings.legacy), settings.add_prefix_space
        self.use_default_system_prompt = settings.use_default_system_prompt
        self.extra_special_tokens = [str(token["content"]) for token in settings.extra_special]
        self._files = {name: files[name] for name in _VOCABULARY_FILES if name in files}
        self._sampling: dict[str, Any] = {}
        self._variants: dict[tuple, Any] = {}
        self._variants_lock = threading.Lock()

    @property
    def sp_model_kwargs(self) -> dict[str, Any]:
        return dict(self._sampling)

    @sp_model_kwargs.setter
    def sp_model_kwargs(self, value: Mapping[str, Any] | None) -> None:
        value = dict(value or {})
        unknown = set(value) - {"enable_sampling", "nbest_size", "alpha"}
        if unknown:
            raise ValueError(f"sp_model_kwargs takes enable_sampling, nbest_size and alpha, not {', '.join(unknown)}")
        if not 0.0 <= value.get("alpha", 0.1) <= 1.0:
            raise ValueError(f"alpha must be from 0 to 1, got {value['alpha']!r}")
        self._sampling = value

    # -- text to ids ---------------------------------------------------------------------------------------------

    def encode(self, text: Any, add_special_tokens: bool = True, text_pair: Any = None, **options: Any) -> list[int]:
        """The ids of `text`; `add_special_tokens` puts BOS and EOS where the checkpoint's settings want them.

        Special tokens spelt out in `text` ("</s>") become their ids, as with Hugging Face. `text_pair` and `options`
        are those of a call. TokenizerError for text that is not valid Unicode (a lone surrogate).
        """
        if text_pair is None and not options and not self._sampling and not self._is_split_otherwise(None):
            return super().encode(text, add_special_tokens)
        return self(text, text_pair, add_special_tokens=add_special_tokens, **options)["input_ids"]

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        **options: Unpack[CallOptions],
    ) -> BatchEncoding:
        """Encode a text or a list of texts, with `text_pair` pairs of them, into a dict of lists or arrays.

        `padding`: True (to the longest), "max_length"; `truncation`: True ("longest_first"), "only_first",
        "only_second"; `max_length` counts special tokens, None is `model_max_length`. `return_tensors`: None or "np".
        `is_split_into_words`: texts are lists of words. `text_target` is encoded alike, as "labels". `verbose` changes
        nothing: there are no warnings. ValueError for what contradicts itself, TokenizerError for a lone surrogate.
        """
        if text is None and text_target is None:
            raise ValueError("a call needs text or text_target")
        if text is None:
            return self._batch(text_target, text_pair_target, **options)
        result = self._batch(text, text_pair, **options)
        if text_target is not None:
            result["labels"] = self._batch(text_target, text_pair_target, **options)["input_ids"]
        return result

    def _batch(
        self,
        text: Any,
        text_pair: Any,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        split_special_tokens: bool | None = None,
    ) -> BatchEncoding:
        """See `__call__`."""
        limit = choose_truncation(
            truncation, padding, max_length, self.model_max_length, side=self.truncation_side, stride=stride
        )
        filler = self._padding(padding, max_length, pad_to_multiple_of, padding_side)
        if limit and filler and pad_to_multiple_of and limit.max_length % pad_to_multiple_of:
            raise ValueError(f"max_length {limit.max_length} is not a multiple of pad_to_multiple_of")
        is_batch = isinstance(text, list | tuple)
        if is_split_into_words:
            is_batch = is_batch and bool(text) and isinstance(text[0], list | tuple)
        inputs = _inputs(text, text_pair, is_batch, is_split_into_words)
        encodings = self._encodings(inputs, split_special_tokens, add_special_tokens, is_split_into_words)
        pieces = [truncated(encoding, limit) for encoding in encodings]
        if not return_overflowing_tokens:
            pieces = [windows[:1] for windows in pieces]
        elif limit and limit.strategy == "longest_first" and text_pair is not None:
            raise ValueError(
                "of pairs only one text's overflow can be returned: truncation='only_first' or 'only_second'"
            )
        rows = [row for windows in pieces for row in windows]
        if filler is not None:
            width = filler.width(max(map(len, rows), default=0))
            for row in rows:
                row.pad(filler, width)
        wanted = {
            "token_type_ids": self._returned(return_token_type_ids, "token_type_ids"),
            "attention_mask": self._returned(return_attention_mask, "attention_mask"),
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
        }
        data: dict[str, Any] = {"input_ids": [row.ids for row in rows]}
        data |= {name: [_column(row, name) for row in rows] for name, is_wanted in wanted.items() if is_wanted}
        if return_length:
            data["length"] = [len(row) for row in rows]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = [i for i, windows in enumerate(pieces) for _ in windows]
        elif not is_batch and return_tensors is None:
            data = {name: value[0] if name != "length" else value for name, value in data.items()}
        return BatchEncoding(data, rows, return_tensors)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The tokens of `text` as strings."""
        return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pad what was encoded before: a dict of rows (or of one row), or a list of dicts of one row each."""
        if isinstance(encoded_inputs, list | tuple) and encoded_inputs and isinstance(encoded_inputs[0], Mapping):
            encoded_inputs = {key: [each[key] for each in encoded_inputs] for key in encoded_inputs[0]}
        if "input_ids" not in encoded_inputs:
            raise ValueError(f"there is nothing to pad without input_ids; got {', '.join(encoded_inputs)}")
        data = {name: as_lists(value) for name, value in encoded_inputs.items()}
        filler = self._padding(padding, max_length, pad_to_multiple_of, padding_side)
        mask = self._returned(return_attention_mask, "attention_mask")
        return BatchEncoding(pad_lists(data, filler, mask), return_tensors=return_tensors)

    def _returned(self, asked: bool | None, name: str) -> bool:
        return name in self.model_input_names if asked is None else asked

    def _padding(
        self, padding: bool | str, max_length: int | None, multiple_of: int | None, side: str | None
    ) -> Padding | None:
        return choose_padding(
            padding,
            max_length,
            self.model_max_length,
            side=self.padding_side if side is None else side,
            token=self.pad_token,
            token_id=self.pad_token_id,
            multiple_of=multiple_of,
        )

    # -- ids to text ---------------------------------------------------------------------------------------------

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,
    ) -> Any:
        """The text of ids (integers of any kind), a list of texts for rows of them; unknown ids have none.

        `clean_up_tokenization_spaces` takes the space before punctuation away, except of a BPE's text, which needs no
        cleaning (as in transformers 5). `spaces_between_special_tokens` puts a space on each side of added tokens.
        """
        if isinstance(token_ids, Mapping):
            token_ids = token_ids["input_ids"]
        ids = as_lists(token_ids)
        if isinstance(ids, list) and ids and isinstance(ids[0], list):
            return [
                self.decode(row, skip_special_tokens, clean_up_tokenization_spaces, spaces_between_special_tokens)
                for row in ids
            ]
        if not isinstance(ids, Iterable):
            ids = [ids]
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        if spaces_between_special_tokens:
            text = self._decode_apart(ids, skip_special_tokens)
        else:
            text = super().decode(ids, skip_special_tokens)
        return clean_up(text) if clean and not self._clean_up and not self._is_bpe() else text

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """A text for each row of ids."""
        texts = self.decode(sequences, skip_special_tokens, **options)
        return [texts] if isinstance(texts, str) else texts

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens, as the decoder joins them."""
        decoder = self._backend.decoder
        with refusing("the tokens cannot be joined"):
            return " ".join(tokens) if decoder is None else decoder.decode(list(tokens))

    def _decode_apart(self, ids: Iterable[int], skip_special_tokens: bool) -> str:
        added = self.added_tokens_decoder
        parts: list[str] = []
        run: list[int] = []
        for index in [*ids, None]:
            if index is not None and index not in added:
                run.append(index)
                continue
            if run:
                parts.append(super().decode(run, skip_special_tokens))
                run = []
            if index is not None and not (skip_special_tokens and index in self.special_ids):
                parts.append(added[index].content)
        return " ".join(part for part in parts if part)

    # -- files, and tokenizers beside this one -------------------------------------------------------------------

    def save_vocabulary(self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None) -> tuple[str]:
        """Write the checkpoint's tokenizer.model (tokenizer.json where there is none) as it was; returns its path."""
        if not Path(save_directory).is_dir():
            raise TokenizerError(f"{save_directory} is not a folder; create it first")
        if not self._files:
            raise TokenizerError("this tokenizer was not made from a tokenizer.model or a tokenizer.json")
        name, data = next(iter(self._files.items()))
        path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{name}"
        path.write_bytes(data)
        return (str(path),)

    def _changed(self) -> None:
        super()._changed()
        with self._variants_lock:
            self._variants.clear()

    def _is_bpe(self) -> bool:
        return type(self._backend.model).__name__ == "BPE"

    def _is_split_otherwise(self, split_special_tokens: bool | None) -> bool:
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        return split != self._backend.encode_special_tokens

    def _encodings(
        self, inputs: list[Any], split_special_tokens: bool | None, add_special_tokens: bool, words: bool
    ) -> list[Any]:
        """An encoding for each text or pair."""
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        sampling = self._sampling if self._sampling.get("enable_sampling") else None
        options = {"add_special_tokens": add_special_tokens, "is_pretokenized": words}
        merges = self._merges(split) if sampling and self._is_bpe() else None
        backend = merges.backend if merges else self._variant(split, sampling)
        with refusing("the text cannot be tokenized"):
            if len(inputs) == 1:  # without the library's threads, after whose first use a fork is complained about
                text, pair = inputs[0] if isinstance(inputs[0], tuple) else (inputs[0], None)
                encodings = [backend.encode(text, pair, **options)]
            else:
                encodings = backend.encode_batch(inputs, **options)
        if merges is None or sampling is None:
            return encodings
        return [merges.merge(symbols, sampling.get("alpha", 0.1)) for symbols in encodings]

    def _variant(self, split: bool, sampling: Mapping[str, Any] | None) -> "tokenizers.Tokenizer":
        """The tokenizer, or a copy that splits special tokens, or samples: a call never changes the shared one."""
        if not sampling and split == self._backend.encode_special_tokens:
            return self._backend
        key = (split, *((sampling.get("alpha", 0.1), sampling.get("nbest_size", -1)) if sampling else ()))
        with self._variants_lock:
            if key not in self._variants:
                copy = self._variants[key] = self._copy(split)
                if sampling:
                    alpha, nbest = key[1:]
                    # To SentencePiece any negative number is "all", and 0 the best one; `tokenizers` has 0 for all.
                    copy.model.alpha, copy.model.nbest_size = float(alpha), 0 if nbest < 0 else max(1, nbest)
            return self._variants[key]

    def _merges(self, split: bool) -> Merges:
        with self._variants_lock:
            key = ("merges", split)
            if key not in self._variants:
                self._variants[key] = Merges(self._copy(split))
            return self._variants[key]

    def _copy(self, split: bool) -> "tokenizers.Tokenizer":
        import tokenizers

        copy = tokenizers.Tokenizer.from_str(self._backend.to_str())
        copy.encode_special_tokens = split
        return copy


def _inputs(text: Any, text_pair: Any, is_batch: bool, words: bool) -> list[Any]:
    """What `encode_batch` takes: a text or a pair for each row. ValueError or TypeError for anything else."""
    if is_batch and text_pair is not None:
        if isinstance(text_pair, str):
            raise TypeError("text_pair must be a list of as many texts as text")
        if len(text) != len(text_pair):
            raise ValueError(f"text has {len(text)} rows, text_pair {len(text_pair)}")
    rows: list[Any] = list(text) if is_batch else [text]
    if text_pair is not None:
        rows = list(zip(rows, text_pair if is_batch else [text_pair], strict=True))
    elif words:
        rows = [list(row) if isinstance(row, tuple) else row for row in rows]
    else:  # a pair may stand for a text
        rows = [tuple(row) if isinstance(row, list | tuple) and len(row) == 2 else row for row in rows]
    for row in rows:
        for each in row if isinstance(row, tuple) else [row]:
            is_list = isinstance(each, list | tuple) and all(isinstance(word, str) for word in each)
            if not (is_list if words else isinstance(each, str)):
                what = "a list of words" if words else "str"
                raise ValueError(f"a text must be {what}, or a list of such, got {type(each).__name__}")
        for each in each_text(row):
            check_unicode(each)
    return rows


def _column(row: Row, name: str) -> list:
    return getattr(row, {"token_type_ids": "type_ids", "offset_mapping": "offsets"}.get(name, name))
