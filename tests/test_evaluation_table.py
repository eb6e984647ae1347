"""BFCL through eval.py, and its table: which entries count, what is exported, the paper's rows beside ours."""

import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from bfcl_fixtures import function, gold_calls, typed, write_category
from conftest import shared
from fuzz_replies import slowness
from test_evaluation import example, exit_code, results, rows_of, words_of, write_rows

from tooln1.benchmarks import Tally, benchmark, paper
from tooln1.benchmarks import bfcl as bfcl_benchmark
from tooln1.benchmarks.runner import load_benches
from tooln1.benchmarks.table import comparison
from tooln1.data import write_examples
from tooln1.io.errors import UserError


def bfcl_data(folder: Path) -> Path:
    """Two categories; three entries that changed since the paper, and one that nobody can win."""
    functions, gold = [function(required=["a"], a=typed("integer"))], [{"f": {"a": [1]}}]
    write_category(folder, "simple_python", functions, gold, ["simple_python_1", "simple_python_363"])
    write_category(folder, "live_simple", functions, gold, ["live_simple_106-63-0"])
    return write_category(folder, "irrelevance", functions, ids=[f"irrelevance_{number}" for number in (7, 8, 232)])


RIGHT, WRONG = '<tool_call>[{"name": "f", "arguments": {"a": 1}}]</tool_call>', "<tool_call>[]</tool_call>"


@pytest.fixture
def bfcl(tmp_path) -> SimpleNamespace:
    """The cases above with replies: all right, but for simple_python_363, irrelevance_7 and irrelevance_232."""
    data, wrong = bfcl_data(tmp_path / "data"), ("simple_python_363", "irrelevance_7", "irrelevance_232")
    rows = []
    for case in load_benches([f"bfcl={data}"])[0].cases:
        calls = case.category == "irrelevance"
        rows.append({"id": case.id, "completion": RIGHT if calls == (case.id in wrong) else WRONG})
    file = write_rows(tmp_path / "replies.jsonl", rows)
    arguments = ["--bench", f"bfcl={data}", "--predictions", file, "--out", tmp_path / "out"]
    return SimpleNamespace(arguments=arguments, out=tmp_path / "out", folder=tmp_path, rows=rows)


@pytest.mark.parametrize(
    ("option", "simple", "irrelevance", "note"),
    [
        ("all", (1, 2), (1, 3), "22 entries changed after the paper's date; 3 of them are counted here"),
        ("leave-out", (1, 1), (1, 1), "The 22 entries that changed after the paper's date are not counted here."),
        ("only", (0, 1), (0, 2), "22 entries changed after the paper's date; 3 of them are counted here"),
    ],
)
def test_entries_changed_since_the_paper_are_named_and_can_be_chosen(bfcl, capsys, option, simple, irrelevance, note):
    assert exit_code(*bfcl.arguments, "--bfcl-changed", option) == 1  # categories are missing
    result = results(bfcl.out)
    assert result["problems"]["unknown_ids"] == [] and not result["complete"]
    result = result["benchmarks"]["bfcl"]
    counts = {name: (figure["right"], figure["replies"]) for name, figure in result["categories"].items()}
    assert (counts["simple_python"], counts["irrelevance"]) == (simple, irrelevance)
    assert ("live_simple" in counts) == (option != "only")
    printed = words_of(capsys.readouterr().out)
    assert note in printed
    assert ("none): simple_python_363," in printed) == (option != "leave-out")
    assert ("Not in these data: simple_javascript_41, parallel_84," in printed) == (option != "leave-out")
    assert ("PARTIAL" in printed) == (option != "all")
    assert ("No right answer wins 1 of these cases: live_simple_106-63-0." in printed) == (option != "only")


