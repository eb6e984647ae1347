"""Java and JavaScript literals as BFCL reads them, oddities included, and how long that takes."""

import json
import random
import time

import pytest

from tooln1.benchmarks.bfcl_literals import java_value, javascript_value

MAP, NEW_LIST = "new HashMap<String, Object>()", "new ArrayList<>"
JAVA = [  # text, declared type, element type, value
    ("-12", "integer", None, -12),
    ("12\n", "short", None, 12),
    ("12 ", "integer", None, "12 "),
    ("1.0", "integer", None, "1.0"),
    ("5L", "long", None, 5),
    ("5l\n", "long", None, 5),
    ("5", "long", None, "5"),
    ("1.5f", "float", None, 1.5),
    ("2e3F", "float", None, 2000.0),
    ("1.5", "float", None, "1.5"),
    ("1.5", "double", None, 1.5),
    ("2", "double", None, 2.0),
    (".5", "double", None, ".5"),
    ("1.5d", "double", None, "1.5d"),
    ("true", "boolean", None, True),
    ("True", "boolean", None, "True"),
    ("'c'", "char", None, "'c'"),
    ('"s"', "String", None, '"s"'),
    ("12", "any", None, "12"),
    ("new int[] {1, 2,}", "Array", "integer", [1, 2]),
    ("x = new int[]{1, a}; new int[] {2}", "Array", "integer", [1, "a"]),
    ("new int[] {1\n} new int[] {2}", "Array", "integer", [2]),
    ('new String[] {"a"}', "Array", "String", ['"a"']),
    ("{1, 2}", "Array", "integer", "{1, 2}"),
    (f'{NEW_LIST}(Arrays.asList("a", bc,))', "ArrayList", "String", ["a", "", ""]),
    (f"{NEW_LIST}(Arrays.asList(1L, 2))", "ArrayList", "long", [1, "2"]),
    (f"{NEW_LIST}(Arrays.asList(1, true))", "ArrayList", "any", ["1", "true"]),
    (f"{NEW_LIST}() {{{{ add(1); add( 2 );\n add(3) }}}}", "ArrayList", "integer", [1, 2, 3]),
    (f'{NEW_LIST}() {{{{ add("a") }}}}', "ArrayList", "String", ["a"]),
    (f"{NEW_LIST}()", "ArrayList", "integer", []),
    (f"{NEW_LIST}() {{{{ }}}}", "ArrayList", "integer", []),
    (f"{NEW_LIST}(Arrays.asList())", "ArrayList", "integer", f"{NEW_LIST}(Arrays.asList())"),
    ("List.of(1)", "ArrayList", "integer", "List.of(1)"),
    (f'{MAP} {{{{ put("a", 1); put("b", "x"); }}}}', "HashMap", None, {"a": 1, "b": "x"}),
    (f'{MAP} {{ put("a", true);\nput("b",\n 2L) }}', "HashMap", None, {"a": True, "b": 2}),
    (f'{MAP} {{{{ put("a", 1.5f); put("a", 1e5); put("c", x y) }}}}', "HashMap", None, {"a": 100000.0, "c": "x y"}),
    (f'{MAP} {{{{ put("a", "}}"); }}}}', "HashMap", None, {}),
    (f'{MAP} {{{{ put("a", b",\n 2); }}}}', "HashMap", None, {'a", b': 2}),
    (f'{MAP} {{{{ put("a", put("b", 1)); }}}}', "HashMap", None, {"a": 'put("b", 1'}),
    (MAP, "HashMap", None, {}),
    ("new HashMap<\n>()", "HashMap", None, "new HashMap<\n>()"),
    (f"{MAP} {{}}", "HashMap", None, {}),
    ("new HashMap<", "HashMap", None, "new HashMap<"),
    ("Map.of()", "HashMap", None, "Map.of()"),
]
JAVASCRIPT = [
    ("'it''s'", "String", None, "it''s"),
    ("\"a'", "String", None, "\"a'"),
    ("a", "String", None, "a"),
    ("3", "float", None, 3.0),
    ("1e5", "float", None, "1e5"),
    ("7n", "Bigint", None, 7),
    ("7", "Bigint", None, "7"),
    ("false", "Boolean", None, False),
    ("'x'", "any", None, "'x'"),
    ("-3", "integer", None, -3),
    (" [1, 'b', c] tail", "array", "String", ["1", "b", "c"]),
    ("[1, 2.5]", "array", "float", [1.0, 2.5]),
    ("['1', 2]", "array", "integer", ["'1'", 2]),
    ("new Array(1, 2)", "array", "integer", [1, 2]),
    ("[]", "array", "String", []),
    ("[a]b]", "array", "String", ["a"]),
    (" [1,\n2] ", "array", "integer", "[1,\n2]"),
    ("[" + "9" * 5000 + "]", "array", "integer", "[" + "9" * 5000 + "]"),
    ("x[1]", "array", "integer", "x[1]"),
    ("[[1, 'a'], [true]]", "array", "array", [[1, "a"], [True]]),
    ("[[1], 2, [3]]", "array", "array", [[1], [3]]),
    ("[\n[1],\n[2]\n] x", "array", "String", [[1], [2]]),
    ("new Array([1], [])", "array", "array", [[1], [""]]),
    ("[[1], [2]", "array", "String", ["[1"]),
    ("{}", "dict", None, {}),
    ("{a: 1, 'b': \"x\"}", "dict", None, {"a": 1, "b": "x"}),
    ("{a: '123', b: \"true\"}", "dict", None, {"a": 123, "b": True}),
    ("{a: [1, 'b'], c: d, e}", "dict", None, {"a": [1, "b"], "c": "d, e"}),
    ("{a: {b: 1}, c: 2}", "dict", None, {"a": "{b: 1"}),
    ("{a: b:c, ::d: 1}", "dict", None, {"a": "b:c", "d": 1}),
    ("{a: 1, : 2}", "dict", None, {"a": 1, "": 2}),
    ("{a: 1,\nb: 2}", "dict", None, "{a: 1,\nb: 2}"),
    ("options", "dict", None, "options"),
]


