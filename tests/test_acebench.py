"""ACEBench against the official verdicts, and rule by rule where a bare clone has no reference data."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import shared, shared_rows

from tooln1.benchmarks import Case, Tally, Verdict, acebench, benchmark, row_by_rule
from tooln1.benchmarks.acebench import CATEGORIES, DECODED, TEXT, load, score, score_text, totals
from tooln1.benchmarks.acebench_checker import base_name
from tooln1.io.errors import UserError
from tooln1.prompt import format_reply

# ---------------------------------------------------------------------------------------- against the official code


def test_golden_verdicts_and_faults_are_equal():
    cases = {case.id: case for case in load(shared("data/acebench"))}
    for row in shared_rows("data/golden/golden_acebench_dev.jsonl.gz"):
        case, by_text = cases[row["id"]], row["mode"] == "text"
        verdict = score_text(case, row["text"]) if by_text else score(case, format_reply(row["model_output"]))
        assert (verdict.ok, verdict.why) == (row["official_valid"], row["error_type"] or ""), row


def test_the_answers_themselves_reach_the_known_ceilings():
    by_row, wrong = defaultdict(list), []
    for case in load(shared("data/acebench")):
        verdict = score(case, format_reply(answer_of(case)))
        by_row[case.category].append(verdict.ok)
        by_row[row_by_rule(case.category, TEXT)].append(verdict.also[TEXT])
        wrong += [] if verdict.ok else [case.id]
    assert wrong == ["normal_single_turn_parallel_function_42"]
    tallies = {row: Tally(sum(oks), len(oks)) for row, oks in by_row.items()}
    figures = totals(tallies)
    assert figures["overall, official text"] == pytest.approx(0.93)
    assert figures["overall, decoded calls"] == pytest.approx((7 + 0.99) / 8)


def answer_of(case: Case) -> list[dict]:
    (gold, *_) = case.gold if isinstance(case.gold, list) else [case.gold]
    return [{"name": base_name(key), "arguments": arguments} for key, arguments in gold.items()]


# ------------------------------------------------------------------------------------------------------- own data

BOOK = {
    "name": "hotel_book",
    "description": "Books a room.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "nights": {"type": "integer"}, "stay": {"type": "object"}},
        "required": ["city"],
    },
}
TAXI = {"name": "taxi", "description": "Calls a taxi.", "arguments": {"type": "object"}, "results": {}, "tags": []}
GOLD = {"hotel_book": {"city": "Bonn", "nights": 2}}
QUESTION = {
    "id": "a_0",
    "question": "user: A room in\nBonn.\nsystem: How long?\nuser: 2 nights.\n",
    "time": "It is May 1.",
    "function": [TAXI, BOOK],
}


def write(folder: Path, question: dict | None = None, answer: dict | None = None) -> Path:
    """A folder with one case in each category; question, answer: changed keys of the first one."""
    (folder / "possible_answer").mkdir(parents=True)
    for place, category in enumerate(CATEGORIES):
        rows = [QUESTION | {"id": f"case_{place}"}, {"id": f"case_{place}", "ground_truth": GOLD}]
        if place == 0:
            rows = [rows[0] | (question or {}), rows[1] | (answer or {})]
        for name, row in zip((".", "possible_answer"), rows, strict=True):
            (folder / name / f"data_{category}.json").write_text(json.dumps(row), encoding="utf-8")
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
    assert example.tools == [{"name": "taxi", "description": "Calls a taxi.", "parameters": {"type": "object"}}, BOOK]
    assert cases[0].gold == GOLD


@pytest.mark.parametrize(
    ("question", "answer", "words"),
    [
        ({}, {"id": "b_0"}, 'line 1: .*possible_answer/data_normal_atom_bool.json has no answer to "case_0"'),
        ({"id": "case_1"}, {"id": "case_1"}, f'data_{CATEGORIES[1]}.json, line 1: the id "case_1" was given'),
        ({"question": "A room"}, {}, "data_normal_atom_bool.json, line 1: not a row as the benchmark has them"),
        ({"question": "user: a\nsystem: b"}, {}, "messages must end with a user or tool turn"),
    ],
)
def test_mangled_data_are_named_with_file_and_row(tmp_path, question, answer, words):
    with pytest.raises(UserError, match=words):
        load(write(tmp_path / "data", question, answer))
    with pytest.raises(UserError, match="holds no ACEBench data: no data_normal_atom_bool.json"):
        load(tmp_path)


# --------------------------------------------------------------------------------------------------------- scoring


def case_with(gold) -> Case:
    return Case("c", CATEGORIES[0], None, gold, [TAXI, BOOK])


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
    tallies = {category: Tally(place, 50) for place, category in enumerate(CATEGORIES)} | {
        CATEGORIES[-1]: Tally(100, 100)
    }
    tallies |= {row_by_rule(category, TEXT): Tally(0, 50) for category in CATEGORIES}
    figures = totals(tallies)
    assert list(figures.values()) == [0, 0, 0, *map(pytest.approx, (0.05, 0.56, 1.42 / 8))]
    assert [*figures][2:] == [
        f"overall, {TEXT}",
        *(f"{name}, {DECODED}" for name in ("atom", "single-turn", "overall")),
    ]
    assert totals({"normal_atom_bool": Tally(1, 2)}) == {}
