"""A GBNF tree as llguidance's Lark: what needs no recursion becomes regular expressions, the rest stays rules.

llguidance splits text into lexemes, each as long as possible, before it parses; GBNF knows characters only. A grammar
that is regular as a whole becomes one expression, which is exact. In a recursive one the expressions are made as large
as possible; where two meet, the longest match counts. Where llama.cpp could split the text in another way, too, some
texts of the grammar cannot be written. What is written is always of the grammar.

Rules that call only themselves at their end or beginning (`ws ::= ([ \\t\\n] ws)?`) are loops, not recursion.
"""

from edgellama.constraint.gbnf import LAST_CHARACTER, Characters, Choice, Node, Reference, Repeat, Sequence, Text
from edgellama.errors import ConstraintError

_MAX_CHARACTERS = 1 << 20  # rules that use rules that use rules: each level may double the expression


def gbnf_to_lark(rules: dict[str, Node]) -> str:
    """`rules` as `gbnf.parse_gbnf` returns them; the result's first rule is `start`."""
    try:
        return _Converter(rules).convert()
    except RecursionError:
        raise ConstraintError("grammar: its rules, put into one another, are too deep") from None


def literal(text: str) -> str:
    """A regular expression, for Lark's /.../, that matches `text` and nothing else."""
    return "".join(letter if letter.isascii() and letter.isalnum() else f"\\x{{{ord(letter):X}}}" for letter in text)


class _Converter:
    def __init__(self, rules: dict[str, Node]):
        self.rules = {name: _unrolled(name, node) for name, node in rules.items()}
        uses = {name: _references(node) for name, node in self.rules.items()}
        self.regular: set[str] = set()
        while True:
            more = {name for name, used in uses.items() if used <= self.regular} - self.regular
            if not more:
                break
            self.regular |= more
        self.uses = uses
        self.expressions: dict[str, str] = {}

    def convert(self) -> str:
        if "root" not in _ending(self.rules):
            raise ConstraintError("grammar: rule root has no end: each of its alternatives calls it again")
        if "root" in self.regular:
            return f"start: /{self.expression(Reference('root'))}/\n"
        names: dict[str, str] = {}
        pending = ["root"]
        while pending:
            name = pending.pop()
            if name not in names and name not in self.regular:
                names[name] = "start" if name == "root" else f"rule_{len(names)}"
                pending += sorted(self.uses[name])
        self.names = names
        return "".join(f"{names[name]}: {self.lark(self.rules[name])}\n" for name in names)

    def is_regular(self, node: Node) -> bool:
        return _references(node) <= self.regular

    def lark(self, node: Node) -> str:
        """The body of a rule, or part of one."""
        if self.is_regular(node):
            expression = self.expression(node)
            return f"/{expression}/" if expression else '""'
        if isinstance(node, Reference):
            return self.names[node.name]
        if isinstance(node, Repeat):
            if node.most == 0:
                return '""'
            suffix = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((node.least, node.most))
            return f"({self.lark(node.node)})" + (
                suffix or f"{{{node.least},{'' if node.most is None else node.most}}}"
            )
        if isinstance(node, Choice):
            regular = tuple(each for each in node.nodes if self.is_regular(each))
            others = [self.lark(each) for each in node.nodes if not self.is_regular(each)]
            if regular:
                others.append(self.lark(Choice(regular)))
            return f"({' | '.join(others)})"
        assert isinstance(node, Sequence)
        parts: list[str] = []
        run: list[Node] = []
        for each in node.nodes:
            if self.is_regular(each):
                run.append(each)
                continue
            if run:
                parts.append(self.lark(Sequence(tuple(run))))
                run = []
            parts.append(self.lark(each))
        if run:
            parts.append(self.lark(Sequence(tuple(run))))
        return " ".join(parts)

    def expression(self, node: Node) -> str:
        """A regular node as a regular expression."""
        if isinstance(node, Text):
            made = literal(node.text)
        elif isinstance(node, Characters):
            made = _class(node)
        elif isinstance(node, Reference):
            if node.name not in self.expressions:
                self.expressions[node.name] = f"(?:{self.expression(self.rules[node.name])})"
            made = self.expressions[node.name]
        elif isinstance(node, Repeat):
            most = "" if node.most is None else node.most
            inner = self.expression(node.node)
            made = f"(?:{inner}){{{node.least},{most}}}" if inner else ""
        elif isinstance(node, Choice):
            made = f"(?:{'|'.join(self.expression(each) for each in node.nodes)})"
        else:
            made = "".join(self.expression(each) for each in node.nodes)
        if len(made) > _MAX_CHARACTERS:
            raise ConstraintError("grammar: its rules, put into one another, are too large")
        return made


