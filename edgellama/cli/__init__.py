"""The `edgellama` command: a skin over the package's public functions.

One module a verb, each with `add_parser(subparsers)` and `run(args) -> int`. Answers go to stdout, everything
else to stderr. Exit codes: 0 done, 1 an error told in one line, 2 wrong usage, 130 interrupted. Verbs import what
is heavy inside `run`, so that `--help` is quick.
"""

import sys
from collections.abc import Sequence

from edgellama.cli import console


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `argv` is without the program's name, None takes the process's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    console.prepare_streams()
    try:
        return _run(argv)
    except SystemExit as done:  # argparse: --help, --version, wrong usage
        return done.code if isinstance(done.code, int) else 2
    except KeyboardInterrupt:
        console.note("edgellama: interrupted")
        return 130
    except BrokenPipeError:
        console.drop_stdout()  # whoever read our output has had enough
        return 0
    except Exception as error:
        line = console.one_line(error)
        if line is None:
            raise  # a bug of ours: the traceback is wanted
        console.note(line)
        return 1


def _run(argv: list[str]) -> int:
    from edgellama.cli.parser import parse

    args = parse(argv)
    code = int(args.run(args))
    sys.stdout.flush()
    return code
