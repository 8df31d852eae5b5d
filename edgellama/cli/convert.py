"""`edgellama convert`: a Hugging Face Llama checkpoint becomes one .edgellama file."""

import argparse
from collections.abc import Mapping
from typing import Any

from edgellama.cli import console, options
from edgellama.cli.progress import conversion_progress
from edgellama.devices import CALIBRATION_DEVICES

_DESCRIPTION = "Make one .edgellama file from a Hugging Face Llama checkpoint."
_EPILOG = """\
examples: edgellama convert meta-llama/Llama-2-7b-hf -o llama-2-7b.edgellama
          edgellama convert ./my-checkpoint
          edgellama convert ./my-llama --method gptq --calibration ./my-texts
          edgellama convert ./my-llama --bpw 4.5

A hub id is fetched through huggingface_hub, with its cache and token (HF_HOME,
HF_TOKEN). The checkpoint is read tensor by tensor: memory stays far below its
size. Interrupted, it leaves nothing behind.

--method gptq runs calibration text through the model and lets each weight make
up for the errors before it: much more exact, and slow. Without --method that is
done for small models (up to 200 million weights in the layers: minutes); others
get `search`, which needs no text. It takes a minute and a half for a 7B model,
gptq three hours, or minutes on a CUDA GPU, which is used where torch finds one
(--device). Interrupted, it goes on when the same command is given again; given
with another device, it begins anew. The bytes it writes depend on the device.

--bpw spends further bits where they help most: what rounding each matrix does
to the model's answers is measured with text, and the worst get 8 bits instead
of 4 until the layers have the bits per weight that you state.

When it is written, the model is measured against its source on a short text of
several languages; `edgellama info` shows the figures, `verify` checks answers
that are kept with them. For a 7B model this takes about as long again."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="make an .edgellama file from a checkpoint",
        usage="edgellama convert SOURCE [-o OUT] [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("source", metavar="SOURCE", help="a hub id (org/name) or a local folder with safetensors")
    parser.add_argument("-o", "--out", metavar="OUT", help="default: the source's last part + .edgellama, here")
    options.add_method(
        parser, "gptq (calibrated: best, slow), search, rtn (plain rounding); auto (default): gptq for small models"
    )
    parser.add_argument(
        "--calibration",
        action="append",
        metavar="TEXT",
        help="for gptq: builtin (default), self (the model's own), a text file or a folder; several share the tokens",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=options.positive_int,
        metavar="N",
        help="tokens of calibration text (default 65536 for small models, 32768 for others)",
    )
    parser.add_argument(
        "--bpw",
        type=float,
        metavar="BITS",
        help="bits per weight in the layers' matrices, e.g. 4.5: those that gain most get 8 bits (default: all have 4)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=CALIBRATION_DEVICES,
        metavar="D",
        help="for gptq: auto (default: cuda if there is one), cpu, cuda (needs edgellama[cuda]), torch-cpu",
    )
    parser.add_argument(
        "--lm-head-bits", type=int, default=8, choices=(4, 8, 16), help="bits of the output layer (default 8)"
    )
    parser.add_argument(
        "--add-pad-token",
        nargs="?",
        const="<pad>",
        metavar="TOKEN",
        help="a token to pad with (default <pad>); its rows are zero",
    )
    parser.add_argument(
        "--num-key-value-heads",
        type=options.positive_int,
        metavar="N",
        help="average the heads of keys and values to N",
    )
    parser.add_argument("--no-receipt", action="store_true", help="do not measure the quality against the source")
    parser.add_argument("--max-ram", type=options.byte_size, metavar="SIZE", help="stay below this, e.g. 1.5G")
    parser.add_argument("--revision", metavar="REV", help="a hub branch, tag or commit")
    parser.add_argument("--offline", action="store_true", help="use only what is on this machine")
    parser.add_argument(
        "-t",
        "--threads",
        type=options.positive_int,
        metavar="T",
        help="default: the physical cores this process may use",
    )
    options.add_json(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no summary")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    if args.method not in ("auto", "gptq") and (args.calibration or args.calibration_tokens):
        args.parser.error(f"--method {args.method} is not calibrated: drop --calibration, or take --method gptq")
    if args.method not in ("auto", "gptq") and args.device not in ("auto", "cpu"):
        args.parser.error(f"--method {args.method} runs on the CPU: drop --device, or take --method gptq")
    from edgellama_convert import convert
    from edgellama_convert.conversion import is_begun

    try:
        with conversion_progress(args.quiet) as (progress, receipt_progress):
            report = convert(
                args.source,
                args.out,
                method=args.method,
                bpw=args.bpw,
                lm_head_bits=args.lm_head_bits,
                calibration=args.calibration,
                calibration_tokens=args.calibration_tokens,
                device=args.device,
                max_ram=args.max_ram,
                revision=args.revision,
                offline=args.offline,
                n_threads=args.threads,
                progress=progress,
                receipt=not args.no_receipt,
                receipt_progress=receipt_progress,
                add_pad_token=args.add_pad_token,
                num_key_value_heads=args.num_key_value_heads,
            )
    except KeyboardInterrupt:
        kept = "; the same command goes on from here" if is_begun(args.source, args.out) else ""
        console.note(f"edgellama: interrupted; nothing was written{kept}")
        return 130
    if args.json:
        console.say_json(report.to_dict())
        return 0
    console.say(str(report.out))
    if not args.quiet:
        for line in summary(report):
            console.note(line)
    return 0


def summary(report) -> list[str]:
    """What was written, how good and how fast; each line fits 80 columns with names of the usual length."""
    name, error = report.worst_tensor
    memory = f"; peak memory {console.size(report.peak_rss)}" if report.peak_rss else ""
    return [
        f"size   {console.size(report.source_bytes)} -> {console.size(report.file_bytes)}, "
        f"{console.count(report.weights)} weights",
        f"method {report.method}{_where(report.device)}{_better(report.method)}",
        f"bits   {report.bits_per_weight:.2f} per weight; {report.linear_bits_per_weight:.2f} in the layers' matrices, "
        f"{report.lm_head_bits} in the output layer",
        *(
            []
            if report.bpw is None
            else [f"mixed  {report.int8_matrices} of {report.layer_matrices} matrices in 8 bits"]
        ),
        f"error  at most {error:.1%} (relative rms), {name.removesuffix('.weight')}",
        *([f"cost   {quality_line(report.quality)}"] if report.quality else []),
        f"time   {console.seconds(report.seconds)}, {console.count(report.weights_per_second)} weights/s{memory}",
        *(f"note   {line}" for line in [*_ignored(report.ignored), *report.warnings]),
        f"next   edgellama {_next(report)}",
    ]


def _where(device: str | None) -> str:
    return "" if device in (None, "cpu") else f" on {device}"


def _better(method: str) -> str:
    return "" if method == "gptq" else "; --method gptq is more exact, and slow"


def quality_line(quality: Mapping[str, Any]) -> str:
    """The receipt's figures on one line; they may come from a file that somebody made up."""

    def number(key: str, pattern: str = "{:.4g}") -> str:
        value = quality.get(key)
        return pattern.format(value) if isinstance(value, int | float) else "?"

    return (
        f"KL {number('kl_mean')} to the source (1 % of tokens above {number('kl_p99')}), "
        f"top-1 agreement {number('top1', '{:.1%}')}, "
        f"perplexity {number('perplexity')} (source {number('source_perplexity')})"
    )


def _ignored(tensors: Mapping[str, str]) -> list[str]:
    """One line for each reason to leave tensors out, with the first of them."""
    names: dict[str, list[str]] = {}
    for name, reason in tensors.items():
        names.setdefault(reason, []).append(name)
    return [
        f"ignored {first}{f' and {len(others)} more (--json names all)' if others else ''}: {reason}"
        for reason, (first, *others) in names.items()
    ]


def _next(report) -> str:
    from edgellama.format import has_tokenizer

    path = console.shell_path(report.out)
    return f'generate {path} -p "Once upon a time"' if has_tokenizer(report.files) else f"info {path}"
