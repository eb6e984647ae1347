"""Java and JavaScript literals in a call's arguments, as BFCL reads them.

In these two languages every argument is a string of source text, which is converted by the declared type before
types and values are compared. The rules are those of bfcl-eval 2026.3.23, leniency and oddities included: text that
does not match stays the string it is, and a line break may follow a number.

Deviations: a collection of more than MAX_LITERAL characters is not read, since searching for its parts takes
quadratic time (the longest in the data has 164); the key of a Java map ends at its first `",`.
"""

import re
from typing import Any

MAX_LITERAL = 2**11  # characters of an array, list, map or object

# Declared type -> the type it is compared as.
JAVA_TYPES: dict[str, type] = (
    dict.fromkeys(("byte", "short", "integer", "long"), int)
    | dict.fromkeys(("float", "double"), float)
    | dict.fromkeys(("char", "String", "any"), str)
    | dict.fromkeys(("Array", "ArrayList"), list)
    | {"boolean": bool, "HashMap": dict}
)
JAVASCRIPT_TYPES: dict[str, type] = (
    dict.fromkeys(("integer", "Bigint"), int)
    | dict.fromkeys(("String", "any"), str)
    | {"float": float, "Boolean": bool, "array": list, "dict": dict}
)

# Declared type -> the text that is read as a number.
_INTEGER = re.compile(r"-?\d+$")
_JAVA_NUMBERS = dict.fromkeys(("byte", "short", "integer"), _INTEGER) | {
    "long": re.compile(r"-?\d+[lL]$"),
    "float": re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?[fF]$"),
    "double": re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?$"),
}
_JAVASCRIPT_NUMBERS = {"integer": _INTEGER, "Bigint": re.compile(r"-?\d+n$"), "float": re.compile(r"-?\d+(\.\d+)?$")}
_BOOLEANS = {"true": True, "false": False}


def java_value(text: str, kind: str | None, element: str | None = None) -> Any:
    """The value of a Java literal declared as `kind`, with elements of the type `element`.

    kind, element: keys of JAVA_TYPES; None: the value is read by its form.
    Raises ValueError for an integer of more digits than Python reads (4300), as the official converter does.
    """
    if kind is None:
        return _by_form(text, '"', ("long", "float"))
    if kind == "boolean":
        return _BOOLEANS.get(text, text)
    if JAVA_TYPES[kind] not in (list, dict):
        return _number(text, kind, _JAVA_NUMBERS, JAVA_TYPES)
    if len(text) > MAX_LITERAL:
        return text
    if kind == "HashMap":
        return _java_map(text)
    return _java_array(text, element) if kind == "Array" else _java_list(text, element)


def javascript_value(text: str, kind: str | None, element: str | None = None) -> Any:
    """The value of a JavaScript literal, as `java_value`; kind, element: keys of JAVASCRIPT_TYPES."""
    if kind is None:
        return _by_form(text.strip(), "\"'")
    if kind == "Boolean":
        return _BOOLEANS.get(text, text)
    if kind == "String":
        return _unquoted(text, "\"'")
    if JAVASCRIPT_TYPES[kind] not in (list, dict):
        return _number(text, kind, _JAVASCRIPT_NUMBERS, JAVASCRIPT_TYPES)
    if len(text) > MAX_LITERAL:
        return text
    return _javascript_object(text) if kind == "dict" else _javascript_array(text, element)


# ---------------------------------------------------------------------------------------------------- scalars


def _number(text: str, kind: str, patterns: dict[str, re.Pattern], types: dict[str, type]) -> Any:
    """A number of the declared type; other text, and text of a type without numbers, as it is."""
    if kind in patterns and patterns[kind].match(text):
        return types[kind](text.rstrip("\nlLfFn"))
    return text


def _unquoted(text: str, quotes: str) -> str:
    """Text without its outer quotes, where it begins and ends with the same one."""
    return text[1:-1] if text[:1] in quotes and text[:1] == text[-1:] else text


def _by_form(text: str, quotes: str, java_kinds: tuple[str, ...] = ()) -> Any:
    """A boolean, quoted string, Java number with a suffix, or anything that int() or float() reads; else the text."""
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if (bare := _unquoted(text, quotes)) != text:
        return bare
    for kind in java_kinds:
        if (value := java_value(text, kind)) != text:
            return value
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return text


# ------------------------------------------------------------------------------------------------- collections

