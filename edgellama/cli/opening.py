"""Opening what a verb generates with: the model, a draft model beside it, remarks to the user."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgellama.cli import console, options, parameters
from edgellama.cli.progress import Progress

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
        get_ready(llm, args.quiet)
        yield llm, extra


def get_ready(llm: "Llama", quiet: bool, look: str = "note: ") -> None:
    """Remarks, and how far the kernels are where they must be compiled first."""
    if not quiet:
        for remark in llm.notes:
            console.note(look + remark)
    with Progress("compiling", unit="functions", quiet=quiet or not console.is_terminal(sys.stderr)) as bar:
        llm.prepare(bar.update)
