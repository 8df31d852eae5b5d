"""The generation parameters, once: options of `generate`, `chat` and `run`, and what `/set parameter` takes.

Names are the keyword arguments of `llm.generate`; what one means, and whether it is in range, is known there. What is
checked here is only what a command line can tell at once: that a number is one.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgellama.cli.options import natural, number, positive_int, read_file, whole_number

BASIC = "generation"
SAMPLING = "more sampling (all off by default)"
CONSTRAINED = "constrained output (one of; needs edgellama[constrain])"
SEARCH = "beams and speculation"

_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\"}


@dataclass(frozen=True)
class Parameter:
    """One keyword argument of `generate`; `parse` turns a word into its value or raises ArgumentTypeError."""

    name: str
    parse: Callable[[str], Any]
    metavar: str
    help: str
    group: str = BASIC
    flags: tuple[str, ...] = ()
    repeated: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        return self.flags or ("--" + self.name.replace("_", "-"),)


def _above(least: float, most: float = float("inf")) -> Callable[[str], float]:
    within = number(least, most)

    def parse(text: str) -> float:
        value = within(text)
        if value == least:
            raise argparse.ArgumentTypeError(f"must be above {least:g}")
        return value

    return parse


def _stop(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a stop text must not be empty")
    return re.sub(r"\\[ntr\\]", lambda match: _ESCAPES[match[0]], text)


def _mirostat(text: str) -> int:
    if text not in ("0", "2"):
        raise argparse.ArgumentTypeError("0 (off) or 2 is meant")
    return int(text)


def _json_schema(text: str) -> Any:
    """A schema as JSON, or the file that holds one."""
    source = text if text.lstrip().startswith("{") else read_file(text)
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as error:
        where = "" if source is text else f"{text}: "
        raise argparse.ArgumentTypeError(f"{where}not JSON: {error}") from None


_TABLE = (
    Parameter("max_new_tokens", positive_int, "N", "stop after N tokens", flags=("-n", "--max-new-tokens")),
    Parameter("seed", natural, "S", "the same seed gives the same text again", flags=("-s", "--seed")),
    Parameter(
        "temperature",
        number(0),
        "T",
        "0 always takes the likeliest token; 0.8 varies",
        flags=("--temperature", "--temp"),
    ),
    Parameter("top_k", natural, "K", "choose among the K likeliest tokens; 0 is off"),
    Parameter("top_p", _above(0, 1), "P", "... that make up P of the probability"),
    Parameter("min_p", number(0, 1), "P", "... at least P times as likely as the first"),
    Parameter("stop", _stop, "TEXT", "end before TEXT; \\n is a line break; may be repeated", repeated=True),
    Parameter("typical_p", _above(0, 1), "P", "keep the most typical tokens, P of the probability", SAMPLING),
    Parameter("top_n_sigma", number(-1), "N", "keep tokens within N deviations of the first", SAMPLING),
    Parameter("xtc_probability", number(0, 1), "P", "how often to leave out the likeliest tokens", SAMPLING),
    Parameter("xtc_threshold", number(0, 1), "P", "... those at least this likely but the last", SAMPLING),
    Parameter("mirostat", _mirostat, "0|2", "steer the surprise instead of top-k, top-p", SAMPLING),
    Parameter("mirostat_tau", _above(0), "TAU", "... towards this many bits", SAMPLING),
    Parameter("mirostat_eta", _above(0), "ETA", "... at this rate", SAMPLING),
    Parameter("repetition_penalty", _above(0), "X", "divide by X what was said (1 is off)", SAMPLING),
    Parameter("presence_penalty", number(-100), "X", "subtract X from what was said", SAMPLING),
    Parameter("frequency_penalty", number(-100), "X", "... for each time", SAMPLING),
    Parameter("penalty_last_n", whole_number(-1), "N", "penalties look back N tokens; -1 is all", SAMPLING),
    Parameter("no_repeat_ngram_size", natural, "N", "never repeat a run of N tokens", SAMPLING),
    Parameter("dry_multiplier", number(0), "X", "penalize what continues a repetition (0.8)", SAMPLING),
    Parameter("json_schema", _json_schema, "SCHEMA", "JSON of this schema: a file, or JSON itself", CONSTRAINED),
    Parameter("regex", str, "REGEX", "text that matches", CONSTRAINED),
    Parameter("grammar", read_file, "FILE", "text of a GBNF or Lark grammar", CONSTRAINED),
    Parameter("choice", str, "TEXT", "one of these texts; give it several times", CONSTRAINED, repeated=True),
    Parameter("num_beams", positive_int, "N", "search N beams instead of sampling", SEARCH),
    Parameter(
        "prompt_lookup_num_tokens",
        positive_int,
        "N",
        "guess N tokens ahead from the prompt",
        SEARCH,
        flags=("--prompt-lookup",),
    ),
    Parameter("draft_model", str, "MODEL", "guess ahead with a smaller model", SEARCH, flags=("--draft",)),
)
BY_NAME = {parameter.name: parameter for parameter in _TABLE}
AT_START = ("num_beams", "draft_model")
"""Those that a model is opened for: a chat cannot change them."""
SETTABLE = tuple(name for name in BY_NAME if name not in AT_START)


def add_basic(parser: argparse.ArgumentParser, max_new_tokens_help: str) -> None:
    """The handful that everybody knows, without a heading."""
    _add([each for each in _TABLE if each.group == BASIC], parser, {"max_new_tokens": max_new_tokens_help})


def add_all(parser: argparse.ArgumentParser, max_new_tokens_help: str) -> None:
    """All of them, under headings."""
    for title in (BASIC, SAMPLING, CONSTRAINED, SEARCH):
        group: Any = parser.add_argument_group(title)
        if title == CONSTRAINED:
            group = group.add_mutually_exclusive_group()
        _add([each for each in _TABLE if each.group == title], group, {"max_new_tokens": max_new_tokens_help})


def _add(parameters: list[Parameter], target: Any, helps: Mapping[str, str]) -> None:
    for each in parameters:
        target.add_argument(
            *each.options,
            dest=each.name,
            type=each.parse,
            metavar=each.metavar,
            help=helps.get(each.name, each.help),
            action="append" if each.repeated else "store",
        )


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, by name."""
    values = {name: getattr(args, name, None) for name in BY_NAME}
    return {name: value for name, value in values.items() if value is not None}
