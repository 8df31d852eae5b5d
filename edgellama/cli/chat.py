"""`edgellama chat`: talk with a model; on a terminal a chat, else one answer to one message."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgellama.cli import console, options, parameters
from edgellama.cli.conversation import Conversation
from edgellama.cli.opening import opened
from edgellama.cli.progress import Progress
from edgellama.cli.reply import note_end, stream_reply, summary
from edgellama.errors import EdgellamaError

if TYPE_CHECKING:
    from edgellama.cli.partner import ModelPartner

_DESCRIPTION = "Talk with a model. On a terminal a chat begins; /? lists its commands."
_EPILOG = """\
examples: edgellama chat Llama-2-7b-chat-hf
          edgellama chat llama.edgellama -p "What is the capital of France?"
          git diff | edgellama chat llama.edgellama --system "Review this diff."

Without a terminal, all of stdin is one message and only the answer is printed.
Ctrl-C stops the reply, not the chat. Without sampling options the model's own
defaults hold (generation_config.json), else temperature 0.8, top-k 40, top-p
0.95, min-p 0.05."""

_NO_TEMPLATE = (
    "note: this model has no chat template: it continues each message as plain text; --template NAME makes it chat"
)


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model",
        usage="edgellama chat MODEL [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    options.add_model(parser)
    add_options(parser)
    parser.set_defaults(run=run, parser=parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Everything but MODEL: shared with `run`."""
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="answer this and end; - reads stdin")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument(
        "--template",
        type=_template,
        metavar="NAME",
        help="a chat template: llama-2, llama-3, chatml, zephyr, or a file of Jinja",
    )
    options.add_runtime(parser)
    parser.add_argument("--verbose", action="store_true", help="tell the speed after each reply")
    parser.add_argument("-q", "--quiet", action="store_true", help="no remarks, only replies and errors")
    options.add_json(parser, "with -p or stdin: print one JSON object when done, instead of the text")
    parameters.add_all(parser, "stop after N tokens (default: the model's own, else the context)")


def _template(text: str) -> str:
    """A name as it is, a file's content."""
    return options.read_file(text) if Path(text).is_file() else text


def run(args: argparse.Namespace) -> int:
    return converse(args, options.model_of(args))


def check(args: argparse.Namespace) -> None:
    """Wrong usage is told before anything is fetched or opened."""
    if args.prompt is None and not console.is_terminal(sys.stdin):
        args.prompt = "-"
    if args.prompt is None and args.json:
        args.parser.error("--json needs -p or a message on stdin")


def converse(args: argparse.Namespace, model: str) -> int:
    """Open `model`, a file or a stored name, and do what `args` of `add_options` say."""
    check(args)
    message = None if args.prompt is None else options.read_prompt(args.prompt)
    if message is not None and not message.strip():
        raise EdgellamaError("the message is empty: give one with -p, or on stdin")
    from edgellama.cli.partner import ModelPartner, Patience

    given = parameters.given(args)
    with opened(args, model, given) as (llm, extra), Progress("read", unit="tokens", quiet=_quiet(args)) as bar:
        partner = ModelPartner(llm, args.template, extra, Patience(bar))
        if partner.template is None and not args.quiet:
            console.note(_NO_TEMPLATE)
        name = llm.file.path.name.removesuffix(".edgellama")
        talk = Conversation(name, args.system, [], given)
        if message is not None:
            return _answer(partner, talk, message, args)
        from edgellama.cli.repl import HOW_TO_LEAVE, Repl

        repl = Repl(partner, talk, verbose=args.verbose)
        if not args.quiet:
            console.note(f"{name}; /? for help, {HOW_TO_LEAVE}", "dim")
        repl.run()
        return 0


def _quiet(args: argparse.Namespace) -> bool:
    """A log wants no progress of each prompt."""
    return args.quiet or not console.is_terminal(sys.stderr)


def _answer(partner: "ModelPartner", talk: Conversation, message: str, args: argparse.Namespace) -> int:
    """One message, one reply."""
    talk.messages.append({"role": "user", "content": message})
    with partner.reply(talk) as stream:
        code = stream_reply(stream, _ignore if args.json else console.write)
        result = stream.result
    if args.json:
        console.say_json(result.to_dict())
    elif console.is_terminal(sys.stdout) or not result.text.endswith("\n"):
        console.say("")
    if code:
        console.note(f"edgellama: interrupted after {len(result.token_ids)} tokens")
    elif args.verbose:
        console.note(summary(result))
    elif not args.quiet and console.is_terminal(sys.stderr):
        end = note_end(result, room=partner.room(result))
        if end:
            console.note(end, "dim")
    return code


def _ignore(_: str) -> None:
    """With --json the text comes at the end, within the object."""
