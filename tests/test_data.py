"""Raw rows to examples, the filters and their counts, JSONL of examples, the split, the epoch order, the command."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import shared

from tooln1.data import EpochOrder, Example, read_examples, write_examples
from tooln1.io.errors import UserError
from tooln1.prepare import read_toolace, read_xlam
from tooln1.prepare.augment import add_irrelevance, mask_names, masked
from tooln1.prepare.convert import convert_toolace, convert_xlam
from tooln1.prepare.split import source_row, split
from tooln1.prompt import XLAM_SYSTEM, build_messages, drop_long

ROOT = Path(__file__).resolve().parents[1]
HEAD = "You are an expert. Here is a list of functions in JSON format that you can invoke:\n"
TAIL = ". \nShould you decide to return the function call(s). \nPut it in the format of [f(x=1)]\n"


def tool(name):
    return {"name": name, "description": f"does {name}", "parameters": {"x": {"type": "str"}}}


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


def xlam_row(query="q", tools=("f", "g"), answers=None):
    answers = [call("f", x=1)] if answers is None else answers
    return {"id": 0, "query": query, "tools": json.dumps([tool(t) for t in tools]), "answers": json.dumps(answers)}


def toolace_row(*turns, tools=("f", "g/h"), system=None):
    system = HEAD + json.dumps([tool(t) for t in tools]) + TAIL if system is None else system
    return {"system": system, "conversations": [{"from": role, "value": text} for role, text in turns]}


DIALOGUE = (
    ("user", "first"),
    ("assistant", '[f(x="a) b", y=true), g/h()]'),
    ("tool", '[{"name": "f", "results": 1}]'),
    ("assistant", "It is 1."),
    ("user", "second"),
    ("assistant", "[g/h(n=2)]"),
)


def example(name="e", **changes):
    plain = Example(name, "mine", "system ", [tool("f"), tool("g")], [{"role": "user", "content": name}], [call("f")])
    return replace(plain, **changes)


@pytest.fixture
def write(tmp_path):
    """A function that writes rows as JSONL (or as a JSON array) and returns the path."""

    def write_rows(*rows, array=False, name="rows.json"):
        text = json.dumps(rows) if array else "\n".join(json.dumps(row) for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write_rows


def test_xlam_rows(write):
    two = [call("g", x=[1, {"a": None}]), call("f")]
    lists = {"query": "three", "tools": [tool("f")], "answers": [call("f") | {"id": 7}], "more": 1}
    found = read_xlam(write(xlam_row("one"), xlam_row("two", answers=two), lists, array=True))
    question = [{"role": "user", "content": "one"}]
    assert found[0] == Example("xlam-0", "xlam", XLAM_SYSTEM, [tool("f"), tool("g")], question, [call("f", x=1)])
    assert [(e.id, e.answer) for e in found[1:]] == [("xlam-1", two), ("xlam-2", [call("f")])]


def test_toolace_dialogue_gives_one_example_per_call_turn(write):
    first, second = read_toolace(write(toolace_row(*DIALOGUE)))
    assert (first.id, second.id) == ("toolace-0-1", "toolace-0-5")
    assert (first.source, second.source) == ("toolace_single_turn", "toolace_multiple_turn")
    assert first.system == second.system == HEAD
    assert first.tools == second.tools == [tool("f"), tool("g/h")]
    assert first.messages == [{"role": "user", "content": "first"}]
    assert first.answer == [call("f", x="a) b", y=True), call("g/h")] and second.answer == [call("g/h", n=2)]
    assert [m["role"] for m in second.messages] == ["user", "assistant", "tool", "assistant", "user"]
    assert json.loads(second.messages[1]["content"]) == first.answer  # an earlier call, as JSON once
    assert second.messages[3]["content"] == "It is 1."


def test_sharegpt_role_names_give_the_same(write):
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    sharegpt = [(names[role], text) for role, text in DIALOGUE]
    as_call = [("function_call", text) if text.endswith(")]") else (role, text) for role, text in sharegpt]
    plain = read_toolace(write(toolace_row(*DIALOGUE)))
    for turns in (sharegpt, as_call):
        assert read_toolace(write(toolace_row(*turns))) == plain


def test_dropped_turns_are_counted_by_reason(write):
    texts = ["[f(x=1)]", "Hello", "[]", "[f(x=1)] ", "[h(x=1)]", "[No function can be used (sorry)]", "[f(5)]"]
    good = ("assistant", "[f(x=1)]")
    path = write(
        *(toolace_row(("user", "q"), ("assistant", text)) for text in texts),
        toolace_row(good),
        toolace_row(("user", "q"), ("assistant", "Wait."), good),
        toolace_row(("user", "q"), good, system="no tools here"),
        toolace_row(("user", "q"), good, system=HEAD + '[{"name": "f"'),
        toolace_row(("user", "half \ud83d"), good),
    )
    conversion = convert_toolace(path)
    assert [e.id for e in conversion.examples] == ["toolace-0-1"]
    assert conversion.rows == {"toolace_single_turn": 11, "toolace_multiple_turn": 1}
    assert conversion.dropped == {
        "no call": 4,
        "calls a tool outside the list": 1,
        "call does not parse: an argument without 'name='": 2,
        "no user or tool turn right before it": 2,
        "tool list unreadable": 2,
        "holds NaN, infinity, half a surrogate pair or very deep nesting": 1,
    }


def test_dropped_xlam_rows_are_counted_by_reason(write):
    path = write(
        xlam_row(),
        xlam_row(answers=[]),
        xlam_row(answers=[call("h")]),
        xlam_row(answers=[{"name": "f"}]),
        xlam_row(answers=[call("f", x=math.nan)]),
        xlam_row() | {"tools": "[1]"},
    )
    conversion = convert_xlam(path)
    assert conversion.rows == {"xlam": 6} and len(conversion.examples) == 1
    assert conversion.dropped == {
        "no call": 1,
        "calls a tool outside the list": 1,
        "call does not parse: an answer without a name and arguments": 1,
        "holds NaN, infinity, half a surrogate pair or very deep nesting": 1,
        "tool list unreadable": 1,
    }


# ---- JSONL of examples ----


def test_examples_survive_writing_and_reading(tmp_path):
    examples = [example("é😀\u2028", reply="t"), example("b", answer=[], tools=[])]
    write_examples(examples, tmp_path / "new" / "e.jsonl")
    assert read_examples(tmp_path / "new" / "e.jsonl") == examples
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["e.jsonl"]


BAD_EXAMPLES = [
    *({key: ...} for key in ("id", "source", "system", "tools", "messages", "answer")),  # the key is missing
    {"id": 5},
    {"id": "a"},  # given twice
    {"extra": 1},
    {"reply": 5},
    {"messages": []},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"answer": [{"name": "f", "arguments": "{}"}]},
]


@pytest.mark.parametrize("change", BAD_EXAMPLES, ids=str)
def test_malformed_example_names_file_line_and_key(write, change):
    row = {key: value for key, value in (vars(example("b")) | change).items() if value is not ...}
    path = write(vars(example("a")), row)
    with pytest.raises(UserError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}, line 2") and next(iter(change)) in str(caught.value)


def test_irrelevance_copies():
    examples = [example(f"e{i}") for i in range(20)]
    examples += [example("all used", answer=[call("f"), call("g")]), example("none", answer=[])]
    grown = add_irrelevance(examples, 0.5, seed=0)
    copies = grown[len(examples) :]
    assert grown[: len(examples)] == examples and len(copies) == 11
    assert all(e.answer == [] and e.tools == [tool("g")] and e.id.endswith("-irrelevant") for e in copies)
    assert {e.id for e in copies} != {e.id for e in add_irrelevance(examples, 0.5, seed=1)[len(examples) :]}
    assert len(add_irrelevance(examples, 1.0, seed=0)) == 42  # only 20 have another tool
    assert add_irrelevance(examples, 0, seed=0) == examples


SCHEMA = {"type": "dict", "properties": {"city": {"type": "str"}, "type": {"type": "dict", "properties": {"city": {}}}}}
BOTH_FORMS = [
    {"name": "look", "parameters": {"city": {"type": "str", "default": "Oslo"}, "type": {"type": "int"}}},
    {"name": "search", "parameters": SCHEMA | {"required": ["type"]}, "required": None},
    {"name": "now", "parameters": {"type": "dict"}},
    {"name": "today"},
]
TWICE = [call("search", city="look", type={"city": 1}), call("search", city="b", other=2)]


def renamed_back(masked_example, part, known):
    """The JSON of a masked example, each of its new names replaced by the old one in its place."""
    text = json.dumps(vars(masked_example), ensure_ascii=False).replace('\\"', "'")
    new = masked_example.tools
    names = [tool["name"] for tool in new] if part == "functions" else [*new[0]["parameters"]]
    assert len({*names} | {*known}) == 2 * len(known) and all(name.isalpha() and len(name) == 8 for name in names)
    for name, old in zip(names, known, strict=True):
        text = text.replace(f'"{name}"', f'"{old}"').replace(f"'{name}'", f"'{old}'")
    return text


@pytest.mark.parametrize(
    ("part", "known"), [("functions", ["look", "search", "now", "today"]), ("parameters", ["city", "type"])]
)
def test_masked_names_are_the_same_everywhere_and_nothing_else_changes(part, known):
    before = example("m", tools=BOTH_FORMS, answer=TWICE)
    text = json.dumps(vars(before), ensure_ascii=False).replace('\\"', "'")
    after = masked(before, part, seed=0)
    assert renamed_back(after, part, known) == text
    assert vars(before) == vars(example("m", tools=BOTH_FORMS, answer=TWICE))  # and not in place
    assert after.answer[0]["name"] == after.answer[1]["name"]
    look, search = (tool["parameters"] for tool in after.tools[:2])
    city, kind = look
    assert [*search] == [*SCHEMA, "required"] and [*search["properties"]] == [city, kind]
    assert search["required"] == [kind]
    assert after.answer[0]["arguments"] == {city: "look", kind: {"city": 1}}  # values and inner names stay
    assert after.answer[1]["arguments"] == {city: "b", "other": 2}
    assert masked(before, part, seed=1) != after != masked(replace(before, id="n"), part, seed=0)


def test_examples_that_cannot_be_masked_are_left_out_of_the_draw():
    turns = [{"role": role, "content": "look"} for role in ("user", "assistant", "user")]
    bad = [example("turns", tools=BOTH_FORMS, messages=turns)]
    bad += [example(f"form {form}", tools=[{"name": "f", "parameters": form}]) for form in (["x"], {"x": "str"})]
    bad += [example("no tools", tools=[], answer=[])]
    good = [example(f"e{i}") for i in range(15)]
    for part in ("functions", "parameters"):
        assert [masked(one, part, 0) for one in bad] == [None] * 4
        after, count = mask_names(bad + good, part, 0.5, seed=0)
        assert after[:4] == bad and count == sum(a != b for a, b in zip(after[4:], good, strict=True)) == 10
        assert mask_names(bad + good, part, 0.5, seed=0) == (after, count)
        assert mask_names((bad + good)[::-1], part, 0.5, seed=0)[0] == after[::-1]
        assert mask_names(bad + good, part, 0.5, seed=1)[0] != after
        assert mask_names(bad + good, part, 1, seed=0)[1] == 15 and mask_names(good, part, 0, seed=0) == (good, 0)
    assert masked(example("nothing", tools=[{"name": "f"}]), "parameters", 0) is None


def test_drop_long():
    class Letters:
        def render(self, messages, *, add_generation_prompt):
            if messages[-1]["content"] == "refused":
                raise UserError("roles must alternate")
            return "".join(m["content"] for m in messages)

        def encode(self, text):
            return list(text.encode())

    limit = sum(len(m["content"]) for m in build_messages(example("s")))
    assert drop_long([example("s"), example("long")], Letters(), limit) == ([example("s")], 1)
    with pytest.raises(UserError, match="^example 'refused': roles must alternate"):
        drop_long([example("refused")], Letters(), limit)


def test_command_writes_both_sides_and_a_report(write, tmp_path):
    xlam = write(*[xlam_row(f"q{i}") for i in range(20)], xlam_row(answers=[call("h")]), name="x.json", array=True)
    toolace = write(*[toolace_row(("user", f"{i}"), *DIALOGUE[1:]) for i in range(10)], name="t.jsonl")
    out = tmp_path / "out"
    args = ["--xlam", xlam, "--toolace", toolace, "--out", out, "--seed", "5", "--mask-functions", "0.5"]
    done = subprocess.run([sys.executable, "-m", "tooln1.prepare", *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| raw | 21 | 0 | 10 |\n| processed | 20 | 10 | 10 |" in done.stdout
    assert "dropped xLAM rows, calls a tool outside the list: 1" in done.stdout
    train, held_out = read_examples(out / "train.jsonl"), read_examples(out / "heldout.jsonl")
    examples = read_xlam(xlam) + read_toolace(toolace)
    sides = split(examples, seed=5)
    assert train == mask_names(sides[0], "functions", 0.5, seed=5)[0] != sides[0] and held_out == sides[1]
    assert f"training examples with masked functions: {round(len(train) / 2)}, parameters: 0" in done.stdout
    report = json.loads((out / "report.json").read_text())
    assert (report["train"], report["heldout"], report["options"]["seed"]) == (len(train), len(held_out), 5)


# ---- the split and the epoch order ----


def steps(rows):
    """Three call turns of each of this many dialogues."""
    question = {row: [{"role": "user", "content": f"q{row}"}] for row in range(rows)}
    return [example(f"toolace-{row}-{turn}", messages=question[row]) for row in range(rows) for turn in (1, 3, 5)]


def questions(examples):
    return [e.messages[0]["content"] for e in examples]


def test_split_keeps_a_row_and_its_irrelevance_copies_together():
    examples = add_irrelevance(steps(200), 1, seed=0)
    train, held_out = split(examples, seed=0, held_out=0.1)
    rows = [{source_row(e.id) for e in side} for side in (train, held_out)]
    assert len(rows[1]) == 20 and len(held_out) == 120 and not rows[0] & rows[1]
    assert [examples.index(e) for e in train] == sorted(examples.index(e) for e in train)
    assert sorted(e.id for e in train + held_out) == sorted(e.id for e in examples)


def test_split_depends_on_the_seed_and_not_on_order_or_ids():
    examples = steps(100)
    held_out = split(examples, seed=3)[1]
    renamed = [replace(e, id=f"x{number}") for number, e in enumerate(examples[::-1])]
    assert set(questions(split(renamed, seed=3)[1])) == set(questions(held_out))
    assert set(questions(split(examples, seed=4)[1])) != set(questions(held_out))


def test_split_puts_equal_questions_with_equal_tools_on_one_side():
    tools = [tool("f"), tool("g")]
    rows = [example(f"q{i}", id=f"xlam-{i}", tools=tools) for i in range(50)]
    pairs = rows + [replace(row, id=f"{row.id}50", tools=tools[::-1]) for row in rows]
    held_out = Counter(questions(split(pairs, seed=0, held_out=0.2)[1]))
    assert len(held_out) == 10 and set(held_out.values()) == {2}


def test_split_share():
    assert split(steps(10), 0, held_out=0) == (steps(10), [])
    assert len(split(steps(10), 0, held_out=0.001)[1]) == 3  # one row
    for rows, share in ((10, 1), (10, -0.1), (10, math.nan), (1, 0.1)):
        with pytest.raises(UserError):
            split(steps(rows), 0, held_out=share)


def test_epochs_are_permutations_and_no_step_spans_two():
    order = EpochOrder(n=10, seed=0)
    epochs = [[order.take(10 * e + start, 3)[0] for start in (0, 3, 6)] for e in range(20)]
    assert all(len(set(sum(epoch, []))) == 9 for epoch in epochs) and len(set(map(str, epochs))) == 20
    assert set(sum(sum(epochs, []), [])) == set(range(10))  # each epoch leaves out another example


def test_order_is_a_function_of_seed_and_position():
    expected = [EpochOrder(7, 1).take(position, 2) for position in range(60)]
    assert [EpochOrder(7, 1).take(position, 2) for position in (59, 3, 0)] == [expected[at] for at in (59, 3, 0)]
    assert [EpochOrder(7, 2).take(position, 2) for position in range(60)] != expected
    # the same permutation for every count, and on every machine: numpy's raw PCG64 stream
    assert [EpochOrder(7, 1).take(position, 1)[0][0] for position in range(7)] == [2, 4, 5, 0, 6, 3, 1]
    assert EpochOrder(7, 1).take(0, 7) == ([2, 4, 5, 0, 6, 3, 1], 7)
    # 4 of 7 are taken: two more are there, three are not, and come from the next epoch
    assert EpochOrder(7, 1).take(4, 2) == ([6, 3], 6)
    assert EpochOrder(7, 1).take(4, 4) == (EpochOrder(7, 1).take(7, 4)[0], 11)
    for count in (0, 8):
        with pytest.raises(UserError):
            EpochOrder(7, 0).steps_per_epoch(count)


# ---- reference data ----


def toolace_fixture(**options):
    """Examples by (row, number of turns before the call)."""
    examples = convert_toolace(shared("data/fixtures/toolace_raw_format.jsonl"), **options).examples
    return {(int(e.id.split("-")[1]), len(e.messages)): e for e in examples}


def test_toolace_fixture_against_the_released_preprocessing():
    """Every released instance is ours; the others that we have are calls that the released parser loses."""
    ours, with_text = toolace_fixture(), toolace_fixture(keep_no_call=True)
    path = shared("data/fixtures/toolace_process_expected.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    calls = {(row["row"], step["n_context"]): step for row in rows for step in row["calls"]}
    nocall = {(row["row"], step["n_context"]) for row in rows for step in row["nocall"]}
    for place, step in calls.items():
        assert ours[place].answer == step["answer"] and ours[place].source == step["id"], place
        assert len(ours[place].tools) == step["n_tools"]
    for place in set(ours) - set(calls):  # names with signs outside the alphabet of the released parser
        assert any(sign in call["name"] for call in ours[place].answer for sign in "/&'("), ours[place].answer
    assert set(with_text) >= nocall and set(with_text) - set(ours) <= nocall
