"""A model without weights: the next token is always the last one plus one. For the code around a backend.

Ids: 0 <s>, 1 </s>, 2.. the letters a..z, then 28 half a "é" (its first byte) and 29 the other half.
"""

import codecs
import hashlib
import threading
from pathlib import Path

import numpy as np

from edgellama.config import LlamaConfig
from edgellama.errors import CancelledError
from edgellama.model import Llama
from edgellama.rope import length_class

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


class HashBackend:
    """Logits depend on every token before, on where each lies and on the length of the call that wrote it.

    So whatever is reused, copied or left over wrongly shows: a position's "key" is a hash of its own content and the
    position before. Asserts that nothing is read that was not written. Records the tokens of each call.
    """

    batch_invariant = True

    def __init__(self, config, n_ctx=64, n_slots=3):
        self.config, self.n_ctx, self.n_slots = config, n_ctx, n_slots
        self.keys = [[None] * n_ctx for _ in range(n_slots)]
        self.calls, self.copies = [], []
        self.fail_after = None  # so many tokens have been written: a MemoryError

    def forward(self, tokens, positions, slots, rows):
        self.calls.append(list(zip(slots.tolist(), positions.tolist(), tokens.tolist(), strict=True)))
        length = {slot: 1 + max(at for s, at, _ in self.calls[-1] if s == slot) for slot in slots.tolist()}
        made = []
        for slot, at, token in self.calls[-1]:
            if len(made) == self.fail_after:
                raise MemoryError
            before = self.keys[slot][at - 1] if at else ""
            assert before is not None, "reads what nobody wrote"
            text = f"{before} {at} {token} {length_class(self.config, length[slot])}"
            self.keys[slot][at] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
            made.append(self.keys[slot][at])
        logits = [np.random.default_rng(int(made[row], 16)).normal(size=VOCAB) for row in rows]
        return np.array(logits, np.float32).reshape(-1, VOCAB)

    def copy_slot(self, source, target, n, start=0):
        self.copies.append((source, target, n))
        assert None not in self.keys[source][:n]
        self.keys[target][start:n] = self.keys[source][start:n]

    def close(self):
        pass


class FakeTokenizer:
    """Letters only; a decoder that holds back half characters."""

    chat_template = None

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


def hash_llama(*, n_ctx=64, n_slots=3, prefix_reuse=None, **config):
    """A Llama over a HashBackend, `.backend`; it has 30 tokens, of which 1 ends a text."""
    file = FakeFile(**config)
    backend = HashBackend(file.config, n_ctx, n_slots)
    llm = Llama(file, backend, prefix_reuse=prefix_reuse)
    llm._tokenizer = FakeTokenizer()
    llm.backend = backend
    return llm
