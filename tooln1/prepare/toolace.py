"""The parser of ToolACE call strings: `[Name(key=value, ...), ...]` to calls, and the tool list of a system text.

    turn      := "[" (call separator*)* "]"                        separator: "," or ";" or white space
    call      := name "(" [argument ("," argument)* [","]] ")"     a name may hold "(words)" of its own
    argument  := key "=" value

A scan that knows strings and brackets cuts out names, keys and the texts of values. A value is read from the syntax
tree that Python's parser makes of it, never evaluated: Python's literals, and JSON's true, false and null. Unquoted
text is a string. What has no single reading (an argument without a key, text beside a quoted string) is an error: a
dropped row is better than a wrong label. docs/toolace_parser.md lists the differences from the paper's parser.
"""

import ast
import json
import re
import warnings

from tooln1.data import is_storable

TOOLS_MARKER = "that you can invoke:\n"

_SEPARATORS = re.compile(r"[\s,;]*")
# Text up to the "(" of the arguments. "(VIN)" in "Vehicle Number (VIN) Lookup(...)": plain words, and the call goes on.
_NAME = re.compile(r"([^()\"=\[\]{}]*+(?:\([^()\"'=\[\]{}]+\)(?=\s*[^\s,;\])])[^()\"=\[\]{}]*+)*+)\(\s*")
_KEY = re.compile(r"([^\s=,()'\"{}][^=,()'\"{}]*+)=\s*")
_NEXT_ARGUMENT = re.compile(rf"\s*(?:{_KEY.pattern}|[,)])")
# An apostrophe after a letter (it's) opens no string, and one between two letters ('it's') does not end one.
_APOSTROPHE = r"(?<=\w)'(?=\w)"
_STRING = re.compile(rf""""(?:[^"\\]|\\.)*+"|(?<!\w)'(?:[^'\\]|\\.|{_APOSTROPHE})*+'""", re.DOTALL)
_MARK = re.compile(rf"""{_STRING.pattern}|[()\[\]{{}},"]|(?<!\w)'""", re.DOTALL)
_CLOSER = {"(": ")", "[": "]", "{": "}"}
_WORDS = {"true": True, "false": False, "null": None}


class CallSyntaxError(Exception):
    """A call string that cannot be read; its text is the reason."""


def is_call_turn(text: str) -> bool:
    """Whether an assistant turn is meant as calls: from "[" to "]", as the released code decides it."""
    return text.startswith("[") and text.endswith("]")


def parse_calls(text: str) -> list[dict]:
    """The calls of a ToolACE call string, in order, as [{"name": str, "arguments": dict}]; "[]" gives [].

    Of a key given twice the last value counts. Raises CallSyntaxError with the reason.
    """
    if not is_call_turn(text):
        raise CallSyntaxError("the turn does not go from '[' to ']'")
    calls, position = [], _SEPARATORS.match(text, 1).end()
    with warnings.catch_warnings(action="ignore"):  # Python warns of "\d" in a string
        while position < len(text) - 1:
            call, position = _read_call(text, position)
            calls.append(call)
            position = _SEPARATORS.match(text, position).end()
    if not is_storable(calls):
        raise CallSyntaxError("a value that JSON cannot hold: not finite, a lone surrogate, nested very deeply")
    return calls


