"""Whatever is drawn under a constraint parses, with every kind of tokenizer; forks, rollbacks, errors."""

import json
import re
import sys

import numpy as np
import pytest

from edgellama.constraint import make_constraint
from edgellama.errors import ConstraintError
from edgellama.sampling import Sampler, SamplingParams
from edgellama.tokenizer import load_tokenizer
from tokenizer_cases import CASES, TEXTS

pytest.importorskip("llguidance", reason="needs the extra `constrain`: pip install 'edgellama[constrain]'")

TOKENIZERS = {
    case.name: load_tokenizer(case.files())
    for case in CASES
    if case.name in ("bytelevel", "bytelevel-extra", "spm-model", "spm-json-added", "spm-model-no-prefix")
}
PLAIN = TOKENIZERS["bytelevel"]
MORE_ROWS = 7  # a model may have more rows than its tokenizer has tokens


def make(tokenizer=PLAIN, eos=True, **option):
    return make_constraint(tokenizer, [tokenizer.eos_id] if eos else [], tokenizer.vocab_size + MORE_ROWS, **option)


def write(constraint, tokenizer, seed, budget=1500, **params):
    """The text drawn from random logits at a high temperature; None if it did not end within the budget."""
    rng = np.random.default_rng(seed)
    values = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": seed} | params
    sampler = Sampler(SamplingParams(**values), eos_ids=[tokenizer.eos_id], constraint=constraint.fork())
    decoder = tokenizer.stream(skip_special_tokens=True, after=tokenizer.encode("a prompt"))
    text = ""
    for _ in range(budget):
        token = sampler(rng.normal(0, 2, tokenizer.vocab_size + MORE_ROWS).astype(np.float32))
        sampler.accept(token)
        if token == tokenizer.eos_id:
            return text + decoder.flush()
        text += decoder.push(token)
    return None


WORD = {"type": "string", "maxLength": 12}
SCHEMAS = {
    "record": {
        "type": "object",
        "properties": {
            "name": WORD,
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "score": {"type": "number", "minimum": -1.5, "maximum": 2},
            "kind": {"enum": ["a", "b", 3, None]},
            "tags": {"type": "array", "items": WORD, "minItems": 1, "maxItems": 3},
            "open": {"type": "boolean"},
        },
        "required": ["name", "kind", "tags"],
        "additionalProperties": False,
    },
    "either": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"const": "x"}, "maxItems": 4}, WORD]},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "nested": {
        "type": "object",
        "properties": {
            "point": {"$ref": "#/$defs/point"},
            "path": {"type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 2, "maxItems": 2},
        },
        "required": ["point", "path"],
        "additionalProperties": False,
        "$defs": {
            "point": {
                "type": "object",
                "properties": {"x": {"type": "integer", "minimum": -99, "maximum": 99}, "y": {"type": "boolean"}},
                "required": ["x", "y"],
                "additionalProperties": False,
            }
        },
    },
}


