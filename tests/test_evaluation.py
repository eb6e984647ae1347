"""Scoring predictions, through eval.py: each fault by hand, mistakes to mend, several benchmarks."""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval as evaluation_script
from tooln1.benchmarks import Case, Tally, Verdict, benchmark
from tooln1.benchmarks import examples as examples_benchmark
from tooln1.benchmarks.runner import Bench, load_benches, match_predictions, metrics_of, score_bench, summarise
from tooln1.benchmarks.table import table
from tooln1.data import Example, write_examples
from tooln1.io.errors import UserError, exit_on_user_error

ONE, TWO = {"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}}
REPLIES = [f"<think>t</think> <tool_call>{json.dumps(calls)}</tool_call>" for calls in ([ONE], [TWO], [ONE, TWO])] + [
    f"<tool_call>{json.dumps([ONE])}</tool_call>",
    "<think>t</think> Nothing fits.",
]


def evaluate(*arguments) -> None:
    evaluation_script.main([*map(str, arguments)])


def exit_code(*arguments) -> int:
    try:
        exit_on_user_error(lambda: evaluate(*arguments))
    except SystemExit as stop:
        return stop.code
    return 0


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def words_of(printed: str) -> str:
    return " ".join(printed.split())


def example(name: str, source: str, answer: list[dict], question: str = "Add.") -> Example:
    messages = [{"role": "user", "content": question}]
    return Example(name, source, "You add.\n", [{"name": "add"}], messages, answer)


FAULTS = {
    "none": REPLIES[0],
    "no_call_block": "<think>t</think> I cannot.",
    "bad_json": "<think>t</think> <tool_call>[{</tool_call>",
    "bad_format": '<think>t</think> <tool_call>[{"name": "add"}]</tool_call>',
    "no_think": REPLIES[3],
    "wrong_count": REPLIES[2],
    "wrong_names": '<think>t</think> <tool_call>[{"name": "sub", "arguments": {"a": 1}}]</tool_call>',
    "wrong_arguments": REPLIES[1],
}


@pytest.fixture
def by_hand(tmp_path) -> SimpleNamespace:
    """One example and prediction for each fault, and a second wrong_count; "none" has a source of its own."""
    names = [*FAULTS, "wrong_count"]
    ids = {f"{place}-{name}": name for place, name in enumerate(names)}
    cases = [example(id_, "easy" if name == "none" else "hard", [ONE]) for id_, name in ids.items()]
    write_examples(cases, tmp_path / "data.jsonl")
    rows = [{"id": id_, "completion": FAULTS[name]} for id_, name in ids.items()]
    file = write_rows(tmp_path / "replies.jsonl", rows)
    arguments = ["--bench", f"examples={tmp_path / 'data.jsonl'}", "--out", tmp_path / "out"]
    return SimpleNamespace(folder=tmp_path, out=tmp_path / "out", rows=rows, file=file, arguments=arguments)


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_each_fault_is_named_counted_and_listed(by_hand, capsys):
    evaluate(*by_hand.arguments, "--predictions", by_hand.file)
    result = results(by_hand.out)
    assert result["complete"]
    summary = result["benchmarks"]["examples"]
    assert summary["categories"] == {
        "easy": {"accuracy": 1.0, "right": 1, "replies": 1},
        "hard": {"accuracy": 0.0, "right": 0, "replies": 8},
    }
    assert summary["totals"] == {"overall": {"accuracy": 1 / 9, "right": 1, "replies": 9}}
    assert summary["faults"]["wrong_count"] == {"replies": 2, "share": 2 / 9}
    assert list(summary["faults"])[0] == "wrong_count"  # the commonest first
    counts = {why: fault["replies"] for why, fault in summary["faults"].items()}
    assert counts == {**{why: 1 for why in FAULTS if why != "none"}, "wrong_count": 2}
    failures = rows_of(by_hand.out / "failures.jsonl")
    assert [row["id"] for row in failures][:2] == ["5-wrong_count", "8-wrong_count"]
    assert all(row["id"][2:] == row["why"] and row["completion"] == FAULTS[row["why"]] for row in failures)
    assert len(failures) == 8 and failures[0]["answer"] == [ONE]
    printed = capsys.readouterr().out
    for line in ("easy 1.000 1/1", "hard 0.000 0/8", "overall 0.111 1/9", "wrong_count 0.222 2"):
        assert line in words_of(printed)


def test_without_thinking_a_missing_thought_is_right(by_hand):
    evaluate(*by_hand.arguments, "--predictions", by_hand.file, "--no-think")
    assert results(by_hand.out)["benchmarks"]["examples"]["totals"]["overall"]["right"] == 2


def test_what_makes_the_score_wrong_is_named_and_changes_the_exit_code(by_hand, capsys):
    first, second, third, *rest = by_hand.rows
    other = {"id": "other", "completion": ""}
    rows = [first, first, second, {**second, "completion": REPLIES[0]}, *rest, other]
    file = write_rows(by_hand.folder / "problems.jsonl", rows)
    assert exit_code(*by_hand.arguments, "--predictions", file) == 1
    result = results(by_hand.out)
    assert not result["complete"]
    assert result["problems"] == {
        "no_prediction": [third["id"]],
        "conflicting_predictions": [second["id"]],
        "missing_categories": [],
        "repeated_predictions": [first["id"]],
        "unknown_ids": ["other"],
    }
    summary = result["benchmarks"]["examples"]
    assert summary["totals"]["overall"] == {"accuracy": 1 / 9, "right": 1, "replies": 9}
    assert summary["faults"]["no_prediction"] == {"replies": 1, "share": 1 / 9}
    assert summary["faults"]["conflicting_predictions"]["replies"] == 1
    errors = capsys.readouterr().err
    assert "without a prediction, counted as wrong: 1 (2-bad_json)" in errors
    assert "no case has, left out: 1 (other)" in errors


def test_a_repeated_line_or_an_unknown_id_leaves_the_score_right(by_hand):
    rows = [*by_hand.rows, by_hand.rows[0], {"id": "x", "completion": ""}]
    file = write_rows(by_hand.folder / "more.jsonl", rows)
    assert exit_code(*by_hand.arguments, "--predictions", file) == 0
    assert results(by_hand.out)["complete"]


def test_a_limit_marks_the_results_as_partial(by_hand, capsys):
    file = write_rows(by_hand.folder / "few.jsonl", by_hand.rows[:5])
    assert exit_code(*by_hand.arguments, "--predictions", file, "--limit", 4) == 0
    result = results(by_hand.out)
    assert not result["complete"] and result["problems"]["unknown_ids"] == []
    overall = result["benchmarks"]["examples"]["totals"]["overall"]
    assert overall == {"accuracy": 0.25, "right": 1, "replies": 4}
    assert "PARTIAL: 4 of 9 cases (--limit" in capsys.readouterr().out


def test_predictions_of_another_origin_are_kept_out_of_a_models_folder(by_hand, capsys):
    by_hand.out.mkdir()
    own = write_rows(by_hand.out / "predictions.jsonl", by_hand.rows)
    assert exit_code(*by_hand.arguments, "--predictions", by_hand.file) == 2
    assert "holds other predictions; choose another --out" in capsys.readouterr().err
    assert exit_code(*by_hand.arguments, "--predictions", own) == 0


# ---------------------------------------------------------------------------------------- several benchmarks


def make_bench(name: str, ids: str, rules=examples_benchmark) -> Bench:
    cases = [Case(id_, id_, example(id_, id_, []), []) for id_ in ids]
    return Bench(name, f"{name}.jsonl", rules, cases, cases)


def test_an_id_of_two_benchmarks_needs_to_say_which():
    benches = [make_bench("left", "ab"), make_bench("right", "bc")]

    def matched(*rows: dict):
        return match_predictions([("f, line 1", {"completion": "x", **row}) for row in rows], benches)

    assert list(matched({"id": "a"}, {"id": "c"}).found) == [("left", "a", 0), ("right", "c", 0)]
    with pytest.raises(UserError, match="left and right have a case 'b'; say with \"bench\""):
        matched({"id": "b"})
    assert list(matched({"id": "b", "bench": "right"}).found) == [("right", "b", 0)]
    assert matched({"id": "a", "bench": "third"}).unknown == ["a"]


def test_a_benchmark_is_named_once(by_hand):
    path = by_hand.arguments[1]
    with pytest.raises(UserError, match="names examples twice"):
        load_benches([path, path])
    assert benchmark("examples") is examples_benchmark


def test_a_total_may_be_a_mean_of_means():
    """As BFCL's are: then it has no counts, and over samples it has a mean and a spread all the same."""

    class Rules:
        @staticmethod
        def score(case, completion, think=True):
            return Verdict(completion == "yes", "" if completion == "yes" else "no")

        @staticmethod
        def totals(by_category: dict[str, Tally]) -> dict[str, float]:
            return {"mean": sum(tally.accuracy for tally in by_category.values()) / len(by_category)}

    bench = make_bench("fake", "abc", Rules)
    first, second, third = bench.cases
    bench = replace(bench, chosen=[replace(first, category="X"), replace(second, category="X"), third])
    said = {("a", 0): "yes", ("b", 0): "no", ("c", 0): "yes", ("a", 1): "no", ("b", 1): "no", ("c", 1): "yes"}
    rows = [("w", {"id": id_, "sample": sample, "completion": text}) for (id_, sample), text in said.items()]
    predictions = match_predictions(rows, [bench])
    result = summarise(bench, score_bench(bench, predictions, predictions.samples, True))
    spread = statistics.stdev([0.75, 0.5])
    assert result["totals"]["mean"] == {"accuracy": 0.625, "spread": spread, "by_sample": [0.75, 0.5]}
    over_samples = {"accuracy": 0.25, "spread": statistics.stdev([0.5, 0.0]), "by_sample": [0.5, 0.0]}
    assert result["categories"]["X"] == {**over_samples, "right": 1, "replies": 4}
    assert table("fake", result).splitlines() == [
        "fake: 3 cases of fake.jsonl",
        "mean ± standard deviation over 2 samples",
        "",
        "  category       accuracy  right",
        "  X         0.250 ± 0.354    1/4",
        "  c         1.000 ± 0.000    2/2",
        "  mean      0.625 ± 0.177",
        "",
        "  fault  share  replies",
        "  no     0.500        3",
    ]


def test_other_rules_have_rows_of_their_own_and_faults_count_for_them_too():
    class Rules:
        @staticmethod
        def score(case: Case, completion: str, think: bool) -> Verdict:
            return Verdict(completion == "yes", "no", {"lax": completion in ("yes", "maybe")})

        @staticmethod
        def totals(by_category: dict[str, Tally]) -> dict[str, Tally]:
            return {"all, lax": by_category["C, lax"], "all": by_category["C"]}

    bench = make_bench("fake", "abcd", Rules)
    bench = replace(bench, chosen=[replace(case, category="C") for case in bench.cases])
    rows = [("w", {"id": id_, "completion": text}) for id_, text in zip("abc", ("yes", "maybe", "no"), strict=True)]
    predictions = match_predictions(rows, [bench])
    result = summarise(bench, score_bench(bench, predictions, 1, True))
    counts = {label: (figure["right"], figure["replies"]) for label, figure in result["categories"].items()}
    assert counts == {"C": (1, 4), "C, lax": (2, 4)}
    assert list(result["totals"]) == ["all, lax", "all"]
    assert {why: fault["replies"] for why, fault in result["faults"].items()} == {"no": 2, "no_prediction": 1}
    assert metrics_of(bench, predictions.found, True) == {"fake_all_lax": 0.5, "fake_all": 0.25}
    assert metrics_of(bench, {}, True) == {"fake_all_lax": 0.0, "fake_all": 0.0}


def test_a_prompt_that_was_not_asked_is_wrong_even_where_silence_is_right():
    class Rules:
        @staticmethod
        def score(case: Case, completion: str, think: bool) -> Verdict:
            return Verdict(completion == "", "spoke")

    bench = make_bench("fake", "ab", Rules)
    rows = [("w", {"id": "a", "completion": ""}), ("w", {"id": "b", "completion": "", "asked": False})]
    scored = score_bench(bench, match_predictions(rows, [bench]), 1, True)
    assert [row.verdict for row in scored] == [Verdict(True, "spoke"), Verdict(False, "prompt_too_long")]


def test_bench_may_be_given_once_or_for_each(by_hand):
    from eval import parse

    options = parse(["--bench", "examples=a", "--bench", "bfcl=b", "acebench=c", "--predictions", "f", "--out", "o"])
    assert options.bench == ["examples=a", "bfcl=b", "acebench=c"]
