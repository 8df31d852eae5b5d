"""A model that says what it is told: for the code around `generate`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from conftest import byte_tokenizer
from edgellama.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(chat_template: Any = CHATML, *, bos: bool = True, special: tuple[str, ...] = ()):
    """Bytes, <unk> 0, <s> 1, </s> 2 and `special` from 259 on; `bos`: every encoded text begins with <s>."""
    data = json.loads(byte_tokenizer())
    if not bos:
        data["post_processor"] = None
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if special:
        config["additional_special_tokens"] = list(special)
    if chat_template is not None:
        config["chat_template"] = chat_template
    return load_tokenizer(
        {"tokenizer.json": json.dumps(data).encode(), "tokenizer_config.json": json.dumps(config).encode()}
    )


@dataclass
class FakeReply:
    """A Generation."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str = "stop"
    logprobs: list[Any] | None = None
    stop: str | None = None


class FakeStream:
    """A Stream over the reply's text, `size` characters at a time; one token a character."""

    def __init__(self, reply: FakeReply, size: int):
        self._reply, self._size, self._at, self.closed = reply, size, 0, False

    def __iter__(self):
        return self

    def __next__(self) -> str:
        if self._at >= len(self._reply.text):
            raise StopIteration
        piece = self._reply.text[self._at : self._at + self._size]
        self._at += len(piece)
        return piece

    @property
    def result(self) -> FakeReply:
        reply, done = self._reply, self._at >= len(self._reply.text)
        logprobs = None if reply.logprobs is None else reply.logprobs if done else reply.logprobs[: self._at]
        return FakeReply(
            reply.text[: self._at], reply.token_ids, reply.prompt_token_ids,
            reply.finish_reason if done else "cancelled", logprobs, reply.stop if done else None,
        )  # fmt: skip

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeLlm:
    """`says` is every reply; `calls` the arguments that `generate` got."""

    says: str = "Hello"
    tokenizer: Any = field(default_factory=make_tokenizer)
    eos_ids: frozenset[int] = frozenset({2})
    n_ctx: int = 512
    finish_reason: str = "stop"
    stop: str | None = None
    piece: int = 3
    calls: list[dict[str, Any]] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)
    file: Any = field(default_factory=lambda: SimpleNamespace(path=Path("models/fake.edgellama")))

    def generate(self, prompt, max_new_tokens=None, *, stream=False, **options):
        self.calls.append({"prompt": prompt, "max_new_tokens": max_new_tokens, "stream": stream, **options})
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        new = self.tokenizer.encode(self.says, add_special_tokens=False)
        ended = self.finish_reason == "stop" and self.stop is None
        logprobs = None
        if options.get("logprobs"):
            logprobs = [_logprob(letter, i, options["top_logprobs"]) for i, letter in enumerate(self.says)]
            logprobs += [_logprob("", 99, 0)] * ended
        text = (prompt if options.get("echo") else "") + self.says
        reply = FakeReply(text, new + [2] * ended, ids, self.finish_reason, logprobs, self.stop)
        if not stream:
            return reply
        self.streams.append(FakeStream(reply, self.piece))
        return self.streams[-1]

    def embed(self, texts):
        return np.arange(2 * len(texts), dtype=np.float32).reshape(-1, 2)


def _logprob(text: str, i: int, n_top: int):
    return SimpleNamespace(
        token_id=i, text=text, logprob=-float(i), top=[(k, f"t{k}", -float(k)) for k in range(n_top)]
    )
