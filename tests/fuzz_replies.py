"""Hostile replies, each a function of (seed, index), through what a run does with one and the benchmarks' scorers.

    python tests/fuzz_replies.py --replies 1000000 --seed 0

Printed are replies by fault and verdict, what went wrong with the seed and index that give it again, and the worst CPU
time of one call for each size of reply. Exit code 1 where anything went wrong or took longer than LIMITS.
"""

from __future__ import annotations

import argparse
import json
import random
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
from tooln1.data import Example, Rollout
from tooln1.prompt import CALL_CLOSE, CALL_OPEN, MAX_JSON_LENGTH, MAX_JSON_MARKS, THINK_CLOSE, THINK_OPEN, parse_reply
from tooln1.rewards import REWARDS, fault_of
from tooln1.run.metrics import Metrics, to_json
from tooln1.run.reply_metrics import add_reply_metrics
from tooln1.task import TOOL_N1

KIB_64, MB_10 = 2**16, 10_000_000
LIMITS = {"small": 0.05, "64 KiB": 0.05, "10 MB": 1.0}  # CPU seconds of one call on a machine of the usual speed
USUAL_SECONDS = 0.0025  # of what `slowness` times there: one core of an AMD EPYC with nothing beside it
REPLIES_A_STEP = 1000  # add_reply_metrics takes so many at once
TAGS = (THINK_OPEN, THINK_CLOSE, CALL_OPEN, CALL_CLOSE)

# ---------------------------------------------------------------------------------------- what the replies answer

TYPED = {"city": "B", "nights": 2, "rate": 1.5, "quiet": True, "guests": ["a"], "stay": {"x": "y"}, "rooms": [{"x": 1}]}
JAVA = {"array": "new int[] {1, 2}", "list": "new ArrayList<>(Arrays.asList(1, 2))", "long": "5L"}
JAVA |= {"map": 'new HashMap<String, Object>() {{ put("x", "y"); }}'}
JAVASCRIPT = {"array": "[1, 2]", "rows": "[[1, 2], [3]]", "dict": "{x: 1, y: 'z'}", "float": "1.5", "big": "7n"}
NAMED = {"book": TYPED, "java": JAVA, "script": JAVASCRIPT, "clock": {}}
CALLS = {name: {"name": name, "arguments": arguments} for name, arguments in NAMED.items()}
ODD = {"name": "odd\ud800", "arguments": {"x": float("nan"), "y": [[[]], {"": -0.0}], "z": "\0</tool_call>"}}
SEVERAL = [CALLS["book"], CALLS["clock"], CALLS["clock"]]
ANSWERS = ([], *([call] for call in CALLS.values()), SEVERAL, [ODD], json.dumps([CALLS["book"]]))


def function(name: str, **kinds: str) -> dict:
    """A function with a parameter of each kind, "type" or "type of elements"."""
    parts = {key: kind.split() for key, kind in kinds.items()}
    properties = {
        key: {"type": kind[0]} | ({"items": {"type": kind[1]}} if kind[1:] else {}) for key, kind in parts.items()
    }
    return {"name": name, "parameters": {"type": "dict", "properties": properties, "required": []}}


def bench_cases() -> dict[str, tuple[Callable[..., Verdict], Case]]:
    """Name -> the scorer and a case of it."""
    kinds = {"city": "string", "nights": "integer", "rate": "float", "quiet": "boolean", "guests": "array string"}
    python = function("book", **kinds, stay="dict", rooms="array dict")
    java = function("java", array="Array integer", list="ArrayList integer", long="long", map="HashMap")
    script = function("script", array="array integer", rows="array array", dict="dict", float="float", big="Bigint")
    ace = function("book", **kinds, stay="object", rooms="array dict")
    accepted = {key: [value, ""] for key, value in TYPED.items()}
    accepted |= {"stay": [{"x": ["y"]}, ""], "rooms": [[{"x": [1]}], ""]}
    by_java = {"array": [[1, 2], ""], "list": [[1, 2], ""], "long": [5, ""], "map": [{"x": ["y"]}, ""]}
    by_script = {"array": [[1, 2], ""], "rows": [[[1, 2], [3]], ""], "dict": [{"x": [1], "y": ["z"]}, ""]}
    by_script |= {"float": [1.5, ""], "big": [7, ""]}
    ace_gold = [{"book": {"city": "A"}}, {"book": TYPED}]
    return {
        "bfcl": (bfcl.score, Case("c", "simple_python", None, [{"book": accepted}], [python])),
        "bfcl java": (bfcl.score, Case("c", "simple_java", None, [{"java": by_java}], [java])),
        "bfcl javascript": (bfcl.score, Case("c", "simple_javascript", None, [{"script": by_script}], [script])),
        "bfcl irrelevance": (bfcl.score, Case("c", "irrelevance", None, [], [python])),
        "acebench": (acebench.score, Case("c", "a", None, ace_gold, [ace])),
        "api_bank": (api_bank.score, Case("c", "level 1", None, [CALLS["book"]])),
        "examples": (examples.score, Case("c", "demo", None, SEVERAL)),
    }


