"""GBNF: the texts that a converted grammar allows are those of the grammar, against plain definitions."""

import itertools
import json
import re

import numpy as np
import pytest

from edgellama.constraint import make_constraint
from edgellama.constraint.gbnf import parse_gbnf
from edgellama.constraint.gbnf_to_lark import gbnf_to_lark
from edgellama.errors import ConstraintError
from edgellama.tokenizer import load_tokenizer
from tokenizer_cases import CASES

pytest.importorskip("llguidance", reason="needs the extra `constrain`: pip install 'edgellama[constrain]'")

TOKENIZER = next(load_tokenizer(case.files()) for case in CASES if case.name == "bytelevel")
BYTES = {spelt: index for index, spelt in enumerate(TOKENIZER.token_bytes()) if len(spelt) == 1}
WORDS = {spelt: index for index, spelt in enumerate(TOKENIZER.token_bytes()) if index not in TOKENIZER.special_ids}


def make(grammar):
    return make_constraint(TOKENIZER, [TOKENIZER.eos_id], TOKENIZER.vocab_size, grammar=grammar)


def accepts(constraint, text):
    constraint = constraint.fork()
    try:
        for byte in text.encode():
            constraint.accept(BYTES[bytes([byte])])
    except ConstraintError:
        return False
    return constraint.accepting


def texts(alphabet, longest):
    for size in range(longest + 1):
        yield from map("".join, itertools.product(alphabet, repeat=size))


@pytest.mark.parametrize(
    ("grammar", "regex", "alphabet"),
    [
        ('root ::= "ab"', "ab", "abc"),
        ('root ::= ("a" "b" | "ab" "c") "d"', "abc?d", "abcd"),
        ('root ::= word "x"\nword ::= [a-x]+', "[a-x]+x", "axy"),
        ("root ::= [^ab] | .{2}", "[^ab]|(?s:.){2}", "abc\n"),
        ("root ::= a* b? (c | d){1,2}\na ::= [a]\nb::= [b-]\nc ::= [c]\nd ::= [\\]]", r"a*[b-]?[c\]]{1,2}", "ab-c]"),
        ('root ::= "a"{2} "b"{0,1} "a"{1,}', "aab?a+", "ab"),
        ('root ::= # nothing\n  "a" |\n  "b"\n   | "c" # or this\n\n', "a|b|c", "abcd"),
        ('root ::= ("a"\n | "b"\n)+', "[ab]+", "abc"),
        ('root ::= "" | "a"', "a?", "ab"),
        (r'root ::= "\"\\\n\x41\u00e9" [\t\U0001F600]?', '"\\\\\nAé[\t😀]?', ['"\\\nAé', '"', "\t", "😀"]),
        ('root ::= ws "a" ws\nws ::= ([ \\n] ws)?', "[ \n]*a[ \n]*", "a \n"),
        ('root ::= root "a" | "b"', "ba*", "ab"),
        ('root ::= "a" root | "b" root | "c"', "[ab]*c", "abc"),
        ('root ::= "a" root? ', "a+", "ab"),
        ('root ::= x | "b"\nx ::= "a" x | y\ny ::= [0-1]', "a*[01]|b", "ab01"),
    ],
)
def test_regular_grammars_are_exact(grammar, regex, alphabet):
    assert gbnf_to_lark(parse_gbnf(grammar)).count("\n") == 1  # a single expression
    constraint = make(grammar)
    for text in texts(alphabet, 5):
        assert accepts(constraint, text) == (re.fullmatch(regex, text) is not None), text


def balanced(text):
    while "()" in text:
        text = text.replace("()", "")
    return not text


def is_sum(text):
    """a+(a+a) and the like; no signs."""
    if not re.fullmatch(r"[a+()]+", text) or re.search(r"\+\+|\(\+|\+\)|^\+|\+$|a\(|\)a|\(\)|\)\(|aa", text):
        return False
    return balanced(text.replace("a", "").replace("+", ""))


