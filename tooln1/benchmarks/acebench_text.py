"""ACEBench's text of calls, [name(key='value', ...), ...]: writing it, and reading it as the official evaluation does.

The official evaluation removes all whitespace, inside strings too, and reads what is left as a Python expression. So
does `read_text`, with Python's own parser and without running anything. Deviation: it refuses texts over MAX_TEXT
characters or MAX_MARKS punctuation marks (the longest answer has 1,653 and 324), and arithmetic other than on numbers
and strings or with huge results; the official code evaluates those.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable
from typing import Any

Call = tuple[str, dict]  # function name, arguments

MAX_TEXT = 2**16  # characters without whitespace; 8192 tokens of a reply are about half of it
MAX_MARKS = 2**10  # of them neither letters nor digits: the parser takes up to 0.02 ms for one
MAX_BITS = 2**13  # of the integers that arithmetic makes


class UnreadableText(ValueError):
    """Text that the official evaluation cannot read as calls either."""


def write_text(calls: list[Call]) -> str:
    """Calls as the text ACEBench asks a model for: values as Python writes them, names and keys as they are.

        [("book", {"city": "Bonn", "nights": 2})]  ->  [book(city='Bonn', nights=2)]

    Raises UnreadableText for values nested too deeply to write.
    """
    try:
        written = (f"{name}({', '.join(f'{key}={value!r}' for key, value in args.items())})" for name, args in calls)
        return f"[{', '.join(written)}]"
    except RecursionError:
        raise UnreadableText("nested too deeply") from None


def read_text(text: str) -> list[Call]:
    """The calls in a text: a list, tuple or set of them.

    Positional arguments are left out. A value is a literal, a list, tuple or dict of values, arithmetic (which is
    carried out), a bare name (it becomes a string), a subscript (its source text) or a call (which becomes
    {name: arguments}). Raises UnreadableText for everything else, whatever the text is.
    """
    text = "".join(text.split())
    if len(text) > MAX_TEXT:
        raise UnreadableText(f"longer than {MAX_TEXT} characters")
    if len(re.findall(r"\W", text)) > MAX_MARKS:
        raise UnreadableText(f"more than {MAX_MARKS} punctuation marks")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about backslashes in strings
            body = ast.parse(text, mode="eval").body
        if not isinstance(body, ast.List | ast.Tuple | ast.Set):
            raise UnreadableText("no list")
        return [_call(element) for element in body.elts]
    except (SyntaxError, ValueError, TypeError, ArithmeticError) as error:
        raise UnreadableText(str(error)) from None
    except (RecursionError, MemoryError):  # how the parser says that an expression is too deep for it
        raise UnreadableText("nested too deeply") from None


# -------------------------------------------------------------------------------------------------- arithmetic

_SIGNS = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert, ast.Not: operator.not_}
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}


def _arithmetic(node: ast.expr) -> Any:
    """The value of an expression of numbers, or of strings joined by +."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | complex | str):
        return node.value
    if isinstance(node, ast.UnaryOp):
        return _SIGNS[type(node.op)](_arithmetic(node.operand))
    if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATORS:
        raise UnreadableText("arithmetic on what is no number")
    left, right = _arithmetic(node.left), _arithmetic(node.right)
    if (isinstance(left, str) or isinstance(right, str)) and not isinstance(node.op, ast.Add):
        raise UnreadableText("arithmetic on a string")  # "%9999999d" % 1, "a" * 10**9
    if isinstance(left, int) and isinstance(right, int) and _most_bits(node.op, left, right) > MAX_BITS:
        raise UnreadableText("a number too large")
    return _OPERATORS[type(node.op)](left, right)


def _most_bits(sign: ast.operator, left: int, right: int) -> int:
    """How many bits an integer result has at most."""
    if isinstance(sign, ast.Pow):
        return left.bit_length() * right
    return left.bit_length() + (right if isinstance(sign, ast.LShift) else right.bit_length())


# ------------------------------------------------------------------------------------------------------ values


def _call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call):
        raise UnreadableText("not a call")
    return _dotted(node.func), {keyword.arg: _value(keyword.value) for keyword in node.keywords}


def _dotted(node: ast.expr) -> str:
    """a.b.c; what is no name at the front of it, such as f() in f().c, is left out."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.append(node.id)
    return ".".join(reversed(parts))


def _value(node: ast.expr | None) -> Any:
    read = _READERS.get(type(node))
    if read is None:  # also None itself, the key of ** in a dict
        raise UnreadableText(f"a {type(node).__name__} as a value")
    return read(node)


def _constant(node: ast.Constant) -> Any:
    return "..." if node.value is Ellipsis else node.value


def _negated(node: ast.UnaryOp) -> Any:
    """The negative of a constant, whichever sign stands before it: the official code takes all four for a minus."""
    if not isinstance(node.operand, ast.Constant):
        raise UnreadableText("a sign before what is no constant")
    return -node.operand.value


def _called(node: ast.Call) -> dict:
    name, arguments = _call(node)
    return {name: arguments}


_READERS: dict[type, Callable[[Any], Any]] = {
    ast.Constant: _constant,
    ast.UnaryOp: _negated,
    ast.BinOp: _arithmetic,
    ast.List: lambda node: [_value(item) for item in node.elts],
    ast.Tuple: lambda node: tuple(_value(item) for item in node.elts),
    ast.Dict: lambda node: {_value(k): _value(v) for k, v in zip(node.keys, node.values, strict=True)},
    ast.Name: lambda node: node.id,
    ast.Call: _called,
    ast.Subscript: lambda node: f"{ast.unparse(node.value)}[{ast.unparse(node.slice)}]",
}
