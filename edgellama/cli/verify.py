"""`edgellama verify`: prove a file's structure and every tensor's hash, and that a device computes what it should."""

import argparse
from pathlib import Path
from typing import Any

from edgellama.cli import console, options
from edgellama.cli.progress import Progress
from edgellama.paths import find_model

_DESCRIPTION = "Check a file's structure, the hash of every tensor, and its golden vectors."
_EPILOG = """\
example: edgellama verify llama-2-7b.edgellama

Golden vectors were stored when the file was made: token ids of awkward texts,
a rendered chat, logits of a short prompt. The model runs on --device for it.

Exit code 0: every byte is what was written, and the device computes what it
should. 1: one line names what is not."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "verify", help="check a file's structure and hashes", description=_DESCRIPTION, epilog=_EPILOG
    )
    options.add_model(parser)
    parser.add_argument("--hashes-only", action="store_true", help="do not run the model")
    options.add_device(parser)
    parser.add_argument("-t", "--threads", type=options.positive_int, metavar="T", help="default: the physical cores")
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
        receipt = file.receipt
    golden = None if args.hashes_only else _check_golden(path, receipt, args)
    if args.json:
        console.say_json({**facts, "device": None if golden is None else args.device, "golden": golden})
    else:
        console.say(f"{file.path}: ok, {facts['tensors']} tensors, {console.size(file.size)}")
        if golden is not None:
            chat = ", a chat" if golden["chats"] else ""
            console.say(
                f"golden vectors: {golden['texts']} texts{chat} and the logits of {golden['rows']} tokens agree on "
                f"{args.device} (KL divergence {golden['kl']:.2g}, at most {golden['max_kl']:g})"
            )
    return 0


def _check_golden(path: Path, receipt: dict[str, Any] | None, args: argparse.Namespace) -> dict[str, Any] | None:
    """What was compared, as plain values; None for a file without golden vectors."""
    from edgellama import golden
    from edgellama.model import load

    vectors = golden.stored(receipt)
    if vectors is None:
        return None
    with load(path, args.device, golden.needed_ctx(vectors), args.threads, n_slots=1) as llm:
        return golden.check(llm, exact=args.device == "reference").to_dict()
