"""`load_tokenizer`: chooses the files and the transformers class, assembles a `Tokenizer`, refuses what is broken.

Ids are those of `AutoTokenizer` of transformers 5 (tested against 5.23). Where transformers 4 or 5 differ, or 5 differs
from what a model was trained with, the choice is:

- tokenizer.json with class `LlamaTokenizer`, `CodeLlamaTokenizer` or `GPT2Tokenizer`: rebuilt as 5 does (`rebuild`).
  The visible difference to 4: a text that begins with a space gets no second one (" Hello" is "Hello"). Any other
  class, byte-level ones that say `LlamaTokenizer`, and none: the file as it is, in 4 and 5.
- `add_bos_token` and `add_eos_token` in tokenizer_config.json count, as in 5, where there is no tokenizer.json; with
  one, its post-processor says what is added. (4's Llama class overrode it; checkpoints written by 4 agree anyway.)
- `legacy` unset means false, as in 5 (4: true).
- tokenizer.model: merges are ranked by the pieces' scores, as SentencePiece and 4 do. 5.23 ranks them by id, which
  gives other ids than the model was trained on for runs of spaces in Llama-2's and Mistral's files. `add_bos_token`
  unset means true, and no class means `LlamaTokenizer` (4, and what 5 documents). A UNIGRAM model is run as one.
- `clean_up_tokenization_spaces` is ignored for BPE, as in 5. CodeLlama's infilling (`<FILL_ME>`) is not done.
"""

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgellama.errors import TokenizerError
from edgellama.tokenizer import rebuild
from edgellama.tokenizer.api import Tokenizer
from edgellama.tokenizer.guard import quiet_panics, refusing
from edgellama.tokenizer.screening import check_before_parsing, check_growth
from edgellama.tokenizer.sentencepiece_model import read_spm_model
from edgellama.tokenizer.settings import Settings, added_token_fields, checked_bytes, parse_json_object, read_settings

if TYPE_CHECKING:
    import tokenizers

    from edgellama.config import LlamaConfig

# Runs every part of a pipeline once, and gives a regular expression that backtracks without end something to do.
_PROBE = "a \u00e9\n1" + "".join(character * 32 for character in "a 1.\n")
_LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")  # pad on the left; others on the right
_PROBE_SECONDS = 2.0  # a good tokenizer needs 100 microseconds


def load_tokenizer(files: Mapping[str, bytes], config: "LlamaConfig | None" = None) -> Tokenizer:
    """The tokenizer in `files` (file name -> bytes, as in a checkpoint folder); unknown names are ignored.

    tokenizer.json is used if there is one, else tokenizer.model. `config` fills in ids that the files leave open.
    TokenizerError: no tokenizer, a broken or an unsupported one; the message names the file.
    """
    data = checked_bytes(files, "tokenizer.json")
    with quiet_panics():
        if data is not None:
            kind, problem = "tokenizer.json", "tokenizer.json: not a tokenizer this version can read"
        else:
            kind, problem = "tokenizer.model", "tokenizer.model: not a tokenizer this version can read"
            data = checked_bytes(files, "tokenizer.model")
            if data is None:
                raise TokenizerError(
                    "no tokenizer: the checkpoint has neither tokenizer.json nor tokenizer.model; copy one of them "
                    "from the model's repository and convert again"
                )
        with refusing(problem):
            assemble = _from_json if kind == "tokenizer.json" else _from_spm
            tokenizer = assemble(data, files, config)
            started = time.monotonic()
            tokenizer.decode(tokenizer.encode(_PROBE))
            if time.monotonic() - started > _PROBE_SECONDS:
                raise TokenizerError(f"{kind}: takes seconds for {len(_PROBE)} characters; refused")
    return tokenizer


