"""`edgellama generate`: continue a prompt, streamed."""

import argparse
import sys

from edgellama.cli import console, options, parameters
from edgellama.cli.opening import opened
from edgellama.cli.reply import start, stream_reply, summary

_DESCRIPTION = "Continue a prompt. The text goes to stdout as it is made, remarks to stderr."
_EPILOG = """\
example: edgellama generate llama-2-7b.edgellama -p "Once upon a time" -n 100

Without sampling options the model's own defaults hold (generation_config.json),
else temperature 0.8, top-k 40, top-p 0.95, min-p 0.05. Ctrl-C ends the reply."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt",
        usage="edgellama generate MODEL -p TEXT [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    options.add_model(parser)
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="the text to continue; - reads stdin")
    options.add_runtime(parser)
    options.add_json(parser, "print one JSON object when done, instead of the text")
    parser.add_argument("--logprobs", type=options.natural, metavar="K", help="... with the K likeliest of each token")
    parser.add_argument("-q", "--quiet", action="store_true", help="no remarks, only the text and errors")
    parameters.add_all(parser, "stop after N tokens (default: the model's own, else 256)")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    model = options.model_of(args)
    given = parameters.given(args)
    if args.logprobs is not None:
        if not args.json:
            args.parser.error("--logprobs needs --json")
        given |= {"logprobs": True, "top_logprobs": args.logprobs}
    prompt = options.read_prompt(args.prompt)
    with opened(args, model, given) as (llm, extra):
        stream = start(llm.generate, prompt, **given, **extra)
        code = stream_reply(stream, _ignore if args.json else console.write)
        result = stream.result
        room = llm.n_ctx - len(result.prompt_token_ids)
    if args.json:
        console.say_json(result.to_dict())
    elif console.is_terminal(sys.stdout) or not result.text.endswith("\n"):
        console.say("")
    if code:
        console.note(f"edgellama: interrupted after {len(result.token_ids)} tokens")
    elif not (args.quiet or args.json):
        console.note(summary(result, context_full=len(result.token_ids) == room))
    return code


def _ignore(_: str) -> None:
    """With --json the text comes at the end, within the object."""
