"""`edgellama bench`: how fast a model runs on this machine, in llama-bench's columns."""

import argparse
import sys

from edgellama.cli import console, options
from edgellama.paths import find_model

_DESCRIPTION = "Measure how fast a model runs here: prefill (pp), decode (tg); tokens a second."
_EPILOG = """\
example: edgellama bench llama-2-7b.edgellama -p 512 -n 128 -d 0,4096

-p, -n, -d and -b take several numbers with commas between; -p 0 or -n 0 leaves
a test out. `of memory` is the share of the memory's read bandwidth, measured in
turn with the samples: decode reads every weight for each token, so 100 % is the
limit."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("bench", help="measure its speed", description=_DESCRIPTION, epilog=_EPILOG)
    options.add_model(parser)
    add = parser.add_argument
    add("-p", "--n-prompt", type=_numbers, default=[512], metavar="N", help="tokens of prefill (default 512)")
    add("-n", "--n-gen", type=_numbers, default=[128], metavar="N", help="tokens to generate (default 128)")
    add("-d", "--n-depth", type=_numbers, default=[0], metavar="N", help="tokens already in the cache (default 0)")
    add("-b", "--batch", type=_numbers, default=[1], metavar="N", help="sequences at once (default 1)")
    add("-r", "--repetitions", type=options.positive_int, default=5, metavar="N", help="samples a test (default 5)")
    add(
        "--generate",
        type=options.positive_int,
        metavar="N",
        help="also: what `generate` adds to N greedy tokens' passes",
    )
    add("-t", "--threads", type=options.positive_int, metavar="T", help="default: the physical cores")
    add("--kv-cache", choices=("float16", "int8"), default="float16", help="what the cache holds (default float16)")
    options.add_json(parser, "print a list of rows")
    parser.set_defaults(run=run, parser=parser)


def _numbers(text: str) -> list[int]:
    return [options.natural(part) for part in text.split(",")]


def run(args: argparse.Namespace) -> int:
    from edgellama import bench
    from edgellama.format import open_model

    tests = bench.plan(args.n_prompt, args.n_gen, args.n_depth, args.batch)
    if not tests and not args.generate:
        args.parser.error("nothing to measure: -p and -n are both 0")
    if 0 in args.batch:
        args.parser.error("-b must be at least 1")
    with open_model(find_model(options.model_of(args))) as file:
        rows = []
        printer = _Table(f"llama {_billions(bench.parameters(file))} int4", file.size, bench.parameters(file))
        for test, row in zip(
            tests, bench.run(file, tests, args.repetitions, args.threads, args.kv_cache, _progress), strict=True
        ):
            rows.append(row)
            if not args.json:
                _clear()
                printer.show(test, row)
        _clear()
        extra = None
        if args.generate:
            extra = bench.run_generate(file, args.generate, args.repetitions, args.threads, args.kv_cache)
        if args.json:
            console.say_json([row.to_dict() for row in rows] + ([extra.to_dict()] if extra else []))
            return 0
        if rows:
            console.say(f"memory: {rows[-1].bandwidth / 1e9:.1f} GB/s; peak RSS: {rows[-1].peak_rss / 2**20:.0f} MiB")
        if extra:
            console.say(
                f"generate: {extra.generate_ts:.2f} t/s over {extra.n_gen} greedy tokens (bare passes: "
                f"{extra.forward_ts:.2f}); outside the passes {extra.outside_us:.0f} us a token, {extra.overhead:.1%}"
            )
    return 0


class _Table:
    """llama-bench's Markdown table, a row at a time."""

    HEADS = ("model", "size", "params", "backend", "threads", "test", "t/s", "of memory", "TTFT")
    WIDTHS = (20, 10, 8, 7, 7, 16, 21, 9, 8)

    def __init__(self, model: str, size: int, params: int):
        self._fixed = [model, f"{size / 2**30:.2f} GiB", _billions(params), "cpu"]
        self._begun = False

    def show(self, test, row) -> None:
        if not self._begun:
            self._begun = True
            self._line(list(self.HEADS))
            console.say("|" + "|".join("-" * (width + 1) + ":" for width in self.WIDTHS) + "|")
        share = "" if row.bandwidth_share is None else f"{row.bandwidth_share:.0%}"
        ttft = "" if row.ttft_s is None else f"{row.ttft_s:.2f} s"
        rate = f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}"
        self._line([*self._fixed, str(row.n_threads), test.name, rate, share, ttft])

    def _line(self, cells: list[str]) -> None:
        padded = (cell.rjust(width) for cell, width in zip(cells, self.WIDTHS, strict=True))
        console.say("| " + " | ".join(padded) + " |")


def _billions(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"


def _progress(test, repetition: int) -> None:
    if console.is_terminal(sys.stderr):
        sys.stderr.write(f"\r{test.name}, sample {repetition + 1}".ljust(40))
        sys.stderr.flush()


def _clear() -> None:
    if console.is_terminal(sys.stderr):
        sys.stderr.write("\r" + " " * 40 + "\r")
        sys.stderr.flush()