# ------------------------------------------------------------------------------------------------------ the replies

MARKERS = "<|im_start|>assistant <|im_start|> <tool_call </tool_call tool_call> <tools> </ <|im_end|> <|endoftext|>"
PLAIN_NUMBERS = "0 -0 -0.0 1e999 -1e-999 NaN Infinity -Infinity 0x10 01 1_000 1. +1 1E5 -"
NUMBERS = (*PLAIN_NUMBERS.split(), "9" * 4300, "9" * 4301, "-" + "1" * 5000, "1." + "3" * 400, "1e" + "9" * 30)
ESCAPES = r"\ud800 \udc00\ud83d \ud83d\ude00 \u0000 \x \ Bonn <think>"
RAW = ("", "\ud800", "\0", "\t", "é\u0301\u202e\u2028", "\U0001f600")
STRINGS = (*(f'"{text}"' for text in (*ESCAPES.split(), *RAW)), '"a', "'a'")
SYNTAX = """[ ] { } , : [] {} [[ ]] [{ }] {"a": "a":1,"a":2 {"": ( ) " ' \\ null true false None True // ```json"""
JAVA_SOURCE = """new int[] {|new ArrayList<>(Arrays.asList(|new ArrayList<>() {{|add(1); |}}|))|new HashMap<|>()|5L|1.5f
|new HashMap<String, Object>() {{|put("a", 1); |put("|",|[[1], [2]|new Array(|[1],|{a: 1, |b: |:::|7n"""
PYTHON_SOURCE = "book(city='Bonn')|f(a=|x[|lambda:|-|**|f'{a}'|1 if 1 else |not |~|=|9e9|\\N{DASH}|#|_1|=[*"
SOURCE = (*JAVA_SOURCE.split("|"), *PYTHON_SOURCE.split("|"))
TEXTS = ("It asks for Zürich.", "天気", "\ud83d", "\udc00", "\u0130\ufb01", "\r\n", " ", "\u00a0", "\ufeff", "a" * 50)
FRAGMENTS = (TAGS, MARKERS.split(), NUMBERS, STRINGS, SYNTAX.split(), SOURCE, TEXTS)
NESTED = (("[", "", "]"), ('{"a":', "1", "}"), ("[[],", "1", "]"), ('[{"a":', "1", "}]"))


def jumble(rng: random.Random, most: int = 12) -> str:
    return "".join(rng.choice(rng.choice(FRAGMENTS)) for _ in range(rng.randrange(most)))


