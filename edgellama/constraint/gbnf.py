"""Reads GBNF, llama.cpp's grammar notation, into a small tree. Knows notation, not what becomes of it.

    root  ::= "yes" | "no, because " [a-z ]+ "."

Rules, alternatives, sequences, groups, `* + ? {m,n}`, "literals", [classes], `.` (any character) and comments, as in
llama.cpp's grammars/README.md. Its tokens (`<[1000]>`, `<think>`) are refused by name.
"""

import re
from dataclasses import dataclass

from edgellama.errors import ConstraintError

LAST_CHARACTER = 0x10FFFF
_MAX_DEPTH = 100
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_NUMBER = re.compile(r"[0-9]{1,6}")
_BLANK = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"} | {each: each for each in '"\\[]-^'}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Characters:
    """One character in (or, `negated`, outside) any of the ranges (first, last), code points. None: any at all."""

    ranges: tuple[tuple[int, int], ...]
    negated: bool = False


@dataclass(frozen=True)
class Reference:
    name: str


@dataclass(frozen=True)
class Repeat:
    """`most` None: without end."""

    node: "Node"
    least: int
    most: int | None


@dataclass(frozen=True)
class Sequence:
    nodes: tuple["Node", ...]


@dataclass(frozen=True)
class Choice:
    nodes: tuple["Node", ...]


Node = Text | Characters | Reference | Repeat | Sequence | Choice


def parse_gbnf(text: str) -> dict[str, Node]:
    """Rule name -> its tree; "root" and all that is referred to are there. ConstraintError names the line."""
    return _Parser(text).rules()


