"""Golden vectors: what a model must answer, stored in its file when it is made, checked on any device ever after.

Token ids of awkward texts and one rendered chat, which must be equal; and next-token distributions after a short
prompt, computed in float32 from the stored weights, which a device must come close to. A tokenizer library that
changed, a template run differently, a kernel that is wrong on this machine: `verify` tells them apart from a damaged
file.

Distributions are kept as the TOP likeliest ids with their log-probabilities. What is compared is the KL divergence with
all other ids taken together as one, which is at most the divergence of the whole distributions; so a bar for that one
is a bar for this one.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import xxhash

from edgellama.chat import checked_messages, repeatable_text
from edgellama.errors import EdgellamaError, FormatError, TokenizerError
from edgellama.logprob import log_softmax

if TYPE_CHECKING:
    from edgellama.config import LlamaConfig
    from edgellama.model import Llama
    from edgellama.tokenizer import Tokenizer

MAX_KL = 0.01
"""Nats, mean over the prompt's last ROWS tokens, of a device with rounded activations and a rounded cache. 8-bit
activations cost 0.0013 to 0.0023 on average (15 bits: nothing that can be measured), and the bar for whole texts is
0.003; a mean over only 16 tokens, whose divergences spread about twice as wide as they are large, stays within thrice
that. A wrong kernel gives 0.1 and more."""
MAX_KL_EXACT = 1e-6
"""Of the float32 reference: rounding alone moves logits by some 3e-4 at most, which is 5e-8 nats."""

TOP = 16
ROWS = 16
_PROMPT_TOKENS = 24
_STEPS = 8  # the last tokens go one by one, as in decoding
_DIGITS = 6
_LEAST_REST = 1e-6  # of the other ids' probability: below, it is the rounding of the stored digits

TEXTS = (
    "Hello, world!",
    " leading space, trailing space ",
    "  two   three    spaces\t\ttabs\n\nlines\r\nend",
    "don't we'll I'm THEY'VE",
    "0123456789 3.14159 1,000,000 1e-9 2026-11-24",
    "snake_case camelCase kebab-case https://example.org/a?b=c&d=%20#e",
    "def f(x):\n    return x ** 2  # square\n",
    "naïve café Ångström Straße ŒUVRE ĳ",
    "e\u0301 n\u0303 a\u030a (combining) \u00e9 \u00f1 \u00e5 (composed)",
    "Привет, мир! Γειά σου Κόσμε",
    "你好，世界。日本語のテキスト 한국어",
    "שלום עולם مرحبا بالعالم",
    "नमस्ते दुनिया ไทย",
    "😀 👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "\u200bzero\u200dwidth\ufeff \u00a0nbsp \u2028separator",
    "\x00\x01\x1b[0m\x7f",
    "<s> </s> <unk> <|im_start|> <|endoftext|> [INST]",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "....---___***!!!???",
    "\n",
    "",
)
"""What tokenizers are known to differ on."""

MESSAGES = (
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "  And of Peru? "},
)
_PROMPT = (
    "The first snow fell in the night, and in the morning the whole street was quiet. Two children pulled a sledge up"
)

Golden = dict[str, Any]


def prompt_ids(config: LlamaConfig, tokenizer: Tokenizer | None) -> np.ndarray:
    """int32 [up to 24]: the ids to run; without a tokenizer, or with one that does not fit, ids spread over the
    vocabulary."""
    ids = [] if tokenizer is None else tokenizer.encode(_PROMPT)[:_PROMPT_TOKENS]
    if not ids or max(ids) >= config.vocab_size:
        ids = [(7 + 7919 * i) % config.vocab_size for i in range(_PROMPT_TOKENS)]
    return np.array(ids[: config.max_position_embeddings], np.int32)


def prompt_rows(n_tokens: int) -> int:
    """After how many of a prompt's last tokens the distribution is kept."""
    return min(ROWS, n_tokens)


def make(prompt: np.ndarray, logits: np.ndarray, tokenizer: Tokenizer | None) -> Golden:
    """What is to be stored: plain JSON. `logits` float32 [rows, vocab_size] after the prompt's last tokens."""
    logprobs = log_softmax(logits)
    ranks = np.argsort(-logits, axis=1, kind="stable")[:, :TOP]
    golden: Golden = {
        "prompt": prompt.tolist(),
        "top": ranks.tolist(),
        "logprobs": np.round(np.take_along_axis(logprobs, ranks, axis=1), _DIGITS).tolist(),
    }
    if tokenizer is not None:
        golden["texts"] = []
        for text in TEXTS:
            with contextlib.suppress(TokenizerError):  # it is refused by this tokenizer's own parts
                golden["texts"].append({"text": text, "ids": tokenizer.encode(text)})
        rendered = repeatable_text(tokenizer, MESSAGES, add_generation_prompt=True)
        if rendered is not None:
            messages = [dict(message) for message in MESSAGES]
            golden["chat"] = {"template": _template_hash(tokenizer), "messages": messages, "text": rendered}
    return golden


def _template_hash(tokenizer: Tokenizer) -> str:
    parts = [tokenizer.chat_template, dict(tokenizer.special_tokens)]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


