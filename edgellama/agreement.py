"""Whether two devices compute the same model: the same tokens on both, and how far their next-token distributions are.

Half of each text goes through in one call, the rest token by token, so prefill and decode are both compared, at every
position. Knows devices by name and a file. Does not know how the outcome is shown (`cli.verify`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellama import devices
from edgellama.errors import ContextError
from edgellama.format import has_tokenizer

if TYPE_CHECKING:
    from edgellama.backends import Backend
    from edgellama.format import ModelFile

MAX_KL = 0.003
"""Mean divergence of two devices in nats a token: int4 itself costs 0.06 to 0.4, 16-bit activations 0.0001."""
MIN_GREEDY_AGREEMENT = 0.97
TIE_MARGIN = 2 * math.sqrt(2) * math.sqrt(2 * MAX_KL)
"""A divergence of d comes of errors of some sqrt(2 d) in each logit; two tokens closer than two of them are a tie."""
MAX_TOKENS = 128
TEXTS = (
    "The capital of France is Paris. It lies on the river Seine, and about two million people live there. Many of them "
    "take the train to work; others go by bicycle. In winter it rains often.",
    "Once upon a time there was a little girl who wanted to know how far the sea was. She asked her grandmother, who "
    "laughed and said: walk until the road ends, and then listen.",
    "def mean(values):\n    total = 0\n    for each in values:\n        total += each\n    return total / len(values)",
)


@dataclass(frozen=True)
class Agreement:
    """`kl`: mean KL(first || second), nats a token. `greedy`: share of positions whose likeliest token is the same."""

    first: str
    second: str
    tokens: int
    kl: float
    greedy: float
    first_s: float
    second_s: float

    @property
    def passed(self) -> bool:
        return self.kl <= MAX_KL and self.greedy >= MIN_GREEDY_AGREEMENT  # a NaN fails

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "max_kl": MAX_KL, "min_greedy": MIN_GREEDY_AGREEMENT, "passed": self.passed}


def compare(
    file: ModelFile,
    first: str,
    second: str,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    n_threads: int | None = None,
    kv_cache: str = "float16",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Agreement:
    """Run `prompts` (lists of ids; None: `default_prompts`) on both devices; `progress` is told tokens."""
    prompts = default_prompts(file) if prompts is None else [list(each) for each in prompts]
    longest = max(map(len, prompts))
    if longest > file.config.max_position_embeddings:
        raise ContextError(f"{longest} tokens do not fit into the model's {file.config.max_position_embeddings}")
    names = [devices.resolve(name, "float16" if name == "reference" else kv_cache) for name in (first, second)]
    total = 2 * sum(map(len, prompts))
    outcomes, seconds, done = [], [], 0
    for name in names:  # one after the other: two large models need not fit at once
        begun = time.perf_counter()
        backend = devices.make_backend(name, file, longest, 1, n_threads, kv_cache)
        logits = []
        try:
            for prompt in prompts:
                logits.append(_logits(backend, np.array(prompt, np.int32)))
                done += len(prompt)
                progress(done, total)
        finally:
            backend.close()
        outcomes.append(np.concatenate(logits))
        seconds.append(time.perf_counter() - begun)
    expected, got = outcomes
    return Agreement(names[0], names[1], len(got), _kl(expected, got), _greedy(expected, got), *seconds)


def default_prompts(file: ModelFile) -> list[list[int]]:
    """`TEXTS` as the model's own ids; random ids for a model without tokenizer."""
    limit = min(MAX_TOKENS, file.config.max_position_embeddings)
    if has_tokenizer(file.files):
        from edgellama.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(file.files, file.config)
        return [tokenizer.encode(text, add_special_tokens=True)[:limit] for text in TEXTS]
    rng = np.random.default_rng(0)
    return [rng.integers(0, file.config.vocab_size, min(limit, 48)).tolist() for _ in TEXTS]


def _logits(backend: Backend, tokens: np.ndarray) -> np.ndarray:
    """float32 [T, vocab_size]: the first half in one call, then token by token."""
    n, half, zero = len(tokens), (len(tokens) + 1) // 2, np.zeros(1, np.int32)
    places = np.arange(n, dtype=np.int32)
    parts = [backend.forward(tokens[:half], places[:half], np.zeros(half, np.int32), places[:half])]
    parts += [backend.forward(tokens[i : i + 1], places[i : i + 1], zero, zero) for i in range(half, n)]
    return np.concatenate(parts)


def _kl(expected: np.ndarray, got: np.ndarray) -> float:
    log_p, log_q = _log_softmax(expected), _log_softmax(got)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())


def _greedy(expected: np.ndarray, got: np.ndarray) -> float:
    chosen = np.take_along_axis(expected, got.argmax(axis=-1)[:, None], axis=-1)[:, 0]
    return float((expected.max(axis=-1) - chosen <= TIE_MARGIN).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