def test_categories_that_the_data_lack_are_named_and_change_the_exit_code(bfcl, capsys):
    assert exit_code(*bfcl.arguments) == 1
    missing = results(bfcl.out)["problems"]["missing_categories"]
    assert len(missing) == 10 and missing[0] == "bfcl simple_java" and "bfcl live_simple" not in missing
    assert "--bench: categories that the data lack" in capsys.readouterr().err
    assert "overall" not in results(bfcl.out)["benchmarks"]["bfcl"]["totals"]


def test_nothing_left_to_choose_is_a_sentence(tmp_path):
    data = write_category(tmp_path, "simple_python", [function()], [{"f": {}}], ["simple_python_1"])
    with pytest.raises(UserError, match="none of its 1 cases changed since the paper"):
        load_benches([f"bfcl={data}"], changed="only")
    assert load_benches([f"bfcl={data}"], changed="leave-out")[0].chosen


def test_replies_are_exported_for_the_official_command(bfcl, capsys):
    rows = [*bfcl.rows[1:], {**bfcl.rows[2], "completion": "other"}]  # one without a prediction, one with two
    rows[0] |= {"asked": False}
    file = write_rows(bfcl.folder / "some.jsonl", rows)
    arguments = [file if part == bfcl.arguments[3] else part for part in bfcl.arguments]
    assert exit_code(*arguments, "--export-bfcl", bfcl.folder / "export") == 1
    written = {row["id"]: row["result"] for path in (bfcl.folder / "export").rglob("*.json") for row in rows_of(path)}
    call = '[{"name": "f", "arguments": {"a": 1}}]'
    assert written == {"irrelevance_8": "[]", "irrelevance_232": call, "live_simple_106-63-0": call}
    printed = capsys.readouterr().out
    assert "2 files for bfcl-eval, 3 cases left out." in printed
    assert f"bfcl evaluate --result-dir {bfcl.folder / 'export'} --model" in printed and "--partial-eval\n" in printed


@pytest.mark.parametrize(
    ("bench", "rows", "words"),
    [("examples", 1, "which --bench does not name"), ("bfcl", 2, "takes one reply a case; replies.jsonl has 2.")],
)
def test_what_cannot_be_exported_is_a_sentence(bfcl, monkeypatch, capsys, bench, rows, words):
    monkeypatch.chdir(bfcl.folder)
    write_rows(Path("replies.jsonl"), [{**row, "sample": n} for row in bfcl.rows for n in range(rows)])
    write_examples([example("a", "s", [])], "examples.jsonl")
    where = {"examples": "examples=examples.jsonl", "bfcl": bfcl.arguments[1]}[bench]
    arguments = ["--bench", where, "--predictions", "replies.jsonl", "--out", "new", "--export-bfcl", "export"]
    assert exit_code(*arguments) == 2 and words in capsys.readouterr().err
    assert not Path("new").exists() and not Path("export").exists()


def test_the_papers_rows_are_consistent():
    """Its averages are those of its columns by our rules."""
    counts = dict(zip(paper.LIVE, (258, 1053, 16, 24), strict=True))
    for model, row in paper.COMPARISONS["bfcl"].rows.items():
        tallies = {name: Tally(round(row[name] / 100 * count), count) for name, count in counts.items()}
        assert all(abs(100 * tally.accuracy - row[name]) < 0.011 for name, tally in tallies.items()), model
        live = 100 * bfcl_benchmark.totals(tallies)["live"].accuracy
        assert row["live"] == pytest.approx(live, abs=0.005), model
        non_live = statistics.fmean(row[name] for name in paper.AST)
        assert row["non-live"] == pytest.approx(non_live, abs=0.011), model
        assert row["overall"] == pytest.approx((row["non-live"] + row["live"]) / 2, abs=0.011), model
        if "live with relevance" in row:
            both = (row["non-live"] + row["live with relevance"]) / 2
            assert row["overall with relevance"] == pytest.approx(both, abs=0.011), model


