"""ACEBench's text of calls, [name(key='value', ...), ...]: writing it, and reading it as the official evaluation does.

The official evaluation removes all whitespace, inside strings too, and evaluates what is left as a Python expression.
`read_text` parses it with `ast` and reads the nodes. Deviations: it refuses more than MAX_MARKS punctuation marks (the
longest answer has 324) and arithmetic other than + - * / on numbers.
"""

import ast
import operator
import re
import warnings
from typing import Any

Call = tuple[str, dict]  # function name, arguments

MAX_MARKS = 2**10  # characters other than letters and digits: the parser takes up to 0.02 ms for one
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


class UnreadableText(ValueError):
    """Text that is not a list of calls."""


def write_text(calls: list[Call]) -> str:
    """[("book", {"city": "Bonn"})] as "[book(city='Bonn')]". Raises UnreadableText for too deeply nested values."""
    try:
        written = (f"{name}({', '.join(f'{key}={value!r}' for key, value in args.items())})" for name, args in calls)
        return f"[{', '.join(written)}]"
    except RecursionError:
        raise UnreadableText("nested too deeply") from None


def read_text(text: str) -> list[Call]:
    """The calls in a list, tuple or set of them, without positional arguments. UnreadableText for any other text."""
    text = "".join(text.split())
    if len(re.findall(r"\W", text)) > MAX_MARKS:
        raise UnreadableText(f"more than {MAX_MARKS} punctuation marks")
    try:
        with warnings.catch_warnings(action="ignore"):  # about backslashes in strings
            body = ast.parse(text, mode="eval").body
        if not isinstance(body, ast.List | ast.Tuple | ast.Set):
            raise UnreadableText("no list")
        return [_call(element) for element in body.elts]
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise UnreadableText(str(error)) from None


def _call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call):
        raise UnreadableText("not a call")
    return ast.unparse(node.func), {keyword.arg: _value(keyword.value) for keyword in node.keywords}


def _value(node: ast.expr | None) -> Any:
    """A literal or the result of arithmetic; a bare name or subscript as text, a call as {name: arguments}."""
    match node:
        case ast.Constant():
            return "..." if node.value is Ellipsis else node.value
        case ast.UnaryOp(operand=ast.Constant(value=value)):
            return -value  # whichever sign it is: the official code takes all four for a minus
        case ast.BinOp() if type(node.op) in _OPERATORS:
            numbers = _value(node.left), _value(node.right)
            if all(isinstance(number, int | float) for number in numbers):
                return _OPERATORS[type(node.op)](*numbers)
        case ast.List():
            return [_value(item) for item in node.elts]
        case ast.Tuple():
            return tuple(_value(item) for item in node.elts)
        case ast.Dict():
            return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
        case ast.Name():
            return node.id
        case ast.Call():
            return dict([_call(node)])
        case ast.Subscript():
            return f"{ast.unparse(node.value)}[{ast.unparse(node.slice)}]"
    raise UnreadableText(f"a {type(node).__name__} as a value")
