"""`edgellama perplexity`: how well a model predicts a text."""

import argparse

from edgellama.cli import console, options
from edgellama.cli.opening import get_ready
from edgellama.cli.progress import GETTING_READY, Progress

_DESCRIPTION = "Measure how well a model predicts a text; lower is better."
_EPILOG = """\
example: edgellama perplexity llama-2-7b.edgellama wiki.test.raw

Figures compare only for the same text, --ctx and way to cut it. The default is
llama.cpp's: chunks of --ctx tokens, the second half of each scored, BOS first
if the model's texts begin with it. --stride cuts as Hugging Face's page on
perplexity does: windows of --ctx tokens that begin STRIDE tokens apart."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "perplexity", help="measure how well it predicts a text", description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.add_argument("model_positional", metavar="MODEL", help="an .edgellama file")
    parser.add_argument("file", metavar="FILE", help="a text, UTF-8; - reads stdin")
    add = parser.add_argument
    add("-c", "--ctx", type=options.positive_int, default=512, metavar="N", help="tokens of a window (default 512)")
    add("--stride", type=options.positive_int, metavar="N", help="Hugging Face's windows, this many tokens apart")
    add("--chunks", type=options.positive_int, metavar="N", help="only the first N windows")
    add("-t", "--threads", type=options.positive_int, metavar="T", help="default: the physical cores")
    options.add_kv_cache(parser)
    options.add_device(parser)
    options.add_json(parser)
    add("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    if args.stride is not None and args.stride > args.ctx:
        args.parser.error(f"--stride {args.stride} is more than --ctx {args.ctx}: tokens would be left out")
    if args.ctx < 4:
        args.parser.error("--ctx must be at least 4")
    text = options.read_text(args.file)
    from edgellama.model import load
    from edgellama.perplexity import perplexity

    with load(args.model_positional, args.device, args.ctx, args.threads, args.kv_cache, n_slots=1) as llm:
        get_ready(llm, args.quiet)
        with Progress("perplexity", " windows", quiet=args.quiet, ready_line=GETTING_READY) as progress:
            result = perplexity(
                llm, text, ctx=args.ctx, stride=args.stride, max_windows=args.chunks, progress=progress.update
            )
    if args.json:
        console.say_json({"model": args.model_positional, "file": args.file, "device": args.device, **result.to_dict()})
        return 0
    windows = f"{result.windows} windows of {result.ctx}" + (f", {result.stride} apart" if result.stride else "")
    console.say(f"perplexity {result.perplexity:.4f} ± {result.stderr:.4f} ({result.tokens} tokens scored, {windows})")
    return 0