def valid(value, schema, root=None) -> bool:
    """Of JSON Schema what the schemas above use."""
    root = root or schema
    if "$ref" in schema:
        return valid(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    if "anyOf" in schema:
        return any(valid(value, each, root) for each in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"] and not isinstance(value, bool)
    if "const" in schema:
        return value == schema["const"]
    kind = schema["type"]
    if kind == "object":
        known = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(known)
            and all(valid(each, known[name], root) for name, each in value.items())
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and schema.get("minItems", 0) <= len(value) <= schema["maxItems"]
            and all(valid(each, schema["items"], root) for each in value)
        )
    if kind == "string":
        return (
            isinstance(value, str)
            and len(value) <= schema.get("maxLength", 99)
            and re.search(schema.get("pattern", ""), value) is not None
        )
    if kind in ("integer", "number"):
        fits = isinstance(value, int) or (kind == "number" and isinstance(value, float))
        return fits and not isinstance(value, bool) and schema["minimum"] <= value <= schema["maximum"]
    return isinstance(value, {"boolean": bool, "null": type(None)}[kind])


def test_the_checker_itself_can_say_no():
    assert not valid({"name": "x", "kind": "c", "tags": ["y"]}, SCHEMAS["record"])
    assert not valid({"name": "x", "kind": "a", "tags": []}, SCHEMAS["record"])
    assert not valid("AB-12", SCHEMAS["pattern"])


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("name", SCHEMAS)
def test_json_always_satisfies_its_schema(name, tokenizer):
    constraint = make(tokenizer, json_schema=SCHEMAS[name])
    for seed in range(8):
        text = write(constraint, tokenizer, seed)
        assert text is not None
        assert valid(json.loads(text), SCHEMAS[name]), text


@pytest.mark.parametrize("schema", [True, {}, {"type": "object"}, '{"type": "array"}'])
def test_open_schemas_give_json(schema):
    constraint = make(json_schema=schema)
    texts = [write(constraint, PLAIN, seed, budget=3000) for seed in range(5)]
    done = [json.loads(text) for text in texts if text is not None]
    assert done
    kind = {"type": "object", "array": list}.get(str(schema), object)
    assert all(isinstance(value, kind if isinstance(kind, type) else object) for value in done)


def test_white_space_does_not_run_away():
    """Between tokens of JSON there is at most a space, or a line break with its indentation."""
    constraint = make(json_schema=SCHEMAS["record"])
    spaces = np.array([b"".join([token]).isspace() for token in PLAIN.token_bytes()] + [False] * MORE_ROWS)
    run = longest = 0
    for _ in range(100):
        logits = np.where(spaces, 10, 0).astype(np.float32) + np.arange(spaces.size, dtype=np.float32) / 1e4
        constraint.mask(logits)
        token = int(logits.argmax())
        constraint.accept(token)
        run = run + len(PLAIN.token_bytes()[token]) if spaces[token] else 0
        longest = max(longest, run)
        if token == PLAIN.eos_id:
            break
    assert 1 <= longest <= 21


REGEXES = [
    r"abc",
    r"[0-9]{3}-[0-9]{4}",
    r"(yes|no|maybe), (because|since) [a-z]{1,8}\.",
    r"[^a-zA-Z]{1,5}",
    r"(a|b)*c{2,3}",
    r"<([a-z]{1,4})/?>",
    r".{0,9}!",
    r"日本(語|人)?[ぁ-ん]{1,3}👍",
    r"/path/[\w.]{1,6}",
    r"(?i)hello",
]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("regex", REGEXES)
def test_text_always_matches_its_regex(regex, tokenizer):
    constraint = make(tokenizer, regex=regex)
    for seed in range(5):
        text = write(constraint, tokenizer, seed)
        assert text is not None
        assert re.fullmatch(regex, text), text


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_each_choice_is_taken_now_and_then(tokenizer):
    options = ["yes", "no", "a+b (c)?", "yes, but", "naïve\n👍"]
    constraint = make(tokenizer, choice=options)
    assert {write(constraint, tokenizer, seed) for seed in range(60)} == set(options)


def test_a_lark_grammar():
    constraint = make(grammar='start: term (/[-+*]/ term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[1-9][0-9]{0,3}/')
    texts = [write(constraint, PLAIN, seed) for seed in range(20)]
    done = [text for text in texts if text is not None]
    assert len(done) > 10
    for text in done:
        assert isinstance(eval(text, {"__builtins__": {}}), int)


@pytest.mark.parametrize("filters", [{"temperature": 0}, {"top_k": 5, "top_p": 0.5, "min_p": 0.3}, {"mirostat": 2}])
def test_filters_choose_among_what_is_allowed(filters):
    constraint = make(json_schema=SCHEMAS["record"])
    for seed in range(4):
        text = write(constraint, PLAIN, seed, **filters)
        assert text is None or valid(json.loads(text), SCHEMAS["record"])


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_bytes_of_tokens_make_up_the_text(tokenizer):
    spelt = tokenizer.token_bytes()
    before = tokenizer.encode("x")
    for text in TEXTS[:30]:
        ids = [
            index for index in tokenizer.encode(text, add_special_tokens=False) if index not in tokenizer.special_ids
        ]
        stream = tokenizer.stream(after=before)
        shown = "".join(map(stream.push, ids)) + stream.flush()
        assert b"".join(spelt[index] for index in ids).decode("utf-8") == shown


def allowed(constraint, size):
    logits = np.zeros(size, np.float32)
    constraint.mask(logits)
    assert set(np.unique(logits).tolist()) <= {0.0, -np.inf}
    return np.flatnonzero(logits == 0).tolist()


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_mask_is_exactly_what_would_be_accepted(tokenizer):
    rng = np.random.default_rng(0)
    size = tokenizer.vocab_size + MORE_ROWS
    constraint = make(tokenizer, json_schema=SCHEMAS["record"])
    for _ in range(25):
        possible = []
        for index in range(size):
            twin = constraint.fork()
            try:
                twin.accept(index)
            except ConstraintError:
                continue
            possible.append(index)
        assert allowed(constraint, size) == possible
        assert not (set(possible) & tokenizer.special_ids) - {tokenizer.eos_id}
        assert max(possible) < tokenizer.vocab_size
        constraint.accept(int(rng.choice(possible)))
        if constraint.finished:
            break


def test_a_refused_token_changes_nothing():
    constraint = make(regex="abc")
    before = allowed(constraint, PLAIN.vocab_size + MORE_ROWS)
    (x,) = PLAIN.encode("x", add_special_tokens=False)
    for bad in (x, PLAIN.eos_id, PLAIN.vocab_size + 3, PLAIN.vocab_size + MORE_ROWS, 10**6):
        with pytest.raises(ConstraintError, match=f"regex: token {bad} cannot come here"):
            constraint.accept(bad)
    assert allowed(constraint, PLAIN.vocab_size + MORE_ROWS) == before


def test_rollback_and_fork_come_back_to_the_same_masks():
    size = PLAIN.vocab_size + MORE_ROWS
    rng = np.random.default_rng(1)
    constraint = make(json_schema=SCHEMAS["nested"])
    masks, tokens = [allowed(constraint, size)], []
    while not tokens or tokens[-1] != PLAIN.eos_id:
        tokens.append(int(rng.choice(masks[-1])))
        constraint.accept(tokens[-1])
        if tokens[-1] != PLAIN.eos_id:
            masks.append(allowed(constraint, size))
    assert constraint.finished
    at = len(tokens)
    for _ in range(60):
        back = int(rng.integers(0, at + 1))
        twin = constraint.fork()
        constraint.rollback(back)
        at -= back
        assert allowed(constraint, size) == masks[at]
        twin.rollback(back)
        assert allowed(twin, size) == masks[at]
        forward = int(rng.integers(0, len(tokens) - at + 1))
        for token in tokens[at : at + forward]:
            constraint.accept(token)
        at += forward
    constraint.rollback(at)
    with pytest.raises(ValueError, match="cannot take 1 tokens back, 0 were accepted"):
        constraint.rollback(1)


def test_speculation_by_forks_gives_the_plain_text():
    """Drafts are verified row by row; each accepted token moves the one sampler, a rejected draft only a fork."""
    size = PLAIN.vocab_size + MORE_ROWS
    rows = np.random.default_rng(3).normal(0, 2, (400, size)).astype(np.float32)

    def fresh():
        constraint = make(json_schema=SCHEMAS["record"])
        return Sampler(SamplingParams(temperature=0), eos_ids=[PLAIN.eos_id], constraint=constraint)

    plain, sampler = [], fresh()
    while not plain or plain[-1] != PLAIN.eos_id:
        plain.append(sampler(rows[len(plain)]))
        sampler.accept(plain[-1])
    drafts, rng, speculative, sampler = 0, np.random.default_rng(4), [], fresh()
    while not speculative or speculative[-1] != PLAIN.eos_id:
        drafter, draft = sampler.fork(), []
        for ahead in range(4):  # the draft model is right in half of the cases
            row = rows[len(speculative) + ahead] if rng.random() < 0.5 else rng.normal(0, 1, size).astype(np.float32)
            draft.append(drafter(row))
            drafter.accept(draft[-1])
            if draft[-1] == PLAIN.eos_id:
                break
        for guess in draft:
            token = sampler(rows[len(speculative)])
            sampler.accept(token)
            speculative.append(token)
            drafts += token == guess
            if token != guess or token == PLAIN.eos_id:
                break
    assert speculative == plain
    assert drafts > 0


def test_without_an_end_token_finished_tells():
    constraint = make(eos=False, regex="ab?")
    (a,), (b,) = (PLAIN.encode(letter, add_special_tokens=False) for letter in "ab")
    assert not constraint.accepting
    constraint.accept(a)
    assert constraint.accepting
    assert not constraint.finished
    constraint.accept(b)
    assert constraint.finished
    assert allowed(constraint, PLAIN.vocab_size + MORE_ROWS) == []


def test_several_end_tokens():
    other = PLAIN.encode("<|eot_id|>", add_special_tokens=False)[0]
    size = PLAIN.vocab_size
    constraint = make_constraint(PLAIN, [PLAIN.eos_id, other], size, choice=["a"])
    constraint.accept(PLAIN.encode("a", add_special_tokens=False)[0])
    assert allowed(constraint, size) == sorted([PLAIN.eos_id, other])
    constraint.accept(other)
    with pytest.raises(ConstraintError, match="cannot come here"):
        constraint.accept(PLAIN.eos_id)


def test_a_model_with_fewer_rows_than_tokens():
    constraint = make_constraint(PLAIN, [], 300, regex=".+")
    assert max(allowed(constraint, 300)) < 300


def test_logits_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"for 795 logits, got shape \(10,\)"):
        make(regex="a").mask(np.zeros(10, np.float32))