def value(rng: random.Random) -> str:
    """JSON text of a value, well formed or not."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(NUMBERS + STRINGS)
    if kind == 1:
        opening, middle, closing = rng.choice(NESTED)
        depth = rng.randrange(rng.choice([3, 30, 300, 1200]))
        return opening * depth + middle + closing * max(depth - rng.choice([0, 0, 1]), 0)
    if kind == 2:
        return f"[{','.join(rng.choice(NUMBERS + STRINGS) for _ in range(rng.randrange(4)))}]"
    return rng.choice([jumble(rng), json.dumps(jumble(rng))])


def payload(rng: random.Random) -> str:
    """The content of a call block: an answer, one with an odd value, or anything at all."""
    answer = rng.choice(ANSWERS)
    calls = json.loads(answer) if isinstance(answer, str) else answer
    text = json.dumps(calls, ensure_ascii=rng.random() < 0.5)
    kind = rng.randrange(8)
    if kind < 5 and calls:
        call = rng.choice(calls)
        arguments = [f"{json.dumps(key)}:{json.dumps(old)}" for key, old in call["arguments"].items()]
        key = rng.choice([*call["arguments"], "x", "city='A'", "\ud800"])
        arguments.insert(rng.randrange(len(arguments) + 1), f"{json.dumps(key)}:{value(rng)}")
        name = json.dumps(call["name"]) if rng.random() < 0.9 else value(rng)
        return f'[{{"name": {name}, "arguments": {{{", ".join(arguments)}}}}}]'
    return rng.choice([text, text, text, json.dumps(text), value(rng), f"[{value(rng)}]", jumble(rng)])


def mutated(rng: random.Random, text: str) -> str:
    """A cut, a splice, a repeat, a changed character or byte."""
    start = rng.randrange(len(text) + 1)
    before, after = text[:start], text[start + rng.choice([1, 1, 3, 20, 300]) :]
    data = bytearray(text.encode("utf-8", "surrogatepass")) or bytearray(1)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    choices = [before, before + after, before + jumble(rng, 3) + text[start:], text + text[start:], text.swapcase()]
    return rng.choice([*choices, data.decode("utf-8", "replace")])


def small_reply(rng: random.Random) -> str:
    kind = rng.randrange(8)
    if kind == 0:
        return jumble(rng)
    thought = rng.choice([f"{THINK_OPEN}{rng.choice(TEXTS)}{THINK_CLOSE}"] * 3 + ["", jumble(rng)])
    text = thought + f"{CALL_OPEN}{payload(rng)}{CALL_CLOSE}" * rng.choice([1] * 8 + [0, 2])
    text += rng.choice(["", "", "<|im_end|>", jumble(rng, 3)])
    for _ in range(rng.choice([0, 0, 1, 4]) if kind > 3 else 0):
        text = mutated(rng, text)
    return text


def most_of(unit: str, room: int) -> str:
    """`unit` as often as `room` characters and MAX_JSON_MARKS allow, with some marks left for what is around it."""
    marks = sum(map(unit.count, "[{,"))
    return unit * min(room // len(unit), (MAX_JSON_MARKS - 2000) // max(marks, 1))


def large_reply(rng: random.Random, size: int) -> str:
    """About `size` characters: a fragment repeated, in a small reply or in a string or list of its calls."""
    unit = rng.choice([jumble(rng, 3), jumble(rng), small_reply(rng), value(rng) + ","]) or "\0"
    filler, text = unit * (size // len(unit) + 1), small_reply(rng)
    block = min(size, MAX_JSON_LENGTH) - 2000  # more is not read
    one, call = value(rng), rng.choice(list(CALLS.values()))
    argument = rng.choice([json.dumps(most_of(unit, block // 6)), f"[{most_of(one + ',', block)}{one}]"])
    inner = f'[{{"name":"{call["name"]}","arguments":{{"{rng.choice([*call["arguments"], "x"])}":{argument}}}}}]'
    place = rng.randrange(len(text) + 1)
    thought = f"{THINK_OPEN}{filler[: max(size - len(inner), 0)]}{THINK_CLOSE}"
    called = f"{CALL_OPEN}{inner}{CALL_CLOSE}"
    return rng.choice([filler[:size], text[:place] + filler[:size] + text[place:], called, thought + called])


def size_class(index: int) -> str:
    """1 reply of 100,000 has 10 MB, 1 of 1,000 has 64 KiB."""
    return "10 MB" if index % 100_000 == 99_999 else "64 KiB" if index % 1000 == 500 else "small"


def hostile_reply(seed: int, index: int) -> str:
    rng, size = random.Random(f"{seed}/{index}"), {"64 KiB": KIB_64, "10 MB": MB_10}.get(size_class(index))
    return large_reply(rng, size) if size else small_reply(rng)


# ---------------------------------------------------------------------------------------------------- what must hold


def cpu_seconds(call: Callable, *arguments: Any) -> float:
    """The least that the call takes in three: a garbage collection may fall in one."""
    taken = []
    for _ in range(3):
        start = time.process_time()
        call(*arguments)
        taken.append(time.process_time() - start)
    return min(taken)


def slowness() -> float:
    """How much slower this machine is at the moment than the one that LIMITS are meant for; at least 1."""
    return max(cpu_seconds(lambda: str(json.loads(f"[{'[1],' * 10_000}[1]]"))) / USUAL_SECONDS, 1.0)


def too_long(limit: float, call: Callable, *arguments: Any) -> float:
    """The CPU seconds of a call that takes more than `limit` of them on a machine of the usual speed, else 0."""
    start = time.process_time()
    call(*arguments)
    if time.process_time() - start <= limit:
        return 0.0
    least = cpu_seconds(call, *arguments)
    return least if least > limit * slowness() else 0.0


@dataclass
class Findings:
    """What a run of replies showed."""

    seed: int
    counts: Counter = field(default_factory=Counter)  # by fault, or by scorer and verdict
    wrong: list[str] = field(default_factory=list)
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)  # size class -> (CPU seconds, of what)

    def timed(self, index: int, what: str, call: Callable, *arguments: Any) -> Any:
        start, size = time.process_time(), size_class(index)
        result = call(*arguments)
        seconds = time.process_time() - start
        if seconds > self.worst.get(size, (0.0, ""))[0]:  # again: a garbage collection may have fallen in it
            seconds = min(seconds, cpu_seconds(call, *arguments))
            self.worst[size] = max((seconds, f"{what}, index {index}"), self.worst.get(size, (0.0, "")))
            if seconds > LIMITS[size] and seconds > LIMITS[size] * slowness():
                self.wrong.append(f"seed {self.seed}, index {index}: {what} takes {seconds:.3f} s")
        return result

    def guarded(self, index: int, check: Callable, *arguments: Any) -> None:
        """Whatever is raised becomes a finding, with the names that reproduce it."""
        try:
            check(self, index, *arguments)
        except Exception as error:  # that none gets here is what is tested
            self.wrong.append(f"seed {self.seed}, index {index}: {type(error).__name__}: {str(error)[:200]}")


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
    assert paid["strict"] == (paid["binary"] if reply.is_strict else 0)
    row = {"step": 1, "kind": "best", "id": "e", "reward": paid["binary"], "reply": text, "answer": answer}
    line = findings.timed(index, "to_json", to_json, row)
    assert "\n" not in line and json.loads(line.encode("utf-8"))["reward"] == paid["binary"]
    findings.counts[fault] += 1
    rows.append(row)


def check_step(findings: Findings, index: int, rows: list[dict]) -> None:
    """The metrics of a step whose replies are those of `rows`."""
    metrics, rewards = Metrics(), torch.tensor([row["reward"] for row in rows], dtype=torch.float32)
    rollouts = [Rollout(n // 8, n % 8, [0], [0] * (n % 7 + 1), [0.0], n % 5 > 0) for n in range(len(rows))]
    measured = [TOOL_N1.metrics(row["reply"], Example("fuzz", "", "", [], [], row["answer"])) for row in rows]
    with metrics.timer("rollout"):
        add_reply_metrics(metrics, rollouts, rewards, measured, 1)
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


def fuzz(seed: int, indices: range) -> Findings:
    """Replies `indices` of `seed` through all checks."""
    findings, cases, rows = Findings(seed), bench_cases(), []
    for index in indices:
        findings.guarded(index, check_reply, text := hostile_reply(seed, index), rows)
        findings.guarded(index, check_scores, text, cases)
        if rows and (len(rows) == REPLIES_A_STEP or index == indices[-1]):
            findings.guarded(index, check_step, rows)
            rows = []
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    given, start = parser.parse_args(), time.process_time()
    findings = fuzz(given.seed, range(given.replies))
    print(f"{given.replies:,} replies of seed {given.seed}, {time.process_time() - start:.0f} s of CPU")
    for name, count in sorted(findings.counts.items(), key=str):
        print(f"  {count:9,}  {name if isinstance(name, str) else ', '.join(name)}")
    print(f"{len(findings.wrong)} went wrong", *findings.wrong[:20], sep="\n  ")
    for size, (seconds, what) in findings.worst.items():
        print(f"  {size}: worst {1000 * seconds:.2f} ms ({what}), limit {1000 * LIMITS[size]:.0f} ms")
    sys.exit(bool(findings.wrong))


if __name__ == "__main__":
    main()
