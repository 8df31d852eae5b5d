"""`edgellama demo`: convert the small model that ships with the package and let it tell a story."""

import argparse
import os
import time
from pathlib import Path

from edgellama.cli import console, options
from edgellama.cli.reply import stream_reply

_DESCRIPTION = "Convert the small model that ships with edgellama, and let it tell a story."
_EPILOG = """\
examples: edgellama demo
          edgellama demo -p "Tom had a red ball." --seed 3

Needs no network. The file is written to the user's cache folder (EDGELLAMA_HOME
moves it; -o names another place)."""
_PROMPT = "Once upon a time"
_MAX_NEW_TOKENS = 120  # about ten lines of 80 characters: the demo fits one screen
_SEED = 7


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "demo", help="try it: no network, no model needed", description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.add_argument("-p", "--prompt", default=_PROMPT, metavar="TEXT", help=f'default: "{_PROMPT}"; - reads stdin')
    options.add_sampling(parser, f"default: {_MAX_NEW_TOKENS}")
    options.add_runtime(parser)
    parser.add_argument("-o", "--out", metavar="OUT", help="where to write the .edgellama file")
    parser.set_defaults(run=run, parser=parser, seed=_SEED)


def run(args: argparse.Namespace) -> int:
    sampling = options.sampling_of(args)
    prompt = options.read_prompt(args.prompt)
    from edgellama_convert import convert

    from edgellama.demo import checkpoint_dir
    from edgellama.model import load
    from edgellama.paths import cache_dir

    out = Path(args.out) if args.out else cache_dir() / "demo.edgellama"
    out.parent.mkdir(parents=True, exist_ok=True)
    source = Path(checkpoint_dir())
    report = convert(source, out, offline=True)
    console.note(
        f"read   {_short(source)}: a Llama of {console.count(report.weights)} weights, "
        f"{console.size(report.source_bytes)}"
    )
    console.note(
        f"wrote  {_short(report.out)}: {console.size(report.file_bytes)}, "
        f"{report.bits_per_weight:.2f} bits per weight, in {console.seconds(report.seconds)}"
    )
    begun = time.perf_counter()
    with load(out, device=args.device, n_ctx=args.ctx, n_threads=args.threads) as llm:
        stream = llm.generate(prompt, args.max_new_tokens or _MAX_NEW_TOKENS, **sampling, stream=True)
        console.note()
        console.say(prompt, end="")
        code = stream_reply(stream)
        console.say("")
        result = stream.result
    spent = time.perf_counter() - begun
    console.note()
    console.note(_speed(result, spent, args.device))
    console.note(f'next   edgellama generate {_short(report.out)} -p "The little dog" -n 60')
    console.note("       edgellama convert meta-llama/Llama-2-7b-hf     (or a local folder; any Llama)")
    return code


def _speed(result, spent: float, device: str) -> str:
    timings = result.timings
    rate = f"{timings.decode_tps:.0f} tokens/s, " if timings.decode_tps else ""
    first = f"first one after {console.seconds(timings.ttft_s)}, " if timings.ttft_s is not None else ""
    return f"speed  {len(result.token_ids)} tokens: {rate}{first}{console.seconds(spent)} in all ({device})"


def _short(path: Path) -> str:
    """`path` as a shell on this system takes it, with ~ for the home folder where that is shorter."""
    text, home = str(path), os.path.expanduser("~")
    if os.name != "nt" and len(home) > 1 and text.startswith(home + os.sep) and " " not in text:
        return "~" + text[len(home) :]
    return f'"{text}"' if " " in text else text
