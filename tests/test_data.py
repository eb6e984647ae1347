"""Raw rows to examples, counted filters, options, the project's own JSONL, the command."""

import gzip
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import shared

from tooln1.data import Example, read_examples, write_examples
from tooln1.io.errors import UserError
from tooln1.prepare.convert import add_irrelevance, convert_toolace, convert_xlam, read_toolace, read_xlam
from tooln1.prepare.split import split
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
    return {
        "id": 0,
        "query": query,
        "tools": json.dumps([tool(t) for t in tools]),
        "answers": json.dumps(answers),
    }


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
    """Write rows as JSONL (or as an array) and return the path."""

    def written(*rows, array=False, name="rows.json"):
        text = json.dumps(rows) if array else "\n".join(json.dumps(row) for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return written


# ----------------------------------------------------------------------------------------------- raw files


@pytest.mark.parametrize("array", [False, True])
def test_xlam_row(write, array):
    path = write(xlam_row("one"), xlam_row("two", answers=[call("g", x=[1, {"a": None}]), call("f")]), array=array)
    found = read_xlam(path)
    assert type(found) is list
    assert found[0] == Example(
        "xlam-0",
        "xlam",
        XLAM_SYSTEM,
        [tool("f"), tool("g")],
        [{"role": "user", "content": "one"}],
        [call("f", x=1)],
    )
    assert [(e.id, e.answer) for e in found[1:]] == [("xlam-1", [call("g", x=[1, {"a": None}]), call("f")])]


def test_xlam_lists_instead_of_strings_and_surplus_keys(write):
    row = {"query": "q", "tools": [tool("f")], "answers": [call("f") | {"id": 7}], "more": 1}
    assert read_xlam(write(row))[0].answer == [call("f")]


@pytest.mark.parametrize("array", [False, True])
def test_toolace_dialogue_gives_one_example_per_call_step(write, array):
    found = read_toolace(write(toolace_row(*DIALOGUE), array=array))
    first, second = found
    assert type(found) is list
    assert (first.id, second.id) == ("toolace-0-1", "toolace-0-5")
    assert (first.source, second.source) == ("toolace_single_turn", "toolace_multiple_turn")
    assert first.system == second.system == HEAD
    assert first.tools == second.tools == [tool("f"), tool("g/h")]
    assert first.messages == [{"role": "user", "content": "first"}]
    assert first.answer == [call("f", x="a) b", y=True), call("g/h")]
    assert second.answer == [call("g/h", n=2)]
    assert [m["role"] for m in second.messages] == ["user", "assistant", "tool", "assistant", "user"]
    # an earlier call enters the history as JSON, once
    assert json.loads(second.messages[1]["content"]) == first.answer
    assert second.messages[3]["content"] == "It is 1."


def test_both_sets_of_role_names_give_the_same(write):
    renamed = {"user": "human", "assistant": "gpt", "tool": "observation"}
    sharegpt = [(renamed[role], text) for role, text in DIALOGUE]
    as_call = [(role if text[0] != "[" or role != "gpt" else "function_call", text) for role, text in sharegpt]
    as_json = [
        (role, json.dumps([call("f", x="a) b", y=True), call("g/h")]) if i == 1 else text)
        for i, (role, text) in enumerate(as_call)
    ]
    plain = read_toolace(write(toolace_row(*DIALOGUE)))
    for turns in (sharegpt, as_call, as_json):
        assert read_toolace(write(toolace_row(*turns))) == plain


def test_dropped_steps_are_counted_by_reason(write):
    question = ("user", "q")
    path = write(
        toolace_row(question, ("assistant", "[f(x=1)]")),  # kept
        toolace_row(question, ("assistant", "Hello")),
        toolace_row(question, ("assistant", "[]")),
        toolace_row(question, ("assistant", "[f(x=1)] ")),  # as in the released code: no space around the brackets
        toolace_row(question, ("assistant", "[h(x=1)]")),
        toolace_row(question, ("assistant", "[No function can be used (sorry)]")),
        toolace_row(question, ("assistant", "[f(5)]")),
        toolace_row(("assistant", "[f(x=1)]")),
        toolace_row(question, ("assistant", "Wait."), ("assistant", "[f(x=1)]")),
        toolace_row(question, ("assistant", "[f(x=1)]"), system="no tools here"),
        toolace_row(question, ("assistant", "[f(x=1)]"), system=HEAD + '[{"name": "f"'),
        toolace_row(("user", "half \ud83d"), ("assistant", "[f(x=1)]")),
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
        xlam_row() | {"answers": '[{"name": "f", "arguments": {"x": 1e999}}]'},
        xlam_row() | {"tools": "[1]"},
    )
    conversion = convert_xlam(path)
    assert conversion.rows == {"xlam": 7} and len(conversion.examples) == 1
    assert conversion.dropped == {
        "no call": 1,
        "calls a tool outside the list": 1,
        "call does not parse: an answer without a name and arguments": 1,
        "holds NaN, infinity, half a surrogate pair or very deep nesting": 2,
        "tool list unreadable": 1,
    }


def test_keep_no_call(write):
    rows = (
        toolace_row(*DIALOGUE),
        toolace_row(("user", "q"), ("assistant", "[]")),
        toolace_row(("user", "q"), ("assistant", "[f(]")),
    )
    kept = convert_toolace(write(*rows), keep_no_call=True)
    assert [(e.id, len(e.answer)) for e in kept.examples] == [
        ("toolace-0-1", 2),
        ("toolace-0-3", 0),
        ("toolace-0-5", 1),
        ("toolace-1-1", 0),
    ]
    assert sum(kept.dropped.values()) == 1  # a call that does not parse is not "no call"
    assert [e.answer for e in convert_xlam(write(xlam_row(answers=[])), keep_no_call=True).examples] == [[]]


MALFORMED = {
    "xlam": [
        ('{"query": "q"', "line 1: not valid JSON"),
        ('{"query": "q", "tools": "[]"}', 'line 1: the key "answers" is missing'),
        ('{"query": 5, "tools": "[]", "answers": "[]"}', 'line 1: "query" must be a string, found a number'),
        ('{"query": "q", "tools": "[", "answers": "[]"}', 'line 1, "tools": not valid JSON'),
        ('{"query": "q", "tools": "{}", "answers": "[]"}', 'line 1: "tools" must be a list, found an object'),
        ("\n[1]", "row 0: expected a JSON object, found a number"),
        ('{"a": 1}\n\n7', "line 3: expected a JSON object"),
        ("", "holds no rows"),
        ("[]", "holds no rows"),
        ("[" * 100_000, "nested too deeply"),
        ('{"query": ' + "9" * 5000 + "}", "line 1"),
        ('{"query": NaN}', "line 1: NaN is not a JSON value"),
    ],
    "toolace": [
        ('{"system": "s"}', 'line 1: the key "conversations" is missing'),
        ('{"system": "s", "conversations": [1]}', "line 1, turn 0: expected"),
        ('{"system": "s", "conversations": [{"from": "user"}]}', 'turn 0: the key "value" is missing'),
        ('{"system": "s", "conversations": [{"from": "bot", "value": ""}]}', "unknown role 'bot'"),
        ('{"system": 1, "conversations": []}', '"system" must be a string'),
    ],
}


@pytest.mark.parametrize(("kind", "text", "reason"), [(k, *case) for k, cases in MALFORMED.items() for case in cases])
def test_malformed_raw_file_names_file_row_and_reason(tmp_path, kind, text, reason):
    path = tmp_path / "raw.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        {"xlam": read_xlam, "toolace": read_toolace}[kind](path)
    assert reason in str(caught.value) and str(path) in str(caught.value)


def test_unreadable_files(tmp_path):
    (tmp_path / "bad").write_bytes(b'{"query": "q"}\n{"query": "\xff"}\n')
    with pytest.raises(UserError, match="bad, line 2: not UTF-8"):
        read_xlam(tmp_path / "bad")
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="cannot read"):
            read_xlam(path)


