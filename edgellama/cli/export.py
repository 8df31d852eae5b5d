"""`edgellama export`: write the dequantized model as a checkpoint that other programs load."""

import argparse

from edgellama.cli import console, options
from edgellama.paths import find_model

_DESCRIPTION = "Write the dequantized weights as a checkpoint that other programs load."
_EPILOG = """\
example: edgellama export llama-2-7b.edgellama --to hf llama-2-7b-int4-hf

The folder loads with transformers' AutoModelForCausalLM.from_pretrained: the
very weights edgellama computes with, so anyone can check its results."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "export", help="write the dequantized checkpoint", description=_DESCRIPTION, epilog=_EPILOG
    )
    options.add_model(parser)
    parser.add_argument(
        "--to", nargs=2, required=True, metavar=("FORMAT", "DIR"), help="FORMAT is hf (Hugging Face safetensors)"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    options.add_json(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    kind, directory = args.to
    if kind != "hf":
        args.parser.error(f"cannot export to {kind!r}; --to hf DIR is what there is")
    path = find_model(options.model_of(args))
    from edgellama_convert import export_hf

    report = export_hf(path, directory, dtype=args.dtype)
    if args.json:
        console.say_json(report.to_dict())
    else:
        console.say(f"{directory}")
        console.note(f"load it with: {report.auto_class}.from_pretrained({str(directory)!r})")
    return 0
