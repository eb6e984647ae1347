"""The ToolACE call-string parser: `[Name(key=value, ...), ...]` to calls.

    turn      := "[" separator* (call separator*)* "]"             separator: "," or ";" or white space
    call      := name "(" [argument ("," argument)* [","]] ")"
    name      := a known tool name | text up to the "(" of the arguments, which may hold "(words)" of its own
    argument  := key "=" value
    value     := string | list | dict | tuple | number | true | false | null | True | False | None | bare text

The syntax is Python-like, written by a language model: values follow Python's literals (escapes included),
JSON's true/false/null mean what they mean in JSON, tuples become lists, and unquoted text is a string. What
has no single reading (an argument without a name, a set, a string that goes on after its closing quote) is an
error: a row without a label is better than a row with a wrong one. docs/toolace_parser.md lists how this
differs from the parser released with the paper (verl/verl/utils/tool_utils.py), which searches with regular
expressions.

One pass over the text, no backtracking beyond re-reading one value as bare text: linear time. Nothing is
evaluated. Also here: the tool list inside a ToolACE system text.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable

MAX_DEPTH = 64  # nested lists and dicts in one value; real rows stay below 10
TOOLS_MARKER = "that you can invoke:\n"

_SPACE = re.compile(r"\s*")
_SEPARATORS = re.compile(r"[\s,;]*")
_OPENING = re.compile(r"\s*\(")
_NAME_TEXT = re.compile(r"[^()\"=\[\]{}]*")
# "(VIN)" in "Vehicle Identification Number (VIN) Lookup(...)": plain words, and the call goes on behind them
_NAME_GROUP = re.compile(r"\([^()\"'=\[\]{}]+\)(?=\s*[^\s,;\])])")
_KEY = re.compile(r"\s*([^\s=,()'\"{}][^=,()'\"{}]*)=")
_STRING = {
    '"': re.compile(r'"((?:[^"\\]|\\.)*+)"', re.DOTALL),
    # an apostrophe between two letters ('it's') cannot end a string: a delimiter would have to follow
    "'": re.compile(r"'((?:[^'\\]|\\.|(?<=\w)'(?=\w))*+)'", re.DOTALL),
}
_WORD = re.compile(r"[^\s,:()\[\]{}'\"]+")  # a number or keyword inside a list or dict
_BARE_MARK = re.compile(r"[,()\[\]{}]")
_LONE_APOSTROPHE = re.compile(r"(?<!\w)'|'(?!\w)")
_PREFIXED_STRING = re.compile(r"[bBrRuUfF]{1,2}['\"]")
_DIGITS = r"[0-9](?:_?[0-9])*"
_INTEGER = re.compile(r"[+-]?(?:0(?:_?0)*|[1-9](?:_?[0-9])*)")
_EXPONENT = rf"[eE][+-]?{_DIGITS}"
_POINT = rf"(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})"
_FLOAT = re.compile(rf"[+-]?(?:{_POINT}(?:{_EXPONENT})?|{_DIGITS}{_EXPONENT})")
_KEYWORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_CLOSER = {"(": ")", "[": "]", "{": "}"}
_ESCAPE = re.compile(
    r"\\(?:(?P<octal>[0-7]{1,3})|x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|U(?P<U>[0-9a-fA-F]{8})"
    r"|N\{(?P<name>[^{}]+)\}|(?P<one>.))",
    re.DOTALL,
)
_ONE_LETTER = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "\n": ""} | {
    sign: sign for sign in "\\'\""
}


class CallSyntaxError(ValueError):
    """A call string that cannot be read, with the reason and the position (in characters)."""

    def __init__(self, reason: str, position: int):
        super().__init__(f"{reason} (at character {position})")
        self.reason = reason
        self.position = position


class _NotALiteral(Exception):
    """What starts like a list, dict or tuple is none; it may still be bare text."""


def is_call_turn(text: str) -> bool:
    """Whether an assistant turn is meant as calls: from "[" to "]", as the released code decides it."""
    return text.startswith("[") and text.endswith("]")


def parse_calls(text: str, tool_names: Iterable[str] = ()) -> list[dict]:
    """Calls of a ToolACE call string, in order, as [{"name": str, "arguments": dict}]; "[]" gives [].

    `tool_names`, the candidate tools, settle where a name ends when it holds parentheses, brackets or quotes;
    a name outside them is read all the same. A key given twice keeps its last value. All values are JSON
    values: no NaN, no infinity, no half surrogate pairs.
    Raises CallSyntaxError with the reason; takes time linear in the text for any text.
    """
    return _Parser(text, sorted({name for name in tool_names if name}, key=len, reverse=True)).turn()


def parse_function_call(text: str, tool_names: Iterable[str] = ()) -> list[dict]:
    """Calls of a turn whose role says that it is a call: a call string, or JSON as sharegpt files have it.

    JSON: one {"name", "arguments"} or a list of them; arguments may be an object or a JSON string of one.
    Raises CallSyntaxError.
    """
    try:
        calls = json.loads(text)
        calls = [calls] if isinstance(calls, dict) else calls
        return [{"name": call["name"], "arguments": _json_arguments(call["arguments"])} for call in calls]
    except json.JSONDecodeError:
        return parse_calls(text.strip(), tool_names)
    except (TypeError, KeyError, ValueError, RecursionError):
        raise CallSyntaxError("JSON that is no list of {name, arguments}", 0) from None


def _json_arguments(arguments: dict | str) -> dict:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def split_system(system: str) -> tuple[str, list[dict] | None]:
    """A ToolACE system text as (its text up to and including "that you can invoke:\\n", its tools).

    The tools are None where there is no such marker or no readable JSON list of tools with names behind it.
    """
    start = system.find(TOOLS_MARKER)
    if start < 0:
        return system, None
    start += len(TOOLS_MARKER)
    try:
        tools, _ = json.JSONDecoder().raw_decode(system, _SPACE.match(system, start).end())
    except (ValueError, RecursionError):
        return system[:start], None
    if not isinstance(tools, list):
        return system[:start], None
    named = [tool for tool in tools if isinstance(tool, dict) and isinstance(tool.get("name"), str)]
    return system[:start], named if len(named) == len(tools) else None


class _Parser:
    def __init__(self, text: str, names_longest_first: list[str]):
        self.text = text
        self.names = names_longest_first
        self.position = 0

    # -- turn, call, name, argument

    def turn(self) -> list[dict]:
        calls = []
        if not self._take("["):
            raise self._error("the turn does not start with '['")
        self._skip(_SEPARATORS)
        while not self._take("]"):
            calls.append(self._call())
            self._skip(_SEPARATORS)
        if self.position != len(self.text):
            raise self._error("text after the closing ']'")
        return calls

    def _call(self) -> dict:
        name = self._known_name() or self._free_name()
        self._skip(_OPENING)
        arguments = {}
        self._skip(_SPACE)
        while not self._take(")"):
            key, value = self._argument()
            arguments[key] = value
            self._skip(_SPACE)
            if not self._take(",") and self._peek() != ")":
                raise self._error("no ',' or ')' after a value")
            self._skip(_SPACE)
        return {"name": name, "arguments": arguments}

    def _known_name(self) -> str | None:
        for name in self.names:
            if self.text.startswith(name, self.position):
                end = self.position + len(name)
                if _OPENING.match(self.text, end):
                    self.position = end
                    return name
        return None

    def _free_name(self) -> str:
        start = self.position
        self._skip(_NAME_TEXT)
        while group := _NAME_GROUP.match(self.text, self.position):
            self.position = group.end()
            self._skip(_NAME_TEXT)
        name = self.text[start : self.position].strip()
        if not name or self._peek() != "(":
            raise self._error("no tool name followed by '('")
        return name

    def _argument(self) -> tuple[str, object]:
        key = _KEY.match(self.text, self.position)
        if not key:
            raise self._error("an argument without 'name='")
        self.position = key.end()
        return key.group(1).strip(), self._value()

    # -- values

    def _value(self) -> object:
        self._skip(_SPACE)
        start = self.position
        first = self._peek()
        if first in ("'", '"'):
            value = self._string()
            self._skip(_SPACE)
            if self._peek() not in (",", ")"):
                raise self._error("text after a closing quote")
            return value
        if first in _CLOSER:
            try:
                value = self._container(depth=1)
                self._skip(_SPACE)
                if self._peek() in (",", ")"):
                    return value
            except _NotALiteral:
                pass
            self.position = start  # "[a](b)", "(555) 123-4567": bare text after all
        return self._bare_value()

    def _string(self) -> str:
        match = _STRING[self._peek()].match(self.text, self.position)
        if not match:
            raise self._error("a string without its closing quote")
        value = _unescape(match.group(1))
        if any("\ud800" <= char <= "\udfff" for char in value):
            try:  # JSON writes an emoji as two \u escapes
                value = value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                raise self._error("half a surrogate pair in a string") from None
        self.position = match.end()
        return value

    def _container(self, depth: int) -> list | dict:
        if depth > MAX_DEPTH:
            raise self._error(f"lists or dicts nested deeper than {MAX_DEPTH}")
        opening = self._peek()
        self.position += 1
        return self._dict(depth) if opening == "{" else self._list(depth, _CLOSER[opening])

    def _list(self, depth: int, closer: str) -> object:
        items, commas = [], 0
        self._skip(_SPACE)
        while not self._take(closer):
            if len(items) > commas:
                raise _NotALiteral
            items.append(self._element(depth))
            commas += self._comma()
        only_grouped = closer == ")" and len(items) == 1 and not commas  # (5) is 5, (5,) is [5]
        return items[0] if only_grouped else items

    def _dict(self, depth: int) -> dict:
        pairs, commas, count = {}, 0, 0
        self._skip(_SPACE)
        while not self._take("}"):
            if count > commas:
                raise _NotALiteral
            key = self._element(depth)
            self._skip(_SPACE)
            if self._peek() in (",", "}"):
                raise self._error("a set, which is no JSON value")
            if not self._take(":") or isinstance(key, (list, dict)):
                raise _NotALiteral
            self._skip(_SPACE)
            pairs[_json_key(key)] = self._element(depth)
            count += 1
            commas += self._comma()
        return pairs

    def _comma(self) -> bool:
        self._skip(_SPACE)
        found = self._take(",")
        self._skip(_SPACE)
        return found

    def _element(self, depth: int) -> object:
        first = self._peek()
        if first in ("'", '"'):
            return self._string()
        if first in _CLOSER:
            return self._container(depth + 1)
        word = _WORD.match(self.text, self.position)
        if not word:
            raise _NotALiteral
        value = self._plain(word.group())
        if isinstance(value, str):
            raise _NotALiteral
        self.position = word.end()
        return value

    def _bare_value(self) -> object:
        """Unquoted text up to the "," of the next `key=` or to the ")" of the call, read as a plain value.

        Brackets in it must pair, save those that no comma depends on ("note={x)" is the string "{x").
        """
        start, first_comma = self.position, None
        unclosed: list[int] = []  # positions of the brackets open at this point
        parentheses = 0
        for mark in _BARE_MARK.finditer(self.text, start):
            sign, here = mark.group(), mark.start()
            if sign in _CLOSER:
                unclosed.append(here)
                parentheses += sign == "("
            elif sign == ")" and parentheses:
                while self.text[unclosed.pop()] != "(":
                    pass
                parentheses -= 1
            elif sign == ")" or (sign == "," and not unclosed and self._ends_value(here)):
                self.position = here
                if unclosed and "," in self.text[unclosed[0] : here]:
                    raise self._error("a bracket that is not closed")
                if first_comma and not isinstance(self._plain(self.text[start:first_comma].strip()), str):
                    raise self._error("an argument without 'name='")  # "a=1, 5", but not "city=Miami, FL"
                return self._unquoted(self.text[start:here].strip())
            elif sign == "," and not unclosed:
                first_comma = first_comma or here
            elif unclosed and sign == _CLOSER[self.text[unclosed[-1]]]:
                unclosed.pop()
        raise self._error("a call without its closing ')'")

    def _ends_value(self, comma: int) -> bool:
        """Whether a comma in bare text ends the value; in "city=Miami, FL" it does not."""
        following = _SPACE.match(self.text, comma + 1).end()
        if self.text[following : following + 1] in (",", ")", ""):
            return True
        return bool(_KEY.match(self.text, following))

    def _unquoted(self, text: str) -> object:
        if text == "..." or _PREFIXED_STRING.match(text):
            raise self._error("an ellipsis, bytes or prefixed string, which is no JSON value")
        if text.count('"') % 2 or len(_LONE_APOSTROPHE.findall(text)) % 2:
            raise self._error("a quote without its partner")
        if text[:1] in ("[", "{") and _is_enclosed(text):
            raise self._error("a list or dict of more than literals")
        return self._plain(text)

    def _plain(self, text: str) -> object:
        """A keyword or a decimal number as Python reads it; anything else is the text itself."""
        if text in _KEYWORDS:
            return _KEYWORDS[text]
        if _INTEGER.fullmatch(text):
            try:
                return int(text)
            except ValueError:  # Python's limit of 4,300 digits
                raise self._error("an integer of too many digits") from None
        if _FLOAT.fullmatch(text):
            number = float(text)
            if math.isinf(number):
                raise self._error("a number that is not finite")
            return number
        return text

    # -- the cursor

    def _skip(self, pattern: re.Pattern) -> None:
        match = pattern.match(self.text, self.position)
        if match:
            self.position = match.end()

    def _peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def _take(self, sign: str) -> bool:
        found = self.text.startswith(sign, self.position)
        self.position += found
        return found

    def _error(self, reason: str) -> CallSyntaxError:
        return CallSyntaxError(reason, self.position)


def _is_enclosed(text: str) -> bool:
    """Whether the bracket that opens the text is closed by its last character."""
    depth = 0
    for mark in re.finditer(r"[()\[\]{}]", text):
        depth += 1 if mark.group() in _CLOSER else -1
        if depth == 0:
            return mark.end() == len(text)
    return False


def _json_key(key: object) -> str:
    """A dict key as json.dumps writes it: JSON knows only strings."""
    if isinstance(key, str):
        return key
    return json.dumps(key)


def _unescape(text: str) -> str:
    """Python's escapes; an unknown one (\\d) keeps its backslash. Text with a malformed one (a path such as
    C:\\users) was not written with escapes in mind and stays as it is."""
    try:
        return _ESCAPE.sub(_unescape_one, text)
    except _NotALiteral:
        return text


def _unescape_one(match: re.Match) -> str:
    kind, digits = match.lastgroup, match.group(match.lastgroup)
    try:
        if kind == "one":
            if digits in "xuUN":
                raise _NotALiteral
            return _ONE_LETTER.get(digits, match.group())
        if kind == "name":
            return unicodedata.lookup(digits)
        return chr(int(digits, 8 if kind == "octal" else 16))
    except (KeyError, ValueError, OverflowError):
        raise _NotALiteral from None
