"""`edgellama rm`: delete models from the user's folder."""

import argparse
import sys
from pathlib import Path

from edgellama.cli import console
from edgellama.errors import EdgellamaError

_DESCRIPTION = "Delete models from your model folder."
_EPILOG = """\
example: edgellama rm Llama-2-7b-hf

Only files in the model folder go, by the names that `edgellama list` shows;
the Hugging Face cache keeps stays there. On a terminal it asks first."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("rm", help="delete your models", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("names", nargs="+", metavar="NAME", help="a name or source as `edgellama list` shows it")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    from edgellama import store

    paths = list(dict.fromkeys(_find(name) for name in args.names))  # all, before the first goes
    for path in paths:
        name, size = path.name.removesuffix(".edgellama"), console.size(path.stat().st_size)
        if not args.yes and console.is_terminal(sys.stdin) and not _agreed(f"delete {name} ({size})?"):
            console.note(f"kept {name}")
            continue
        store.remove(path)
        console.note(f"deleted {name} ({size})")
    return 0


def _find(name: str) -> Path:
    from edgellama import store

    path = store.find(name)
    if path is None:
        close = store.close_names(name)
        hint = f"did you mean {' or '.join(close)}?" if close else "`edgellama list` shows them"
        is_file = " (rm deletes stored models only; this is a file)" if Path(name).is_file() else ""
        raise EdgellamaError(f"no stored model {name!r}{is_file}; {hint}")
    return path


def _agreed(question: str) -> bool:
    sys.stderr.write(f"{console.clean(question)} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