def parse_function_call(text: str) -> list[dict]:
    """The calls of a turn whose role says that it is a call: a call string, or JSON as sharegpt files have it.

    JSON: one {"name", "arguments"} or a list of them. Raises CallSyntaxError.
    """
    try:
        calls = json.loads(text)
        calls = [calls] if isinstance(calls, dict) else calls
        return [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    except json.JSONDecodeError:
        return parse_calls(text.strip())
    except (TypeError, KeyError, ValueError, RecursionError):
        raise CallSyntaxError("JSON that is no list of {name, arguments}") from None


def split_system(system: str) -> tuple[str, list[dict] | None]:
    """A ToolACE system text as (its text up to and including "that you can invoke:\\n", its tools).

    The tools are None where there is no such marker or no readable JSON list of tools with names behind it.
    """
    head, marker, rest = system.partition(TOOLS_MARKER)
    try:
        tools, _ = json.JSONDecoder().raw_decode(rest.lstrip())
    except (ValueError, RecursionError):
        tools = None
    if not isinstance(tools, list) or not all(isinstance(t, dict) and isinstance(t.get("name"), str) for t in tools):
        tools = None
    return head + marker, tools


def _read_call(text: str, position: int) -> tuple[dict, int]:
    """The call at `position`, and where it ends."""
    name = _NAME.match(text, position)
    if not name or not name[1].strip():
        raise CallSyntaxError("no tool name followed by '('")
    arguments, position = {}, name.end()
    while text[position] != ")":
        if not (key := _KEY.match(text, position)):
            raise CallSyntaxError("an argument without 'name='")
        end = _value_end(text, key.end())
        arguments[key[1].strip()] = _read_value(text[key.end() : end].strip())
        position = _SEPARATORS.match(text, end).end()
    return {"name": name[1].strip(), "arguments": arguments}, position + 1


def _value_end(text: str, start: int) -> int:
    """Where the value at `start` ends: at the "," before the next `key=`, or at the ")" of the call."""
    closers, first_comma = [], None
    for mark in _MARK.finditer(text, start):
        sign, here = mark.group(), mark.start()
        if sign in _CLOSER:
            closers.append(_CLOSER[sign])
        elif closers and sign == closers[-1]:
            closers.pop()
        elif not closers and (sign == ")" or (sign == "," and _NEXT_ARGUMENT.match(text, here + 1))):
            first = text[start:first_comma].strip()
            if first_comma and _read_value(first) != first:  # a literal: "a=1, 5", but not "city=Miami, FL"
                raise CallSyntaxError("an argument without 'name='")
            return here
        elif sign == "," and not closers:
            first_comma = first_comma or here
        elif sign in ")]}'\"":
            raise CallSyntaxError("a bracket or quote without its partner")
    raise CallSyntaxError("a call without its closing ')'")


def _read_value(text: str) -> object:
    """The value of a literal; of any other text that has one reading, the text itself."""
    try:
        if "#" in _STRING.sub("", text):
            raise ValueError("Python would take it for a comment")
        # Python knows neither line breaks nor bare apostrophes in such strings.
        source = _STRING.sub(lambda string: re.sub(_APOSTROPHE, r"\'", string[0]).replace("\n", r"\n"), text)
        return _from_node(ast.parse(source, mode="eval").body)
    except SyntaxError:
        if _STRING.fullmatch(text):
            return text[1:-1]  # an escape that is none, as in "C:\users": not written with escapes in mind
    except (ValueError, RecursionError, MemoryError):
        pass
    if text[:1] in ("'", '"') or text[:1] + text[-1:] in ("[]", "{}"):
        raise CallSyntaxError("text beside a quoted string, or a list or dict of more than literals")
    if any(set(quoted) & set(",=()[]{}") for quoted in _STRING.findall(text)):
        raise CallSyntaxError("unquoted text with a quoted part that may end it")
    return text


def _from_node(node: ast.expr) -> object:
    """The JSON value of a literal. Raises ValueError for others, CallSyntaxError for literals that JSON lacks."""
    match node:
        case ast.Constant(value=str()):  # JSON writes an emoji as two \u escapes
            return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        case ast.Constant(value=bool() | int() | float() | None):
            return node.value
        case ast.Name() if node.id in _WORDS:
            return _WORDS[node.id]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=int() | float() as number)):
            return -number if isinstance(node.op, ast.USub) else number
        case ast.List() | ast.Tuple():
            return [_from_node(item) for item in node.elts]
        case ast.Dict():
            keys = [_from_node(key) for key in node.keys]
            if not any(isinstance(key, list | dict) for key in keys):
                texts = [key if isinstance(key, str) else json.dumps(key) for key in keys]
                return dict(zip(texts, map(_from_node, node.values), strict=True))
        case ast.Set() | ast.JoinedStr() | ast.Constant():
            raise CallSyntaxError("a set, an ellipsis, bytes, a complex number or a formatted string")
    raise ValueError("not a literal")
