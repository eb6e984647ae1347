"""ACEBench against the official verdicts, and rule by rule where a bare clone has no reference data."""

import gzip
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import shared

from tooln1.benchmarks import Tally, Verdict, acebench, benchmark, row_by_rule
from tooln1.benchmarks.acebench import CATEGORIES, TEXT, AceCase, load, score, score_text, totals
from tooln1.benchmarks.acebench_checker import base_name
from tooln1.benchmarks.acebench_text import MAX_TEXT, write_text
from tooln1.io.errors import UserError
from tooln1.prompt import build_messages, format_reply

# ---------------------------------------------------------------------------------------- against the official code


def test_golden_verdicts_and_faults_are_equal():
    cases = {case.id: case for case in load(shared("data/acebench"))}
    with gzip.open(shared("data/golden/golden_acebench_dev.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert Counter(row["mode"] for row in rows) == {"text": 2043, "decoded": 2194}
    wrong = []
    for row in rows:
        case = cases[row["id"]]
        if row["mode"] == "text":
            verdict = score_text(case, row["text"])
        else:
            verdict = score(case, format_reply(row["model_output"]))
        if (verdict.ok, verdict.why) != (row["official_valid"], row["error_type"] or ""):
            wrong.append((row["id"], row["mode"], row["mutation"], verdict))
    assert not wrong[:5]


def test_the_answers_themselves_reach_the_known_ceilings():
    by_row, wrong = defaultdict(list), []
    for case in load(shared("data/acebench")):
        verdict = score(case, format_reply(answer_of(case)))
        by_row[case.category].append(verdict.ok)
        by_row[row_by_rule(case.category, TEXT)].append(verdict.also[TEXT])
        wrong += [] if verdict.ok else [case.id]
    assert wrong == ["normal_single_turn_parallel_function_42"]
    tallies = {row: Tally(sum(oks), len(oks)) for row, oks in by_row.items()}
    failing = {row: tally.count - tally.right for row, tally in tallies.items() if row.endswith(TEXT)}
    assert {row: count for row, count in failing.items() if count} == {
        "normal_atom_object_deep, official text": 17,
        "normal_single_turn_single_function, official text": 8,
        "normal_single_turn_parallel_function, official text": 14,
    }
    figures = totals(tallies)
    assert figures["overall, official text"] == pytest.approx(0.93)
    assert figures["overall, decoded calls"] == pytest.approx((7 + 0.99) / 8)


def test_every_case_renders_and_ends_with_the_user():
    cases = load(shared("data/acebench"))
    assert Counter(case.category for case in cases) == {
        category: 100 if "single_turn" in category else 50 for category in CATEGORIES
    }
    for case in cases:
        messages = build_messages(case.example)
        assert messages[-1]["role"] == "user" and all(turn["content"] for turn in messages)
        assert '"arguments": {"type"' not in messages[0]["content"]  # nothing tells the answer from the others
    turns = Counter(tuple(turn["role"][0] for turn in case.example.messages) for case in cases)
    assert turns == {
        ("u",): 324,
        ("u", "a", "u"): 150,
        ("u", "a", "a", "u"): 24,
        ("u", "a", "u", "a", "u", "a", "u"): 1,
        ("u", "a", "a", "u", "a", "a", "u"): 1,
    }


def answer_of(case: AceCase) -> list[dict]:
    return [{"name": base_name(key), "arguments": arguments} for key, arguments in case.golds[0].items()]


# ------------------------------------------------------------------------------------------------------- own data

PROPERTIES = {
    "city": {"type": "string"},
    "nights": {"type": "integer"},
    "quiet": {"type": "boolean"},
    "guests": {"type": "array", "items": {"type": "string"}},
    "stay": {"type": "object", "properties": {}},
}
BOOK = {
    "name": "hotel_book",
    "description": "Books a room.",
    "parameters": {"type": "object", "properties": PROPERTIES, "required": ["city"]},
}
TAXI = {"name": "taxi", "description": "Calls a taxi.", "arguments": {"type": "object"}, "results": {}, "tags": []}
GOLD = {"hotel_book": {"city": "Bonn", "nights": 2}}
QUESTION = {
    "id": "a_0",
    "question": "user: A room in\nBonn.\nsystem: How long?\nuser: 2 nights.\n",
    "time": "It is May 1.",
    "function": [TAXI, BOOK],
}


def rows_of(place: int) -> tuple[dict, dict]:
    return QUESTION | {"id": f"case_{place}"}, {"id": f"case_{place}", "ground_truth": GOLD}


def files_of(category: str, rows: Iterable[dict]) -> dict[str, str]:
    """File name -> text, of the questions and of the answers."""
    names = f"data_{category}.json", f"possible_answer/data_{category}.json"
    return {name: json.dumps(row) + "\n" for name, row in zip(names, rows, strict=True)}


def write(folder: Path, text: dict[str, str] | None = None) -> Path:
    """A folder with one case in each category; `text` replaces whole files."""
    (folder / "possible_answer").mkdir(parents=True)
    for place, category in enumerate(CATEGORIES):
        for name, content in files_of(category, rows_of(place)).items():
            (folder / name).write_text((text or {}).get(name, content), encoding="utf-8")
    return folder


def test_a_case_is_what_the_data_say(tmp_path):
    assert benchmark("acebench") is acebench
    folder = write(tmp_path / "ACEBench" / "data_all" / "data_en")
    cases = load(folder)
    assert cases == load(tmp_path / "ACEBench")  # a checkout
    assert [case.category for case in cases] == list(CATEGORIES)
    example = cases[0].example
    assert example.messages == [
        {"role": "user", "content": "It is May 1.\nA room in\nBonn."},
        {"role": "assistant", "content": "How long?"},
        {"role": "user", "content": "2 nights."},
    ]
    assert example.tools == [
        {"name": "taxi", "description": "Calls a taxi.", "parameters": {"type": "object"}},
        BOOK,
    ]
    assert cases[0].gold == GOLD and cases[0].golds == [GOLD]


def changed(question: dict | None = None, **answer) -> dict[str, str]:
    """The first category's files with changed keys; ... takes the key away."""
    rows = [row | change for row, change in zip(rows_of(0), (question or {}, answer), strict=True)]
    return files_of(CATEGORIES[0], [{key: row[key] for key in row if row[key] is not ...} for row in rows])


def with_schema(schema) -> dict:
    parameters = BOOK["parameters"] | {"properties": PROPERTIES | {"city": schema}}
    return {"function": [BOOK | {"parameters": parameters}]}


FIRST, ANSWERS = f"data_{CATEGORIES[0]}.json", f"possible_answer/data_{CATEGORIES[0]}.json"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({FIRST: "{"}, f"{FIRST}, line 1: not valid JSON"),
        ({FIRST: ""}, f"{FIRST} holds no rows"),
        ({ANSWERS: json.dumps(rows_of(0)[1]) + "\n" + json.dumps(rows_of(1)[1])}, "has 2 answers to 1 questions"),
        (changed(id="b_0"), f'{ANSWERS}, line 1: the id is "b_0", but .*{FIRST}, line 1 asks "case_0"'),
        (changed({"id": ...}), 'the key "id" is missing'),
        (changed({"id": "case_1"}, id="case_1"), f'data_{CATEGORIES[1]}.json, line 1: the id "case_1" was given'),
        (changed({"question": "A room"}), 'must begin with "user:"'),
        (changed({"question": "user: a\nsystem: b"}), "messages must end with a user or tool turn"),
        (changed({"time": 7}), '"time" be a string'),
        (changed({"function": {}}), f'{FIRST}, line 1: "function" must be a list'),
        (changed({"function": ["f"]}), '"function" must hold objects, found a string'),
        (changed({"function": [{"name": "f", "description": ""}]}), 'the key "arguments" is missing'),
        (changed(ground_truth=...), f'{ANSWERS}, line 1: "ground_truth" must be'),
        (changed(ground_truth=[]), '"ground_truth" must be'),
        (changed(ground_truth={"f": {}}), "the answer calls 'f', which the question does not offer"),
        (changed(ground_truth={"taxi": {}}), "function 'taxi': the key \"parameters\" is missing"),
        (changed(ground_truth={"hotel_book": []}), '"hotel_book" must be an object'),
        (changed(with_schema({"type": "colour"})), "parameter 'city': unknown type 'colour'; known are string, any"),
        (changed(with_schema({"type": ["string"]})), "parameter 'city': \"type\" must be a string"),
        (changed(with_schema({"type": "array", "items": {"type": "x"}})), "unknown type 'x'"),
        (changed(with_schema(None)), "unknown type None"),
    ],
)
def test_mangled_data_are_named_with_file_and_row(tmp_path, files, words):
    with pytest.raises(UserError, match=words):
        load(write(tmp_path / "data", files))


