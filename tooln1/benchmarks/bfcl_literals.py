"""Java and JavaScript literals in a call's arguments, as BFCL reads them.

In these two languages every argument is a string of source text, which is converted by the declared type before
types and values are compared. The rules are those of bfcl-eval 2026.3.23, leniency and oddities included: text that
does not match stays the string it is. The official converters search with regular expressions, of which some
backtrack quadratically or exponentially over text that nearly matches; the scans here find the same in linear time.

An integer of more digits than Python reads (4300) raises ValueError, as it does there, except inside an array or
object of JavaScript.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

# Declared type -> the type it is compared as.
JAVA_TYPES = {
    "byte": int,
    "short": int,
    "integer": int,
    "long": int,
    "float": float,
    "double": float,
    "boolean": bool,
    "char": str,
    "String": str,
    "any": str,
    "Array": list,
    "ArrayList": list,
    "HashMap": dict,
}
JAVASCRIPT_TYPES = {
    "integer": int,
    "Bigint": int,
    "float": float,
    "Boolean": bool,
    "String": str,
    "any": str,
    "array": list,
    "dict": dict,
}


def java_value(text: str, kind: str, element: str | None = None) -> Any:
    """The value of a Java literal declared as `kind`, with elements of the type `element` where it has some.

    kind, element: keys of JAVA_TYPES; elements of no declared type go by their looks.
    """
    if kind in _JAVA_COLLECTIONS:
        return _JAVA_COLLECTIONS[kind](text, element)
    return _JAVA_SCALARS[kind](text)


def javascript_value(text: str, kind: str, element: str | None = None) -> Any:
    """The value of a JavaScript literal, as `java_value`; kind, element: keys of JAVASCRIPT_TYPES."""
    if kind in _JAVASCRIPT_COLLECTIONS:
        return _JAVASCRIPT_COLLECTIONS[kind](text, element)
    return _JAVASCRIPT_SCALARS[kind](text)


# ---------------------------------------------------------------------------------------------------- scalars


def _number(pattern: str, make: Callable[[str], Any], suffix: str) -> Callable[[str], Any]:
    """A reader: `make` of text that is such a number; a line break may follow it, as `$` lets one pass."""
    match = re.compile(pattern).match
    return lambda text: make(text.rstrip("\n" + suffix)) if match(text) else text


_integer = _number(r"-?\d+$", int, "")
_long = _number(r"-?\d+[lL]$", int, "lL")
_float = _number(r"-?\d+(\.\d+)?([eE][+-]?\d+)?[fF]$", float, "fF")
_double = _number(r"-?\d+(\.\d+)?([eE][+-]?\d+)?$", float, "")
_javascript_float = _number(r"-?\d+(\.\d+)?$", float, "")
_bigint = _number(r"-?\d+n$", int, "n")


def _boolean(text: str) -> Any:
    return {"true": True, "false": False}.get(text, text)


def _unquoted(text: str, quotes: tuple[str, ...] = ('"', "'")) -> str:
    """Text without its outer quotes, where it begins and ends with the same one."""
    return text[1:-1] if text[:1] in quotes and text[:1] == text[-1:] else text


# What int() and float() read: a try that fails costs much more than this.
_DIGITS = r"\d++(?:_\d++)*+"
_PYTHON_NUMBER = re.compile(
    rf"\s*+[+-]?(?:inf(?:inity)?|nan|(?:{_DIGITS}(?:\.(?:{_DIGITS})?+)?+|\.{_DIGITS})(?:e[+-]?{_DIGITS})?+)\s*+\Z",
    re.IGNORECASE,
)


def _python_number(text: str) -> Any:
    """What int() or float() make of text, which is more than a literal may be: "1_0", "inf", "1e5"."""
    if not _PYTHON_NUMBER.match(text):
        return text
    for make in (int, float):
        try:
            return make(text)
        except ValueError:
            pass
    return text


_JAVA_SCALARS: dict[str, Callable[[str], Any]] = {
    "byte": _integer,
    "short": _integer,
    "integer": _integer,
    "long": _long,
    "float": _float,
    "double": _double,
    "boolean": _boolean,
    "char": str,
    "String": str,
    "any": str,
}
_JAVASCRIPT_SCALARS: dict[str, Callable[[str], Any]] = {
    "integer": _integer,
    "Bigint": _bigint,
    "float": _javascript_float,
    "Boolean": _boolean,
    "String": _unquoted,
    "any": str,
}


_JAVA_SUFFIXES = tuple("lLfF")


def _untyped_java(text: str) -> Any:
    """A stripped Java value by its looks: boolean, string, long, float, number, else the text itself."""
    if text in ("true", "false"):
        return _boolean(text)
    if (bare := _unquoted(text, ('"',))) != text:
        return bare
    if text[-1:] in _JAVA_SUFFIXES:
        for read in (_long, _float):
            if (value := read(text)) != text:
                return value
    return _python_number(text)


def _untyped_javascript(text: str) -> Any:
    """A JavaScript value by its looks."""
    text = text.strip()
    if text in ("true", "false"):
        return _boolean(text)
    bare = _unquoted(text)
    return bare if bare != text else _python_number(text)


# ---------------------------------------------------------------------------------------------------- scanning

_SPACE, _COLONS = re.compile(r"\s*"), re.compile(":*")


class _Lines:
    """Where the lines of a text end; generation again within a line costs nothing."""

    def __init__(self, text: str):
        self.text, self.start, self.end = text, 0, -1

    def end_of(self, start: int) -> int:
        """The end of the line that holds position `start`."""
        if not self.start <= start <= self.end:
            found = self.text.find("\n", start)
            self.start, self.end = start, found if found >= 0 else len(self.text)
        return self.end


def _after_space(text: str, start: int) -> int:
    return _SPACE.match(text, start).end()


def _enclosed(text: str, opening: re.Pattern, closing: str, least: int = 0) -> Iterator[str]:
    """What stands between an opening and the next `closing` on the same line, from left to right.

    least: characters there are at least between the two.
    """
    lines, used, dead = _Lines(text), 0, -1  # used: end of the last find; dead: end of a line found to lack `closing`
    for match in opening.finditer(text):
        start = match.end()
        if match.start() < used or start <= dead:
            continue
        stop = lines.end_of(start)
        end = text.find(closing, start + least, stop)
        if end < 0:
            dead = stop
        else:
            used = end + len(closing)
            yield text[start:end]


# -------------------------------------------------------------------------------------------- Java collections

_NEW_ARRAY, _ADD = re.compile(r"new\s+\w+\[\]\s*\{"), re.compile(r"add\(")
_NEW_LIST, _LIST_BODY = re.compile(r"new\s+ArrayList<\w*>\(\)"), re.compile(r"new\s+ArrayList<\w*>\(\)\s*\{\{\s*")
_LIST_OF = re.compile(r"new\s+ArrayList<\w*>\(Arrays\.asList\(")
_NEW_MAP, _MAP_BODY = re.compile(r"new\s+HashMap<"), re.compile(r">\s*\(\)\s*\{\s*\{?\s*")


def _java_array(text: str, element: str | None) -> Any:
    """`new Word[] {a, b}` anywhere in the text; elements keep their quotes."""
    content = next(_enclosed(text, _NEW_ARRAY, "}"), None)
    if content is None:
        return text
    read = partial(java_value, kind=element) if element else _untyped_java
    return [read(part.strip()) for part in content.split(",") if part.strip()]


def _java_list(text: str, element: str | None) -> Any:
    """`new ArrayList<>(Arrays.asList(a, b))`, else `new ArrayList<>() {{ add(a); add(b); }}`, else `new ArrayList<>()`.

    Strings and characters lose the first and the last character, whatever it is.
    """
    listed = next(_enclosed(text, _LIST_OF, "))", least=1), None)
    if listed is not None:
        return [_list_element(part.strip(), element) for part in listed.split(",")]
    block = _LIST_BODY.search(text)
    end = text.find("}}", block.end() + 1) if block else -1
    if end >= 0:
        added = _enclosed(text[block.end() : end], _ADD, ")", least=1)
        return [_list_element(part.strip(), element) for part in added]
    return [] if _NEW_LIST.search(text) else text


def _list_element(text: str, element: str | None) -> Any:
    if element in ("String", "char"):
        return text[1:-1]
    return java_value(text, element) if element else _untyped_java(text)


def _java_map(text: str, element: None = None) -> Any:
    """`new HashMap<...>() {{ put("k", v); }}` with one pair of braces or two, else `new HashMap<...>()`."""
    head = _NEW_MAP.search(text)
    body = _MAP_BODY.search(text, head.end()) if head else None
    end = text.find("}", body.end()) if body else -1
    if end >= 0:
        return {key: _untyped_java(value.strip()) for key, value in _puts(text[body.end() : end])}
    return {} if head and _has_empty_map(text) else text


def _puts(text: str) -> Iterator[tuple[str, str]]:
    """(key, value) of each `put("key", value)`; key and value each within a line.

    The key ends at the first `",` after which its value is closed. If the line's first one fails, those after it
    fail too, but for one at the very end of the line, whose value may begin on a later line.
    """
    lines, used, dead = _Lines(text), 0, -1
    for match in re.finditer(r'put\("', text):
        start = match.end()
        if match.start() < used or start <= dead:
            continue
        stop = lines.end_of(start)
        for find in (text.find, text.rfind):
            comma = find('",', start, stop)
            value = _after_space(text, comma + 2) if comma >= 0 else stop
            end = text.find(")", value, lines.end_of(value))
            if end >= 0:
                used = end + 1
                yield text[start:comma], text[value:end]
                break
        else:
            dead = stop


def _has_empty_map(text: str) -> bool:
    """Whether `new HashMap<` and `>()` stand on one line."""
    ends = [match.start() for match in re.finditer(r">\s*\(\)", text)]
    lines = _Lines(text)
    for head in _NEW_MAP.finditer(text):
        place = bisect_left(ends, head.end())
        if place < len(ends) and ends[place] < lines.end_of(head.end()):
            return True
    return False


_JAVA_COLLECTIONS = {"Array": _java_array, "ArrayList": _java_list, "HashMap": _java_map}

# -------------------------------------------------------------------------------------- JavaScript collections

_ARRAY, _ROWS = re.compile(r"\[|new\s+Array\("), re.compile(r"(?:\[|new\s+Array\()\s*\[")
# The rest of a row, with group 1 if the array is closed behind it, else to where the next row begins.
_REST_OF_ROW = {sign: re.compile(rf"[^\n]*?\]\s*+(?:({re.escape(sign)})|,\s*+\[)") for sign in "])"}
_ROW = re.compile(r"\[([^\n\]]*+)\]")
# The comma between two members: a key follows, with a colon before the next comma (group 1), or a space as the key.
_NEXT_MEMBER = re.compile(r",\s*+(?:([^,][^,:]*+:)|(?<=\s):)")


def _javascript_array(text: str, element: str | None = None) -> Any:
    """`[a, b]` or `new Array(a, b)` at the start of the text, up to the first closing bracket; or rows of them."""
    text = text.strip()
    head = _ARRAY.match(text)
    if not head:
        return text
    if rows := _rows(text):
        first, *others = (row.strip() for row in _ROW.findall(rows))
        return [[_untyped_javascript(part) for part in row.split(",")] for row in (first.removeprefix("["), *others)]
    end = text.find(")" if head.end() > 1 else "]", head.end(), _Lines(text).end_of(head.end()))
    if end < 0:
        return text
    content = text[head.end() : end].strip()
    read = partial(javascript_value, kind=element) if element else _untyped_javascript
    try:
        return [read(part.strip()) for part in content.split(",")] if content else []
    except ValueError:
        return text


def _rows(text: str) -> str | None:
    """The array of arrays that the text begins with, `[[a, b], [c]]` or `new Array([a, b], [c])`, if it does.

    A row may hold anything but a line break. It ends at the first "]" after which the array is closed or the next
    row begins.
    """
    head = _ROWS.match(text)
    if not head:
        return None
    rest, row = _REST_OF_ROW["]" if text.startswith("[") else ")"], head
    while row := rest.match(text, row.end()):
        if row[1]:
            return text[: row.end()]
    return None


def _javascript_object(text: str, element: None = None) -> Any:
    """`{key: value, ...}` at the start of the text, up to the first "}" of its line."""
    text = text.strip()
    if not text.startswith("{"):
        return text
    end = text.find("}", 1, _Lines(text).end_of(1))
    if end < 0:
        return text
    return dict(_members(text[1:end]))


def _members(content: str) -> Iterator[tuple[str, Any]]:
    """The (key, value) pairs of an object. Objects within it cannot occur: it ends at the first closing brace.

    Quotes are stripped from a value before it is read by its looks, so "123" becomes a number.
    """
    position = 0
    while True:
        position = _COLONS.match(content, position).end()
        colon = content.find(":", position)
        if colon < 0:
            return
        key = content[position:colon].strip().strip("'\"")
        start = _after_space(content, colon + 1)
        end, position = _member_end(content, start)
        value = content[start:end].strip()
        is_array = value.startswith("[") and value.endswith("]")
        yield key, _javascript_array(value) if is_array else _untyped_javascript(value.strip("'\""))


def _member_end(content: str, start: int) -> tuple[int, int]:
    """(end of the value that begins at `start`, beginning of the next key).

    A value ends at a comma that precedes a key: one with a colon, and something before it, before the next comma.
    """
    found = _NEXT_MEMBER.search(content, start)
    if not found:
        return len(content), len(content)
    return found.start(), found.start(1) if found[1] else found.end() - 2


_JAVASCRIPT_COLLECTIONS = {"array": _javascript_array, "dict": _javascript_object}
