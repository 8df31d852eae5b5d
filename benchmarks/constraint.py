"""What constrained output costs: microseconds a token for `Constraint`, at a vocabulary of 128,256.

    python benchmarks/constraint.py [--tokens 300]

The vocabulary is made up (words of English syllables, punctuation, digits, some Chinese); tokens are drawn at random
from those allowed, with ends rare, so that texts get long.
"""

import argparse
import random
import time

import numpy as np

from edgellama.constraint import make_constraint

VOCAB, BOS, EOS = 128_256, 128_000, 128_001
SYLLABLES = "th e in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co".split()
PUNCTUATION = "(){}[]\"'.,:;<>=+-*/\n\t 0123456789"
JSON_GRAMMAR = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""
STRING = {"type": "string"}
RECORD = {"name": STRING, "age": {"type": "integer"}, "tags": {"type": "array", "items": STRING}}
RECORD |= {"kind": {"enum": ["person", "place", "thing"]}, "when": {"type": "string", "format": "date"}}
CASES = {
    "JSON schema, a record": {"json_schema": {"type": "object", "properties": RECORD, "required": list(RECORD)}},
    "JSON schema, any object": {"json_schema": {"type": "object"}},
    "regex": {"regex": r"([a-z ]+, ){3}[0-9]{3}(-[A-Z]{2}){1,50}"},
    "choice of 100": {"choice": [f"{number} {SYLLABLES[number % 30] * 9}" for number in range(100)]},
    "GBNF, JSON": {"grammar": JSON_GRAMMAR},
    "Lark, arithmetic": {"grammar": 'start: term (/[-+]/ term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]+/'},
}


class MadeUpTokenizer:
    def __init__(self) -> None:
        dice = random.Random(0)
        words: dict[str, None] = {}
        while len(words) < BOS:
            word = "".join(dice.choice(SYLLABLES) for _ in range(dice.randint(1, 5)))
            kind = dice.random()
            if kind < 0.5:
                word = " " + word
            elif kind < 0.6:
                word = word.capitalize()
            elif kind < 0.7:
                word = dice.choice(PUNCTUATION) * dice.randint(1, 3) + word
            elif kind < 0.8:
                word = "".join(dice.choice(PUNCTUATION) for _ in range(dice.randint(2, 5)))
            elif kind < 0.82:
                word = "".join(chr(dice.randint(0x4E00, 0x9000)) for _ in range(2))
            if len(word) > 1:
                words[word] = None
        self.special_ids = frozenset({BOS, EOS})
        self._tokens = [bytes([byte]) for byte in range(256)] + [word.encode() for word in words]

    def token_bytes(self) -> list[bytes]:
        return [*self._tokens[:BOS], b"<s>", b"</s>"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=300)
    tokens = parser.parse_args().tokens
    tokenizer, rng = MadeUpTokenizer(), np.random.default_rng(0)
    begun = time.perf_counter()
    make_constraint(tokenizer, [EOS], VOCAB, regex="a")  # type: ignore[arg-type]
    print(f"preparing the tokenizer: {time.perf_counter() - begun:.2f} s; below: us a token for mask and accept")
    print(f"{'':26s}{'build ms':>9s}{'median':>8s}{'mean':>8s}{'99 %':>8s}{'most':>8s}")
    for name, option in CASES.items():
        begun = time.perf_counter()
        fresh = make_constraint(tokenizer, [EOS], VOCAB, **option)  # type: ignore[arg-type]
        build, times, constraint = time.perf_counter() - begun, [], fresh.fork()
        for _ in range(tokens):
            logits = np.zeros(VOCAB, np.float32)
            begun = time.perf_counter()
            constraint.mask(logits)
            spent = time.perf_counter() - begun
            allowed = np.flatnonzero(logits == 0)
            token = int(rng.choice(allowed))
            begun = time.perf_counter()
            constraint.accept(token)
            times.append(spent + time.perf_counter() - begun)
            if token == EOS or constraint.finished:
                constraint = fresh.fork()
        us = np.array(times) * 1e6
        row = "".join(f"{value:8.0f}" for value in (np.median(us), us.mean(), np.quantile(us, 0.99), us.max()))
        print(f"{name:26s}{build * 1e3:9.1f}{row}")


if __name__ == "__main__":
    main()
