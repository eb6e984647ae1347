"""Hostile replies cost linear time and never raise: a seeded sample of the fuzzing, and worst cases made by hand."""

import itertools
import json
import re
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import get_args

import pytest
from fuzz_replies import KIB_64, LIMITS, MB_10, bench_cases, fuzz, marks_of, most_of, too_long

from tooln1.benchmarks.acebench_text import MAX_MARKS, MAX_TEXT, UnreadableText, read_text
from tooln1.prompt import MAX_JSON_LENGTH, MAX_JSON_MARKS, parse_reply
from tooln1.rewards import REWARDS, Fault, fault_of
from tooln1.run.metrics import to_json

# ------------------------------------------------------------------------------------------------------ worst cases


def reply(payload: str) -> str:
    return f"<think>t</think><tool_call>{payload}</tool_call>"


def call(arguments: str, name: str = "book") -> str:
    return reply(f'[{{"name": {json.dumps(name)}, "arguments": {arguments}}}]')


def argument(value: str, key: str = "guests", name: str = "book") -> str:
    return call(f'{{"city": "Bonn", {json.dumps(key)}: {value}}}' if name == "book" else f'{{"{key}": {value}}}', name)


def worst_cases(size: int) -> dict[str, str]:
    """Name -> a reply of at most `size` characters, made to be slow to read, compare or write."""
    block = min(size, MAX_JSON_LENGTH) - 500  # more is not read

    def of(unit: str, room: int = size) -> str:
        return unit * (room // len(unit))

    def rows(unit: str) -> str:
        return f"[{most_of(unit + ',', block)}{unit}]"

    def source(text: str) -> str:
        """A JSON string of such text: a literal of Java or JavaScript, say."""
        return json.dumps(text)

    keys = ", ".join(f'"{number:06}": 0' for number in range(min(block // 13, MAX_JSON_MARKS - 2000)))
    tags = ("<tool_call>", "</tool_call>", "<think>", "<tool_call", "<|im_start|>assistant", "<")
    bare = {tag: of(tag) for tag in tags} | {
        "empty blocks": of("<tool_call></tool_call>"),
        "blocks of spaces": of("<tool_call>" + " " * 1000 + "</tool_call>"),
        "zeros": "\0" * size,
        "surrogates": "\ud83d" * size,
        "spaces": " " * size,
        "stop tokens": "<think></think><tool_call>[]</tool_call>" + of("<|im_end|>", size - 40),
    }
    payloads = {
        "lists": rows("[]"),
        "objects": rows("{}"),
        "numbers": rows("1"),
        "floats": rows("2.2250738585072011e-308"),
        "NaNs": rows("NaN"),
        "integers": rows("9" * 4300),
        "deep lists in a list": rows("[" * 100 + "]" * 100),
        "small objects": rows('{"":0}'),
        "two keys": rows('{"b":0,"a":0}'),
        "strings": rows('""'),
        "escapes": source("\ud800" * (block // 6)),
        "controls": source("\0" * (block // 6)),
        "a string": source("x" * block),
        "many keys": f"{{{keys}}}",
        "equal keys": f'{{{most_of(chr(34) + "a" + chr(34) + ":0,", block)}"a":0}}',
        "digits": "9" * block,
        "fraction": "0." + "1" * block,
        "exponent": "1e" + "9" * block,
        "deep lists": most_of("[", block),
        "deep objects": most_of('{"a":', block),
        "just readable": "[" * 900 + most_of("[],", block - 1800) + "[]" + "]" * 900,
        "a block in a string": source(most_of("[[],", block)),
    }
    calls = {
        "calls": reply(rows('{"name":"book","arguments":{}}')),
        "three calls": reply(json.dumps([{"name": "book", "arguments": {"city": "x" * (block // 4)}}] * 3)),
        "names": reply(rows('{"name":"","arguments":0}')),
        "a name": call("{}", "x" * block),
        "text of calls": reply(source(f'[{{"name": "book", "arguments": {rows("0")[: block // 2]}]}}}}]')),
    }
    arguments = {
        f"{name} as {key}": argument(payload, key) for name, payload in payloads.items() for key in ("rooms", "stay")
    }
    return bare | calls | arguments | {f"{name} as the block": reply(payload) for name, payload in payloads.items()}


LITERALS = {  # function and parameter: [(what the text begins with, what it ends with)], what it repeats
    "java array": ([("", ""), ("new int[] {", "}")], ["new int[] {", "1, ", "a,", "new  ", "x[] {"]),
    "java list": (
        [("", ""), ("new ArrayList<>(Arrays.asList(", "))"), ("new ArrayList<>() {{", "}}")],
        [
            "1,",
            "a,",
            "],",
            "add(",
            "add(1)",
            "new ArrayList<",
            "new ArrayList<>() {{",
            "new ArrayList<>(Arrays.asList(",
        ],
    ),
    "java map": (
        [("", ""), ("new HashMap<>() {{", "}}")],
        ["new HashMap<", "new HashMap<>() {{", 'put("', 'put("a",', 'put("",1)', 'put("a",\n', ">()", ">() {", " "],
    ),
    "java long": ([("", ""), ("", "x")], ["9", "9L\n"]),
    "script array": (
        [("", ""), ("[", "]"), ("new Array(", ")")],
        ["1,", ",", "a,", "[],", "[1]\n,", "[,", "]", "] ", "[", "'',", "1_.,", "inf,", "new Array(", " "],
    ),
    "script rows": (
        [("", ""), ("[[", "]]"), ("[[", ""), ("new Array([", "])"), ("new Array([", "")],
        ["],[", "] ,\n[", ",", "a,", "]", "] ", "[", "] , ", "[1]", "1_.,", " "],
    ),
    "script dict": (
        [("{", "}"), ("{a: ", "")],
        ["a:,", "a:1,", "a:[],", "a:[,", ",", ", ", " ,:", ":", " ", "a", "{", "a:'',", "a:1_.,"],
    ),
    "script float": ([("", ""), ("1.", "x")], ["9"]),
    "script big": ([("", "n")], ["9", "n"]),
}


def literals(size: int) -> dict[str, str]:
    """Arguments in Java and JavaScript."""
    found = {}
    for place, (ends, units) in LITERALS.items():
        for (head, tail), unit in itertools.product(ends, units):
            found[f"{place}: {head}{unit!r}{tail}"] = literal(place, head, unit, tail, size)
    return found


def literal(place: str, head: str, unit: str, tail: str, size: int) -> str:
    name, key = place.split()
    room = min(size, MAX_JSON_LENGTH) - 600
    written = most_of(json.dumps(unit)[1:-1], room)
    return argument(json.dumps(head)[:-1] + written + json.dumps(tail)[1:], key, name)


def python_texts(size: int) -> dict[str, str]:
    """Calls whose official ACEBench text is Python that is slow to parse or to evaluate."""
    room = min(size, MAX_TEXT) - 1100  # longer texts are refused by their length
    units = {
        "tuple": ("x[", "a,", "]"),
        "negatives": ("x[", "-1,", "]"),
        "slices": ("x[", ":,", "]"),
        "f-string": ('x[f"', "{a}", '"]'),
        "wide f-string": ('x[f"', "{" + "a" * 60 + "}", '"]'),
        "several f-strings": ("x[", 'f"{a}",', "]"),
        "ends in an error": ("f(", "a,", "!)"),
        "ends in a lambda": ("f(", "a,", "lambda:)"),
        "dict": ("{", "1:1,", "}"),
        "calls": ("[", "f(),", "]"),
        "lists": ("[", "[],", "]"),
        "comparisons": ("1", "<1", ""),
        "attributes": ("a", ".a", ""),
        "minuses": ("", "-", "1"),
        "not closed": ("", "f(a=", ""),
        "strings": ("", "''", ""),
        "powers": ("2", "**2", ""),
        "sums": ("'" + "a" * (room // 2) + "'", "+'x'", ""),
        "backslashes": ('"', "\\d", '"'),
        "names of characters": ('"', "\\N{DASH}", '"'),
        "keywords": ("f(", "**a,", ")"),
        "accents": ("[", "é,", "]"),
        "subscripts": ("x", "[0]", ""),
        "lambdas": ("", "lambda:", "1"),
        "word": ("x", "a", ""),
        "string in a subscript": ('x["', "\\n", '"]'),
        "long string in a subscript": ('x["', "a", '"]'),
        "hex digits": ("0x", "f", ""),
    }
    prime = 2**61 - 1  # integers that are multiples of it have the same hash
    texts = {}
    for name, (head, unit, tail) in units.items():
        fitting = (room - len(head)) // len(unit)
        readable = min(fitting, (MAX_MARKS - 50) // (len(re.findall(r"\W", unit)) or 1))
        texts |= {f"{name} {count} times": head + unit * count + tail for count in (fitting, readable)}
    texts["equal hashes"] = "{" + ",".join(f"{prime * number}:1" for number in range(1, MAX_MARKS // 2 - 30)) + "}"
    names = {name: f"stay={text},x" for name, text in texts.items()}  # a key is written as it is
    return {
        f"python {name}": call(json.dumps({"city": "Bonn", key: 0}, ensure_ascii=False)) for name, key in names.items()
    }


# ------------------------------------------------------------------------------------------------------------ tests

GOLD = [{"name": "book", "arguments": {"city": "Bonn", "guests": 0}}]
ALIKE = ("bfcl irrelevance", "bfcl parallel", "acebench twice", "examples")  # another of them does as much and more
READERS: dict[str, Callable[[str], object]] = {
    "parse_reply": parse_reply,
    "reward": lambda text: REWARDS["format_name_partial"](text, GOLD),
    "fault_of": lambda text: fault_of(text, GOLD),
    "to_json": lambda text: to_json({"reply": text}),
    **{name: partial(*scorer_and_case) for name, scorer_and_case in bench_cases().items() if name not in ALIKE},
}
MEANT_FOR = {"java": "bfcl java", "script": "bfcl javascript", "python": "acebench"}  # the others see no more in them
ONLY_OWN = ("bfcl java", "bfcl javascript")  # the rest is as for "bfcl"


def slow(names: dict[str, str], reader: str, limit: float) -> dict[str, float]:
    """The cases over the limit, with their CPU seconds."""
    read = READERS[reader]
    seconds = {}
    for name, text in names.items():
        kind = name.split()[0]
        if MEANT_FOR.get(kind, reader) != reader or (reader in ONLY_OWN and kind not in MEANT_FOR):
            continue
        if least := too_long(limit, read, text):
            seconds[name] = least
    return seconds


@pytest.fixture(scope="module")
def of_64_kib() -> dict[str, str]:
    return worst_cases(KIB_64) | literals(KIB_64) | python_texts(KIB_64)


@pytest.fixture(scope="module")
def of_10_mb() -> dict[str, str]:
    names = (
        "<tool_call>",
        "empty blocks",
        "zeros",
        "surrogates",
        "deep lists in a list as rooms",
        "floats as stay",
        "just readable as stay",
        "two keys as stay",
        "many keys as stay",
        "a block in a string as the block",
    )
    cases = worst_cases(MB_10)
    pieces = [
        ("script array", "[", ",", "]"),
        ("script rows", "[[", "],[", "]]"),
        ("script dict", "{", "a:,", "}"),
        ("java list", "new ArrayList<>(Arrays.asList(", "],", "))"),
    ]
    return {name: cases[name] for name in names} | {" ".join(piece): literal(*piece, MB_10) for piece in pieces}


@pytest.mark.parametrize("reader", READERS)
def test_64_kib_are_read_in_50_ms(of_64_kib, reader):
    assert not slow(of_64_kib, reader, LIMITS["64 KiB"])


@pytest.mark.parametrize("reader", ["reward", "to_json", "bfcl java", "bfcl javascript", "acebench", "api_bank"])
def test_10_mb_are_read_in_a_second(of_10_mb, reader):
    assert not slow(of_10_mb, reader, LIMITS["10 MB"])


def test_10_mb_are_as_much_as_is_read(of_10_mb):
    for name, text in of_10_mb.items():
        assert "than" not in parse_reply(text).detail, name  # longer than, more than: refused by size
        assert max(len(text) / MAX_JSON_LENGTH, marks_of(text) / MAX_JSON_MARKS) > 0.9, name


def test_text_of_too_many_marks_is_refused():
    marks = MAX_MARKS - len("[(=[])]")
    assert read_text(f"[f(a=[{'1,' * marks}])]") == [("f", {"a": [1] * marks})]
    with pytest.raises(UnreadableText, match="punctuation marks"):
        read_text(f"[f(a=[{'1,' * marks},])]")


def test_a_seeded_sample_of_the_fuzzing():
    findings = fuzz(seed=1, indices=range(2501))
    assert not findings.wrong and not findings.slow
    assert set(get_args(Fault)) == set(findings.counts)  # every fault was seen


def test_a_seeded_sample_of_the_fuzzing_of_the_scorers():
    findings = fuzz(seed=1, indices=range(1001), scorers=True)
    assert not findings.wrong and not findings.slow
    never = ("bfcl parallel", "acebench twice")  # which ask for more calls than any reply has
    assert all(findings.counts[name, "right"] for name in bench_cases() if name not in never)


@pytest.mark.parametrize("frames_left", [30, 60, 120, 400])
def test_a_caller_deep_in_the_stack_gets_a_verdict(frames_left):
    """Whatever nesting Python has no room left for there is a fault of the reply."""

    def descend(frames: int, text: str) -> None:
        if frames > 0:
            descend(frames - 1, text)
        else:
            for read in READERS.values():
                read(text)

    used = sum(1 for _ in traceback.walk_stack(None))
    for depth in (5, 20, 50, 100, 300, 900, 5000):
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            for key in ("city", "rooms", "stay"):
                text = argument(opening * depth + "1" + closing * depth, key)
                descend(sys.getrecursionlimit() - used - frames_left, text)


def test_a_finding_says_how_to_see_it_again(monkeypatch):
    monkeypatch.setitem(REWARDS, "strict", lambda text, answer: 1 / 0)
    findings = fuzz(seed=3, indices=range(7, 9))
    assert findings.wrong == [f"seed 3, index {index}: ZeroDivisionError: division by zero" for index in (7, 8)]
