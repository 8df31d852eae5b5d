"""`edgellama compare`: how far a model is from its source."""

import argparse

from edgellama.cli import console, options
from edgellama.cli.progress import GETTING_READY, Progress

_DESCRIPTION = "Measure how far a model is from its source: KL divergence, top-1, perplexity."
_EPILOG = """\
example: edgellama compare my-llama.edgellama ./my-llama book.txt

SOURCE is a checkpoint folder, a hub id or another .edgellama file of the same
model. Both are computed in float32, layer by layer, in bounded memory; what
differs is the weights alone. Text is cut as `edgellama perplexity` does it."""
_WORST = 5


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "compare", help="measure how far it is from its source", description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.add_argument("model_positional", metavar="MODEL", help="an .edgellama file, or a stored model's name")
    parser.add_argument("source", metavar="SOURCE", help="what it was made from, or another .edgellama file")
    parser.add_argument("file", metavar="FILE", help="a text, UTF-8; - reads stdin")
    add = parser.add_argument
    add("-c", "--ctx", type=options.positive_int, default=512, metavar="N", help="tokens of a window (default 512)")
    add("--chunks", type=options.positive_int, metavar="N", help="only the first N windows")
    add("--plot", metavar="PNG", help="draw the error of each layer; needs edgellama[plot]")
    add("--revision", metavar="REV", help="a hub branch, tag or commit")
    add("--offline", action="store_true", help="use only what is on this machine")
    add("-t", "--threads", type=options.positive_int, metavar="T", help="default: the physical cores")
    options.add_json(parser)
    add("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    if args.ctx < 4:
        args.parser.error("--ctx must be at least 4")
    text = options.read_text(args.file)
    from edgellama.paths import find_model
    from edgellama_convert.comparison import compare
    from edgellama_convert.plot import draw, require_matplotlib

    if args.plot is not None:
        require_matplotlib()
    model = find_model(args.model_positional)
    with Progress("compare", "weights", quiet=args.quiet, ready_line=GETTING_READY) as progress:
        result = compare(
            model,
            args.source,
            text,
            ctx=args.ctx,
            max_windows=args.chunks,
            revision=args.revision,
            offline=args.offline,
            n_threads=args.threads,
            progress=progress.update,
        )
    if args.plot is not None:
        draw(result, args.plot, title=f"{model.name} and {args.source}")
    if args.json:
        console.say_json({"model": str(model), "source": args.source, "file": args.file, **result.to_dict()})
        return 0
    worst = sorted(result.tensor_errors.items(), key=lambda item: -item[1])[:_WORST]
    console.say(
        console.table(
            [
                ("KL divergence", f"{result.kl_mean:.4g} nats a token; 1 % of tokens above {result.kl_p99:.4g}"),
                ("top-1 agreement", f"{result.top1:.1%}"),
                ("perplexity", f"{result.perplexity:.4f} (source {result.source_perplexity:.4f})"),
                ("scored", f"{result.tokens} tokens of {result.windows} windows of {result.ctx}"),
                ("after the layers", f"{result.layer_errors[-1]:.1%} relative rms error"),
                *(("worst weights" if i == 0 else "", f"{error:.1%} {name}") for i, (name, error) in enumerate(worst)),
            ]
        )
    )
    return 0