def test_missing_data_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no ACEBench data: expected data_normal_atom_bool.json"):
        load(tmp_path)
    folder = write(tmp_path / "data")
    (folder / "possible_answer" / f"data_{CATEGORIES[7]}.json").unlink()
    with pytest.raises(UserError, match=f"cannot read .*possible_answer/data_{CATEGORIES[7]}.json"):
        load(folder)
    (folder / f"data_{CATEGORIES[3]}.json").unlink()
    with pytest.raises(UserError, match=f"cannot read .*data/data_{CATEGORIES[3]}.json"):
        load(folder)


# --------------------------------------------------------------------------------------------------------- scoring


def case_with(gold) -> AceCase:
    return AceCase("c", CATEGORIES[0], None, gold, [TAXI, BOOK])


def test_any_accepted_answer_will_do_and_the_first_names_the_fault():
    case = case_with([{"hotel_book": {"city": "Aachen"}}, {"hotel_book": {"city": "Bonn"}}])
    assert score_text(case, "[hotel_book(city='Bonn')]") == Verdict(True, "")
    assert score_text(case, "[hotel_book(city='Bonn', x=1)]").why == "value_error:string"  # of Aachen
    assert score_text(case, "hotel_book(city='Bonn')").why == "wrong_output_format"


def test_a_reply_is_scored_as_calls_and_as_text():
    case = case_with({"hotel_book": {"city": "Bonn", "stay": {"rooms": ["a b"]}}})
    right = [{"name": "hotel_book", "arguments": {"city": "in Bonn", "stay": {"rooms": ["a b"]}}}]
    assert score(case, format_reply(right)) == Verdict(True, "", {TEXT: False})  # "a b" loses its space in the text
    reply = "x <tool_call>1</tool_call>" + format_reply([{"name": "hotel_book", "arguments": {"city": "Bonn"}}])
    assert score(case_with(GOLD), reply + "<|im_end|>") == Verdict(True, "", {TEXT: True})
    unreadable = Verdict(False, "wrong_output_format", {TEXT: False})
    for calls in ('[{"name": 5, "arguments": {}}]', '[{"name": "hotel_book", "arguments": []}]', "[f()]", "null"):
        assert score(case_with(GOLD), f"<tool_call>{calls}</tool_call>") == unreadable
    assert score(case_with(GOLD), "[hotel_book(city='Bonn')]") == unreadable  # the text itself is no reply of ours
    assert score(case_with(GOLD), format_reply([])).why == "wrong functions number"


