"""`Constraint`: which tokens may come next, by llguidance. One sequence each; forks and rollbacks are cheap."""

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellama.constraint.sources import Source, lark_grammar
from edgellama.errors import ConstraintError

if TYPE_CHECKING:
    from edgellama.tokenizer import Tokenizer

_SHOWN = 200  # characters of a message

# A byte of llguidance's mask -> for its eight tokens inf (allowed) or -inf: the mask is then a minimum.
_LIMITS = np.where((np.arange(256)[:, None] >> np.arange(8)) & 1, np.inf, -np.inf).astype(np.float32)

_tokenizers: weakref.WeakKeyDictionary["Tokenizer", dict[tuple, Any]] = weakref.WeakKeyDictionary()
_tokenizers_lock = threading.Lock()


def make_constraint(
    tokenizer: "Tokenizer",
    eos_ids: Iterable[int],
    vocab_size: int,
    *,
    json_schema: Source = None,
    regex: str | None = None,
    choice: Iterable[str] | None = None,
    grammar: str | None = None,
) -> "Constraint":
    """The constraint that a reply must satisfy; exactly one of the four is given.

    `json_schema`: a dict, its JSON text, True for any JSON, or a class with `model_json_schema` (pydantic). `regex`
    must match the whole reply; the syntax is Rust's (no look-around, no back-references). `choice`: the reply is one of
    these strings. `grammar`: GBNF (`root ::= ...`) or llguidance's variant of Lark (`start: ...`). `eos_ids` end the
    reply where the constraint lets it end; without any the caller looks at `finished`. `vocab_size`: of the model.

    Preparing a tokenizer takes 0.5 s for 128,000 tokens, once. Raises ConstraintError for what cannot be used, and
    where llguidance is not installed; TypeError, ValueError for a caller's mistake.
    """
    given = {"json_schema": json_schema, "regex": regex, "choice": choice, "grammar": grammar}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give one of json_schema, regex, choice and grammar, got {' and '.join(given) or 'none'}")
    ((name, value),) = given.items()
    llguidance = _llguidance()
    source = lark_grammar(name, value)
    eos = frozenset(int(index) for index in eos_ids if 0 <= index < vocab_size)
    matcher = llguidance.LLMatcher(_prepared(llguidance, tokenizer, eos, vocab_size), source, log_level=0)
    constraint = Constraint(matcher, name, eos, vocab_size)
    constraint.check()
    constraint.mask(np.zeros(vocab_size, np.float32))  # some mistakes show only here
    return constraint


class Constraint:
    """Where one reply stands in its grammar. `finished`: it is complete and nothing but its end can follow."""

    def __init__(self, matcher: Any, name: str, eos_ids: frozenset[int], vocab_size: int):
        """`matcher`: an llguidance LLMatcher; `name`: what the user gave, for messages."""
        self._matcher, self._name, self._eos, self._vocab_size = matcher, name, eos_ids, vocab_size
        self._accepted = 0
        self._ends = 0  # of those, end-of-text tokens after the end, which llguidance does not count
        self._bits = np.zeros((vocab_size + 1 + 31) // 32, np.uint32)  # one token more: see `_prepared`

    def check(self) -> None:
        """ConstraintError if the grammar is broken, or ran into llguidance's limits."""
        matcher = self._matcher
        if matcher.is_error():
            message = _one_line(matcher.get_error())
            if message == "NoExtensionBias":
                message = "no text that has tokens in this vocabulary can satisfy it"
            raise ConstraintError(f"{self._name}: {message}")

    def mask(self, logits: np.ndarray) -> None:
        """-inf, in place, for every token that must not come next. `logits` float32 [vocab_size]."""
        if logits.shape != (self._vocab_size,):
            raise ValueError(f"the constraint is for {self._vocab_size} logits, got shape {logits.shape}")
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self.check()
        limits = _LIMITS.take(self._bits.view(np.uint8), axis=0).reshape(-1)
        np.minimum(logits, limits[: logits.size], out=logits)

    def accept(self, token_id: int) -> None:
        """The token comes next. ConstraintError, and nothing changes, if it must not."""
        known = 0 <= token_id < self._vocab_size  # another id would break the matcher for good
        if not known or not self._matcher.try_consume_tokens([int(token_id)]):
            self.check()
            if not (self.finished and not self._ends and token_id in self._eos):
                raise ConstraintError(f"{self._name}: token {token_id} cannot come here")
            self._ends = 1
        self._accepted += 1

    def rollback(self, n: int) -> None:
        """Takes the last n accepted tokens back."""
        if not 0 <= n <= self._accepted:
            raise ValueError(f"cannot take {n} tokens back, {self._accepted} were accepted")
        self._accepted -= n
        if n and self._ends:
            n, self._ends = n - 1, 0
        if n:
            self._matcher.rollback(n)
            self.check()

    def fork(self) -> "Constraint":
        """An independent copy."""
        twin = Constraint(self._matcher.deep_copy(), self._name, self._eos, self._vocab_size)
        twin._accepted, twin._ends = self._accepted, self._ends
        return twin

    @property
    def accepting(self) -> bool:
        """The reply may end here."""
        return self._matcher.is_accepting()

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConstraintError(
            "constrained output needs the package llguidance: pip install 'edgellama[constrain]'"
        ) from None
    return llguidance


class _Tokens:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokens: list[bytes], special_ids: list[int], eos_id: int):
        self.tokens, self.special_token_ids, self.eos_token_id, self.bos_token_id = tokens, special_ids, eos_id, None

    def __call__(self, text: bytes) -> list[int]:
        return []  # tokenizes forced text; nothing is forced (`sources`)


def _prepared(llguidance: Any, tokenizer: "Tokenizer", eos_ids: frozenset[int], vocab_size: int) -> Any:
    """llguidance's form of the tokenizer, made once. After the model's tokens comes one more: an end if it has none."""
    with _tokenizers_lock:
        known = _tokenizers.setdefault(tokenizer, {})
        key = (eos_ids, vocab_size)
        if key not in known:
            tokens = tokenizer.token_bytes()[:vocab_size]
            tokens += [b""] * (vocab_size - len(tokens)) + [b"<end>"]
            special = sorted({index for index in tokenizer.special_ids if index < vocab_size} | eos_ids | {vocab_size})
            ends = sorted(eos_ids) or [vocab_size]
            wrapped = llguidance.TokenizerWrapper(_Tokens(tokens, special, ends[0]))
            known[key] = llguidance.LLTokenizer(wrapped, eos_token=ends)
        return known[key]


def _one_line(message: str) -> str:
    """llguidance's message on one line, without the state of the parser that it may print after it."""
    text = " ".join(message.partition("<state>")[0].split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