@pytest.mark.parametrize(
    ("read", "text", "kind", "element", "value"),
    [(java_value, *row) for row in JAVA] + [(javascript_value, *row) for row in JAVASCRIPT],
)
def test_source_text_is_converted(read, text, kind, element, value):
    found = read(text, kind, element)
    assert json.dumps(found) == json.dumps(value)  # 1, 1.0 and True differ


NEAR_MATCHES = [  # reader, declared type, what the text begins with, repeats and ends with
    (java_value, "Array", "", "new int[] {", ""),
    (java_value, "Array", "new int[] {", "1, ", "}"),
    (java_value, "ArrayList", "", f"{NEW_LIST}(Arrays.asList(", ""),
    (java_value, "ArrayList", f"{NEW_LIST}() {{{{", "add(", "}}"),
    (java_value, "ArrayList", f"{NEW_LIST}() {{{{", "add(1); ", "}}"),
    (java_value, "HashMap", "", "new HashMap<", ""),
    (java_value, "HashMap", f"{MAP} {{{{", 'put("', "}}"),
    (java_value, "HashMap", f"{MAP} {{{{", 'put("a",', "}}"),
    (java_value, "HashMap", f"{MAP} {{{{", 'put("a", 1); ', "}}"),
    (java_value, "double", "", "9", "x"),
    (javascript_value, "array", "[", "[1],", ""),
    (javascript_value, "array", "[", "[1]\n,", ""),
    (javascript_value, "array", "[", "1, ", "]"),
    (javascript_value, "dict", "{", "a: 1, ", "}"),
    (javascript_value, "dict", "{a: ", ", ", "}"),
    (javascript_value, "dict", "{a: ", " ", "}"),
]


@pytest.mark.parametrize(("read", "kind", "opening", "piece", "closing"), NEAR_MATCHES)
def test_literals_are_read_in_linear_time(read, kind, opening, piece, closing):
    """The official patterns take quadratic time on some of these, and on rows exponential time."""
    text = opening + piece * (2_000_000 // len(piece)) + closing
    start = time.process_time()
    read(text, kind, "integer" if "rray" in kind else None)
    assert time.process_time() - start < 5


def test_numbers_in_an_array_are_those_that_python_reads():
    """Which texts are tried is decided by a pattern; none that int() or float() read may be missing from it."""

    def by_python(text: str):
        for make in (int, float):
            try:
                return make(text)
            except ValueError:
                pass
        return text

    rng = random.Random(0)
    pieces = ["1", "0", "23", "_", ".", "e", "E", "+", "-", "inf", "Infinity", "NaN", "x", "٣", "²"]
    texts = {"".join(rng.choices(pieces, k=rng.randrange(1, 7))) for _ in range(50_000)}
    read = {text: javascript_value(f"[{text}]", "array")[0] for text in texts}
    assert {text: repr(value) for text, value in read.items()} == {text: repr(by_python(text)) for text in texts}
    assert sum(type(value) is not str for value in read.values()) > 500
