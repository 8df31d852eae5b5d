"""Reads the small files beside a tokenizer: tokenizer_config.json, special_tokens_map.json, added_tokens.json, the chat
template. The rules of precedence are those of transformers 5 (`PreTrainedTokenizerBase._from_pretrained`).

Knows nothing of the `tokenizers` library: an added token is a plain dict of its fields here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgellama.errors import TokenizerError
from edgellama.tokenizer.guard import refusing

MAX_FILE_BYTES = 64 << 20
"""Largest tokenizer.json or tokenizer.model accepted, in bytes (the largest in the wild is some 35 MB)."""
MAX_SMALL_FILE_BYTES = 8 << 20
"""Largest of the files beside them (Llama-3's tokenizer_config.json has 55 kB)."""

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

AddedTokenFields = dict[str, object]
"""`content` and those of `single_word lstrip rstrip normalized special` that a file states."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass
class Settings:
    """What the small files say. None: not stated (a class's own default then holds)."""

    tokenizer_class: str | None = None
    legacy: bool | None = None
    add_prefix_space: bool | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    split_special_tokens: bool = False
    clean_up_spaces: bool = False  # wished for; honoured only where transformers does
    clean_up_spaces_for_bpe: bool = False
    named: dict[str, AddedTokenFields | None] = field(default_factory=dict)  # bos_token etc.; None: explicitly none
    extra_special: list[AddedTokenFields] = field(default_factory=list)
    added: dict[int, AddedTokenFields] = field(default_factory=dict)  # id as stated -> token
    chat_template: str | dict[str, str] | None = None
    padding_side: str | None = None
    truncation_side: str | None = None
    model_max_length: int | None = None
    model_input_names: list[str] | None = None
    use_default_system_prompt: bool = False


def checked_bytes(files: Mapping[str, bytes], name: str) -> bytes | None:
    """The file's bytes, or None if there is no such file; TokenizerError if it is too large."""
    data = files.get(name)
    limit = MAX_FILE_BYTES if name in ("tokenizer.json", "tokenizer.model") else MAX_SMALL_FILE_BYTES
    if data is not None and len(data) > limit:
        raise TokenizerError(f"{name}: {len(data)} bytes; at most {limit} are accepted")
    return None if data is None else bytes(data)


def parse_json_object(name: str, data: bytes) -> dict:
    """The JSON object in `data` (UTF-8); TokenizerError naming the file otherwise.

    Not `format.strict_json`: checkpoints really hold what that refuses (`model_max_length` of 10**30, 300,000 values).
    """
    with refusing(f"{name}: not valid JSON"):
        try:
            value = json.loads(data.decode("utf-8"))
        except RecursionError:
            raise TokenizerError(f"{name}: JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{name}: must be a JSON object, got {type(value).__name__}")
    return value


def added_token_fields(where: str, value: object, **defaults: bool) -> AddedTokenFields:
    """A token as any of these files spells it: a string or an object with `content` and flags."""
    if isinstance(value, str):
        return {"content": value, **defaults}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise TokenizerError(f"{where}: a token must be a string or an object with a string `content`")
    fields: AddedTokenFields = {"content": value["content"], **defaults}
    for flag in _FLAGS:
        if flag in value and flag not in defaults:
            if not isinstance(value[flag], bool):
                raise TokenizerError(f"{where}.{flag}: must be true or false, got {value[flag]!r:.80}")
            fields[flag] = value[flag]
    return fields


def read_settings(files: Mapping[str, bytes], tokenizer_json_tokens: list | None = None) -> Settings:
    """The settings in `files`. `tokenizer_json_tokens`: the `added_tokens` of tokenizer.json, if there is one."""
    name = "tokenizer_config.json"
    data = checked_bytes(files, name)
    raw = {} if data is None else parse_json_object(name, data)
    settings = Settings(
        tokenizer_class=_optional(name, raw, "tokenizer_class", str),
        legacy=_optional(name, raw, "legacy", bool),
        add_prefix_space=_optional(name, raw, "add_prefix_space", bool),
        add_bos_token=_optional(name, raw, "add_bos_token", bool),
        add_eos_token=_optional(name, raw, "add_eos_token", bool),
        split_special_tokens=bool(_optional(name, raw, "split_special_tokens", bool)),
        clean_up_spaces=bool(_optional(name, raw, "clean_up_tokenization_spaces", bool)),
        clean_up_spaces_for_bpe=bool(
            _optional(name, raw, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", bool)
        ),
        chat_template=_chat_template(files, raw),
        padding_side=_side(name, raw, "padding_side"),
        truncation_side=_side(name, raw, "truncation_side"),
        model_max_length=_length(name, raw),
        model_input_names=_names(name, raw, "model_input_names"),
        use_default_system_prompt=bool(_optional(name, raw, "use_default_system_prompt", bool)),
    )
    _read_special(settings, name, raw)
    decoder = raw.get("added_tokens_decoder")
    if decoder is not None:
        if not isinstance(decoder, dict):
            raise TokenizerError(f"{name}: added_tokens_decoder must be an object")
        for key, value in decoder.items():
            where = f"{name}: added_tokens_decoder[{key[:20]!r}]"
            if not isinstance(value, dict):
                raise TokenizerError(f"{where}: must be an object")
            settings.added[_token_id(where, key)] = added_token_fields(where, value)
    else:
        _read_older_files(settings, files, tokenizer_json_tokens or [])
    by_content = {token["content"]: token for token in settings.added.values()}
    for key, token in settings.named.items():
        if token is not None:
            settings.named[key] = by_content.get(token["content"], token)
    return settings


def _read_older_files(settings: Settings, files: Mapping[str, bytes], tokenizer_json_tokens: list) -> None:
    """special_tokens_map.json and added_tokens.json: read only if tokenizer_config.json has no added_tokens_decoder."""
    name = "special_tokens_map.json"
    data = checked_bytes(files, name)
    if data is not None:
        _read_special(settings, name, parse_json_object(name, data))
    name = "added_tokens.json"
    data = checked_bytes(files, name)
    if data is not None:
        special = {token["content"] for token in settings.named.values() if token is not None}
        special.update(token["content"] for token in settings.extra_special)
        for content, index in parse_json_object(name, data).items():
            is_special = content in special
            settings.added[_token_id(f"{name}: {content[:40]!r}", index)] = {
                "content": content,
                "normalized": not is_special,
                "special": is_special,
            }
    for position, value in enumerate(tokenizer_json_tokens):
        where = f"tokenizer.json: added_tokens[{position}]"
        if not isinstance(value, dict):
            raise TokenizerError(f"{where}: must be an object")
        settings.added[_token_id(where, value.get("id"))] = added_token_fields(where, value)


def _read_special(settings: Settings, name: str, raw: dict) -> None:
    """Named special tokens (`bos_token`, and any other `..._token` that is one) and the unnamed ones."""
    for key, value in raw.items():
        if key in NAMED_TOKENS and value is None:
            if name == "tokenizer_config.json":
                settings.named[key] = None
        elif key in NAMED_TOKENS or (key.endswith("_token") and isinstance(value, str)):
            if isinstance(value, dict) and name != "tokenizer_config.json":
                settings.named[key] = added_token_fields(f"{name}: {key}", value, special=True)
            else:
                settings.named[key] = added_token_fields(f"{name}: {key}", value)
    for key, value in (_optional(name, raw, "model_specific_special_tokens", dict) or {}).items():
        settings.named.setdefault(
            key, added_token_fields(f"{name}: model_specific_special_tokens[{key[:40]!r}]", value)
        )
    extra = raw.get("extra_special_tokens") or raw.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        for key, value in extra.items():
            settings.named[key] = added_token_fields(f"{name}: extra_special_tokens[{key[:40]!r}]", value)
    elif isinstance(extra, list):
        known = {token["content"] for token in settings.extra_special}
        for value in extra:
            token = added_token_fields(f"{name}: additional_special_tokens", value)
            if token["content"] not in known:
                settings.extra_special.append(token)
    else:
        raise TokenizerError(f"{name}: additional_special_tokens must be a list")


def _token_id(where: str, value: object) -> int:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 10:
        return int(text)
    raise TokenizerError(f"{where}: {value!r:.40} is not a token id")


def _optional(name: str, raw: dict, key: str, kind: type):
    value = raw.get(key)
    if value is not None and not isinstance(value, kind):
        raise TokenizerError(f"{name}: {key} must be {kind.__name__}, got {value!r:.80}")
    return value


def _side(name: str, raw: dict, key: str) -> str | None:
    side = raw.get(key)
    if side not in (None, "left", "right"):
        raise TokenizerError(f"{name}: {key} must be left or right, got {side!r:.80}")
    return side


def _length(name: str, raw: dict) -> int | None:
    """A whole number; 1e30 is how transformers writes "nobody said"."""
    value = raw.get("model_max_length", raw.get("max_len"))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e40:
        raise TokenizerError(f"{name}: model_max_length must be a positive number, got {value!r:.80}")
    return int(value)


def _names(name: str, raw: dict, key: str) -> list[str] | None:
    value = _optional(name, raw, key, list)
    if value is not None and not all(isinstance(each, str) for each in value):
        raise TokenizerError(f"{name}: {key} must be a list of names")
    return value


def _chat_template(files: Mapping[str, bytes], raw: dict) -> str | dict[str, str] | None:
    """chat_template.jinja, else tokenizer_config.json's: one template, or several by name."""
    data = checked_bytes(files, "chat_template.jinja")
    if data is not None:
        with refusing("chat_template.jinja: not UTF-8"):
            # As a file opened in text mode would read it.
            return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    value = raw.get("chat_template")
    if value is None or isinstance(value, str):
        return value
    pairs: list[tuple] | None = list(value.items()) if isinstance(value, dict) else None
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        pairs = [(item.get("name"), item.get("template")) for item in value]
    if pairs is None or not all(isinstance(key, str) and isinstance(text, str) for key, text in pairs):
        raise TokenizerError("tokenizer_config.json: chat_template must be a string or a list of {name, template}")
    return dict(pairs)
