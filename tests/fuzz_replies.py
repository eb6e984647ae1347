"""Hostile replies, each a function of (seed, index), through what a run does with one, or the benchmarks.

    python tests/fuzz_replies.py --replies 1000000 --seed 0              parse, rewards, faults, metrics, log line
    python tests/fuzz_replies.py --replies 100000 --seed 0 --scorers     the score() of every benchmark

Printed are replies by fault, what went wrong with the seed and index that give it again, and the worst CPU time of one
call for each size of reply. Exit code 1 where anything went wrong or took longer than LIMITS.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tooln1.benchmarks import Case, Verdict, acebench, api_bank, bfcl, examples
from tooln1.benchmarks.bfcl_data import BfclCase
from tooln1.data import Rollout
from tooln1.prompt import (
    ASSISTANT_MARKER,
    CALL_CLOSE,
    CALL_OPEN,
    MAX_JSON_LENGTH,
    MAX_JSON_MARKS,
    STOP_TOKENS,
    THINK_CLOSE,
    THINK_OPEN,
    format_reply,
    parse_reply,
)
from tooln1.rewards import REWARDS, fault_of
from tooln1.run.metrics import Metrics, to_json
from tooln1.run.reply_metrics import add_reply_metrics

KIB_64, MB_10 = 2**16, 10_000_000
LIMITS = {"small": 0.05, "64 KiB": 0.05, "10 MB": 1.0}  # CPU seconds of one call on a machine of the usual speed
USUAL_SECONDS = 0.0035  # of `work` there: one core of an AMD EPYC with nothing beside it
REPLIES_A_STEP = 1000  # add_reply_metrics takes so many at once

# ---------------------------------------------------------------------------------------- what the replies answer

TYPED = {
    "city": "Bonn",
    "nights": 2,
    "rate": 1.5,
    "quiet": True,
    "guests": ["a", "b"],
    "stay": {"x": "y"},
    "rooms": [{"x": "y"}],
}
JAVA = {
    "array": "new int[] {1, 2}",
    "list": "new ArrayList<>(Arrays.asList(1, 2))",
    "long": "5L",
    "map": 'new HashMap<String, Object>() {{ put("x", "y"); }}',
}
JAVASCRIPT = {"array": "[1, 2]", "rows": "[[1, 2], [3]]", "dict": "{x: 1, y: 'z'}", "float": "1.5", "big": "7n"}
CALLS = {
    name: {"name": name, "arguments": arguments}
    for name, arguments in (("book", TYPED), ("java", JAVA), ("script", JAVASCRIPT), ("clock", {}))
}
ODD = {"name": "odd\ud800", "arguments": {"x": float("nan"), "y": [[[]], {"": -0.0}], "z": "\0</tool_call>"}}
ANSWERS = (
    [],
    [CALLS["book"]],
    [CALLS["clock"]],
    [CALLS["java"]],
    [CALLS["script"]],
    [CALLS["book"], CALLS["clock"], CALLS["clock"]],
    [ODD],
    json.dumps([CALLS["book"]]),
)


def typed(kind: str, element: str = "") -> dict:
    return {"type": kind, "items": {"type": element}} if element else {"type": kind}


def bench_cases() -> dict[str, tuple[Callable[..., Verdict], Case]]:
    """Name -> the scorer and a case of it."""

    def function(name: str, **properties) -> dict:
        return {"name": name, "parameters": {"type": "dict", "properties": properties, "required": []}}

    python = function(
        "book",
        city=typed("string"),
        nights=typed("integer"),
        rate=typed("float"),
        quiet=typed("boolean"),
        guests=typed("array", "string"),
        stay=typed("dict"),
        rooms=typed("array", "dict"),
    )
    java = function(
        "java",
        array=typed("Array", "integer"),
        list=typed("ArrayList", "integer"),
        long=typed("long"),
        map=typed("HashMap"),
    )
    script = function(
        "script",
        array=typed("array", "integer"),
        rows=typed("array", "array"),
        dict=typed("dict"),
        float=typed("float"),
        big=typed("Bigint"),
    )
    ace_stay = python["parameters"]["properties"] | {"stay": typed("object")}
    ace = {"name": "book", "parameters": {"type": "object", "properties": ace_stay, "required": ["city"]}}
    accepted = {key: [value, ""] for key, value in TYPED.items()}
    accepted |= {"stay": [{"x": ["y"]}, ""], "rooms": [[{"x": ["y"]}], ""]}
    sources = (
        {"array": [[1, 2], ""], "list": [[1, 2], ""], "long": [5, ""], "map": [{"x": ["y"]}, ""]},
        {
            "array": [[1, 2], ""],
            "rows": [[[1, 2], [3]], ""],
            "dict": [{"x": [1], "y": ["z"]}, ""],
            "float": [1.5, ""],
            "big": [7, ""],
        },
    )

    def of_bfcl(category: str, gold: list, described: dict):
        return bfcl.score, BfclCase("c", category, None, gold, [described])

    def of_acebench(gold: Any):
        return acebench.score, acebench.AceCase("c", "a", None, gold, [ace])

    return {
        "bfcl": of_bfcl("simple_python", [{"book": accepted}], python),
        "bfcl parallel": of_bfcl("parallel", [{"book": accepted}] * 3, python),
        "bfcl java": of_bfcl("simple_java", [{"java": sources[0]}], java),
        "bfcl javascript": of_bfcl("simple_javascript", [{"script": sources[1]}], script),
        "bfcl irrelevance": of_bfcl("irrelevance", [], python),
        "acebench": of_acebench([{"book": {"city": "A"}}, {"book": TYPED}]),
        "acebench twice": of_acebench({"book": TYPED, "book_1": TYPED}),
        "api_bank": (api_bank.score, Case("c", "level 1", None, [CALLS["book"]])),
        "examples": (examples.score, Case("c", "demo", None, ANSWERS[5])),
    }


# ------------------------------------------------------------------------------------------------------ the replies

TAGS = (THINK_OPEN, THINK_CLOSE, CALL_OPEN, CALL_CLOSE)
MARKERS = (ASSISTANT_MARKER, "<|im_start|>", "<tool_call", "</tool_call", "tool_call>", "<tools>", "</", *STOP_TOKENS)
NUMBERS = (
    "0",
    "-0",
    "-0.0",
    "1e999",
    "-1e-999",
    "NaN",
    "Infinity",
    "-Infinity",
    "0x10",
    "01",
    "1_000",
    "1.",
    "+1",
    "1E5",
    "-",
    "9" * 4300,
    "9" * 4301,
    "9" * 5000,
    "-" + "1" * 5000,
    "1." + "3" * 400,
    "1e" + "9" * 30,
)
STRINGS = (
    '""',
    '"Bonn"',
    '"\\ud800"',
    '"\\udc00\\ud83d"',
    '"\\ud83d\\ude00"',
    '"\ud800"',
    '"\\u0000"',
    '"\0"',
    '"\t"',
    '"\\x"',
    '"\\"',
    '"a',
    "'a'",
    '"<think>"',
    '"é\u0301\u202e\u2028"',
    '"\U0001f600"',
)
SYNTAX = (
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    "[]",
    "{}",
    "[[",
    "]]",
    "[{",
    "}]",
    '{"a":',
    '"a":1,"a":2',
    '{"":',
    "(",
    ")",
    '"',
    "'",
    "\\",
    "\n",
    " ",
    "null",
    "true",
    "false",
    "None",
    "True",
    "undefined",
    "//",
    "```json",
    "\ufeff",
)
SOURCE = (
    "new int[] {",
    "new ArrayList<>(Arrays.asList(",
    "new ArrayList<>() {{",
    "add(1); ",
    "}}",
    "))",
    "[[1], [2]",
    "new HashMap<",
    ">()",
    "new HashMap<String, Object>() {{",
    'put("a", 1); ',
    'put("',
    '",',
    "new Array(",
    "[1],",
    "{a: 1, ",
    "b: ",
    ":::",
    "5L",
    "7n",
    "1.5f",
    "book(city='Bonn')",
    "f(a=",
    "x[",
    "lambda:",
    "-",
    "**",
    "f'{a}'",
    "1 if 1 else ",
    "not ",
    "~",
    "=",
    "9e9",
    "\\N{DASH}",
    "#",
    "_1",
    "=[*",
)
TEXTS = ("It asks for Zürich.", "天気", "\0", "\ud83d", "\udc00", "\u0130\ufb01", "\r\n", "\x85", "\u00a0", "a" * 50)
WELL_FORMED = (
    "[]",
    "{}",
    '{"a":1}',
    '{"a":{},"b":[]}',
    "1e-5",
    "-0.1",
    "1",
    "9" * 4300,
    '"\\ud800"',
    '"a"',
    "NaN",
    "[" * 200 + "]" * 200,
)
NESTED = (("[", "", "]"), ('{"a":', "1", "}"), ("[[],", "1", "]"), ('[{"a":', "1", "}]"))
FRAGMENTS = (TAGS, MARKERS, NUMBERS, STRINGS, SYNTAX, SOURCE, TEXTS)


def fragment(rng: random.Random) -> str:
    return rng.choice(rng.choice(FRAGMENTS))


def jumble(rng: random.Random, kinds=FRAGMENTS, most: int = 12) -> str:
    return "".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randrange(most)))


def nested(rng: random.Random, most: int) -> str:
    opening, middle, closing = rng.choice(NESTED)
    depth = rng.randrange(most)
    return opening * depth + middle + closing * (depth - rng.choice([0, 0, 1]) if depth else 0)


def value(rng: random.Random) -> str:
    """JSON text of a value, well formed or not."""
    kind = rng.randrange(8)
    if kind < 2:
        return rng.choice(NUMBERS if kind else STRINGS)
    if kind == 2:
        return json.dumps(jumble(rng, (SOURCE, SYNTAX, NUMBERS)))
    if kind == 3:
        return nested(rng, rng.choice([3, 30, 300, 1200]))
    if kind == 4:
        return f"[{','.join(rng.choice(NUMBERS + STRINGS) for _ in range(rng.randrange(4)))}]"
    if kind == 5:
        return f"{{{','.join(f'{rng.choice(STRINGS)}:{rng.choice(NUMBERS)}' for _ in range(rng.randrange(4)))}}}"
    return json.dumps(format_reply([CALLS["clock"]])) if kind == 6 else jumble(rng)


def payload(rng: random.Random) -> str:
    """What stands in a call block: an answer, one with an odd value, or anything at all."""
    answer = rng.choice(ANSWERS)
    calls = json.loads(answer) if isinstance(answer, str) else answer
    text = json.dumps(calls, ensure_ascii=rng.random() < 0.5)
    kind = rng.randrange(8)
    if kind < 2:
        return text
    if kind < 5 and calls:
        call = dict(rng.choice(calls))
        arguments = [f"{json.dumps(key)}:{json.dumps(old)}" for key, old in call["arguments"].items()]
        keys = [*call["arguments"], "x", "city='A'", "\ud800"]
        arguments.insert(rng.randrange(len(arguments) + 1), f"{json.dumps(rng.choice(keys))}:{value(rng)}")
        name = json.dumps(call["name"]) if rng.random() < 0.9 else value(rng)
        return f'[{{"name": {name}, "arguments": {{{", ".join(arguments)}}}}}]'
    return (json.dumps(text), value(rng), f"[{value(rng)}]", jumble(rng))[rng.randrange(4)]


def mutated(rng: random.Random, text: str) -> str:
    """A cut, a splice, a repeat, a changed character or byte."""
    start = rng.randrange(len(text) + 1)
    end = start + rng.choice([1, 1, 3, 20, 300])
    kind = rng.randrange(6)
    if kind == 0:
        return text[:start] + text[end:]
    if kind == 1:
        return text[:start] + fragment(rng) + text[start:]
    if kind == 2:
        return text[:end] + text[start:]
    if kind == 3:
        return text[:start]
    if kind == 4:
        return text[:start] + text[start:end].swapcase() + text[end:]
    data = bytearray(text.encode("utf-8", "surrogatepass")) or bytearray(1)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data.decode("utf-8", "replace")


def small_reply(rng: random.Random) -> str:
    kind = rng.randrange(8)
    if kind == 0:
        return jumble(rng)
    thought = rng.choice([f"{THINK_OPEN}{rng.choice(TEXTS)}{THINK_CLOSE}"] * 3 + ["", jumble(rng)])
    text = thought + f"{CALL_OPEN}{payload(rng)}{CALL_CLOSE}" * rng.choice([1] * 8 + [0, 2])
    text += rng.choice(["", "", STOP_TOKENS[0], fragment(rng)])
    for _ in range(rng.choice([0, 0, 1, 4]) if kind > 3 else 0):
        text = mutated(rng, text)
    return text


def marks_of(text: str) -> int:
    """How many marks there are of those that MAX_JSON_MARKS limits."""
    return sum(map(text.count, "[{,"))


def most_of(unit: str, room: int) -> str:
    """`unit` as often as `room` characters and the marks that are read allow, with some left for what is around it."""
    return unit * min(room // len(unit), (MAX_JSON_MARKS - 2000) // max(marks_of(unit), 1))


def large_reply(rng: random.Random, size: int) -> str:
    """A small reply with one of its places, or a string in it, blown up to about `size` characters."""
    unit = (fragment(rng), jumble(rng), small_reply(rng), value(rng) + ",")[rng.randrange(4)] or "\0"
    block = min(size, MAX_JSON_LENGTH) - 2000  # up to what is read; the rest goes into the thought
    filler, block = unit * (size // len(unit) + 1), max(block, 0)
    kind = rng.randrange(5)
    if kind == 0:
        return filler[:size]
    if kind == 1:
        text = small_reply(rng)
        place = rng.randrange(len(text) + 1)
        return text[:place] + filler[:size] + text[place:]
    call = rng.choice(list(CALLS.values()))
    key = rng.choice([*call["arguments"], "x"])
    if kind == 2:
        quoted = json.dumps(most_of(unit, block // 6))
        inner = f'[{{"name":"{call["name"]}","arguments":{{"{key}":{quoted}}}}}]'
    elif kind == 3:
        one = rng.choice(WELL_FORMED)
        inner = f'[{{"name":"{call["name"]}","arguments":{{"{key}":[{most_of(one + ",", block)}{one}]}}}}]'
    else:
        one = payload(rng).removeprefix("[").removesuffix("]")
        inner = f"[{most_of(one + ',', block)}{one}]"
    thought = filler[: max(size - len(inner) - 40, 0)] if rng.random() < 0.5 else ""
    return f"{THINK_OPEN}{thought}{THINK_CLOSE}{CALL_OPEN}{inner}{CALL_CLOSE}"


def size_class(index: int) -> str:
    """1 reply of 100,000 has 10 MB, 1 of 1,000 has 64 KiB."""
    return "10 MB" if index % 100_000 == 99_999 else "64 KiB" if index % 1000 == 500 else "small"


def hostile_reply(seed: int, index: int) -> str:
    rng = random.Random(f"{seed}/{index}")
    size = {"small": 0, "64 KiB": KIB_64, "10 MB": MB_10}[size_class(index)]
    return large_reply(rng, size) if size else small_reply(rng)


# ---------------------------------------------------------------------------------------------------- what must hold


def cpu_seconds(call: Callable, *arguments: Any) -> float:
    """The least that the call takes in three."""
    taken = []
    for _ in range(3):
        start = time.process_time()
        call(*arguments)
        taken.append(time.process_time() - start)
    return min(taken)


def work() -> None:
    """Some of what reading replies is made of: JSON, patterns, small calls."""
    values = json.loads(f"[{'[1],' * 10_000}[1]]")
    assert len(re.findall(r"\d", str(values))) == sum(len(value) for value in values)


def slowness() -> float:
    """How much slower this machine is at the moment than the one that LIMITS are meant for; at least 1."""
    return max(cpu_seconds(work) / USUAL_SECONDS, 1.0)


def too_long(limit: float, call: Callable, *arguments: Any) -> float:
    """The CPU seconds of a call that takes more than `limit` of them on a machine of the usual speed, else 0.

    It is called again where the first time is over the limit, lest a garbage collection be taken for it.
    """
    start = time.process_time()
    call(*arguments)
    if time.process_time() - start <= limit:
        return 0.0
    least = cpu_seconds(call, *arguments)
    return least if least > limit and least > limit * slowness() else 0.0


@dataclass
class Findings:
    """What a run of replies showed."""

    seed: int
    counts: Counter = field(default_factory=Counter)  # by fault, or by scorer and verdict
    wrong: list[str] = field(default_factory=list)
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)  # size class -> (CPU seconds, of what)

    def timed(self, index: int, what: str, call: Callable, *arguments: Any) -> Any:
        start = time.process_time()
        result = call(*arguments)
        seconds, size = time.process_time() - start, size_class(index)
        if seconds > self.worst.get(size, (0.0, ""))[0]:  # again, lest a garbage collection be taken for it
            again = min(seconds, cpu_seconds(call, *arguments)), f"{what}, index {index}"
            self.worst[size] = max(again, self.worst.get(size, again))
        return result

    def guarded(self, index: int, check: Callable, *arguments: Any) -> None:
        """Whatever is raised becomes a finding, with the names that reproduce it."""
        try:
            check(self, index, *arguments)
        except Exception as error:  # that none gets here is what is tested
            self.wrong.append(f"seed {self.seed}, index {index}: {type(error).__name__}: {str(error)[:200]}")

    @property
    def slow(self) -> list[str]:
        return [
            f"{size}: {seconds:.3f} s by {what}"
            for size, (seconds, what) in self.worst.items()
            if seconds > LIMITS[size] and seconds > LIMITS[size] * slowness()
        ]


def check_reply(findings: Findings, index: int, text: str, rows: list[dict]) -> None:
    """One reply through the parser, the rewards, the faults and the log line; `rows` collects what a step keeps."""
    answer = ANSWERS[index % len(ANSWERS)]
    if index % 2:  # half of the time an answer that the reply may well have
        answer = next((gold for gold in ANSWERS[1:-1] if f'"name": {json.dumps(gold[0]["name"])}' in text), answer)
    reply = findings.timed(index, "parse_reply", parse_reply, text)
    paid = {name: findings.timed(index, name, reward, text, answer) for name, reward in REWARDS.items()}
    fault = findings.timed(index, "fault_of", fault_of, text, answer)
    without_think = findings.timed(index, "fault_of without think", fault_of, text, answer, False)
    assert all(type(value) in (int, float) and 0 <= value <= 1 for value in paid.values()), paid
    assert (reply.calls is not None) == (reply.fault in ("none", "no_think"))
    assert (paid["binary"] == 1) == (fault == "none")
    assert (paid["binary_no_think"] == 1) == (without_think == "none")
    assert paid["strict"] <= paid["binary"] <= paid["binary_no_think"]
    assert paid["format_partial"] <= paid["format_name_partial"]
    assert not reply.is_strict or (reply.calls is not None and reply.has_think)
    assert paid["strict"] == (paid["binary"] if reply.is_strict else 0)
    # As deep in the stack as above: Python counts it into how deep a value may be nested.
    marked = findings.timed(index, "a transcript", REWARDS["binary_no_think"], f"x{ASSISTANT_MARKER}{text}", answer)
    assert marked == paid["binary_no_think"]
    row = {"step": 1, "kind": "best", "id": "e", "reward": paid["binary"], "reply": text, "answer": answer}
    line = findings.timed(index, "to_json", to_json, row)
    assert "\n" not in line and json.loads(line.encode("utf-8"))["reward"] == paid["binary"]
    findings.counts[fault] += 1
    rows.append(row)


def check_step(findings: Findings, index: int, rows: list[dict]) -> None:
    """The metrics of a step whose replies are those of `rows`."""
    metrics, rewards = Metrics(), torch.tensor([row["reward"] for row in rows], dtype=torch.float32)
    rollouts = [Rollout(n // 8, n % 8, [0], [0] * (n % 7 + 1), [0.0], n % 5 > 0) for n in range(len(rows))]
    answers = [json.loads(a) if isinstance(a, str) else a for a in (row["answer"] for row in rows)]
    with metrics.timer("rollout"):
        add_reply_metrics(metrics, rollouts, [row["reply"] for row in rows], answers, rewards, True, 1)
    values = metrics.reduced()
    assert abs(values["accuracy"] - values["reward"]) < 1e-6, values  # they are paid by the binary reward
    to_json(values)


def check_scores(findings: Findings, index: int, text: str, cases: dict) -> None:
    """One reply through a scorer of each benchmark."""
    for name, (score, case) in cases.items():
        verdict = findings.timed(index, name, score, case, text)
        assert type(verdict) is Verdict and type(verdict.ok) is bool and verdict.ok == (verdict.why == ""), name
        assert all(type(ok) is bool for ok in verdict.also.values()), name
        findings.counts[name, "right" if verdict.ok else "wrong"] += 1


def fuzz(seed: int, indices: range, scorers: bool = False) -> Findings:
    """Replies `indices` of `seed` through all checks."""
    findings, cases, rows = Findings(seed), bench_cases(), []
    for index in indices:
        text = hostile_reply(seed, index)
        findings.guarded(index, check_scores if scorers else check_reply, text, cases if scorers else rows)
        if rows and (len(rows) == REPLIES_A_STEP or index == indices[-1]):
            findings.guarded(index, check_step, rows)
            rows = []
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=int, default=1_000_000)
    parser.add_argument("--first", type=int, default=0, help="index of the first reply")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scorers", action="store_true", help="the benchmarks instead of the rewards")
    given, start = parser.parse_args(), time.process_time()
    findings = fuzz(given.seed, range(given.first, given.first + given.replies), given.scorers)
    print(f"{given.replies:,} replies of seed {given.seed} in {time.process_time() - start:.0f} s of CPU")
    for name, count in sorted(findings.counts.items(), key=str):
        print(f"  {count:9,}  {name if isinstance(name, str) else ', '.join(name)}")
    print(f"{len(findings.wrong)} went wrong", *findings.wrong[:20], sep="\n  ")
    for size, (seconds, what) in findings.worst.items():
        print(f"  {size}: worst {1000 * seconds:.2f} ms ({what}), limit {1000 * LIMITS[size]:.0f} ms")
    sys.exit(bool(findings.wrong or findings.slow))


if __name__ == "__main__":
    main()
