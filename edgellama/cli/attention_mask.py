"""`edgellama attention-mask`: what each token of a text can see, or looks at."""

import argparse
import sys

from edgellama.cli import console, options
from edgellama.errors import EdgellamaError

_DESCRIPTION = "Show what each token of a text can see; with --layer, how much it looks at each."
_EPILOG = """\
examples: edgellama attention-mask my-llama -p "Hello this is a test"
          edgellama attention-mask my-llama -p "Hello this is a test" -o mask.png
          edgellama attention-mask my-llama -p "..." --layer 3 --head 1 -o weights.svg

Layers and heads count from 0; without --head the mean of all heads is shown. The
weights are the float32 reference's, so a large model takes its time. Pictures
need matplotlib: pip install "edgellama[plot]"."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "attention-mask",
        help="show what each token can see",
        usage="edgellama attention-mask MODEL -p TEXT [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    options.add_model(parser)
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="the text; - reads stdin")
    parser.add_argument("-o", "--out", metavar="FILE", help="write a picture (.png, .svg) instead")
    parser.add_argument("--layer", type=options.natural, metavar="N", help="attention weights of this layer")
    parser.add_argument("--head", type=options.natural, metavar="N", help="... and of this head")
    options.add_json(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    model = options.model_of(args)
    if args.head is not None and args.layer is None:
        args.parser.error("--head needs --layer")
    text = options.read_prompt(args.prompt)
    from edgellama.visualize.attention import attention_of
    from edgellama.visualize.picture import check_path
    from edgellama.visualize.text import show

    try:
        if args.out is not None:
            check_path(args.out)
        attention = attention_of(model, text, layer=args.layer, head=args.head)
    except ValueError as error:
        raise EdgellamaError(str(error)) from None
    if args.out is not None:
        attention.save(args.out)
    if args.json:
        numbers = attention.mask.astype(int) if attention.weights is None else attention.weights.astype(float)
        console.say_json(
            {
                "title": attention.title,
                "ids": attention.ids,
                "tokens": attention.labels,
                "layer": attention.layer,
                "head": attention.head,
                "mask" if attention.weights is None else "weights": numbers.tolist(),
            }
        )
    elif args.out is not None:
        console.say(args.out)
    else:
        show(attention, sys.stdout)
    return 0
