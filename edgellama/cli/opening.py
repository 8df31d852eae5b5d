"""Opening what a verb generates with: the model, a draft model beside it, remarks to the user."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgellama.cli import console, options

if TYPE_CHECKING:
    from edgellama.model import Llama


@contextlib.contextmanager
def opened(args: argparse.Namespace, model: str, given: dict[str, Any]) -> Iterator[tuple["Llama", dict[str, Any]]]:
    """The model, and the keyword arguments of `generate` that hold open models: a draft model is taken from `given`."""
    from edgellama.model import load

    runtime = options.runtime_of(args)
    draft = given.pop("draft_model", None)
    with contextlib.ExitStack() as stack:
        llm = stack.enter_context(load(model, **runtime))
        extra = {} if draft is None else {"draft_model": stack.enter_context(load(draft, **runtime))}
        if not args.quiet:
            for remark in llm.notes:
                console.note(f"note: {remark}")
        yield llm, extra