@pytest.mark.parametrize("name", paper.COMPARISONS)
def test_the_papers_columns_are_figures_of_the_benchmark(name):
    """Every column is a category or a total of a run over all categories, but for what only the paper knows."""
    module = benchmark(name)
    categories = getattr(module, "CATEGORIES", None) or tuple(module.LEVELS.values())
    rules = {"acebench": ["official text"], "api_bank": ["ToolRL soft match"]}.get(name, [])
    rows = [*categories, *(f"{category}, {rule}" for category in categories for rule in rules)]
    tallies = {row: Tally(1, 2) for row in rows}
    known = tallies.keys() | module.totals(tallies).keys()
    keys = [key for group in paper.COMPARISONS[name].columns.values() for key in group.values()]
    assert set(keys) - known == ({"reported"} if name != "bfcl" else set())
    for row in paper.COMPARISONS[name].rows.values():
        assert row.keys() <= set(keys)


def test_the_table_has_the_form_of_the_papers():
    categories = {name: {"accuracy": share} for name, share in (("simple_python", 0.5), ("multiple", 0.25))}
    totals = {"simple": {"accuracy": 1.0}, "non-live": {"accuracy": 0.12345}}
    ours = {"categories": categories, "totals": totals}
    lines = comparison("bfcl", {"ours: x/hf": ours, "base: y": {"categories": {}, "totals": totals}}).splitlines()
    assert lines[0].split() == ["non-live", "live", "average", "with", "relevance"]
    assert lines[1].split()[:7] == ["bfcl,", "per", "cent", "simple", "mult.", "par.", "p.-m."]
    assert lines[2].split() == ["ours:", "x/hf", "100.00", "25.00", *"-" * 6, "12.35", *"-" * 4]
    assert lines[3].split() == ["base:", "y", "100.00", *"-" * 7, "12.35", *"-" * 4]
    rows = {" ".join(line.split()[:2]): line.split()[2:] for line in lines[4:]}
    assert rows["paper: Tool-N1-7B"][-5:] == ["89.25", "80.38", "84.82", "-", "-"]
    assert rows["paper: Qwen2.5-7B-Instruct"][-5:] == ["86.46", "75.06", "80.76", "67.44", "76.95"]
    assert max(map(len, lines)) <= 120
    for group, first in (("live", "simple"), ("average", "non-live"), ("with", "live")):  # stands above its columns
        start = lines[0].index(f"  {group}") + 2
        assert lines[1][start:].lstrip().startswith(first), group


def test_there_is_no_table_with_nothing_to_compare():
    assert comparison("examples", {"ours": {"categories": {}, "totals": {"overall": {"accuracy": 1.0}}}}) == ""


def test_all_of_bfcl_is_scored_within_seconds(tmp_path, capsys):
    """Right replies to all 3,641 cases, through the command: the ceiling, the exit code, the time of one processor."""
    data = shared("data/bfcl")
    cases = load_benches([f"bfcl={data}"])[0].cases
    rows = [{"id": case.id, "completion": f"<tool_call>{json.dumps(gold_calls(case))}</tool_call>"} for case in cases]
    file, start = write_rows(tmp_path / "gold.jsonl", rows), time.process_time()
    assert exit_code("--bench", f"bfcl={data}", "--predictions", file, "--out", tmp_path / "out") == 0
    assert time.process_time() - start < 5 * slowness()
    result = results(tmp_path / "out")
    totals = result["benchmarks"]["bfcl"]["totals"]
    assert result["complete"]
    assert totals["overall"]["accuracy"] == pytest.approx(((0.99 + 3) / 4 + 1347 / 1351) / 2)
    assert totals["live with relevance"] == {"accuracy": 2247 / 2251, "right": 2247, "replies": 2251}
    printed = words_of(capsys.readouterr().out)
    assert "ours: " in printed and "99.00 100.00 100.00 100.00 99.22 99.81 100.00 100.00 99.75 99.70 99.73" in printed
    assert "No right answer wins 7 of these cases" in printed and "21 of them are counted here" in printed
