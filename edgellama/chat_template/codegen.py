"""How a chat template becomes Python: Jinja's code generator, with our hooks in what it writes.

Knows the places where the generated code could run long or make something large, and puts a call of `sandbox`'s
environment there. Does not know what the hooks do.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser

from edgellama.chat_template.budget import TooMuch

if TYPE_CHECKING:
    from edgellama.chat_template.sandbox import GuardedEnvironment

MAX_TOKENS = 15_000
"""Of a template; the longest in use have some 3,000."""
_MAX_LITERAL = 8  # items of a list that need no bill of their own


class Generation(Extension):
    """`{% generation %}`, which marks the assistant's words for training: rendered as it stands. Counts tokens."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own way

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        budget = self.environment.budget  # type: ignore[attr-defined]
        for count, token in enumerate(stream):
            budget.tick(4)
            if count >= MAX_TOKENS:
                raise TooMuch(f"more than {MAX_TOKENS} tokens of Jinja")
            yield token

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of its own, out of which no `set` leaks; the filter leaves text alone.
        return nodes.FilterBlock(body, nodes.Filter(None, "string", [], [], None, None)).set_lineno(line)


def _hook(name: str, *args: nodes.Node, **kwargs: Any) -> nodes.Call:
    """The call of a method of GuardedEnvironment, which no template can write."""
    keywords = [nodes.Keyword(key, nodes.Const(value)) for key, value in kwargs.items()]
    return nodes.Call(nodes.EnvironmentAttribute(name), cast(list[nodes.Expr], list(args)), keywords, None, None)


class GuardedCode(CodeGenerator):
    """Jinja's code generator with our hooks in what it writes."""

    environment: "GuardedEnvironment"

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self.environment.budget.tick()
        return super().visit(node, *args, **kwargs)

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        """Only what is text already; Jinja would evaluate whatever it can."""
        if isinstance(node, nodes.TemplateData):
            return node.data
        if isinstance(node, nodes.Const) and type(node.value) is str:
            return node.value
        raise nodes.Impossible()

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if isinstance(node.node, nodes.EnvironmentAttribute):
            self.visit(node.node, frame)
            self.write("(")
            for arg in node.args:
                self.visit(arg, frame)
                self.write(", ")
            for keyword in node.kwargs:
                self.visit(keyword, frame)
            self.write(")")
        else:
            super().visit_Call(node, frame, forward_caller=forward_caller)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.iter = _hook("iterate", node.iter)
        super().visit_For(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        node.expr = _hook("comparable", node.expr)
        for operand in node.ops:
            operand.expr = _hook("comparable", operand.expr)
        super().visit_Compare(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.visit(_hook("joined", nodes.Tuple(node.nodes, "load")), frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            bounds = (each or nodes.Const(None) for each in (node.arg.start, node.arg.stop, node.arg.step))
            self.visit(_hook("sliced", node.node, *bounds), frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        for pair in node.items:
            if not isinstance(pair.key, nodes.Const):
                pair.key = _hook("comparable", pair.key)
        self._visit_literal(node, frame, super().visit_Dict)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._visit_literal(node, frame, super().visit_List)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._visit_literal(node, frame, super().visit_Tuple)
        else:
            super().visit_Tuple(node, frame)

    def _visit_literal(self, node: Any, frame: Frame, write: Callable[[Any, Frame], None]) -> None:
        if len(node.items) <= _MAX_LITERAL:
            write(node, frame)
            return
        self.write("environment.literal(")
        write(node, frame)
        self.write(f", length={len(node.items)})")

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier, frame: Frame) -> None:
        self.fail("'autoescape' is not offered to chat templates", node.lineno)
