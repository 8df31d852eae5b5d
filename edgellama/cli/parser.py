"""The command line's grammar: verbs, shared options, and help for those who mistype."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import edgellama
from edgellama.cli import (
    attention_mask,
    bench,
    chat,
    compare,
    console,
    convert,
    demo,
    export,
    generate,
    info,
    list_models,
    perplexity,
    rm,
    run,
    verify,
)

_VERBS = (
    demo,
    run,
    chat,
    generate,
    convert,
    list_models,
    rm,
    info,
    verify,
    export,
    bench,
    perplexity,
    compare,
    attention_mask,
)
_DESCRIPTION = "Run Llama models on your own machine: one int4 file, from Python, on any CPU."
_EPILOG = """\
try it:  edgellama demo
then:    edgellama run meta-llama/Llama-2-7b-chat-hf
or:      edgellama convert meta-llama/Llama-2-7b-hf -o llama-2-7b.edgellama
         edgellama generate llama-2-7b.edgellama -p "Once upon a time"
help:    edgellama VERB --help"""


class _Parser(argparse.ArgumentParser):
    """argparse with short errors, and a suggestion for a mistyped option."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, console.clean(f"edgellama: {message}; see {self.prog} --help") + "\n")

    def options(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command, with `run` to carry it out. Raises SystemExit (2) on wrong usage."""
    parser = _Parser(prog="edgellama", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"edgellama {edgellama.__version__}")
    subparsers = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", parser_class=_Parser)
    for module in _VERBS:
        module.add_parser(subparsers)
    verbs: dict[str, _Parser] = subparsers.choices
    if not argv:
        parser.print_help(sys.stderr)
        return argparse.Namespace(run=lambda _: 2)
    if not argv[0].startswith("-") and argv[0] not in verbs:
        parser.error(f"unknown verb {argv[0]!r}{console.did_you_mean(argv[0], list(verbs))}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        verb_parser = verbs[args.verb] if args.verb else parser
        known = verb_parser.options()
        hint = console.did_you_mean(unknown[0].split("=")[0], known) if unknown[0].startswith("-") else ""
        verb_parser.error(f"unknown argument {unknown[0]!r}{hint}")
    return args