_NEW_ARRAY = re.compile(r"new\s+\w+\[\]\s*\{([^\n}]*)\}")
_LIST_OF = re.compile(r"new\s+ArrayList<\w*>\(Arrays\.asList\((.+?)\)\)")
_LIST_BLOCK = re.compile(r"new\s+ArrayList<\w*>\(\)\s*\{\{\s*+(.+?)\}\}", re.DOTALL)
_ADD = re.compile(r"add\((.[^\n)]*)\)")
_NEW_LIST = re.compile(r"new\s+ArrayList<\w*>\(\)")
_NEW_MAP = re.compile(r"new\s+HashMap<")
_MAP_BLOCK = re.compile(r">\s*\(\)\s*\{([^}]*)\}")
_PUT = re.compile(r'put\("(?>(.*?)",)\s*(.*?)\)')
_EMPTY_MAP = re.compile(r"new\s+HashMap<.*?>\s*\(\)")


def _java_array(text: str, element: str | None) -> Any:
    """`new Word[] {a, b}` anywhere in the text; elements keep their quotes."""
    found = _NEW_ARRAY.search(text)
    if not found:
        return text
    return [java_value(part.strip(), element) for part in found[1].split(",") if part.strip()]


def _java_list(text: str, element: str | None) -> Any:
    """`new ArrayList<>(Arrays.asList(a, b))`, else `new ArrayList<>() {{ add(a); add(b); }}`, else `new ArrayList<>()`.

    Strings and characters lose the first and the last character, whatever it is.
    """
    if found := _LIST_OF.search(text):
        parts = found[1].split(",")
    elif found := _LIST_BLOCK.search(text):
        parts = _ADD.findall(found[1])
    else:
        return [] if _NEW_LIST.search(text) else text
    parts = [part.strip() for part in parts]
    if element in ("String", "char"):
        return [part[1:-1] for part in parts]
    return [java_value(part, element) for part in parts]


def _java_map(text: str) -> Any:
    """`new HashMap<...>() {{ put("k", v); }}` with one pair of braces or two, else `new HashMap<...>()`."""
    head = _NEW_MAP.search(text)
    if head and (block := _MAP_BLOCK.search(text, head.end())):
        return {key: java_value(value.strip(), None) for key, value in _PUT.findall(block[1])}
    return {} if _EMPTY_MAP.search(text) else text


_ARRAY = re.compile(r"\[([^\n\]]*)\]|new\s+Array\(([^\n)]*)\)")


def _rows_pattern(opening: str, closing: str) -> str:
    """An array of arrays. A row ends at the first "]" after which the array ends or the next row begins.

    (?>...): no other end is tried; the official pattern does, and takes exponential time.
    """
    row = rf"\[(?>.*?\]\s*(?={closing}|,\s*\[))"
    return rf"{opening}\s*{row}(?:,\s*{row})*{closing}"


_ROWS = re.compile(_rows_pattern(r"\[", r"\]") + "|" + _rows_pattern(r"new\s+Array\(", r"\)"))
_ROW = re.compile(r"\[([^\n\]]*)\]")
_OBJECT = re.compile(r"\{([^\n}]*)\}")
# A value ends at a comma that precedes a key: something before the next colon, and no other comma.
_MEMBER = re.compile(r":*+([^:]++):\s*(.*?)(?:,\s*(?=[^,]+:)|\Z)")


def _javascript_array(text: str, element: str | None = None) -> Any:
    """`[a, b]` or `new Array(a, b)` at the start of the text, up to the first closing bracket; or rows of them."""
    text = text.strip()
    if rows := _ROWS.match(text):
        first, *others = (row.strip() for row in _ROW.findall(rows[0]))
        return [[javascript_value(part, None) for part in row.split(",")] for row in (first.removeprefix("["), *others)]
    found = _ARRAY.match(text)
    if not found:
        return text
    content = (found[1] or found[2] or "").strip()
    parts = [part.strip() for part in content.split(",")] if content else []
    return [javascript_value(part, element) for part in parts]


def _javascript_object(text: str) -> Any:
    """`{key: value, ...}` at the start of the text, up to the first "}": objects within it are not read as such.

    Quotes are stripped from a value before it is read by its form, so "123" becomes a number.
    """
    text = text.strip()
    found = _OBJECT.match(text)
    if not found:
        return text
    members = {}
    for key, value in _MEMBER.findall(found[1]):
        value = value.strip()
        is_array = value.startswith("[") and value.endswith("]")
        bare = value.strip("'\"")
        members[key.strip().strip("'\"")] = _javascript_array(value) if is_array else javascript_value(bare, None)
    return members