def test_totals_are_unweighted_means_by_both_rules():
    tallies = {category: Tally(place, 50) for place, category in enumerate(CATEGORIES)}
    tallies |= {row_by_rule(category, TEXT): Tally(0, 50) for category in CATEGORIES}
    tallies[CATEGORIES[-1]] = Tally(100, 100)
    assert totals(tallies) == {
        "atom, official text": 0,
        "single-turn, official text": 0,
        "overall, official text": 0,
        "atom, decoded calls": pytest.approx(0.05),
        "single-turn, decoded calls": pytest.approx(0.56),
        "overall, decoded calls": pytest.approx(1.42 / 8),
    }
    assert totals({"normal_atom_bool": Tally(1, 2)}) == {}


HOSTILE = [
    "-" * 60000 + "1",
    "1" + "+1" * 30000,
    "2" + "**2" * 20000,
    "a" + ".a" * 30000,
    "a" + "()" * 30000,
    "a" + "[0]" * 20000,
    "lambda:" * 9000 + "1",
    "(" * 60000,
    "[" * 199 + "]" * 199,
    "{1:" * 199 + "1" + "}" * 199,
    "f(a=" * 150,
    "{**" * 150 + "}" * 150,
    "1" + "<1" * 30000,
    "'" * 60001,
    '"\\d' * 20000,
    "\0",
    "\ud800",
    "9**" * 50 + "9",
    "f'" + "{a}" * 20000 + "'",
    "[" + "f()," * 16000 + "]",
    "x" * (MAX_TEXT + 1),
]


def test_hostile_texts_get_a_verdict_soon():
    case, start = case_with(GOLD), time.process_time()
    for text in HOSTILE:
        for whole in (text, f"[hotel_book(city={text})]"):
            assert not score_text(case, whole).ok
    for depth in (100, 300, 900, 5000):
        for city in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "1" * depth):
            arguments = f'{{"city": {city}, "stay": {{"x": {city}}}}}'
            assert not score(case, f'<tool_call>[{{"name": "hotel_book", "arguments": {arguments}}}]</tool_call>').ok
    assert time.process_time() - start < 30


def test_any_reply_gets_a_verdict():
    rng = random.Random(0)
    gold = {"city": "Bonn", "nights": 2, "quiet": True, "guests": ["a", "b"], "stay": {"x": {"y": [1]}}}
    case = case_with([{"hotel_book": gold}, GOLD])
    odd = [None, "true", "in Bonn", "", 2.0, -1, [], ["b"], [[]], {}, {"x": {"y": 1}}, [{}], "\ud800"]
    right, seen = 0, set()
    for _ in range(3000):
        chosen = {"city": "Bonn"} | {key: gold[key] for key in gold if rng.random() < 0.5}
        arguments = {key: value if rng.random() < 0.8 else rng.choice(odd) for key, value in chosen.items()}
        call = {"name": rng.choice(["hotel_book"] * 8 + ["taxi", 3]), "arguments": arguments}
        calls = [call] * rng.choice([1, 1, 1, 1, 0, 2])
        reply, text = format_reply(calls), write_text([(str(call["name"]), call["arguments"]) for call in calls])
        if rng.random() < 0.5:
            reply, text = (changed_somewhere(rng, whole) for whole in (reply, text))
        verdicts = score(case, reply), score_text(case, text)
        assert all(type(verdict.ok) is bool and verdict.ok == (verdict.why == "") for verdict in verdicts)
        assert type(verdicts[0].also[TEXT]) is bool
        right += verdicts[0].ok
        seen |= {verdict.why for verdict in verdicts}
    assert right > 300 and len(seen) > 8


def changed_somewhere(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text))
    return text[:place] + rng.choice("[](){}'\"=,.-*:\\ x1") + text[place + rng.randrange(2) :]
