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
    "byte": int, "short": int, "integer": int, "long": int, "float": float, "double": float, "boolean": bool,
    "char": str, "String": str, "any": str, "Array": list, "ArrayList": list, "HashMap": dict,
}  # fmt: skip
JAVASCRIPT_TYPES = {
    "integer": int, "Bigint": int, "float": float, "Boolean": bool, "String": str, "any": str, "array": list,
    "dict": dict,
}  # fmt: skip


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


def _number(pattern: str, make: Callable[[str], Any], suffix: str, text: str) -> Any:
    """`make` of text that is such a number; a line break may follow it, as `$` lets one pass."""
    return make(text.rstrip("\n" + suffix)) if re.match(pattern, text) else text


_integer = partial(_number, r"-?\d+$", int, "")
_long = partial(_number, r"-?\d+[lL]$", int, "lL")
_float = partial(_number, r"-?\d+(\.\d+)?([eE][+-]?\d+)?[fF]$", float, "fF")
_double = partial(_number, r"-?\d+(\.\d+)?([eE][+-]?\d+)?$", float, "")
_javascript_float = partial(_number, r"-?\d+(\.\d+)?$", float, "")
_bigint = partial(_number, r"-?\d+n$", int, "n")


def _boolean(text: str) -> Any:
    return {"true": True, "false": False}.get(text, text)


def _unquoted(text: str, quotes: str = "\"'") -> str:
    """Text without its outer quotes, where it begins and ends with the same one."""
    return text[1:-1] if text[:1] == text[-1:] and text[:1] in tuple(quotes) else text


def _python_number(text: str) -> Any:
    """What int() or float() make of text, which is more than a literal may be: "1_0", "inf", "1e5"."""
    for make in (int, float):
        try:
            return make(text)
        except ValueError:
            pass
    return text


_JAVA_SCALARS: dict[str, Callable[[str], Any]] = {
    "byte": _integer, "short": _integer, "integer": _integer, "long": _long, "float": _float, "double": _double,
    "boolean": _boolean, "char": str, "String": str, "any": str,
}  # fmt: skip
_JAVASCRIPT_SCALARS: dict[str, Callable[[str], Any]] = {
    "integer": _integer, "Bigint": _bigint, "float": _javascript_float, "Boolean": _boolean, "String": _unquoted,
    "any": str,
}  # fmt: skip


def _untyped_java(text: str) -> Any:
    """A stripped Java value by its looks: boolean, string, long, float, number, else the text itself."""
    if text in ("true", "false"):
        return _boolean(text)
    if (bare := _unquoted(text, '"')) != text:
        return bare
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
_MAP_BODY = re.compile(r">\s*\(\)\s*\{\s*\{?\s*")
_NEXT_ROW = re.compile(r",\s*\[")


class _Lines:
    """Where the lines of a text end; asking again within a line costs nothing."""

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


def _enclosed(text: str, opening: str, closing: str, least: int = 0) -> Iterator[str]:
    """What stands between an opening (a pattern) and the next `closing` on the same line, from left to right.

    least: characters there are at least between the two.
    """
    lines, used, dead = _Lines(text), 0, -1  # used: end of the last find; dead: end of a line found to lack `closing`
    for match in re.finditer(opening, text):
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


def _java_array(text: str, element: str | None) -> Any:
    """`new Word[] {a, b}` anywhere in the text; elements keep their quotes."""
    content = next(_enclosed(text, r"new\s+\w+\[\]\s*\{", "}"), None)
    if content is None:
        return text
    read = partial(java_value, kind=element) if element else _untyped_java
    return [read(part.strip()) for part in content.split(",") if part.strip()]


def _java_list(text: str, element: str | None) -> Any:
    """`new ArrayList<>(Arrays.asList(a, b))`, else `new ArrayList<>() {{ add(a); add(b); }}`, else `new ArrayList<>()`.

    Strings and characters lose the first and the last character, whatever it is.
    """
    listed = next(_enclosed(text, r"new\s+ArrayList<\w*>\(Arrays\.asList\(", "))", least=1), None)
    if listed is not None:
        return [_list_element(part.strip(), element) for part in listed.split(",")]
    block = re.search(r"new\s+ArrayList<\w*>\(\)\s*\{\{\s*", text)
    end = text.find("}}", block.end() + 1) if block else -1
    if end >= 0:
        added = _enclosed(text[block.end() : end], r"add\(", ")", least=1)
        return [_list_element(part.strip(), element) for part in added]
    return [] if re.search(r"new\s+ArrayList<\w*>\(\)", text) else text


def _list_element(text: str, element: str | None) -> Any:
    if element in ("String", "char"):
        return text[1:-1]
    return java_value(text, element) if element else _untyped_java(text)


def _java_map(text: str, element: None = None) -> Any:
    """`new HashMap<...>() {{ put("k", v); }}` with one pair of braces or two, else `new HashMap<...>()`."""
    head = re.search(r"new\s+HashMap<", text)
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
    for head in re.finditer(r"new\s+HashMap<", text):
        place = bisect_left(ends, head.end())
        if place < len(ends) and ends[place] < lines.end_of(head.end()):
            return True
    return False


_JAVA_COLLECTIONS = {"Array": _java_array, "ArrayList": _java_list, "HashMap": _java_map}

# -------------------------------------------------------------------------------------- JavaScript collections


def _javascript_array(text: str, element: str | None = None) -> Any:
    """`[a, b]` or `new Array(a, b)` at the start of the text, up to the first closing bracket; or rows of them."""
    text = text.strip()
    if rows := _rows(text):
        first, *others = (row.strip() for row in _enclosed(rows, r"\[", "]"))
        return [[_untyped_javascript(part) for part in row.split(",")] for row in (first.removeprefix("["), *others)]
    head = re.match(r"\[|new\s+Array\(", text)
    if not head:
        return text
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
    head = re.match(r"(\[|new\s+Array\()\s*\[", text)
    if not head:
        return None
    closing = "]" if head[1] == "[" else ")"
    lines, start = _Lines(text), head.end()
    while (end := text.find("]", start, lines.end_of(start))) >= 0:
        after = _after_space(text, end + 1)
        if text.startswith(closing, after):
            return text[: after + 1]
        row = _NEXT_ROW.match(text, after)
        start = row.end() if row else end + 1
    return None


def _javascript_object(text: str, element: None = None) -> Any:
    """`{key: value, ...}` at the start of the text, up to the first "}" of its line."""
    text = text.strip()
    end = text.find("}", 1, _Lines(text).end_of(1))
    if not text.startswith("{") or end < 0:
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
    comma = content.find(",", start)
    while comma >= 0:
        key, stop = _after_space(content, comma + 1), content.find(",", comma + 1)
        if content.find(":", key + 1, stop if stop >= 0 else len(content)) >= 0:
            return comma, key
        if key > comma + 1 and content.startswith(":", key):  # then the space before it is the key
            return comma, key - 1
        comma = stop
    return len(content), len(content)


_JAVASCRIPT_COLLECTIONS = {"array": _javascript_array, "dict": _javascript_object}
