"""edgellama: run Llama models on your own machine.

    import edgellama

    with edgellama.load("llama-2-7b.edgellama") as llm:
        for piece in llm.generate("Once upon a time", max_new_tokens=64, stream=True):
            print(piece, end="", flush=True)

This module knows names only: what stands behind them is imported at first use, so `import edgellama` costs
a few milliseconds and never imports Numba.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # the one source; the build reads it from here

if TYPE_CHECKING:
    from edgellama.errors import (
        CancelledError,
        ChatTemplateError,
        ConfigError,
        ConstraintError,
        ContextError,
        ConvertError,
        DeviceError,
        EdgellamaError,
        FormatError,
        TokenizerError,
    )
    from edgellama.generate import CancelToken, Generation, Stream, Timings, TokenLogprob
    from edgellama.generate.async_stream import AsyncStream
    from edgellama.model import Llama, load
    from edgellama.past import SequenceCache
    from edgellama.pipelines import pipeline
    from edgellama.scoring import Score
    from edgellama.visualize import Attention, visualize_attention_mask

_HOME = {  # public name -> the module that defines it
    "load": "edgellama.model",
    "Llama": "edgellama.model",
    "AsyncStream": "edgellama.generate.async_stream",
    "CancelToken": "edgellama.generate",
    "Generation": "edgellama.generate",
    "Stream": "edgellama.generate",
    "Timings": "edgellama.generate",
    "TokenLogprob": "edgellama.generate",
    "Score": "edgellama.scoring",
    "SequenceCache": "edgellama.past",
    "pipeline": "edgellama.pipelines",
    "Attention": "edgellama.visualize",
    "visualize_attention_mask": "edgellama.visualize",
    "EdgellamaError": "edgellama.errors",
    "FormatError": "edgellama.errors",
    "ConfigError": "edgellama.errors",
    "ConvertError": "edgellama.errors",
    "TokenizerError": "edgellama.errors",
    "ConstraintError": "edgellama.errors",
    "ChatTemplateError": "edgellama.errors",
    "ContextError": "edgellama.errors",
    "DeviceError": "edgellama.errors",
    "CancelledError": "edgellama.errors",
}

__all__ = [
    "AsyncStream",
    "Attention",
    "CancelToken",
    "CancelledError",
    "ChatTemplateError",
    "ConfigError",
    "ConstraintError",
    "ContextError",
    "ConvertError",
    "DeviceError",
    "EdgellamaError",
    "FormatError",
    "Generation",
    "Llama",
    "Score",
    "SequenceCache",
    "Stream",
    "Timings",
    "TokenLogprob",
    "TokenizerError",
    "__version__",
    "load",
    "pipeline",
    "visualize_attention_mask",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgellama' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
