"""From prompts to replies: the options, the engine that runs many at once, and what a caller gets.

    results   what a call gives back                 request   what a caller asks for, checked
    reply     one reply in the making                stream    a call as it runs: to the end or piece by piece
    stops     stop strings in pieces of text         cancel    the token that stops it
    slots     who sits where in the cache            engine    forward passes that many replies share

Knows a backend as numbers in, logits out. Does not know weights, devices or files, nor how a token is chosen.
"""

from edgellama.generate.cancel import CancelToken
from edgellama.generate.request import GenerateOptions
from edgellama.generate.results import Generation, Timings, TokenLogprob
from edgellama.generate.stream import AsyncStream, Stream

__all__ = ["AsyncStream", "CancelToken", "GenerateOptions", "Generation", "Stream", "Timings", "TokenLogprob"]
