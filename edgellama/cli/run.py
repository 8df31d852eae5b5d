"""`edgellama run`: talk with a model from anywhere; a checkpoint is converted on its first use, and kept."""

import argparse
from pathlib import Path

from edgellama.cli import chat, console, options
from edgellama.cli.progress import conversion_progress
from edgellama.errors import ConvertError

_DESCRIPTION = "Run a model from a file, your model folder, or the Hugging Face hub."
_EPILOG = """\
examples: edgellama run meta-llama/Llama-2-7b-chat-hf
          edgellama run Llama-2-7b-chat-hf -p "What is the capital of France?"
          edgellama run ./my-checkpoint

A hub id or a checkpoint folder is converted on its first use, and kept in your
model folder (EDGELLAMA_HOME moves it) under a readable name: `edgellama list`.
From then on no network is needed. Then it is `edgellama chat`, which explains
what happens without a terminal."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "run",
        help="fetch, convert, talk: all in one",
        usage="edgellama run MODEL [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    options.add_model(parser, "an .edgellama file, a stored name, a hub id or a checkpoint folder")
    parser.add_argument("--offline", action="store_true", help="use only what is on this machine")
    options.add_method(parser, "how it is converted on its first use, see `edgellama convert` (default auto)")
    chat.add_options(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    model = options.model_of(args)
    chat.check(args)
    try:
        path = _obtain(model, args)
    except KeyboardInterrupt:
        console.note("edgellama: interrupted; nothing was stored")
        return 130
    return chat.converse(args, str(path))


def _obtain(model: str, args: argparse.Namespace) -> Path:
    """The file to run, converted first where `model` is a source that is not stored yet."""
    from edgellama import store
    from edgellama.paths import find_model, is_checkpoint

    if not (is_checkpoint(Path(model).expanduser()) or (store.is_hub_id(model) and not Path(model).exists())):
        return find_model(model)
    try:
        return store.obtain(model, lambda path: _convert(model, path, args), _tell_waiting)
    except ConvertError as error:
        close = store.close_names(model)
        if not close:
            raise
        raise ConvertError(f"{error}; stored under a similar name: {', '.join(close)}") from None


def _convert(model: str, path: Path, args: argparse.Namespace) -> None:
    from edgellama_convert import convert

    if not args.quiet:
        console.note(f"first use of {model}: converting it")
    with conversion_progress(args.quiet) as (progress, receipt_progress):
        report = convert(
            model,
            path,
            method=args.method,
            offline=args.offline,
            n_threads=args.threads,
            progress=progress,
            receipt_progress=receipt_progress,
        )
    if not args.quiet:
        name = path.name.removesuffix(".edgellama")
        console.note(f"stored as {name} ({console.size(report.file_bytes)}); `edgellama rm {name}` frees it")


def _tell_waiting() -> None:
    console.note("another edgellama is converting this model; waiting for it")
