"""What choosing a token costs: microseconds a token for `Sampler`, from logits to a recorded id.

    python benchmarks/sampling.py [--vocab 128256] [--history 4000] [--tokens 200] [--json]

Two kinds of logits: "model" has the shape of a language model's (few likely tokens, a long tail), "flat" is noise,
where half the vocabulary matters: the worst case for filters. The history is a text that repeats itself in places.
"""

import argparse
import json
import statistics
import time

import numpy as np

from edgellama.sampling import Sampler, SamplingParams

OFF = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "no_repeat_ngram_size": 4}
PENALTIES |= {"dry_multiplier": 0.8, "dry_sequence_breaker_ids": (13, 25), "logit_bias": {7: -1.0, 9: 2.0}}
PENALTIES |= {"bad_words_ids": [[11], [12, 13], [14, 15, 16]], "min_new_tokens": 10_000}
CASES = {
    "greedy": {"temperature": 0.0},
    "defaults (top_k 40, top_p, min_p)": {},
    "temperature only": OFF,
    "top_p 0.95": OFF | {"top_p": 0.95},
    "typical_p 0.9": OFF | {"typical_p": 0.9},
    "min_p 0.05": OFF | {"min_p": 0.05},
    "top_n_sigma 1": OFF | {"top_n_sigma": 1.0},
    "mirostat 2": {"mirostat": 2},
    "penalties and bans, greedy": PENALTIES | {"temperature": 0.0},
    "everything": PENALTIES | {"top_n_sigma": 2.0, "typical_p": 0.9, "xtc_probability": 0.5},
    "everything, top_k 0": PENALTIES | {"top_k": 0, "top_n_sigma": 2.0, "typical_p": 0.9, "xtc_probability": 0.5},
}


def make_logits(kind: str, vocab: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [16, vocab]"""
    logits = rng.normal(0, 2 if kind == "model" else 1, (16, vocab))
    if kind == "model":
        for row in logits:
            row[rng.choice(vocab, 300, replace=False)] += rng.exponential(4, 300) + 4
    return logits.astype(np.float32)


def make_history(size: int, vocab: int, rng: np.random.Generator) -> np.ndarray:
    """Zipf-like ids int32 [size], with a phrase of 12 tokens coming back every 200."""
    ids = np.minimum(rng.zipf(1.2, size), vocab - 1).astype(np.int32)
    phrase = ids[:12].copy()
    for start in range(0, size - 12, 200):
        ids[start : start + 12] = phrase
    return ids


def measure(params: SamplingParams, logits: np.ndarray, history: np.ndarray, tokens: int) -> float:
    """Median microseconds for one call and one accept."""
    sampler = Sampler(params, prompt_ids=history, eos_ids={2})
    times = []
    for step in range(tokens):
        row = logits[step % len(logits)]
        begun = time.perf_counter()
        sampler.accept(sampler(row))
        times.append(time.perf_counter() - begun)
    return statistics.median(times[5:]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--history", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    history = make_history(args.history, args.vocab, rng)
    logits = {kind: make_logits(kind, args.vocab, rng) for kind in ("model", "flat")}
    rows = []
    for name, values in CASES.items():
        params = SamplingParams(**{"seed": 1, **values})
        times = {kind: measure(params, each, history, args.tokens) for kind, each in logits.items()}
        rows.append({"case": name, **{f"{kind}_us": round(value, 1) for kind, value in times.items()}})
    if args.json:
        print(json.dumps({"vocab": args.vocab, "history": args.history, "rows": rows}))
        return
    print(f"vocabulary {args.vocab}, history {args.history} tokens; us a token, median of {args.tokens - 5}")
    print(f"{'':36s}{'model':>8s}{'flat':>8s}")
    for row in rows:
        print(f"{row['case']:36s}{row['model_us']:8.0f}{row['flat_us']:8.0f}")


if __name__ == "__main__":
    main()
