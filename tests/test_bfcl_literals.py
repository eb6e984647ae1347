"""Java and JavaScript literals as BFCL reads them, oddities included."""

import json
import math

import pytest

from tooln1.benchmarks.bfcl_literals import MAX_LITERAL, java_value, javascript_value

MAP, NEW_LIST = "new HashMap<String, Object>()", "new ArrayList<>"
JAVA = [  # text, declared type, element type, value
    ("-12", "integer", None, -12),
    ("5", "long", None, "5"),
    ("1.5f", "float", None, 1.5),
    ("1.5", "double", None, 1.5),
    ("true", "boolean", None, True),
    ("True", "boolean", None, "True"),
    ("new int[] {1, 2,}", "Array", "integer", [1, 2]),
    ("x = new int[]{1, a}; new int[] {2}", "Array", "integer", [1, "a"]),
    ("new int[] {1\n} new int[] {2}", "Array", "integer", [2]),
    (f'{NEW_LIST}(Arrays.asList("a", bc,))', "ArrayList", "String", ["a", "", ""]),
    (f"{NEW_LIST}(Arrays.asList(1L, 2))", "ArrayList", "long", [1, "2"]),
    (f"{NEW_LIST}() {{{{ add(1); add( 2 );\n add(3) }}}}", "ArrayList", "integer", [1, 2, 3]),
    (f"{NEW_LIST}()", "ArrayList", "integer", []),
    (f"{NEW_LIST}(Arrays.asList())", "ArrayList", "integer", f"{NEW_LIST}(Arrays.asList())"),
    (f'{MAP} {{{{ put("a", 1); put("b", "x"); }}}}', "HashMap", None, {"a": 1, "b": "x"}),
    (f'{MAP} {{ put("a", true);\nput("b",\n 2L) }}', "HashMap", None, {"a": True, "b": 2}),
    (f'{MAP} {{{{ put("a", 1.5f); put("a", 1e5); put("c", x y) }}}}', "HashMap", None, {"a": 100000.0, "c": "x y"}),
    (f'{MAP} {{{{ put("a", put("b", 1)); }}}}', "HashMap", None, {"a": 'put("b", 1'}),
    (MAP, "HashMap", None, {}),
    ("new HashMap<\n>()", "HashMap", None, "new HashMap<\n>()"),
]
JAVASCRIPT = [
    ("'it''s'", "String", None, "it''s"),
    ("\"a'", "String", None, "\"a'"),
    ("1e5", "float", None, "1e5"),
    ("7n", "Bigint", None, 7),
    (" [1, 'b', c] tail", "array", "String", ["1", "b", "c"]),
    ("['1', 2]", "array", "integer", ["'1'", 2]),
    ("new Array(1, 2)", "array", "integer", [1, 2]),
    ("[a]b]", "array", "String", ["a"]),
    (" [1,\n2] ", "array", "integer", "[1,\n2]"),
    ("[1_0, 1e5, inf]", "array", None, [10, 1e5, math.inf]),
    ("[[1], 2, [3]]", "array", "array", [[1], [3]]),
    ("[\n[1],\n[2]\n] x", "array", "String", [[1], [2]]),
    ("[[1], [2]", "array", "String", ["[1"]),
    ("{}", "dict", None, {}),
    ("{a: '123', b: \"true\"}", "dict", None, {"a": 123, "b": True}),
    ("{a: [1, 'b'], c: d, e}", "dict", None, {"a": [1, "b"], "c": "d, e"}),
    ("{a: {b: 1}, c: 2}", "dict", None, {"a": "{b: 1"}),
    ("{a: b:c, ::d: 1}", "dict", None, {"a": "b:c", "d": 1}),
    ("{a: 1, : 2}", "dict", None, {"a": 1, "": 2}),
    ("{a: 1,\nb: 2}", "dict", None, "{a: 1,\nb: 2}"),
]


@pytest.mark.parametrize(
    ("read", "text", "kind", "element", "value"),
    [(java_value, *row) for row in JAVA] + [(javascript_value, *row) for row in JAVASCRIPT],
)
def test_source_text_is_converted(read, text, kind, element, value):
    found = read(text, kind, element)
    assert json.dumps(found) == json.dumps(value)  # 1, 1.0 and True differ


def test_longer_collections_stay_text():
    fitting = f"[{'1' * (MAX_LITERAL - 2)}]"
    assert javascript_value(fitting, "array") == [int(fitting[1:-1])]
    assert javascript_value(fitting + " ", "array") == fitting + " "
    assert java_value(MAP + " " * MAX_LITERAL, "HashMap") == MAP + " " * MAX_LITERAL
