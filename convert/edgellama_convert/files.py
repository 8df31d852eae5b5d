"""What lies beside the weights in a source's folder: the config and the tokenizer's files, read and understood."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellama.config import LlamaConfig
from edgellama.errors import TokenizerError
from edgellama.format import FILE_NAMES, has_tokenizer

from .checkpoint import read_small
from .resources import MIB
from .siblings import MAX_CONFIG_BYTES, read_raw_config, to_llama
from .source import CONFIG_FILE

MAX_FILE_BYTES = 32 * MIB
"""Of each tokenizer file; Llama-3's tokenizer.json has 9 MB."""


def read_config(folder: Path) -> tuple[dict[str, Any], LlamaConfig]:
    """config.json, verbatim or translated to a Llama's (`siblings`), and understood."""
    raw = to_llama(read_raw_config(folder))
    return raw, LlamaConfig.from_dict(raw)


def read_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer, chat template and generation defaults of the folder, verbatim."""
    return {name: read_small(folder / name, MAX_FILE_BYTES) for name in FILE_NAMES if (folder / name).exists()}


def check_tokenizer(files: Mapping[str, bytes], config: LlamaConfig) -> list[str]:
    """Load the tokenizer once, so that a damaged one is refused now (TokenizerError); warnings otherwise."""
    from edgellama.tokenizer import load_tokenizer

    if not has_tokenizer(files):
        return ["the source has no tokenizer.json or tokenizer.model: the model will take and give token ids only"]
    try:
        tokenizer = load_tokenizer(files, config)
        tokenizer.decode(tokenizer.encode("Hello"))
    except TokenizerError as error:
        raise TokenizerError(f"the source's tokenizer cannot be used: {error}") from None
    if tokenizer.vocab_size > config.vocab_size:
        return [
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: "
            "the last ones cannot be used"
        ]
    return []


def with_config(folder: Path, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """`files` and config.json, verbatim: what a conversion is made from besides weights."""
    return {CONFIG_FILE: read_small(folder / CONFIG_FILE, MAX_CONFIG_BYTES), **files}
