"""Log-probabilities as a caller reads them: with the text of each token. Knows a tokenizer and rows of logits."""

from typing import TYPE_CHECKING

import numpy as np

from edgellama.generate.results import TokenLogprob
from edgellama.sampling import top_logprobs

if TYPE_CHECKING:
    from edgellama.tokenizer import Tokenizer


class LogprobRecorder:
    """`recorder.of(token_id, logits)`; `n_top` alternatives each. `tokenizer` None: tokens have no text."""

    def __init__(self, tokenizer: "Tokenizer | None", n_top: int):
        self._tokenizer, self._n_top = tokenizer, n_top
        # A decoder that has seen a word knows that a token's space does not begin the text.
        self._word = [] if tokenizer is None else tokenizer.encode("a", add_special_tokens=False)
        self._texts: dict[int, str] = {}

    def of(self, token_id: int, logits: np.ndarray | None) -> TokenLogprob:
        """`logits` float32 [vocab_size]: those that `token_id` was chosen from; None: it was not."""
        if logits is None:
            return TokenLogprob(token_id, self.text(token_id), None, [])
        logprob, top = top_logprobs(logits, token_id, min(self._n_top, logits.size))
        return TokenLogprob(
            token_id, self.text(token_id), float(logprob), [(id_, self.text(id_), float(value)) for id_, value in top]
        )

    def text(self, token_id: int) -> str:
        """What a token says within a text."""
        if self._tokenizer is None:
            return ""
        if token_id not in self._texts:
            decoder = self._tokenizer.stream(after=self._word)
            self._texts[token_id] = decoder.push(token_id) + decoder.flush()
        return self._texts[token_id]
