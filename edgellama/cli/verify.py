"""`edgellama verify`: prove a file's structure and every tensor's hash."""

import argparse

from edgellama.cli import console, options
from edgellama.cli.progress import Progress
from edgellama.paths import find_model

_DESCRIPTION = "Check a file's structure and the hash of every tensor."
_EPILOG = """\
example: edgellama verify llama-2-7b.edgellama

Exit code 0: every byte is what was written. 1: one line names what is not."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "verify", help="check a file's structure and hashes", description=_DESCRIPTION, epilog=_EPILOG
    )
    options.add_model(parser)
    options.add_json(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    path = find_model(options.model_of(args))
    from edgellama.format import open_model

    with open_model(path) as file:
        with Progress("verify", unit="B", quiet=args.quiet) as progress:
            file.verify(progress.update)
        facts = {"path": str(file.path), "ok": True, "tensors": len(file.tensors), "size_bytes": file.size}
    if args.json:
        console.say_json(facts)
    else:
        console.say(f"{file.path}: ok, {facts['tensors']} tensors, {console.size(file.size)}")
    return 0
