"""Scoring predictions, through eval.py and by its functions; the table with the paper's rows."""

import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
from bfcl_fixtures import function, gold_calls, typed, write_category
from conftest import shared
from tiny import read_rows, run_eval, write_rows

from tooln1.benchmarks import Case, Tally, Verdict, bfcl
from tooln1.benchmarks import benchmark as benchmark_module
from tooln1.benchmarks.runner import LoadedBenchmark, load_benchmarks, match_predictions, score_predictions, summarise
from tooln1.benchmarks.runner import totals_by_log_name as log_totals
from tooln1.benchmarks.table import COMPARISONS, comparison, report
from tooln1.data import Example, write_examples
from tooln1.prompt import format_reply

ONE, TWO = {"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}}
FAULTS = {
    "none": format_reply([ONE], "t"),
    "no_think": format_reply([ONE]),
    "wrong_count": format_reply([ONE, TWO], "t"),
    "wrong_arguments": format_reply([TWO], "t"),
}


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def words(printed: str) -> str:
    return " ".join(printed.split())


def make_case(case_id: str, category: str = "C", answer=()) -> Case:
    example = Example(case_id, category, "You add.\n", [{"name": "add"}], [{"role": "user", "content": "Add."}], answer)
    return Case(case_id, category, example, list(answer))


@pytest.fixture
def by_hand(tmp_path) -> SimpleNamespace:
    """One example and prediction for each fault, and a second wrong_count; "none" has a category of its own."""
    ids = {f"{place}-{name}": name for place, name in enumerate([*FAULTS, "wrong_count"])}
    cases = [make_case(case_id, "easy" if name == "none" else "hard", [ONE]) for case_id, name in ids.items()]
    write_examples([case.example for case in cases], tmp_path / "data.jsonl")
    rows = [{"id": case_id, "completion": FAULTS[name]} for case_id, name in ids.items()]
    out, file = tmp_path / "out", tmp_path / "replies.jsonl"
    where = ["--bench", f"examples={tmp_path / 'data.jsonl'}", "--out", out, "--predictions", file]

    def run(rows: list[dict], *options, code=0) -> dict:
        write_rows(file, rows)
        assert run_eval(*where, *options) == code
        return results(out)

    return SimpleNamespace(out=out, rows=rows, run=run)


def test_each_fault_is_named_counted_and_listed(by_hand):
    summary = by_hand.run(by_hand.rows)["benchmarks"]["examples"]
    assert summary["categories"] == {
        "easy": {"accuracy": 1.0, "right": 1, "replies": 1},
        "hard": {"accuracy": 0.0, "right": 0, "replies": 4},
    }
    assert summary["totals"] == {"overall": {"accuracy": 0.2, "right": 1, "replies": 5}}
    counts = {name: fault["replies"] for name, fault in summary["faults"].items()}
    assert counts == {"wrong_count": 2, "no_think": 1, "wrong_arguments": 1}
    failures = read_rows(by_hand.out / "failures.jsonl")
    assert [row["why"] for row in failures] == ["no_think", "wrong_arguments", "wrong_count", "wrong_count"]
    assert all(row["id"][2:] == row["why"] and row["completion"] == FAULTS[row["why"]] for row in failures)
    assert by_hand.run(by_hand.rows, "--no-think")["benchmarks"]["examples"]["totals"]["overall"]["right"] == 2


def test_missing_and_conflicting_predictions_are_wrong_and_change_the_exit_code(by_hand):
    first, second, third, *rest = by_hand.rows
    conflict = [second, {**second, "completion": FAULTS["none"]}, second]
    result = by_hand.run([first, *conflict, *rest], code=1)["benchmarks"]["examples"]
    assert not result["valid"] and result["totals"]["overall"]["right"] == 1
    whys = {row["id"]: row["why"] for row in read_rows(by_hand.out / "failures.jsonl")}
    assert (whys[second["id"]], whys[third["id"]]) == ("conflicting_predictions", "no_prediction")


def test_a_limit_a_repeated_row_or_an_unknown_id_leaves_the_score_valid(by_hand, capsys):
    result = by_hand.run([*by_hand.rows, by_hand.rows[0], {"id": "x", "completion": ""}], "--limit", 4)
    assert result["unknown_ids"] == ["x"]
    summary = result["benchmarks"]["examples"]
    assert summary["valid"] and summary["totals"]["overall"] == {"accuracy": 0.25, "right": 1, "replies": 4}
    printed = capsys.readouterr().out
    assert "4 of 5 cases" in printed and "IGNORED: 1 predictions with an id that no case has, such as 'x'" in printed
    assert "overall 0.250 1/4" in words(printed) and "wrong_count 0.250 1" in words(printed)


def make_benchmark(ids: str, score, totals, name="fake") -> LoadedBenchmark:
    cases = [make_case(case_id, case_id) for case_id in ids]
    return LoadedBenchmark(name, f"{name}.jsonl", SimpleNamespace(score=score, totals=totals), cases, cases)


def test_a_total_may_be_a_mean_of_means():
    """As BFCL's are: then it has no counts, but over samples a mean and a spread."""
    fake = make_benchmark(
        "abc",
        lambda case, completion, think: Verdict(completion == "yes", "" if completion == "yes" else "no"),
        lambda rows: {"mean": sum(tally.accuracy for tally in rows.values()) / len(rows)},
    )
    fake.chosen[:] = [make_case("a", "X"), make_case("b", "X"), fake.chosen[2]]
    said = {("a", 0): "yes", ("b", 0): "no", ("c", 0): "yes", ("a", 1): "no", ("b", 1): "no", ("c", 1): "yes"}
    rows = [("w", {"id": name, "sample": sample, "completion": text}) for (name, sample), text in said.items()]
    result = summarise(fake, score_predictions(fake, match_predictions(rows, [fake])[0], True))
    spread = statistics.stdev([0.75, 0.5])
    assert result["totals"]["mean"] == {"accuracy": 0.625, "spread": spread, "by_sample": [0.75, 0.5]}
    full = {"benchmarks": {"fake": result | {"notes": []}}, "unknown_ids": []}
    lines = report({"ours": full}).splitlines()
    assert lines[:2] == ["fake: 3 of 3 cases of fake.jsonl", "mean ± standard deviation over 2 samples"]
    assert "  X         0.250 ± 0.354    1/4" in lines and "  mean      0.625 ± 0.177" in lines


def test_other_rules_have_rows_of_their_own_and_missing_predictions_count_there_too():
    fake = make_benchmark(
        "abcd",
        lambda case, text, think: Verdict(text == "yes", "no", {"lax": text in ("yes", "maybe")}),
        lambda rows: {"all, lax": rows["C, lax"], "all": rows["C"]},
    )
    fake.chosen[:] = [make_case(case.id) for case in fake.cases]
    rows = [("w", {"id": name, "completion": text}) for name, text in zip("abc", ("yes", "maybe", "no"), strict=True)]
    found, _ = match_predictions(rows, [fake])
    result = summarise(fake, score_predictions(fake, found, True))
    assert {name: row["right"] for name, row in result["categories"].items()} == {"C": 1, "C, lax": 2}
    assert {why: fault["replies"] for why, fault in result["faults"].items()} == {"no": 2, "no_prediction": 1}
    assert log_totals(fake, found, True) == {"fake_all_lax": 0.5, "fake_all": 0.25}
    assert log_totals(fake, {}, True) == {"fake_all_lax": 0.0, "fake_all": 0.0}


RIGHT, WRONG = format_reply([{"name": "f", "arguments": {"a": 1}}]), format_reply([])


@pytest.mark.parametrize(
    ("option", "simple", "irrelevance"),
    [("all", (1, 2), (1, 3)), ("leave-out", (1, 1), (1, 1)), ("only", (0, 1), (0, 2))],
)
def test_entries_changed_since_the_paper_can_be_chosen(tmp_path, capsys, option, simple, irrelevance):
    """Three categories; three entries that changed since the paper, all answered wrongly, and one nobody can win."""
    data, functions, gold = tmp_path / "data", [function(required=["a"], a=typed("integer"))], [{"f": {"a": [1]}}]
    write_category(data, "simple_python", functions, gold, ["simple_python_1", "simple_python_363"])
    write_category(data, "live_simple", functions, gold, ["live_simple_106-63-0"])
    write_category(data, "irrelevance", functions, ids=[f"irrelevance_{number}" for number in (7, 8, 232)])
    rows = []
    for case in load_benchmarks([f"bfcl={data}"])[0].cases:
        right = (case.category == "irrelevance") == (case.id in bfcl.CHANGED_SINCE_PAPER)
        rows.append({"id": case.id, "completion": RIGHT if right else WRONG})
    file, out = write_rows(tmp_path / "replies.jsonl", rows), tmp_path / "out"
    arguments = ["--bench", f"bfcl={data}", "--predictions", file, "--out", out, "--bfcl-changed", option]
    assert run_eval(*arguments) == 1  # categories are missing
    result = results(out)["benchmarks"]["bfcl"]
    counts = {name: (row["right"], row["replies"]) for name, row in result["categories"].items()}
    assert (counts["simple_python"], counts["irrelevance"]) == (simple, irrelevance)
    assert ("live_simple" in counts) == (option != "only") and "overall" not in result["totals"]
    printed = words(capsys.readouterr().out)
    assert "MISSING in the data, with the totals that need them: simple_java" in printed
    assert ("3 of these cases changed after the paper's date" in printed) == (option != "leave-out")
    assert ("No answer is counted as right in 1 of these" in printed) == (option != "only")


@pytest.mark.slow
def test_gold_answers_to_all_of_bfcl_reach_the_ceiling(tmp_path, capsys):
    data = shared("data/bfcl")
    cases = load_benchmarks([f"bfcl={data}"])[0].cases
    rows = [{"id": case.id, "completion": format_reply(gold_calls(case))} for case in cases]
    file = write_rows(tmp_path / "gold.jsonl", rows)
    assert run_eval("--bench", f"bfcl={data}", "--predictions", file, "--out", tmp_path / "out") == 0
    totals = results(tmp_path / "out")["benchmarks"]["bfcl"]["totals"]
    assert totals["overall"]["accuracy"] == pytest.approx(((0.99 + 3) / 4 + 1347 / 1351) / 2)
    assert totals["live with relevance"] == {"accuracy": 2247 / 2251, "right": 2247, "replies": 2251}
    printed = words(capsys.readouterr().out)
    assert "99.00 100.00 100.00 100.00 99.22 99.81 100.00 100.00 99.75 99.70 99.73" in printed


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_papers_columns_are_rows_of_the_benchmark(name):
    module = benchmark_module(name)
    categories = getattr(module, "CATEGORIES", None) or tuple(module.LEVELS.values())
    rules = {"acebench": ["official text"], "api_bank": ["ToolRL soft match"]}.get(name, [])
    rows = [*categories, *(f"{category}, {rule}" for category in categories for rule in rules)]
    tallies = {row: Tally(1, 2) for row in rows}
    keys = {key for group in COMPARISONS[name]["columns"].values() for key in group.values()}
    assert keys - tallies.keys() - module.totals(tallies).keys() == ({"reported"} if name != "bfcl" else set())
    assert all(row.keys() <= keys for row in COMPARISONS[name]["rows"].values())


def test_the_table_has_the_form_of_the_papers():
    totals = {"simple": {"accuracy": 1.0}, "non-live": {"accuracy": 0.12345}}
    ours = {"categories": {"simple_python": {"accuracy": 0.5}, "multiple": {"accuracy": 0.25}}, "totals": totals}
    lines = comparison("bfcl", {"ours: x/hf": ours, "base: y": {"categories": {}, "totals": totals}}).splitlines()
    assert lines[0].split() == ["non-live", "live", "average", "with", "relevance"]
    assert lines[1].split()[:7] == ["bfcl,", "per", "cent", "simple", "mult.", "par.", "p.-m."]
    assert lines[2].split() == ["ours:", "x/hf", "100.00", "25.00", *"-" * 6, "12.35", *"-" * 4]
    assert lines[4].split()[-5:] == ["89.25", "80.38", "84.82", "-", "-"] and max(map(len, lines)) <= 120
