"""A chat template's syntax tree, with what charges its allowance (chat_template.py) put into it."""

from __future__ import annotations

from typing import Any

import jinja2.ext
from jinja2 import TemplateSyntaxError, nodes
from jinja2.visitor import NodeTransformer

STEP = 32  # bytes of the allowance that one node of the tree costs when it is run


class Charges(NodeTransformer):
    """Puts into a template's syntax tree what charges loops, bodies, slices, comparisons, + and ~."""

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:
        raise TemplateSyntaxError("autoescape is for HTML, no chat template needs it", node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        cost = _cost([*node.body, node.test])
        self.generic_visit(node)
        if node.recursive:
            node.body.insert(0, nodes.ExprStmt(_call("body!", nodes.Const(cost))))
        node.iter = _call("loop!", node.iter, nodes.Const(cost))
        return node

    def _visit_body(self, node: Any) -> nodes.Node:
        cost = _cost(node.body)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("body!", nodes.Const(cost))))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _visit_body  # what can run again by being called

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("~!", nodes.List(node.nodes))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _call("slice!", node.node)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _call("pay!", node.key)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        first = node.ops[0]
        equality = first.op in ("eq", "ne") and (_is_constant(node.expr) or _is_constant(first.expr))
        if len(node.ops) == 1 and (equality or (first.op in ("in", "notin") and _is_constant(first.expr))):
            return node  # with constants it costs nothing
        for operand in (node, *node.ops):
            if not _is_constant(operand.expr):
                searched = operand is not node and operand.op in ("in", "notin")
                operand.expr = _call("in!" if searched else "pay!", operand.expr)
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        terms = [node.right]
        while isinstance(node.left, nodes.Add):
            node = node.left
            terms.append(node.right)
        first, *others = (self.visit(term) for term in (node.left, *reversed(terms)))
        return _call("+!", first, *others)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [  # "{{ 'text' }}" is text
            nodes.TemplateData(part.value, lineno=part.lineno) if _is_text(part) else part for part in node.nodes
        ]
        return node


def _is_text(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and isinstance(node.value, str)


def _is_constant(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) or (
        isinstance(node, nodes.List | nodes.Tuple) and all(isinstance(item, nodes.Const) for item in node.items)
    )


def _call(name: str, value: nodes.Expr, *args: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)


def _cost(parts: list[nodes.Node | None]) -> int:
    """Of running these nodes and all below them once."""
    found = [part for part in parts if part is not None]
    count, text = 1 + len(found), 0
    while found:
        node = found.pop()
        children = list(node.iter_child_nodes())
        count += len(children)
        text += len(node.data) if isinstance(node, nodes.TemplateData) else 0
        found += children
    return STEP * count + text


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks a model's own words; here its body is just rendered."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
