"""From logits to the next token.

    params = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=1)
    sampler = Sampler(params, prompt_ids=ids, eos_ids=llm.eos_ids)
    token = sampler(logits)      # float32 [vocab_size] -> id
    sampler.accept(token)        # the token that was really taken

Modules: `params` (the numbers, checked), `history` (what was said, kept so that a step costs little), `adjust` and
`dry` (penalties and bans: they change logits), `filters` (they choose candidates), `sampler` (one sequence: everything
in its order), `logprobs`.

The order is llama.cpp's: penalties, dry, top_n_sigma, top_k, typical_p, top_p, min_p, xtc, temperature (so the filters
judge the model's own distribution, whatever the temperature). A name that transformers has means exactly what it means
there; `presence_penalty`, `frequency_penalty` and `logit_bias` are OpenAI's; the rest are llama.cpp's.

Knows token ids and logits. Does not know: models, tokenizers, text.
"""

from edgellama.sampling.dry import breaker_ids
from edgellama.sampling.logprobs import log_softmax, top_logprobs
from edgellama.sampling.params import SamplingOptions, SamplingParams
from edgellama.sampling.sampler import LogitsProcessor, Sampler, TokenConstraint

__all__ = [
    "LogitsProcessor",
    "Sampler",
    "SamplingOptions",
    "SamplingParams",
    "TokenConstraint",
    "breaker_ids",
    "log_softmax",
    "top_logprobs",
]
