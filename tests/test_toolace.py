"""The ToolACE call-string parser: hand-written cases, and the parser released with the paper.

`python tests/test_toolace.py` prints the counts of docs/toolace_parser.md.
"""

import ast
import contextlib
import json
import random
import re
from collections import Counter

import pytest
from conftest import shared_rows

from tooln1.prepare.toolace import CallSyntaxError, is_call_turn, parse_calls, parse_function_call, split_system


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


def same(left, right):
    """Equal as JSON: 1, 1.0 and true differ."""
    return json.dumps(left) == json.dumps(right)


VALUES = {
    '"a"': "a",
    r"'it\'s, ok'": "it's, ok",
    '"call (555) now"': "call (555) now",
    '"x=1, y=2"': "x=1, y=2",
    '["a\nb"]': ["a\nb"],
    r'"C:\users\new"': r"C:\users\new",
    r'"\ud83d\ude00"': "😀",
    r'"\x41\101\N{BULLET}"': "AA•",
    "'x' 'y'": "xy",
    "-1": -1,
    "1_000": 1000,
    "007": "007",
    "0x10": 16,
    "true": True,
    "[1, 'a', true, None,]": [1, "a", True, None],
    '{"a": [1, {"b": true}], "c": null}': {"a": [1, {"b": True}], "c": None},
    "{'k)': ')', 'l': (1, 2), 'it's': 1}": {"k)": ")", "l": [1, 2], "it's": 1},
    "{1: 2, true: 3, 1.5: 4, 1: 5}": {"1": 5, "true": 3, "1.5": 4},
    "": "",
    "Miami, FL": "Miami, FL",
    "(555) 123-4567": "(555) 123-4567",
    "f(x)": "f(x)",
    "[a](b)": "[a](b)",
    "it's": "it's",
    'say "hi"': 'say "hi"',
    "12 #4": "12 #4",
    "line1\nline2": "line1\nline2",
}


@pytest.mark.parametrize("text", VALUES)
def test_value(text):
    value = VALUES[text]
    assert same(parse_calls(f"[f(a={text})]"), [call("f", a=value)])
    assert same(parse_calls(f"[f(z=0, a = {text} , b='b'), g()]"), [call("f", z=0, a=value, b="b"), call("g")])


NAMES = "Market API;/v1/x;Q&A List;Get Agent's Listings;M4.5+ Quakes;café lookup;Fetch (all);a,b;Lookup (VIN) V2"


@pytest.mark.parametrize("name", NAMES.split(";"))
def test_name(name):
    assert parse_calls(f'[{name}(x=")"), g(), {name} ()]') == [call(name, x=")"), call("g"), call(name)]


def test_separators_and_spaces():
    two = [call("f", a=1), call("g", b=2)]
    for separator in (", ", ",", " , ", "; ", " "):
        assert parse_calls(f"[f(a=1){separator}g(b=2)]") == two, separator
    assert parse_calls("[ f( a=1 ),\n g (b = 2,) ]") == two
    assert parse_calls("[]") == parse_calls("[ ]") == []
    assert parse_calls("[f(a=1, a=2)]") == [call("f", a=2)]


REFUSED = {
    "[f(a='x', 5)]": "without 'name='",
    "[No tool fits (sorry)]": "without 'name='",
    "[f(a={1, 2})]": "a set",
    "[f(a=b'x')]": "bytes",
    '[f(a=f"{x}")]': "formatted",
    "[f(a=1e999)]": "not finite",
    "[f(a=0x1" + "0" * 4000 + ")]": "JSON cannot hold",  # more digits than Python writes
    "[f(a=" + "[" * 5000 + "]" * 5000 + ")]": "more than literals",  # than Python's parser takes
    r'[f(a="\ud83d")]': "beside a quoted string",
    "[f(a=\ud83d)]": "surrogate",
    "[f(a=[1, 2, b=3)]": "partner",
    "[f(a=[hello, world])]": "more than literals",
    "[f(a={(1, 2): 3})]": "more than literals",
    '[f(a=5" pipe)]': "partner",
    '[f(a=5" pipe, b=6" pipe)]': "may end it",
    "[f(a=1)": "from '[' to ']'",
    "[()]": "no tool name",
    "[f(a=open('/etc/passwd').read(), b=[open('/etc/passwd')])]": "more than literals",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text):
    with pytest.raises(CallSyntaxError, match=re.escape(REFUSED[text])):
        parse_calls(text)


def test_any_text_gives_calls_or_a_syntax_error():
    """Also that the result is strict JSON that UTF-8 can hold."""
    draw = random.Random(0)
    pieces = [*"[](){}'\"\\,=:;. \nfab019eE-+_é#x", "true", "None", "f(a=", "\\u00e9", "\\ud83d", "1e999", "\0", "0x"]
    for _ in range(20_000):
        text = "[" + "".join(draw.choices(pieces, k=draw.randrange(24))) + "]"
        with contextlib.suppress(CallSyntaxError):
            json.dumps(parse_calls(text), ensure_ascii=False, allow_nan=False).encode()


