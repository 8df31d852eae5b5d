"""A model without weights: the next token is always the last one plus one. For the code around a backend.

Ids: 0 <s>, 1 </s>, 2.. the letters a..z, then 28 half a "é" (its first byte) and 29 the other half.
"""

import codecs
import threading
from pathlib import Path

import numpy as np

from edgellama.config import LlamaConfig
from edgellama.errors import CancelledError
from edgellama.model import Llama

VOCAB = 30
LETTERS = {2 + index: bytes([97 + index]) for index in range(26)} | {28: b"\xc3", 29: b"\xa9"}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 64,
}


class FakeFile:
    """What `Llama` needs of a ModelFile."""

    path = Path("fake.edgellama")
    size = 1000

    def __init__(self, files=None, **config):
        self.config = LlamaConfig.from_dict({**CONFIG, **config})
        self.files = files or {}
        self.closed = False

    def close(self):
        self.closed = True


class FakeBackend:
    """Logits 10 for (token + 1) % VOCAB, else 0; `script` overrides the next tokens. Records every call."""

    batch_invariant = True

    def __init__(self, n_ctx=64, script=(), delay=0.0, n_slots=1):
        self.n_ctx, self.n_slots = n_ctx, n_slots
        self.script = list(script)
        self.delay = delay
        self.calls = []
        self.closed = False
        self._busy = threading.Lock()
        self._cancelled = threading.Event()

    def forward(self, tokens, positions, slots, rows):
        assert self._busy.acquire(blocking=False), "two threads in one backend"
        try:
            assert {each.dtype for each in (tokens, positions, slots, rows)} == {np.dtype(np.int32)}
            assert not self.closed
            self.calls.append((tokens.tolist(), positions.tolist(), slots.tolist(), rows.tolist()))
            self._cancelled.wait(self.delay)
            if self._cancelled.is_set():
                self._cancelled.clear()
                raise CancelledError("cancelled")
            logits = np.zeros((len(rows), VOCAB), np.float32)
            logits[np.arange(len(rows)), (tokens[rows] + 1) % VOCAB] = 10
            if self.script and len(rows):
                logits[-1] = 0
                logits[-1, self.script.pop(0)] = 10
            return logits
        finally:
            self._busy.release()

    def cancel(self):
        self._cancelled.set()

    def close(self):
        self.closed = True


class FakeTokenizer:
    """Letters only; a decoder that holds back half characters."""

    def encode(self, text, add_special_tokens=True):
        return ([0] if add_special_tokens else []) + [ord(letter) - 95 for letter in text]

    def decode(self, ids, skip_special_tokens=False):
        return b"".join(LETTERS.get(each, b"") for each in ids).decode(errors="replace")

    def stream(self, skip_special_tokens=False, after=()):
        return FakeDecoder()


class FakeDecoder:
    def __init__(self):
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id):
        return self._utf8.decode(LETTERS.get(token_id, b""))

    def flush(self):
        return self._utf8.decode(b"", final=True)


def fake_llama(script=(), *, n_ctx=64, delay=0.0, n_slots=1, files=None, **config):
    """A Llama over fakes; `.backend` is the FakeBackend."""
    backend = FakeBackend(n_ctx, script, delay, n_slots)
    llm = Llama(FakeFile(files, **config), backend)
    llm._tokenizer = FakeTokenizer()
    llm.backend = backend
    return llm
