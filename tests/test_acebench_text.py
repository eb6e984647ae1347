"""ACEBench's text of calls: written, and read as Python reads it."""

import pytest

from tooln1.benchmarks.acebench_text import MAX_MARKS, UnreadableText, read_text, write_text


def test_calls_are_written_as_the_benchmark_asks_for_them():
    calls = [("a.b", {"x": "it's\n", "y": [1, {"k": None}]}), ("c", {})]
    assert write_text(calls) == "[a.b(x=\"it's\\n\", y=[1, {'k': None}]), c()]"
    assert read_text(write_text(calls)) == calls
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UnreadableText):
        write_text([("f", {"x": deep})])


VALUES = [
    *[("'a b\tc'", "abc"), ('"\\n"', "\n"), ("None", None), ("true", "true"), ("...", "...")],
    *[("-5", -5), ("+5", -5), ("~5", -5), ("not 5", "not5")],
    *[("(1,[2])", (1, [2])), ("{'a': {b: 1}}", {"a": {"b": 1}}), ("a[b]", "a[b]")],
    *[("g(1, x=2)", {"g": {"x": 2}}), ("g.h(1)", {"g.h": {}})],
    *[("2+3*-4", -10), ("1 - 2.5", -1.5), ("2023-10-12", 2001), ("3/4", 0.75)],
]


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_values_in_text(text, value):
    assert read_text(f"[f(p={text})]") == [("f", {"p": value})]
    assert read_text(f"(f(0, p={text}),)") == read_text(f"{{f(p={text})}}")


BROKEN = ["", "f(p=1)", "[f(p=1)", "[f(p=1)] Done.", "Call: [f(p=1)]", "{'name': 'f'}", "['f']"]
NO_VALUES = ["a.b", "-a", "--1", "-'a'", "{1}", "1 < 2", "{**{}}", "{[]: 1}", "f'{a}'", "9" * 5000]
NO_NUMBERS = ["-(1+2)", "a+1", "g()+1", "2**9", "'a'*10**9", "1/0"]


@pytest.mark.parametrize("text", BROKEN + [f"[f(p={value})]" for value in NO_VALUES + NO_NUMBERS])
def test_what_is_no_text_of_calls_is_refused(text):
    with pytest.raises(UnreadableText):
        read_text(text)


def test_positional_arguments_and_brackets_of_any_kind_are_accepted():
    assert read_text("[]") == [] and read_text("()") == []
    assert read_text("f(1, x=2), g.h(),") == [("f", {"x": 2}), ("g.h", {})]


def test_too_many_punctuation_marks_are_refused():
    marks = MAX_MARKS - len("[(=[])]")
    assert read_text(f"[f(a=[{'1,' * marks}])]") == [("f", {"a": [1] * marks})]
    with pytest.raises(UnreadableText, match="punctuation marks"):
        read_text(f"[f(a=[{'1,' * marks},])]")