def _class(node: Characters) -> str:
    if node.ranges == ((0, LAST_CHARACTER),) and not node.negated:
        return "(?s:.)"
    ranges = "".join(f"\\x{{{first:X}}}" + (f"-\\x{{{last:X}}}" if last > first else "") for first, last in node.ranges)
    return f"[{'^' if node.negated else ''}{ranges}]"


def _references(node: Node) -> set[str]:
    if isinstance(node, Reference):
        return {node.name}
    if isinstance(node, Repeat):
        return _references(node.node)
    if isinstance(node, Sequence | Choice):
        return {name for each in node.nodes for name in _references(each)}
    return set()


def _ending(rules: dict[str, Node]) -> set[str]:
    """The rules that can produce a text."""

    def ends(node: Node) -> bool:
        if isinstance(node, Reference):
            return node.name in known
        if isinstance(node, Repeat):
            return node.least == 0 or ends(node.node)
        if isinstance(node, Choice):
            return any(map(ends, node.nodes))
        return not isinstance(node, Sequence) or all(map(ends, node.nodes))

    known: set[str] = set()
    while True:
        more = {name for name, node in rules.items() if name not in known and ends(node)}
        if not more:
            return known
        known |= more


def _unrolled(name: str, node: Node) -> Node:
    """R ::= A R | B is A* B, and R ::= R A | B is B A* (Arden's rule); `node` itself where it is neither."""
    alternatives = [list(each) for each in _alternatives(node)]
    me = Reference(name)
    base = [each for each in alternatives if not any(name in _references(part) for part in each)]
    calls = [each for each in alternatives if each not in base and each != [me]]
    if not calls or not base:
        return node
    stripped: dict[bool, list[Node]] = {}
    for at_end in (True, False):
        rest = [each[:-1] if at_end else each[1:] for each in calls if each[-1 if at_end else 0] == me]
        if len(rest) == len(calls) and not any(name in _references(part) for each in rest for part in each):
            stripped[at_end] = [Sequence(tuple(each)) for each in rest]
    if not stripped:
        return node
    at_end, loop = next(iter(stripped.items()))
    once: Node = Choice(tuple(Sequence(tuple(each)) for each in base))
    many: Node = Repeat(Choice(tuple(loop)), 0, None)
    return Sequence((many, once) if at_end else (once, many))


def _alternatives(node: Node) -> list[tuple[Node, ...]]:
    """The sequences that a rule's body chooses among; an option at the top, or at a sequence's end, is a choice."""
    if isinstance(node, Choice):
        return [each for part in node.nodes for each in _alternatives(part)]
    if isinstance(node, Repeat) and (node.least, node.most) == (0, 1):
        return [*_alternatives(node.node), ()]
    if isinstance(node, Sequence):
        if node.nodes and isinstance(node.nodes[-1], Repeat) and (node.nodes[-1].least, node.nodes[-1].most) == (0, 1):
            ends = _alternatives(node.nodes[-1])
            return [(*node.nodes[:-1], *end) for end in ends]
        return [node.nodes]
    return [(node,)]