class _Parser:
    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0

    def rules(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        referred: dict[str, int] = {}
        self.referred = referred
        self.skip(_SPACE)
        while self.at < len(self.text):
            name = self.name("the name of a rule")
            if name in rules:
                raise self.error(f"rule {name} is there twice")
            self.skip(_BLANK)
            self.expect("::=")
            self.skip(_SPACE)
            rules[name] = self.choice(nested=False)
            self.skip(_BLANK)
            if self.at < len(self.text) and self.text[self.at] not in "\r\n":
                raise self.error("expected the end of the rule")
            self.skip(_SPACE)
        if "root" not in rules:
            raise ConstraintError("grammar: there is no rule root")
        for name, at in referred.items():
            if name not in rules:
                self.at = at
                raise self.error(f"there is no rule {name}")
        return rules

    def choice(self, nested: bool) -> Node:
        nodes = [self.sequence(nested)]
        while self.next_alternative(nested):
            nodes.append(self.sequence(nested))
        return nodes[0] if len(nodes) == 1 else Choice(tuple(nodes))

    def next_alternative(self, nested: bool) -> bool:
        """Goes past a `|`, which may stand on the next line."""
        space = _SPACE.match(self.text, self.at)
        assert space  # it may be empty
        if self.text[space.end() : space.end() + 1] != "|":
            return False
        self.at = space.end() + 1
        self.skip(_SPACE)
        return True

    def sequence(self, nested: bool) -> Node:
        blank = _SPACE if nested else _BLANK
        nodes: list[Node] = []
        while True:
            node = self.item()
            if node is None:
                return nodes[0] if len(nodes) == 1 else Sequence(tuple(nodes))
            self.skip(blank)
            nodes.append(self.repeated(node))
            self.skip(blank)

    def item(self) -> Node | None:
        letter = self.text[self.at : self.at + 1]
        if letter == '"':
            return self.literal()
        if letter == "[":
            return self.characters()
        if letter == ".":
            self.at += 1
            return Characters(((0, LAST_CHARACTER),))
        if letter == "(":
            self.at += 1
            self.depth += 1
            if self.depth > _MAX_DEPTH:
                raise self.error("parentheses are nested too deeply")
            self.skip(_SPACE)
            node = self.choice(nested=True)
            self.skip(_SPACE)
            self.expect(")")
            self.depth -= 1
            return node
        if letter in ("<", "!"):
            raise self.error("tokens in a grammar are not supported; spell their text out, or use Lark")
        match = _NAME.match(self.text, self.at)
        if match is None:
            return None
        after = _BLANK.match(self.text, match.end())
        if after and self.text.startswith("::=", after.end()):
            return None  # the next rule
        self.referred.setdefault(match[0], self.at)
        self.at = match.end()
        return Reference(match[0])

    def repeated(self, node: Node) -> Node:
        """`node` with the operators after it."""
        simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        while True:
            letter = self.text[self.at : self.at + 1]
            if letter in simple and letter:
                self.at += 1
                node = Repeat(node, *simple[letter])
            elif letter == "{":
                self.at += 1
                node = self.counted(node)
            else:
                return node

    def counted(self, node: Node) -> Node:
        self.skip(_SPACE)
        least = self.number()
        most: int | None = least
        self.skip(_SPACE)
        if self.text[self.at : self.at + 1] == ",":
            self.at += 1
            self.skip(_SPACE)
            most = None if self.text[self.at : self.at + 1] == "}" else self.number()
            self.skip(_SPACE)
        self.expect("}")
        if most is not None and most < least:
            raise self.error(f"{{{least},{most}}} is no range")
        return Repeat(node, least, most)

    def literal(self) -> Text:
        self.at += 1
        letters = []
        while self.text[self.at : self.at + 1] != '"':
            letters.append(self.character())
        self.at += 1
        return Text("".join(letters))

    def characters(self) -> Characters:
        self.at += 1
        negated = self.text[self.at : self.at + 1] == "^"
        self.at += negated
        ranges = []
        while self.text[self.at : self.at + 1] != "]":
            first = last = self.character()
            if self.text[self.at : self.at + 1] == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                last = self.character()
            if last < first:
                raise self.error(f"{first}-{last} is no range of characters")
            ranges.append((ord(first), ord(last)))
        self.at += 1
        if not ranges and not negated:
            raise self.error("[] has no characters")
        return Characters(tuple(ranges), negated) if ranges else Characters(((0, LAST_CHARACTER),))

    def character(self) -> str:
        letter = self.text[self.at : self.at + 1]
        if letter in ("", "\n"):
            raise self.error("a literal or class does not end on its line")
        self.at += 1
        if letter != "\\":
            return letter
        kind = self.text[self.at : self.at + 1]
        if kind in _ESCAPES and kind:
            self.at += 1
            return _ESCAPES[kind]
        size = _HEX_DIGITS.get(kind, 0)
        digits = self.text[self.at + 1 : self.at + 1 + size]
        if not size or not re.fullmatch(rf"[0-9A-Fa-f]{{{size}}}", digits):
            raise self.error(f"\\{kind} is no escape")
        code = int(digits, 16)
        if code > LAST_CHARACTER or 0xD800 <= code < 0xE000:
            raise self.error(f"\\{kind}{digits} is no character")
        self.at += 1 + size
        return chr(code)

    def name(self, what: str) -> str:
        match = _NAME.match(self.text, self.at)
        if match is None:
            raise self.error(f"expected {what}")
        self.at = match.end()
        return match[0]

    def number(self) -> int:
        match = _NUMBER.match(self.text, self.at)
        if match is None:
            raise self.error("expected a number")
        self.at = match.end()
        return int(match[0])

    def expect(self, text: str) -> None:
        if not self.text.startswith(text, self.at):
            raise self.error(f"expected {text}")
        self.at += len(text)

    def skip(self, what: re.Pattern[str]) -> None:
        match = what.match(self.text, self.at)
        assert match  # it may be empty
        self.at = match.end()

    def error(self, problem: str) -> ConstraintError:
        line = self.text.count("\n", 0, self.at) + 1
        begin = self.text.rfind("\n", 0, self.at) + 1
        return ConstraintError(f"grammar: line {line}, column {self.at - begin + 1}: {problem}")
