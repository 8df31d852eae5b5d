"""`edgellama verify`: prove a file's structure and every tensor's hash, and what devices compute."""

import argparse
from pathlib import Path
from typing import Any

from edgellama.cli import console, options
from edgellama.cli.progress import Progress
from edgellama.devices import DEVICES
from edgellama.paths import find_model

_DESCRIPTION = "Check a file's structure, the hash of every tensor, and its golden vectors."
_EPILOG = """\
example: edgellama verify llama-2-7b.edgellama
         edgellama verify llama-2-7b.edgellama --device cpu,cuda

Golden vectors were stored when the file was made: token ids of awkward texts,
a rendered chat, logits of a short prompt. The model runs on --device for it.

Exit code 0: every byte is what was written, and the device computes what it
should. 1: one line names what is not.
With --device A,B the same texts run on both devices instead. 0: their
next-token distributions agree (KL divergence, share of equal likeliest
tokens), 1: they do not."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "verify", help="check a file's structure and hashes", description=_DESCRIPTION, epilog=_EPILOG
    )
    options.add_model(parser)
    parser.add_argument("--hashes-only", action="store_true", help="do not run the model")
    options.add_json(parser)
    parser.add_argument(
        "--device",
        type=_devices,
        default=("cpu",),
        metavar="D[,D]",
        help="default cpu; two: compare them, e.g. cpu,cuda",
    )
    parser.add_argument("-t", "--threads", type=options.positive_int, metavar="T", help="the cpu's")
    options.add_kv_cache(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run, parser=parser)


def _devices(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if len(names) > 2 or not set(names) <= set(DEVICES):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(DEVICES)}, or two with a comma between")
    return names


def run(args: argparse.Namespace) -> int:
    path = find_model(options.model_of(args))
    return _compare(args, path) if len(args.device) == 2 else _check_file(args, path)


def _compare(args: argparse.Namespace, path: Path) -> int:
    from edgellama.agreement import MAX_KL, MIN_GREEDY_AGREEMENT, compare
    from edgellama.format import open_model

    with open_model(path) as file, Progress("compare", unit="tokens", quiet=args.quiet) as progress:
        outcome = compare(file, *args.device, n_threads=args.threads, kv_cache=args.kv_cache, progress=progress.update)
    if args.json:
        console.say_json({"path": str(path), **outcome.to_dict()})
    else:
        console.say(
            f"{path}: {outcome.first} and {outcome.second} {'agree' if outcome.passed else 'DISAGREE'}; KL divergence "
            f"{outcome.kl:.2g} (at most {MAX_KL:g}), same likeliest token {outcome.greedy:.1%} "
            f"(at least {MIN_GREEDY_AGREEMENT:.0%}), {outcome.tokens} tokens"
        )
    return 0 if outcome.passed else 1


def _check_file(args: argparse.Namespace, path: Path) -> int:
    from edgellama.format import open_model

    with open_model(path) as file:
        with Progress("verify", unit="B", quiet=args.quiet) as progress:
            file.verify(progress.update)
        facts = {"path": str(file.path), "ok": True, "tensors": len(file.tensors), "size_bytes": file.size}
        receipt = file.receipt
    golden = None if args.hashes_only else _check_golden(path, receipt, args)
    if args.json:
        console.say_json({**facts, "device": None if golden is None else args.device[0], "golden": golden})
    else:
        console.say(f"{file.path}: ok, {facts['tensors']} tensors, {console.size(file.size)}")
        if golden is not None:
            chat = ", a chat" if golden["chats"] else ""
            console.say(
                f"golden vectors: {golden['texts']} texts{chat} and the logits of {golden['rows']} tokens agree on "
                f"{args.device[0]} (KL divergence {golden['kl']:.2g}, at most {golden['max_kl']:g})"
            )
    return 0


def _check_golden(path: Path, receipt: dict[str, Any] | None, args: argparse.Namespace) -> dict[str, Any] | None:
    """What was compared, as plain values; None for a file without golden vectors."""
    from edgellama import golden
    from edgellama.model import load

    vectors = golden.stored(receipt)
    if vectors is None:
        return None
    device = args.device[0]
    with load(path, device, golden.needed_ctx(vectors), args.threads, args.kv_cache, n_slots=1) as llm:
        return golden.check(llm, exact=device == "reference").to_dict()
