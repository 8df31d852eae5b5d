"""`edgellama verify`: prove a file's structure and every tensor's hash, or that two devices agree on it."""

import argparse
from pathlib import Path

from edgellama.cli import console, options
from edgellama.cli.progress import Progress
from edgellama.devices import DEVICES
from edgellama.paths import find_model

_DESCRIPTION = "Check a file's structure and the hash of every tensor."
_EPILOG = """\
example: edgellama verify llama-2-7b.edgellama
         edgellama verify llama-2-7b.edgellama --device cpu,cuda

Exit code 0: every byte is what was written. 1: one line names what is not.
With --device A,B the same texts run on both devices instead. 0: their
next-token distributions agree (KL divergence, share of equal likeliest
tokens), 1: they do not."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "verify", help="check a file's structure and hashes", description=_DESCRIPTION, epilog=_EPILOG
    )
    options.add_model(parser)
    options.add_json(parser)
    parser.add_argument("--device", type=_two_devices, metavar="A,B", help="compare two devices, e.g. cpu,cuda")
    parser.add_argument("-t", "--threads", type=options.positive_int, metavar="T", help="the cpu's, with --device")
    options.add_kv_cache(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run, parser=parser)


def _two_devices(text: str) -> tuple[str, str]:
    names = text.split(",")
    if len(names) != 2 or not set(names) <= set(DEVICES):
        raise argparse.ArgumentTypeError(f"{text!r} is not two of {', '.join(DEVICES)} with a comma between")
    return names[0], names[1]


def run(args: argparse.Namespace) -> int:
    path = find_model(options.model_of(args))
    return _compare(args, path) if args.device else _check_hashes(args, path)


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


def _check_hashes(args: argparse.Namespace, path: Path) -> int:
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
