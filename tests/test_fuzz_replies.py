"""Hostile replies cost linear time and never raise: a seeded sample of the fuzzing, and worst cases made by hand."""

import json
import sys
import traceback
from functools import partial
from itertools import product
from typing import get_args

import pytest
from fuzz_replies import KIB_64, LIMITS, MB_10, bench_cases, fuzz, most_of, too_long

from tooln1.prompt import MAX_JSON_LENGTH, MAX_JSON_MARKS, parse_reply
from tooln1.rewards import REWARDS, Fault, fault_of
from tooln1.run.metrics import to_json

# ------------------------------------------------------------------------------------------------------ worst cases


def block(payload: str) -> str:
    return f"<think>t</think><tool_call>{payload}</tool_call>"


def argument(value: str, key: str, name: str = "book") -> str:
    """A call with the JSON text `value` as one argument."""
    city = '"city": "Bonn", ' if name == "book" else ""
    return block(f'[{{"name": "{name}", "arguments": {{{city}{json.dumps(key, ensure_ascii=False)}: {value}}}}}]')


def worst_cases(size: int) -> dict[str, str]:
    """Name -> a reply of at most `size` characters, made to be slow to read, compare or write."""
    room = min(size, MAX_JSON_LENGTH) - 500  # more is not read

    def rows(unit: str) -> str:
        return f"[{most_of(unit + ',', room)}{unit}]"

    tags = ("<tool_call>", "</tool_call>", "<think>", "<", "<tool_call></tool_call>", "\ud83d", " ")
    bare = {tag: tag * (size // len(tag)) for tag in tags}
    keys = ", ".join(f'"{number:06}": 0' for number in range(min(room // 13, MAX_JSON_MARKS - 2000)))
    units = ("[]", "1", "2.2250738585072011e-308", "9" * 4300, "[" * 100 + "]" * 100, '{"b":0,"a":0}', '""')
    payloads = {f"a list of {unit[:20]}": rows(unit) for unit in units} | {
        "escapes": json.dumps("\ud800" * (room // 6)),
        "many keys": f"{{{keys}}}",
        "digits": "9" * room,
        "fraction": "0." + "1" * room,
        "deep lists": most_of("[", room),
        "just readable": "[" * 900 + most_of("[],", room - 1800) + "[]" + "]" * 900,
    }
    calls = {"calls": block(rows('{"name":"book","arguments":{}}'))}
    arguments = {f"{n} as {key}": argument(text, key) for n, text in payloads.items() for key in ("rooms", "stay")}
    return bare | calls | arguments | {f"{name} as the block": block(text) for name, text in payloads.items()}


# ------------------------------------------------------------------------------------------------------------ tests

GOLD = [{"name": "book", "arguments": {"city": "Bonn", "guests": 0}}]
READERS = {
    "parse_reply": parse_reply,
    "reward": lambda text: REWARDS["format_name_partial"](text, GOLD),
    "fault_of": lambda text: fault_of(text, GOLD),
    "to_json": lambda text: to_json({"reply": text}),
    **{name: partial(*scorer_and_case) for name, scorer_and_case in bench_cases().items()},
}


def slow(cases: dict[str, str], reader: str, limit: float) -> list[str]:
    """The cases over the limit."""
    return [name for name, text in cases.items() if too_long(limit, READERS[reader], text)]


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_64_kib_are_read_in_50_ms(reader):
    assert not slow(worst_cases(KIB_64), reader, LIMITS["64 KiB"])


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["reward", "to_json", "bfcl", "acebench", "api_bank"])
def test_10_mb_are_read_in_a_second(reader):
    assert not slow(worst_cases(MB_10), reader, LIMITS["10 MB"])


@pytest.mark.parametrize("count", [1001, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_seeded_sample_of_the_fuzzing(count):
    findings = fuzz(seed=1, indices=range(count))
    assert not findings.wrong
    assert findings.counts.keys() >= {*get_args(Fault), *((name, "right") for name in bench_cases())}


@pytest.mark.parametrize("frames_left", [30, 120, 400])
def test_a_caller_deep_in_the_stack_gets_a_verdict(frames_left):
    """Nesting for which Python has no stack left is a fault of the reply."""

    def descend(frames: int, text: str) -> None:
        if frames > 0:
            return descend(frames - 1, text)
        for read in READERS.values():
            read(text)

    used = sum(1 for _ in traceback.walk_stack(None))
    for depth, (opening, closing), key in product(
        (20, 100, 900, 5000), ("[]", ('{"a":', "}")), ("city", "rooms", "stay")
    ):
        text = argument(opening * depth + "1" + closing * depth, key)
        descend(sys.getrecursionlimit() - used - frames_left, text)
