"""Builds the `tokenizers.Tokenizer` that a transformers tokenizer class would run.

transformers 5 takes a tokenizer.json as it is only for generic classes; `LlamaTokenizer`, `CodeLlamaTokenizer` and
`GPT2Tokenizer` keep its vocabulary, merges and post-processor and replace the rest by their own pipeline. Ids can only
equal its ids if we do the same. `loader` says when which applies.

Knows the `tokenizers` library and parsed files, not which file to read.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgellama.errors import TokenizerError
from edgellama.tokenizer.screening import check_charsmap
from edgellama.tokenizer.sentencepiece_model import BPE as SPM_BPE
from edgellama.tokenizer.sentencepiece_model import CONTROL, USER_DEFINED, SpmModel
from edgellama.tokenizer.settings import AddedTokenFields, Settings

if TYPE_CHECKING:
    import tokenizers

SPACE = "▁"


@dataclass(frozen=True)
class TokenizerClass:
    """What a transformers class adds to a tokenizer.json. `build(vocab, merges, settings, named)`."""

    build: Callable[[dict[str, int], list, Settings, dict], "tokenizers.Tokenizer"]
    named: dict[str, str] = field(default_factory=dict)  # special tokens where the settings are silent
    extra_special: tuple[str, ...] = ()
    add_bos_token: bool | None = None  # not None: the class writes its own post-processor


def _llama(vocab, merges, settings: Settings, named: dict) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, models

    prefix = settings.add_prefix_space is not False
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = metaspace(prefix, bool(settings.legacy))
    tokenizer.decoder = spm_decoder(prefix)
    return tokenizer


def _code_llama(vocab, merges, settings: Settings, named: dict) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, models

    unk = named["unk_token"]["content"] if named.get("unk_token") else "None"
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token=unk))
    tokenizer.pre_tokenizer = metaspace(settings.add_prefix_space is not False, legacy=False)
    tokenizer.decoder = spm_decoder(strip=True)
    return tokenizer


def _gpt2(vocab, merges, settings: Settings, named: dict) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    model = models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.add_prefix_space))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


_LLAMA_NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_CODE_LLAMA_NAMED = {"prefix_token": "▁<PRE>", "middle_token": "▁<MID>", "suffix_token": "▁<SUF>"}
_CODE_LLAMA_NAMED |= {"eot_token": "▁<EOT>", "fill_token": "<FILL_ME>"}
_GPT2_NAMED = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")

CLASSES = {
    "LlamaTokenizer": TokenizerClass(_llama, _LLAMA_NAMED),
    "CodeLlamaTokenizer": TokenizerClass(_code_llama, _LLAMA_NAMED | _CODE_LLAMA_NAMED, add_bos_token=True),
    "GPT2Tokenizer": TokenizerClass(_gpt2, _GPT2_NAMED),
}
"""The classes that rebuild; any other takes tokenizer.json as it is."""


def metaspace(add_prefix_space: bool, legacy: bool) -> Any:
    """Spaces to ▁, and one before the text (`legacy`: also after each special token) unless there is one already."""
    from tokenizers import pre_tokenizers

    scheme = ("always" if legacy else "first") if add_prefix_space else "never"
    return pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)


def spm_decoder(strip: bool) -> Any:
    """▁ to spaces, byte tokens to characters, and the first word without the space that encoding put before it."""
    from tokenizers import decoders

    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if strip else steps)


def from_tokenizer_json(parsed: dict, name: str, settings: Settings, named: dict) -> "tokenizers.Tokenizer":
    """The pipeline of class `name` over the vocabulary and merges of a parsed tokenizer.json (a BPE)."""
    vocab, merges = parsed["model"]["vocab"], parsed["model"].get("merges", [])
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise TokenizerError("tokenizer.json: model.vocab must be an object and model.merges a list")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    return CLASSES[name].build(vocab, pairs, settings, named)


def from_spm_model(model: SpmModel, settings: Settings) -> "tokenizers.Tokenizer":
    """LlamaTokenizer's pipeline over a SentencePiece model. Its control and user-defined pieces become added tokens."""
    from tokenizers import Regex, Tokenizer, models, normalizers

    if model.model_type == SPM_BPE:
        # SentencePiece drops no character: without byte fallback an unknown one is `unk`.
        backend = Tokenizer(
            models.BPE(
                vocab={piece: index for index, piece in enumerate(model.pieces)},
                merges=model.merges(),
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
                unk_token=model.pieces[model.unk_id],
            )
        )
    else:
        scored = list(zip(model.pieces, model.scores, strict=True))
        backend = Tokenizer(models.Unigram(scored, unk_id=model.unk_id, byte_fallback=model.byte_fallback))
        steps: list = []
        if model.precompiled_charsmap:
            check_charsmap(model.precompiled_charsmap)
            steps.append(normalizers.Precompiled(model.precompiled_charsmap))
        if model.remove_extra_whitespaces:
            steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
        backend.normalizer = normalizers.Sequence(steps)
    prefix = settings.add_prefix_space is not False
    backend.pre_tokenizer = metaspace(prefix, bool(settings.legacy))
    backend.decoder = spm_decoder(prefix)
    return backend


def spm_added_tokens(model: SpmModel) -> list[AddedTokenFields]:
    """Control pieces (special) and user-defined symbols (not special): found in text before anything else."""
    return [
        {"content": piece, "normalized": False, "special": kind == CONTROL}
        for piece, kind in zip(model.pieces, model.types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]


def add_tokens(backend: "tokenizers.Tokenizer", settings: Settings, named: dict, extra: list[AddedTokenFields]) -> None:
    """Registers the settings' added and special tokens, in transformers' order: unknown ones get the next free ids."""
    from tokenizers import AddedToken

    tokens: list[dict[str, Any]] = [dict(settings.added[index]) for index in sorted(settings.added)]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    known.update(str(fields["content"]) for fields in tokens)
    names = {fields["content"] for fields in named.values() if fields is not None}
    for fields in [*(fields for fields in named.values() if fields is not None), *extra]:
        if fields["content"] not in known:
            known.add(str(fields["content"]))
            # A token that is only named is special unless it says otherwise.
            tokens.append({"special": True, **fields})
    made = []
    for fields in tokens:
        token = AddedToken(**fields)
        if not token.special and token.content in names:
            token.special = True
        made.append(token)
    if made:
        backend.add_tokens(made)


def set_post_processor(backend: "tokenizers.Tokenizer", bos: str | None, eos: str | None) -> None:
    """BOS before and EOS after every text, each unless None."""
    from tokenizers import processors

    def around(text: str, number: int) -> list[str]:
        before, after = ([] if token is None else [f"{token}:{number}"] for token in (bos, eos))
        return [*before, f"{text}:{number}", *after]

    special = [(token, backend.token_to_id(token)) for token in (bos, eos) if token is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=around("$A", 0), pair=around("$A", 0) + around("$B", 1), special_tokens=special
    )
