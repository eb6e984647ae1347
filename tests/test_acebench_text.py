"""ACEBench's text of calls: written, and read as Python reads it."""

import pytest

from tooln1.benchmarks.acebench_text import UnreadableText, read_text, write_text


def test_calls_are_written_as_the_benchmark_asks_for_them():
    calls = [("a.b", {"x": "it's\n", "y": [1, {"k": None}]}), ("c", {})]
    assert write_text(calls) == "[a.b(x=\"it's\\n\", y=[1, {'k': None}]), c()]"
    assert read_text(write_text(calls)) == calls
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UnreadableText):
        write_text([("f", {"x": deep})])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'a b\tc'", "abc"),
        ('"\\n"', "\n"),
        ("-5", -5),
        ("+5", -5),
        ("~5", -5),
        ("not 5", "not5"),
        ("None", None),
        ("true", "true"),
        ("True", True),
        ("...", "..."),
        ("(1,[2])", (1, [2])),
        ("{'a': {b: 1}}", {"a": {"b": 1}}),
        ("g(1, x=2)", {"g": {"x": 2}}),
        ("g.h(1)", {"g.h": {}}),
        ("a[b]", "a[b]"),
        ("2+3*-4", -10),
        ("7//2", 3),
        ("2**10", 1024),
        ("'a'+'b'", "ab"),
        ("1 - 2.5", -1.5),
        ("2023-10-12", 2001),
        ("1e999", float("inf")),
    ],
)
def test_values_in_text(text, value):
    assert read_text(f"[f(p={text})]") == [("f", {"p": value})]
    assert read_text(f"(f(0, p={text}),)") == read_text(f"{{f(p={text})}}")


BROKEN = [
    "",
    "f(p=1)",
    "[f(p=1)",
    "[f(p=1)] Done.",
    "Call: [f(p=1)]",
    "{'name': 'f'}",
    "['f']",
    "[f]",
    "[lambda: 1]",
]
NO_VALUES = [
    "a.b",
    "-a",
    "--1",
    "-'a'",
    "-(1+2)",
    "{1}",
    "1 < 2",
    "a+1",
    "g()+1",
    "'%9d' % 1",
    "'a'*10**9",
    "10**9*'a'",
    "{**{}}",
    "{[]: 1}",
    "f'{a}'",
    "2**99999",
    "1<<99999",
    "1/0",
    "2.0**99999",
    "9" * 5000,
    "0x" + "f" * 4000 + "*2",
]


@pytest.mark.parametrize("text", BROKEN + [f"[f(p={value})]" for value in NO_VALUES])
def test_what_is_no_text_of_calls_is_refused(text):
    with pytest.raises(UnreadableText):
        read_text(text)


def test_positional_arguments_and_brackets_of_any_kind_are_let_pass():
    assert read_text("[]") == [] and read_text("()") == []
    assert read_text("f(1, x=2), g(),") == [("f", {"x": 2}), ("g", {})]
    assert read_text("[f()(a=1), f().g(a=2)]") == [("", {"a": 1}), ("g", {"a": 2})]
