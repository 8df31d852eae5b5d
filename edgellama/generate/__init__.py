"""From prompts to replies: the options, the engine that runs many at once, and what a caller gets.

    request, prompts    what a caller asks for, checked       replies    from that to what runs
    results             what a caller gets                    reply      one reply in the making
    cancel              the token that stops a call           stream     a call as it runs, piece by piece
    async_stream        the same in an event loop
    slots               who sits where in the cache           engine     passes that many replies share
    stops, logprobs     stop strings in pieces of text; log-probabilities with text
    exiting             no thread computes while the process ends

Knows a backend as numbers in, logits out. Does not know weights, devices or files, nor how a token is chosen.
"""

from edgellama.generate.cancel import CancelToken
from edgellama.generate.request import GenerateOptions
from edgellama.generate.results import Generation, Timings, TokenLogprob
from edgellama.generate.stream import Stream

__all__ = ["CancelToken", "GenerateOptions", "Generation", "Stream", "Timings", "TokenLogprob"]