@dataclass(frozen=True)
class Checked:
    """What was equal (numbers of texts and chats), and how close the device came: `kl` is at most `max_kl`."""

    texts: int
    chats: int
    kl: float
    max_kl: float
    rows: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def stored(receipt: Mapping[str, Any] | None) -> Golden | None:
    """The golden vectors of a file's receipt, if it has any."""
    golden = (receipt or {}).get("golden")
    return golden if isinstance(golden, dict) else None


def needed_ctx(golden: Golden) -> int:
    """Positions that `check` needs. FormatError if the vectors are none."""
    return max(1, len(_ids(golden, "prompt", 1 << 31, 4096)))


def check(llm: Llama, exact: bool = False) -> Checked:
    """Check a loaded model against its own file's golden vectors; `exact` for the float32 reference.

    EdgellamaError says what differs; FormatError: the stored vectors are none. The model's cache is emptied.
    """
    golden = stored(llm.file.receipt)
    if golden is None:
        raise EdgellamaError(f"{llm.file.path}: no golden vectors are stored in it; convert the model again")
    texts, chats = _check_tokenizer(llm, golden)
    prompt = np.array(_ids(golden, "prompt", llm.config.vocab_size, 4096), np.int32)
    top, logprobs = _distributions(golden, llm.config.vocab_size)
    if not 0 < len(top) <= len(prompt):
        _refuse("top", f"{len(top)} rows for a prompt of {len(prompt)} tokens")
    steps = min(_STEPS, len(prompt) - 1)
    llm.reset()
    logits = [llm.forward(prompt[: len(prompt) - steps])]
    logits += [llm.forward(prompt[i : i + 1]) for i in range(len(prompt) - steps, len(prompt))]
    llm.reset()
    ours = np.take_along_axis(log_softmax(np.concatenate(logits)[-len(top) :]), top, axis=1)
    kl = float(coarse_kl(logprobs, ours).mean())
    limit = MAX_KL_EXACT if exact else MAX_KL
    if not kl <= limit:
        raise EdgellamaError(
            f"{llm.file.path}: the file is whole, but this device computes other logits than when it was converted: "
            f"KL divergence {kl:.2g}, at most {limit:g} is right; please report it, with `edgellama --version`"
        )
    return Checked(texts, chats, kl, limit, len(top))


def coarse_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """float64 [R]: KL divergence in nats of distributions given as log-probabilities [R, TOP] of the same ids, all
    other ids being one."""
    rest_p, rest_q = (np.maximum(1 - np.exp(each).sum(axis=1), _LEAST_REST) for each in (p, q))
    return np.maximum((np.exp(p) * (p - q)).sum(axis=1) + rest_p * np.log(rest_p / rest_q), 0.0)


def _check_tokenizer(llm: Llama, golden: Golden) -> tuple[int, int]:
    texts = golden.get("texts", [])
    if not isinstance(texts, list):
        _refuse("texts", "must be a list")
    for i, item in enumerate(texts):
        text = _member(item, "text", f"texts[{i}]")
        ids = llm.tokenizer.encode(text)
        if ids != _member(item, "ids", f"texts[{i}]", list):
            raise EdgellamaError(
                f"{llm.file.path}: the file is whole, but {text!a} becomes other token ids than when it was converted: "
                "this version of `tokenizers` reads the model's tokenizer differently; install another one"
            )
    chat = golden.get("chat")
    if chat is None:
        return len(texts), 0
    if _member(chat, "template", "chat") != _template_hash(llm.tokenizer):
        return len(texts), 0  # the template was edited since
    try:
        messages = checked_messages(_member(chat, "messages", "chat", list))
    except (TypeError, ValueError) as error:
        _refuse("chat", f"has messages that are none: {error}")
    if repeatable_text(llm.tokenizer, messages, add_generation_prompt=True) != _member(chat, "text", "chat"):
        raise EdgellamaError(
            f"{llm.file.path}: the file is whole, but its chat template gives another text than when it was converted: "
            "this version of jinja2 or of edgellama runs it differently; please report it"
        )
    return len(texts), 1


def _distributions(golden: Golden, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64 [rows, n], their log-probabilities float64 [rows, n])"""
    top, logprobs = golden.get("top"), golden.get("logprobs")
    if not isinstance(top, list) or not isinstance(logprobs, list) or len(top) != len(logprobs):
        _refuse("top", "and logprobs must be lists of the same length")
    rows = [_ids({"top": row}, "top", vocab_size, 4096) for row in top]
    if len({len(row) for row in rows}) != 1 or any(len(set(row)) != len(row) for row in rows):
        _refuse("top", "must hold rows of equal length, each id once")
    for row in logprobs:
        if not isinstance(row, list) or len(row) != len(rows[0]) or not all(_is_logprob(value) for value in row):
            _refuse("logprobs", "must hold a number of at most 0 for each id")
    return np.array(rows, np.int64), np.array(logprobs, np.float64)


def _is_logprob(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value <= 0


def _ids(golden: Golden, key: str, limit: int, most: int) -> list[int]:
    ids = golden.get(key)
    if not isinstance(ids, list) or not 0 < len(ids) <= most or not all(type(i) is int and 0 <= i < limit for i in ids):
        _refuse(key, "must be a list of token ids")
    return ids


def _member(item: object, key: str, where: str, kind: type = str) -> Any:
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, kind):
        _refuse(where, f"must have {key!r}, a {kind.__name__}")
    return value


def _refuse(field: str, problem: str) -> NoReturn:
    raise FormatError(f"receipt.golden.{field}", None, problem)
