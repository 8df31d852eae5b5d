"""From a request to the replies that it asks for: each gets a sampler, a decoder and its seed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellama.generate.logprobs import LogprobRecorder
from edgellama.generate.prompts import Prompt
from edgellama.generate.reply import NoText, Reply, TextDecoder
from edgellama.generate.request import Request
from edgellama.sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from edgellama.tokenizer import Tokenizer

# The tail of the prompt that the text decoder sees: enough that the reply's first word keeps its leading space.
_PRIME_TOKENS = 16


def make_replies(
    prompts: Sequence[Prompt],
    request: Request,
    params: SamplingParams,
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    tokenizer: "Tokenizer | None",
    n_ctx: int,
    vocab_size: int,
    load_s: float,
    started: float,
) -> list[Reply]:
    """`request.num_return_sequences` replies to each prompt, in order. `tokenizer` None: ids in, ids out.

    `started`: `time.perf_counter()` at the call.
    """
    recorder = LogprobRecorder(tokenizer, request.top_logprobs) if request.logprobs else None
    make_constraint = _constraints(request, tokenizer, eos_ids, vocab_size)
    replies: list[Reply] = []
    for prompt in prompts:
        echo = _echo(prompt, tokenizer) if request.echo else None
        room = max_new_tokens if request.on_full == "slide" else min(max_new_tokens, n_ctx - prompt.ids.size)
        for _ in range(request.num_return_sequences):
            index = len(replies)
            constraint = make_constraint()
            is_complete = None if constraint is None else partial(getattr, constraint, "finished")
            sampler = Sampler(
                params if params.seed is None else params.override(seed=params.seed + index),
                prompt_ids=prompt.ids,
                eos_ids=eos_ids,
                processors=request.logits_processor,
                constraint=constraint,
            )
            reply = Reply(
                prompt.ids,
                sampler,
                _decoder(prompt.ids, tokenizer),
                max_new_tokens=room,
                eos_ids=eos_ids,
                stops=request.stop,
                logprobs=recorder,
                echo=echo,
                is_complete=is_complete,
                index=index,
                load_s=load_s,
                started=started,
            )
            replies.append(reply)
    return replies


def _constraints(
    request: Request, tokenizer: "Tokenizer | None", eos_ids: frozenset[int], vocab_size: int
) -> Callable[[], Any]:
    """A function that makes a new constraint each time, or None; the grammar is read once."""
    if not request.constraint:
        return lambda: None
    from edgellama.constraint import make_constraint

    assert tokenizer is not None  # the caller has seen to it
    return make_constraint(tokenizer, eos_ids, vocab_size, **request.constraint).fork


def _decoder(prompt_ids: np.ndarray, tokenizer: "Tokenizer | None") -> TextDecoder:
    if tokenizer is None:
        return NoText()
    return tokenizer.stream(skip_special_tokens=True, after=prompt_ids[-_PRIME_TOKENS:].tolist())


def _echo(prompt: Prompt, tokenizer: "Tokenizer | None") -> str:
    if prompt.text is not None:
        return prompt.text
    return "" if tokenizer is None else tokenizer.decode(prompt.ids, skip_special_tokens=True)