def test_written_calls_are_read_back():
    """Random calls, written with Python's and with JSON's literals."""
    draw = random.Random(1)
    texts = ["", "a", "a, b=2)", "(", "'", '"', "\\", "\n", "é😀", "true", "null", "1", "]", "{", "\u2028", "x'y", "#"]

    def value(depth):
        kind = draw.randrange(8 if depth < 3 else 6)
        if kind == 6:
            return [value(depth + 1) for _ in range(draw.randrange(4))]
        if kind == 7:
            return {draw.choice(texts): value(depth + 1) for _ in range(draw.randrange(4))}
        return (draw.choice(texts), draw.randrange(-99, 99), draw.random(), True, False, None)[kind]

    for _ in range(1_000):
        calls = [
            call(draw.choice(["f", "A b/c", "Fetch (all)"]), **{k: value(0) for k in draw.sample("abcd", 2)})
            for _ in range(draw.randrange(1, 4))
        ]
        for write in (repr, json.dumps, lambda v: json.dumps(v, ensure_ascii=False)):
            written = [f"{c['name']}({', '.join(f'{k}={write(v)}' for k, v in c['arguments'].items())})" for c in calls]
            assert same(parse_calls(f"[{', '.join(written)}]"), calls)


def test_function_call_turns():
    """sharegpt's function_call role: JSON, or a call string."""
    for text in ('{"name": "f", "arguments": {"a": 1}}', '[{"name": "f", "arguments": {"a": 1}}]', " [f(a=1)]\n"):
        assert parse_function_call(text) == [call("f", a=1)]
    for text in ("5", '["f"]', '[{"name": "f"}]', "plain words"):
        with pytest.raises(CallSyntaxError):
            parse_function_call(text)


def test_split_system():
    tools = [{"name": "f", "description": "[that you can invoke:\n]"}]
    head = "Here is a list of functions in JSON format that you can invoke:\n"
    system = f"{head}{json.dumps(tools)}. \nShould you decide to return the function call(s)."
    assert split_system(system) == (head, tools)
    for broken in ("no list", head, head + "[1]", head + '{"name": "f"}', head + '[{"name": "f"}', head + "5"):
        assert split_system(broken)[1] is None, broken


# ---- against the parser released with the paper ----


def golden_cases():
    return shared_rows("data/golden/golden_toolace_parse_dev.jsonl.gz")


def ours(text):
    """Our calls, None for a turn that is text, or the CallSyntaxError."""
    try:
        return (parse_calls(text) or None) if is_call_turn(text) else None
    except CallSyntaxError as error:
        return error


def difference(case):
    """How our result and the released parser's differ; a case with several faults counts under the first."""
    our = ours(case["text"])
    if not case["accepted_as_call"]:
        return "released: text; ours: calls" if isinstance(our, list) else "no call for both"
    their = [{"name": name, "arguments": arguments} for name, arguments in case["parsed"]]
    if not case["json_ok"]:
        return "released: a value that JSON cannot hold"
    if not isinstance(our, list):
        return "ours: refused"
    if same(our, their):
        return "equal"
    if [c["name"] for c in our] != [c["name"] for c in their]:
        return "other names"
    return "other arguments"


class Words(ast.NodeTransformer):
    """Replaces JSON's words by their values; KeyError for other names."""

    def visit_Name(self, node):
        return ast.Constant({"true": True, "false": False, "null": None}[node.id])


def python_arguments(text, names):
    """The arguments of each call as CPython reads the text with its names replaced; None where it is no such Python."""
    for name in names:
        text = re.sub(re.escape(name) + r"\s*\(", "_call(", text, count=1)
    try:
        calls = ast.parse(text.replace(";", ","), mode="eval").body.elts
        read = [{k.arg: ast.literal_eval(Words().visit(k.value)) for k in node.keywords} for node in calls]
        return json.loads(json.dumps(read))
    except (SyntaxError, ValueError, KeyError, TypeError, AttributeError):
        return None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")  # "\\d" in the texts
def test_where_the_texts_are_python_our_values_are_pythons():
    judged = Counter()
    for case in golden_cases():
        our = ours(case["text"])
        expected = python_arguments(case["text"], [c["name"] for c in our]) if isinstance(our, list) else None
        if expected is not None:
            assert same([c["arguments"] for c in our], expected), case["text"]
            judged[difference(case)] += 1
    assert judged["equal"] > 500 and judged["other arguments"] > 50, judged


# Calls without what the released parser misreads: other signs in names; brackets, escapes or line breaks in values.
VALUE = r"""(?:"[^"\\()\n]*"|'[^'\\()\n]*'|-?\d[\d.]*|True|False|None|\[(?:[\d., ]|"[^"\\()\n]*")*\])"""
PLAIN = re.compile(rf"\[(?:[\w.?| -]+\((?: *\w+={VALUE},?)*\)[,; ]*)+\]", re.ASCII)


def test_plain_calls_are_read_as_the_released_parser_reads_them():
    kinds = Counter(difference(case) for case in golden_cases() if PLAIN.fullmatch(case["text"]))
    assert kinds["equal"] > 300 and len(kinds) == 1, kinds


if __name__ == "__main__":
    for kind, count in Counter(map(difference, golden_cases())).most_common():
        print(f"| {kind} | {count} |")