def nested(text):
    """Lists of lists, at most one space after each bracket and comma."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return "  " not in text and not text.startswith(" ")


@pytest.mark.parametrize(
    ("grammar", "member", "alphabet", "longest"),
    [
        ('root ::= ("(" root ")")*', balanced, "()", 8),
        ('root ::= "(" root ")" root | ""', balanced, "()", 8),
        ('root ::= expr\nexpr ::= term ("+" term)*\nterm ::= "a" | "(" expr ")"', is_sum, "a+()", 5),
        ('root ::= root "+" term | term\nterm ::= "(" root ")" | "a"', is_sum, "a+()", 5),
        ('root ::= "a" root "b" | ""', lambda text: text == "a" * (len(text) // 2) + "b" * (len(text) // 2), "ab", 8),
        (
            'root ::= "[" ws (root ("," ws root)*)? "]" ws\nws ::= " "?',
            nested,
            "[], ",
            5,
        ),
    ],
)
def test_recursive_grammars_are_exact_where_lexemes_do_not_overlap(grammar, member, alphabet, longest):
    constraint = make(grammar)
    found = [text for text in texts(alphabet, longest) if accepts(constraint, text)]
    assert found == [text for text in texts(alphabet, longest) if member(text)]
    assert len(found) > 2


JSON = r"""
# llama.cpp's, in its older spelling of white space
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= ([ \t\n] ws)?
"""


def test_json_by_grammar_parses_and_takes_what_json_writes():
    constraint = make(JSON)
    for value in ({}, {"a": [1, -2.5e3, True, None, 'é\n"\\']}, {"x": {"y": [[], [{}]]}, "": 0}):
        for indent in (None, 2):
            assert accepts(constraint, json.dumps(value, indent=indent))
            assert accepts(constraint, json.dumps(value, indent=indent, ensure_ascii=False))
    for broken in ('{"a" 1}', "[1]", '{"a": 01}', '{"a": "\n"}', '{"a": 1,}', '{"a": 1}}'):
        assert not accepts(constraint, broken)
    rng, done = np.random.default_rng(0), 0
    closers = [WORDS[each] for each in (b'"', b"}", b"]")]
    for _ in range(10):
        twin, text = constraint.fork(), b""
        for step in range(400):
            logits = rng.normal(0, 2, TOKENIZER.vocab_size).astype(np.float32)
            logits[closers] += step / 20
            logits[TOKENIZER.eos_id] += 8
            twin.mask(logits)
            token = int(logits.argmax())
            twin.accept(token)
            if token == TOKENIZER.eos_id:
                assert isinstance(json.loads(text), dict)
                done += 1
                break
            text += TOKENIZER.token_bytes()[token]
    assert done >= 8


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('rot ::= "a"', "there is no rule root"),
        ('root ::= "a', "line 1, column 12: a literal or class does not end"),
        ('root ::= "a\n"', "does not end on its line"),
        ("root ::= [a", "does not end on its line"),
        ("root ::= []", r"line 1, column 12: \[\] has no characters"),
        ("root ::= [z-a]", "z-a is no range"),
        ('root ::= ("a"', r"expected \)"),
        ('root ::= "a")', "expected the end of the rule"),
        ('root ::= "a"\nroot ::= "b"', "line 2, column 5: rule root is there twice"),
        ('root ::= "a"{2,1}', r"\{2,1\} is no range"),
        ('root ::= "a"{x}', "expected a number"),
        ('root ::= "a"{1', "expected }"),
        (r'root ::= "\q"', r"\\q is no escape"),
        (r'root ::= "\x4"', r"\\x is no escape"),
        (r'root ::= "\uD800"', "is no character"),
        ("root ::= <think>", "tokens in a grammar are not supported"),
        ("root ::= a\na = 5", "line 2, column 3: expected ::="),
        ("root ::= a b", "line 1, column 10: there is no rule a"),
        ('root ::= "a"\n%', "line 2, column 1: expected the name of a rule"),
        ("root ::= " + "(" * 200 + '"a"' + ")" * 200, "nested too deeply"),
        ("root ::= a0\n" + "".join(f"a{n} ::= a{n + 1} a{n + 1}\n" for n in range(40)) + 'a40 ::= "x"', "too large"),
        ("root ::= a0\n" + "".join(f"a{n} ::= a{n + 1}\n" for n in range(3000)) + 'a3000 ::= "x"', "too deep"),
        ("root ::= root", "rule root has no end"),
        ('root ::= "(" a\na ::= root ")"', "rule root has no end"),
    ],
)
def test_mistakes_are_told_with_their_place(grammar, message):
    with pytest.raises(ConstraintError, match=f"grammar: .*{message}|{message}") as caught:
        make(grammar)
    assert "\n" not in str(caught.value)
