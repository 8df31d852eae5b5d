"""`edgellama demo`: convert the small model that ships with the package and let it tell a story."""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from edgellama.cli import console, options, parameters
from edgellama.cli.opening import get_ready
from edgellama.cli.progress import GETTING_READY, Progress
from edgellama.cli.reply import stream_reply
from edgellama.demo import PROMPTS, checkpoint_dir

_DESCRIPTION = "Convert the small model that ships with edgellama, and let it tell a story."
_EPILOG = """\
examples: edgellama demo
          edgellama demo -p "Tom had a red ball." --seed 3

Needs no network. The file is written to the user's cache folder (EDGELLAMA_HOME
moves it; -o names another place)."""
_MAX_NEW_TOKENS = 260  # at most 15 lines of 80 characters: the demo fits one screen
_SEED = 2  # a story that ends by itself within that, for the shipped checkpoint


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "demo", help="try it: no network, no model needed", description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.add_argument(
        "-p", "--prompt", default=PROMPTS[0], metavar="TEXT", help=f'default: "{PROMPTS[0]}"; - reads stdin'
    )
    parameters.add_basic(parser, f"default: {_MAX_NEW_TOKENS}")
    options.add_runtime(parser)
    parser.add_argument("-o", "--out", metavar="OUT", help="where to write the .edgellama file")
    parser.set_defaults(run=run, parser=parser, seed=_SEED)


def run(args: argparse.Namespace) -> int:
    given = {"max_new_tokens": _MAX_NEW_TOKENS, **parameters.given(args)}
    prompt = options.read_prompt(args.prompt)
    from edgellama.model import load
    from edgellama.paths import cache_dir
    from edgellama_convert import convert

    out = Path(args.out) if args.out else cache_dir() / "demo.edgellama"
    out.parent.mkdir(parents=True, exist_ok=True)
    source = Path(checkpoint_dir())
    with Progress("convert", unit="weights", ready_line=GETTING_READY) as progress:
        report = convert(source, out, method="search", offline=True, progress=progress.update)
    console.note(
        f"read   {console.shell_path(source)} "
        f"({console.count(report.weights)} weights, {console.size(report.source_bytes)})"
    )
    console.note(
        f"wrote  {console.shell_path(report.out)} ({console.size(report.file_bytes)}, "
        f"{report.bits_per_weight:.2f} bits per weight, {console.seconds(report.seconds)})"
    )
    begun = time.perf_counter()
    with load(out, **options.runtime_of(args)) as llm:
        get_ready(llm, quiet=False, look="note   ")
        console.note()
        stream = llm.generate(prompt, **given, stream=True)
        push, flush = _writer()
        push(prompt)
        code = stream_reply(stream, push)
        flush()
        console.say("")
        result = stream.result
    spent = time.perf_counter() - begun
    console.note()
    console.note(_speed(result, spent, args.device))
    console.note(f'next   edgellama generate {console.shell_path(report.out)} -p "There once was"')
    console.note("       edgellama convert meta-llama/Llama-2-7b-hf   (or a local folder)")
    return code


def _writer() -> tuple[Callable[[str], None], Callable[[], None]]:
    """How the story is written, piece by piece and at its end: words unbroken on a terminal, as it is elsewhere."""
    if not console.is_terminal(sys.stdout):
        return console.write, lambda: None
    wrap = console.WordWrap(console.write, shutil.get_terminal_size().columns)
    return wrap.push, wrap.flush


def _speed(result, spent: float, device: str) -> str:
    timings = result.timings
    rate = f" at {timings.decode_tps:.0f}/s" if timings.decode_tps else ""
    first = f", the first after {console.seconds(timings.ttft_s)}" if timings.ttft_s is not None else ""
    return f"speed  {len(result.token_ids)} tokens{rate}{first}; {console.seconds(spent)} in all ({device})"
