"""Options that several verbs share, and the types of their values: a bad one is wrong usage (exit 2)."""

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgellama.devices import DEVICES, KV_CACHES
from edgellama.errors import EdgellamaError

_MAX_FILE_BYTES = 1 << 20
_MODEL = "an .edgellama file, or a stored model's name"


def add_model(parser: argparse.ArgumentParser, what: str = _MODEL) -> None:
    parser.add_argument("model_positional", nargs="?", metavar="MODEL", help=what)
    parser.add_argument("-m", "--model", dest="model_option", metavar="MODEL", help="the same, as an option")


def model_of(args: argparse.Namespace) -> str:
    """The one MODEL that was given. Wrong usage is the caller's `parser.error` (exit 2)."""
    given = [each for each in (args.model_positional, args.model_option) if each is not None]
    if len(given) != 1:
        args.parser.error(f"give one MODEL, {_MODEL}" if not given else "MODEL was given twice")
    return given[0]


def add_runtime(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-t", "--threads", type=positive_int, metavar="T", help="default: the physical cores this process may use"
    )
    parser.add_argument("-c", "--ctx", type=positive_int, metavar="N", help="positions in the KV cache")
    add_kv_cache(parser)
    add_device(parser)


def add_kv_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-cache", default="float16", choices=KV_CACHES, metavar="K", help="float16 (default); int8: half the memory"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="cpu",
        choices=DEVICES,
        metavar="D",
        help="cpu (default); cuda; auto (cuda if there is one); reference (slow, exact); torch-cpu",
    )


def runtime_of(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `load`."""
    return {"device": args.device, "n_ctx": args.ctx, "n_threads": args.threads, "kv_cache": args.kv_cache}


def add_json(parser: argparse.ArgumentParser, what: str = "print one JSON object") -> None:
    parser.add_argument("--json", action="store_true", help=what)


def positive_int(text: str) -> int:
    return _int(text, 1)


def natural(text: str) -> int:
    return _int(text, 0)


def whole_number(least: int) -> Callable[[str], int]:
    return lambda text: _int(text, least)


def _int(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not least <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is too {'small' if value < least else 'large'}")
    return value


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (math.isfinite(value) and least <= value <= most):
            limits = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; {limits} is meant")
        return value

    return parse


def byte_size(text: str) -> int:
    """
    >>> byte_size("1.5G"), byte_size("800MB"), byte_size("4096")
    (1500000000, 800000000, 4096)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 800M, 1.5G or a number of bytes")
    value, unit, binary = match.groups()
    result = int(float(value) * (1024 if binary else 1000) ** " kmgt".index(unit or " "))
    if result < 1:
        raise argparse.ArgumentTypeError("the size must be at least one byte")
    return result


def read_file(name: str) -> str:
    """The text of a small file that an option names."""
    path = Path(name).expanduser()
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise argparse.ArgumentTypeError(f"{name} has more than {_MAX_FILE_BYTES >> 20} MB")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{name} is not UTF-8 text") from None
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{name}: {(error.strerror or str(error)).lower()}") from None


def read_prompt(text: str) -> str:
    """`text`, or stdin for "-" (without its last line break)."""
    if text != "-":
        return text
    if sys.stdin is None:
        raise EdgellamaError("there is no stdin to read the prompt from")
    data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
    try:
        prompt = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EdgellamaError(f"stdin is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None
    return prompt.removesuffix("\n").removesuffix("\r")


def add_method(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--method", default="auto", choices=("auto", "search", "gptq", "rtn"), help=what)


def read_text(path: str) -> str:
    """The text of a UTF-8 file, or of stdin for "-"."""
    if path == "-":
        return read_prompt(path)
    with open(path, "rb") as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EdgellamaError(f"{path} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None
