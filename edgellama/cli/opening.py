"""Opening what a verb generates with: the model, a draft model beside it, remarks to the user."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgellama.cli import console, options, parameters

if TYPE_CHECKING:
    from edgellama.model import Llama


@contextlib.contextmanager
def opened(args: argparse.Namespace, model: str, given: dict[str, Any]) -> Iterator[tuple["Llama", dict[str, Any]]]:
    """The model, and the keyword arguments of `generate` for which it was opened: they are taken from `given`.

    A draft model is opened, too; beams need as many slots.
    """
    from edgellama.model import load

    runtime = options.runtime_of(args)
    extra = {name: given.pop(name) for name in parameters.AT_START if name in given}
    slots = {"n_slots": extra["num_beams"]} if "num_beams" in extra else {}
    with contextlib.ExitStack() as stack:
        llm = stack.enter_context(load(model, **runtime, **slots))
        if "draft_model" in extra:
            extra["draft_model"] = stack.enter_context(load(extra["draft_model"], **runtime))
        if not args.quiet:
            for remark in llm.notes:
                console.note(f"note: {remark}")
        yield llm, extra