def test_line_separators_inside_strings_and_byte_order_mark(tmp_path):
    row = json.dumps(xlam_row("a\u2028b\x85c"), ensure_ascii=False)
    (tmp_path / "rows").write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n{row}\r\n".encode())
    assert [e.messages[0]["content"] for e in read_xlam(tmp_path / "rows")] == ["a\u2028b\x85c"] * 2


# ------------------------------------------------------------------------------------------------- own JSONL


def test_examples_survive_writing_and_reading(tmp_path):
    examples = [
        example("é😀\u2028"),
        example("b", answer=[], tools=[]),
        example("c", answer=[call("f", x=[1.0, None])]),
    ]
    write_examples(examples, tmp_path / "new" / "e.jsonl")
    assert read_examples(tmp_path / "new" / "e.jsonl") == examples
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["e.jsonl"]


BAD_EXAMPLES = [
    ({"id": 5}, '"id" must be a string'),
    ({"system": None}, '"system" must be a string, found null'),
    ({"extra": 1}, "unknown key 'extra'"),
    ({"tools": {}}, '"tools" must be a list'),
    ({"tools": [{"type": "function"}]}, "tools[0]"),
    ({"messages": []}, "must end with a user or tool turn"),
    (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        "must end with",
    ),
    ({"messages": [{"role": "human", "content": "q"}]}, "messages[0]: the role must be"),
    ({"messages": [{"role": "user"}]}, 'messages[0]: the key "content" is missing'),
    ({"messages": ["q"]}, "messages[0]: expected an object"),
    ({"answer": [{"name": "f"}]}, "answer[0] must be"),
    ({"answer": [{"name": "f", "arguments": "{}"}]}, "answer[0] must be"),
    ({"answer": [{"name": "f", "arguments": {}, "id": 1}]}, "answer[0] must be"),
    ({"answer": None}, '"answer" must be a list'),
    ({"source": "\ud83d"}, "half a surrogate pair"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_EXAMPLES)
def test_malformed_example_names_file_line_and_reason(write, change, reason):
    path = write(vars(example("a")), vars(example("b")) | change)
    with pytest.raises(UserError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}, line 2") and reason in str(caught.value)


def test_more_malformed_examples(write, tmp_path):
    for key in vars(example()).keys() - {"reply"}:
        with pytest.raises(UserError, match=f'line 1: the key "{key}" is missing'):
            read_examples(write({k: v for k, v in vars(example()).items() if k != key}))
    with pytest.raises(UserError, match='line 2: the id "e" was given before'):
        read_examples(write(vars(example()), vars(example())))
    with pytest.raises(UserError, match="line 1: NaN is not a JSON value"):
        read_examples(write(vars(example(answer=[call("f", x=math.nan)]))))
    (tmp_path / "huge").write_text(json.dumps(vars(example(answer=[call("f", x=1)]))).replace(": 1}", ": 1e999}"))
    with pytest.raises(UserError, match="infinity"):
        read_examples(tmp_path / "huge")


def test_nothing_is_written_when_an_example_is_refused(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_text("before")
    for bad in ([example(), example()], [example(), example("b", answer=[call("f", x=math.inf)])]):
        with pytest.raises(UserError):
            write_examples(bad, path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------- options


def test_irrelevance_copies():
    examples = [example(f"e{i}") for i in range(20)]
    examples += [example("all used", answer=[call("f"), call("g")]), example("none", answer=[])]
    grown = add_irrelevance(examples, 0.5, seed=0)
    copies = grown[len(examples) :]
    assert grown[: len(examples)] == examples and len(copies) == 11
    assert all(e.answer == [] and e.tools == [tool("g")] and e.id.endswith("-irrelevant") for e in copies)
    assert {e.id for e in copies} != {e.id for e in add_irrelevance(examples, 0.5, seed=1)[len(examples) :]}
    assert len(add_irrelevance(examples, 1.0, seed=0)) == 42  # only 20 are fit
    assert add_irrelevance(examples, 0, seed=0) == examples
    with pytest.raises(UserError):
        add_irrelevance(examples, 1.5, seed=0)


def test_drop_long():
    class Letters:
        def render(self, messages, *, add_generation_prompt):
            assert add_generation_prompt
            return "".join(m["content"] for m in messages)

        def encode(self, text):
            return list(text.encode())

    short, long = example("s"), example("l" * 100)
    limit = sum(len(m["content"]) for m in build_messages(short))
    assert drop_long([short, long], Letters(), limit) == ([short], 1)
    assert drop_long([short, long], Letters(), limit - 1) == ([], 2)


def test_a_template_that_refuses_an_example_is_told_with_its_id():
    class Strict:
        def render(self, messages, *, add_generation_prompt):
            raise UserError("roles must alternate")

    with pytest.raises(UserError, match="^example 'e7': roles must alternate"):
        drop_long([example("e7")], Strict(), 10)


# ---------------------------------------------------------------------------------------------- command line


def command(*args):
    run = [sys.executable, "-m", "tooln1.prepare", *map(str, args)]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True)


def test_command_writes_both_sides_and_a_report(write, tmp_path):
    xlam = write(*[xlam_row(f"q{i}") for i in range(20)], xlam_row(answers=[call("h")]), name="x.json", array=True)
    toolace = write(
        *[toolace_row(*((r, t + str(i) * (r == "user")) for r, t in DIALOGUE)) for i in range(10)],
        name="t.jsonl",
    )
    out = tmp_path / "out"
    done = command("--xlam", xlam, "--toolace", toolace, "--out", out, "--seed", 5)
    assert done.returncode == 0, done.stderr
    assert "| raw | 21 | 0 | 10 |\n| processed | 20 | 10 | 10 |" in done.stdout
    assert "dropped xLAM rows, calls a tool outside the list: 1" in done.stdout
    assert "dropped ToolACE assistant turns, no call: 10" in done.stdout
    train, held_out = read_examples(out / "train.jsonl"), read_examples(out / "heldout.jsonl")
    examples = read_xlam(xlam) + read_toolace(toolace)
    assert (train, held_out) == split(examples, seed=5)
    report = json.loads((out / "report.json").read_text())
    assert (report["train"], report["heldout"], report["options"]["seed"]) == (len(train), len(held_out), 5)
    assert sorted(p.name for p in out.iterdir()) == ["heldout.jsonl", "report.json", "train.jsonl"]


# ---------------------------------------------------------------------------------------- reference data


def test_xlam_fixture():
    conversion = convert_xlam(shared("data/fixtures/xlam_raw_format.jsonl"))
    assert len(conversion.examples) == conversion.rows["xlam"] == 231 and not conversion.dropped


def toolace_fixture(**options):
    return convert_toolace(shared("data/fixtures/toolace_raw_format.jsonl"), **options)


def by_place(examples):
    """Examples by (row, number of turns before the call)."""
    return {(int(e.id.split("-")[1]), len(e.messages)): e for e in examples}


def released_instances(kind):
    path = shared("data/fixtures/toolace_process_expected.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(row["row"], step["n_context"]): step for row in rows for step in row[kind]}


def test_toolace_fixture_against_the_released_preprocessing():
    """179 bracketed turns: 168 released instances, all equal here, 10 that its parser loses, and one []."""
    conversion = toolace_fixture()
    ours, released = by_place(conversion.examples), released_instances("calls")
    assert len(released) == 168 and len(ours) == 178 and conversion.dropped == {"no call": 295}
    for place, step in released.items():
        assert ours[place].answer == step["answer"] and ours[place].source == step["id"], place
        assert len(ours[place].tools) == step["n_tools"]
    assert Counter(e.source for e in conversion.examples) == {
        "toolace_single_turn": 90,
        "toolace_multiple_turn": 88,
    }
    recovered = {call["name"] for place in set(ours) - set(released) for call in ours[place].answer}
    assert recovered == {
        "/madlibs-diceware",
        "User Feed (Video Posts) V2",
        "/email/valistring",
        "Q&A Notifications",
        "Get Agent's Active Listings",
        "products/list",
        "tags/list",
        "Stock News API",
        "symbols/get-dividend-history",
        "Vehicle Identification Number (VIN) Lookup",
    }


def test_toolace_fixture_with_no_call_turns():
    """The released option gives 465 instances, ours all 473 assistant turns: the 8 are calls it drops."""
    ours, released = by_place(toolace_fixture(keep_no_call=True).examples), released_instances("nocall")
    assert len(released) == 465 and len(ours) == 473
    assert all(ours[place].answer for place in set(ours) - set(released))


def undo_double_encoding(message):
    twice = message["role"] == "assistant" and message["content"].startswith('"')
    return message | {"content": json.loads(message["content"])} if twice else message


def test_prompts_equal_the_released_ones():
    """Byte for byte, the second encoding of earlier calls undone, save 3 histories that hold a torn call."""
    xlam = read_xlam(shared("data/fixtures/xlam_raw_format.jsonl"))
    toolace = by_place(toolace_fixture().examples)
    counts, torn = Counter(), set()
    with gzip.open(shared("data/golden/golden_prompts_dev.jsonl.gz"), "rt", encoding="utf-8") as file:
        for case in map(json.loads, file):
            ours = xlam[case["row"]] if case["source"] == "xlam" else toolace[case["row"], case["n_context"]]
            expected = [undo_double_encoding(message) for message in case["messages"]]
            answer = case.get("answer") or case["answers"]
            assert ours.answer == (json.loads(answer) if isinstance(answer, str) else answer)
            equal = build_messages(ours) == expected
            counts[case["source"], equal] += 1
            if not equal:
                torn.add(case["row"])
    assert counts == {("xlam", True): 75, ("toolace", True): 81, ("toolace", False): 3}
    assert torn == {4, 30, 58}  # /madlibs-diceware, Q&A Notifications, ... (VIN) Lookup


def test_prompt_lengths_with_the_real_tokenizer():
    """PAPER's load: xLAM prompts of 728 tokens in the mean, at most 1,900."""
    tokenizer_module = pytest.importorskip("tooln1.tokenizer")
    tokenizer = tokenizer_module.load_tokenizer(shared("reference/qwen2.5-tokenizer"))
    examples = read_xlam(shared("data/fixtures/xlam_raw_format.jsonl"))
    kept, dropped = drop_long(examples, tokenizer, 1_000)
    assert dropped == 25 and len(kept) == 206
    assert drop_long(examples, tokenizer, 1_900)[1] == 0