def _from_json(data: bytes, files: Mapping[str, bytes], config: "LlamaConfig | None") -> Tokenizer:
    import tokenizers

    check_before_parsing(data)
    backend = tokenizers.Tokenizer.from_buffer(data)
    settings = read_settings(files, _json_added_tokens(backend))
    name = _class_name(settings, config)
    is_bpe = isinstance(backend.model, tokenizers.models.BPE)
    # transformers looks for the same substring.
    as_it_is = name not in rebuild.CLASSES or not is_bpe or (name == "LlamaTokenizer" and b'"ByteLevel"' in data)
    named = dict(settings.named)
    extra = list(settings.extra_special)
    if not as_it_is:
        spec = rebuild.CLASSES[name]
        named = _with_defaults(named, spec.named)
        post_processor = backend.post_processor
        backend = rebuild.from_tokenizer_json(parse_json_object("tokenizer.json", data), name, settings, named)
        if post_processor is not None:
            backend.post_processor = post_processor
    rebuild.add_tokens(backend, settings, named, extra)
    if not as_it_is and spec.add_bos_token:
        rebuild.set_post_processor(backend, _content(named, "bos_token"), None)
    return _finish(backend, "tokenizer.json", settings, named, config, files, rebuilt=name if not as_it_is else None)


def _from_spm(data: bytes, files: Mapping[str, bytes], config: "LlamaConfig | None") -> Tokenizer:
    model = read_spm_model(data)
    settings = read_settings(files)
    named = _with_defaults(settings.named, rebuild.CLASSES["LlamaTokenizer"].named)
    backend = rebuild.from_spm_model(model, settings)
    rebuild.add_tokens(backend, settings, named, [*settings.extra_special, *rebuild.spm_added_tokens(model)])
    bos = _content(named, "bos_token") if settings.add_bos_token is not False else None
    rebuild.set_post_processor(backend, bos, _content(named, "eos_token") if settings.add_eos_token else None)
    return _finish(backend, "tokenizer.model", settings, named, config, files, rebuilt="LlamaTokenizer")


def _finish(
    backend: "tokenizers.Tokenizer",
    kind: str,
    settings: Settings,
    named: dict,
    config: "LlamaConfig | None",
    files: Mapping[str, bytes],
    rebuilt: str | None,
) -> Tokenizer:
    import tokenizers

    for part in (backend.normalizer, backend.decoder):
        if part is not None:
            check_growth(json.loads(part.__getstate__()))
    # A prompt is never cut or padded silently, and gives the same ids each time.
    backend.no_truncation()
    backend.no_padding()
    is_bpe = isinstance(backend.model, tokenizers.models.BPE)
    if is_bpe and backend.model.dropout is not None:
        backend.model.dropout = None
    backend.encode_special_tokens = settings.split_special_tokens
    eos_ids = config.eos_token_ids if config is not None else ()
    return Tokenizer(
        backend,
        settings=settings,
        padding_side=settings.padding_side or ("left" if rebuilt in _LLAMA_CLASSES else "right"),
        model_input_names=settings.model_input_names or ["input_ids", "attention_mask"],
        files=files,
        kind=kind,
        bos_id=_id_of(backend, named, "bos_token", config.bos_token_id if config is not None else None),
        eos_id=_id_of(backend, named, "eos_token", eos_ids[0] if eos_ids else None),
        chat_template=settings.chat_template,
        special_tokens={key: token["content"] for key, token in named.items() if token},
        clean_up_spaces=settings.clean_up_spaces and (not is_bpe or settings.clean_up_spaces_for_bpe),
    )


def _json_added_tokens(backend: "tokenizers.Tokenizer") -> list[dict]:
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return [
        {"id": index, **{flag: getattr(token, flag) for flag in flags}}
        for index, token in backend.get_added_tokens_decoder().items()
    ]


def _class_name(settings: Settings, config: "LlamaConfig | None") -> str:
    """The class that transformers would choose, without the "Fast" of older files; "" if nothing says."""
    name: Any = settings.tokenizer_class
    if name is None and config is not None:
        name = config.raw.get("tokenizer_class")
    return name.removesuffix("Fast") if isinstance(name, str) else ""


def _with_defaults(named: dict, defaults: Mapping[str, str]) -> dict:
    """A class's own special tokens where the settings don't name any (null means none)."""
    return {**{key: added_token_fields(key, token) for key, token in defaults.items() if key not in named}, **named}


def _content(named: dict, key: str) -> str | None:
    return named[key]["content"] if named.get(key) else None


def _id_of(backend: "tokenizers.Tokenizer", named: dict, key: str, otherwise: int | None) -> int | None:
    content = _content(named, key)
    index = None if content is None else backend.token_to_id(content)
    return otherwise if index is None else index
