"""`Sampler`: one sequence's way from logits to tokens, everything in its order.

Knows: `SamplingParams`, the ids so far, and that a constraint can mask logits. Does not know: what the constraint is,
models, text.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from edgellama.errors import EdgellamaError
from edgellama.sampling import adjust, filters
from edgellama.sampling.dry import Dry
from edgellama.sampling.history import Counts, History
from edgellama.sampling.logprobs import log_sum_exp
from edgellama.sampling.params import SamplingParams

LogitsProcessor = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""`(ids int32 [T], logits float32 [vocab_size]) -> logits`: ids are prompt and reply; the logits may be changed."""


class TokenConstraint(Protocol):
    """What must hold for the reply, as `edgellama.constraint.Constraint` does it."""

    def mask(self, logits: np.ndarray, /) -> None: ...
    def accept(self, token_id: int, /) -> None: ...
    def fork(self) -> "TokenConstraint": ...


class Sampler:
    """Draws the tokens of one sequence. Two samplers with the same arguments and seed draw the same tokens.

    `sampler(logits)` proposes; `accept(id)` records what was really taken, be it drawn, forced or verified.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_ids: Sequence[int] | np.ndarray = (),
        eos_ids: Iterable[int] = frozenset(),
        processors: Iterable[LogitsProcessor] = (),
        constraint: TokenConstraint | None = None,
    ):
        """`processors` run after penalties and bans, in order; forks share them."""
        self.params = params
        self.constraint = constraint
        self._processors = tuple(processors)
        self._rng = None if params.temperature == 0 else np.random.Generator(np.random.PCG64(params.seed))
        self._history = history = History(np.asarray(prompt_ids, np.int32))
        self._eos = np.array(sorted(eos_ids), np.int64)
        self._bias_ids = np.array(list(params.logit_bias), np.int64)
        self._biases = np.array(list(params.logit_bias.values()), np.float32)
        self._biased = adjust.SequenceBiases(params.sequence_bias)
        self._banned = adjust.SequenceBiases.bans(params.bad_words_ids, frozenset(eos_ids))
        self._seen = self._said = None
        if params.repetition_penalty != 1:
            self._seen = Counts(history.ids, params.penalty_last_n)
        if params.frequency_penalty or params.presence_penalty:
            self._said = Counts(history.ids[:0], params.penalty_last_n)
        self._dry = None
        if params.dry_multiplier and params.dry_penalty_last_n:
            self._dry = Dry(
                history,
                multiplier=params.dry_multiplier,
                base=params.dry_base,
                allowed_length=params.dry_allowed_length,
                last_n=params.dry_penalty_last_n,
                breakers=params.dry_sequence_breaker_ids,
            )
        # Mirostat 2: the bound on surprise, and what the last proposal's was.
        self._mu = 2 * params.mirostat_tau
        self._surprise: tuple[int, float] | None = None
        self._vocab = np.zeros(0, np.int64)

    def __call__(self, logits: np.ndarray) -> int:
        """The next token for `logits` float32 [vocab_size], which are left as they are. Records nothing.

        Raises EdgellamaError when the logits have NaN or infinity on top, and when nothing is left to choose from;
        ValueError for a `logit_bias`, `sequence_bias` or `bad_words_ids` outside the vocabulary.
        """
        best = int(logits.argmax())  # the first NaN, if there is one
        if not math.isfinite(logits[best]):
            raise EdgellamaError(
                "the model's logits are not finite: its weights are damaged or overflow; `edgellama verify` tells which"
            )
        adjusted = self.adjust(logits)
        if adjusted is not logits:
            best = int(adjusted.argmax())
        params = self.params
        if self._rng is None:
            return best
        if params.mirostat:
            return self._mirostat(adjusted, self._rng.random())
        if params.top_k == 1:
            return best
        ids, kept = self._vocab, adjusted
        if adjusted is not logits and adjusted.min() == -math.inf:
            ids = np.flatnonzero(adjusted > -math.inf)
            kept = adjusted[ids]
        ids, kept = filters.top_n_sigma(ids, kept, params.top_n_sigma)
        if params.top_k:
            chosen, kept = filters.top_k(kept, params.top_k)
            ids = ids[chosen]
        ids, kept = filters.typical_p(ids, kept, params.typical_p)
        ids, kept = filters.top_p(ids, kept, params.top_p)
        ids, kept = filters.min_p(ids, kept, params.min_p)
        if params.xtc_probability and self._rng.random() < params.xtc_probability:
            ids, kept = filters.xtc(ids, kept, params.xtc_threshold)
        return filters.draw(ids, kept, params.temperature, self._rng.random())

    def accept(self, token_id: int) -> None:
        """`token_id` is the sequence's next token. EdgellamaError if the constraint does not allow it."""
        if self.constraint is not None:
            self.constraint.accept(token_id)
        history = self._history
        if self._seen is not None:
            self._seen.add(token_id, history.ids)
        if self._said is not None:
            self._said.add(token_id, history.ids[history.prompt_size :])
        history.append(token_id)
        if self._dry is not None:
            self._dry.extend(history)
        if self._surprise is not None and self._surprise[0] == token_id:
            self._mu -= self.params.mirostat_eta * (self._surprise[1] - self.params.mirostat_tau)
        self._surprise = None

    def fork(self) -> "Sampler":
        """An independent copy of all state, the random numbers to come included."""
        twin = copy.copy(self)
        twin._rng = copy.deepcopy(self._rng)
        twin._history = self._history.fork()
        twin._seen = self._seen and self._seen.fork()
        twin._said = self._said and self._said.fork()
        twin._dry = self._dry and self._dry.fork()
        twin.constraint = self.constraint and self.constraint.fork()
        return twin

    def adjust(self, logits: np.ndarray) -> np.ndarray:
        """`logits` themselves, or a changed copy, after everything that comes before choosing. Never NaN on top."""
        if self._vocab.size != logits.size:
            self._check_vocabulary(logits.size)
        adjusted = self._penalized(logits)
        if self._processors:
            adjusted = self._processed(logits.copy() if adjusted is logits else adjusted)
        if self.constraint is not None:
            if adjusted is logits:
                adjusted = logits.copy()
            self.constraint.mask(adjusted)
            if adjusted.max() == -math.inf:  # bans and the constraint leave nothing: the constraint must hold
                adjusted = logits.copy()
                self.constraint.mask(adjusted)
        if adjusted is not logits and not math.isfinite(adjusted.max()):
            raise EdgellamaError(
                "no token is left to choose from: logit_bias, sequence_bias, bad_words_ids, no_repeat_ngram_size, "
                "min_new_tokens, a logits processor or the constraint forbid all that the model finds possible"
                if adjusted.max() == -math.inf
                else "a logits processor returned NaN or infinity"
            )
        return adjusted

    def _penalized(self, logits: np.ndarray) -> np.ndarray:
        params, history = self.params, self._history
        too_early = history.generated < params.min_new_tokens and self._eos.size > 0
        changed = params.logit_bias or params.sequence_bias or params.bad_words_ids or params.no_repeat_ngram_size
        if not (changed or too_early or self._seen or self._said or self._dry):
            return logits
        logits = logits.copy()
        if params.logit_bias:
            logits[self._bias_ids] += self._biases
        if params.sequence_bias:
            self._biased.apply(logits, history)
        if self._seen is not None:
            adjust.penalize_repetition(logits, self._seen.present()[0], params.repetition_penalty)
        if self._said is not None:
            adjust.penalize_counts(logits, *self._said.present(), params.frequency_penalty, params.presence_penalty)
        if self._dry is not None:
            self._dry.apply(logits, history)
        if params.no_repeat_ngram_size:
            adjust.ban_repeated_ngrams(logits, history.ids, params.no_repeat_ngram_size)
        if params.bad_words_ids:
            self._banned.apply(logits, history)
        if too_early:
            logits[self._eos] = -np.inf
        return logits

    def _processed(self, logits: np.ndarray) -> np.ndarray:
        shape = logits.shape
        for processor in self._processors:
            result = processor(self._history.ids, logits)
            name = getattr(processor, "__name__", type(processor).__name__)
            if result is None:
                raise TypeError(f"the logits processor {name} returned None; it must return the logits")
            logits = np.asarray(result, np.float32)
            if logits.shape != shape:
                raise ValueError(f"the logits processor {name} returned shape {logits.shape}, {shape} is needed")
        # The constraint writes into them.
        return logits if logits.flags.writeable else logits.copy()

    def _mirostat(self, logits: np.ndarray, u: float) -> int:
        """Draws among the tokens of at most mu bits of surprise, at least one. As in llama.cpp, after temperature."""
        scaled = (logits - logits.max()) / np.float32(max(self.params.temperature, 1e-30))
        total = log_sum_exp(scaled)
        keep = scaled >= np.float32(min(0.0, total - self._mu * math.log(2)))
        ids = np.flatnonzero(keep)
        kept = scaled[ids]
        token = filters.draw(ids, kept, 1.0, u)
        self._surprise = (token, (log_sum_exp(kept) - float(scaled[token])) / math.log(2))
        return token

    def _check_vocabulary(self, size: int) -> None:
        largest = {
            "logit_bias": self._bias_ids.max(initial=-1),
            "sequence_bias": self._biased.largest,
            "bad_words_ids": self._banned.largest,
        }
        for name, index in largest.items():
            if index >= size:
                raise ValueError(f"{name} names token {index}, but the vocabulary has {size} tokens")
        self._eos = self._eos[self._eos < size]
        self._vocab = filters.whole(size)
