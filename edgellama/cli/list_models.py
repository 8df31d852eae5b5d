"""`edgellama list`: the models in the user's folder. (A module named `list` would hide the builtin in its package.)"""

import argparse
import time
from collections.abc import Sequence
from datetime import datetime

from edgellama.cli import console, options

_DESCRIPTION = "List the models in your model folder."
_EPILOG = """\
example: edgellama list

Every verb takes a name for MODEL. `edgellama run` adds a model, `edgellama rm`
deletes one; .edgellama files may also be copied into the folder by hand."""
_GAP = "  "


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("list", help="list your models", description=_DESCRIPTION, epilog=_EPILOG)
    options.add_json(parser, "print a list of objects")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    from edgellama.paths import models_dir
    from edgellama.store import list_models

    models = list_models()
    if args.json:
        console.say_json(
            [
                {
                    "name": each.name,
                    "path": str(each.path),
                    "size_bytes": each.size,
                    "modified": datetime.fromtimestamp(each.modified).astimezone().isoformat(timespec="seconds"),
                    "source": each.source,
                }
                for each in models
            ]
        )
    elif models:
        now = time.time()
        rows = [("NAME", "SIZE", "MODIFIED", "SOURCE")]
        rows += [(m.name, console.size(m.size), ago(now - m.modified), m.source or "unknown") for m in models]
        for line in table(rows):
            console.say(line)
    else:
        console.note(f"no models in {console.shell_path(models_dir())}; `edgellama run org/name` fetches one")
    return 0


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of padded columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return [
        _GAP.join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]


def ago(seconds: float) -> str:
    """
    >>> ago(3), ago(60), ago(7300), ago(3 * 86400)
    ('just now', '1 minute ago', '2 hours ago', '3 days ago')
    """
    for unit, length in (("year", 365 * 86400), ("month", 30 * 86400), ("day", 86400), ("hour", 3600), ("minute", 60)):
        n = int(seconds // length)
        if n > 0:
            return f"{n} {unit}{'' if n == 1 else 's'} ago"
    return "just now"