class Model:
    @staticmethod
    def model_json_schema():
        return SCHEMAS["pattern"]


def test_a_pydantic_class_is_its_schema():
    text = write(make(json_schema=Model), PLAIN, 0)
    assert valid(json.loads(text), SCHEMAS["pattern"])


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({}, ValueError, "give one of json_schema, regex, choice and grammar, got none"),
        ({"regex": "a", "choice": ["b"]}, ValueError, "got regex and choice"),
        ({"json_schema": 5}, TypeError, "json_schema must be a dict"),
        ({"json_schema": False}, TypeError, "json_schema must be a dict"),
        ({"json_schema": "{"}, ConstraintError, "json_schema: not JSON"),
        ({"json_schema": {"a": {1, 2}}}, ConstraintError, "json_schema: not JSON"),
        ({"json_schema": {"type": "strin"}}, ConstraintError, "json_schema: .*strin"),
        ({"json_schema": {"type": "string", "pattern": "("}}, ConstraintError, "json_schema: .*unclosed group"),
        ({"json_schema": {"enum": []}}, ConstraintError, "json_schema: "),
        ({"json_schema": {"$ref": "#/$defs/none"}}, ConstraintError, "json_schema: "),
        ({"json_schema": {"x-guidance": 1}}, ConstraintError, "x-guidance must be an object"),
        ({"regex": "a("}, ConstraintError, "regex: .*unclosed group"),
        ({"regex": r"(a)\1"}, ConstraintError, "regex: .*backreferences are not supported"),
        ({"regex": "a(?=b)"}, ConstraintError, "regex: .*look-around"),
        ({"regex": r"[^\x00-\x{10FFFF}]"}, ConstraintError, "regex: no text that has tokens"),
        ({"regex": 5}, TypeError, "regex must be a string"),
        ({"choice": "yes"}, TypeError, "choice must be a list of strings"),
        ({"choice": ["a", 1]}, TypeError, "choice must be a list of strings, but has 1"),
        ({"choice": []}, ValueError, "at least one string"),
        ({"choice": ["a", ""]}, ValueError, "none that is empty"),
        ({"grammar": "nothing"}, ConstraintError, "grammar: neither GBNF"),
        ({"grammar": "start: foo"}, ConstraintError, "grammar: .*unknown name"),
        ({"grammar": "start: /(/"}, ConstraintError, "grammar: "),
        ({"grammar": "root ::= foo"}, ConstraintError, "grammar: line 1, column 10: there is no rule foo"),
        ({"grammar": 'root ::= "a" root'}, ConstraintError, "grammar: rule root has no end"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(option, error, message):
    with pytest.raises(error, match=message) as caught:
        make(**option)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_without_llguidance_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConstraintError, match=r"pip install 'edgellama\[constrain\]'"):
        make(regex="a")


@pytest.mark.models
def test_a_real_tokenizer(minimind_dir):
    tokenizer = load_tokenizer({path.name: path.read_bytes() for path in minimind_dir.glob("*token*.json")})
    for schema in ("record", "nested"):
        constraint = make(tokenizer, json_schema=SCHEMAS[schema])
        for seed in range(5):
            assert valid(json.loads(write(constraint, tokenizer, seed)), SCHEMAS[schema])
