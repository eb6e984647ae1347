"""Scoring without a model: predictions to verdicts, results, a table and a list of failures.

    cases and predictions -> `score_bench` -> `summarise` -> results.json, `table`
                                           -> `failures`  -> failures.jsonl
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tooln1.benchmarks import Benchmark, Case, Tally, Verdict, benchmark
from tooln1.errors import UserError
from tooln1.jsonl import field as json_field

# What may be wrong with a predictions file; the first two are faults of a case as well.
NO_PREDICTION, CONFLICTING = "no_prediction", "conflicting_predictions"
REPEATED, UNKNOWN = "repeated_predictions", "unknown_ids"
Key = tuple[str, str, int]  # benchmark, case id, sample


@dataclass(frozen=True)
class Bench:
    """A benchmark as the command line names it, with its cases."""

    name: str
    path: str
    rules: Benchmark
    cases: list[Case]
    limit: int | None = None  # only the first so many are evaluated; None: all

    @property
    def chosen(self) -> list[Case]:
        """The cases to evaluate."""
        return self.cases[: self.limit]


@dataclass(frozen=True)
class Prediction:
    """A model's reply to a case."""

    completion: str
    finished: bool | None = None  # ended with a stop token; None: its file does not say


@dataclass(frozen=True)
class Predictions:
    """What a predictions file holds, matched with the cases."""

    found: dict[Key, Prediction] = field(default_factory=dict)
    conflicting: set[Key] = field(default_factory=set)  # given more than once, with different completions
    repeated: list[str] = field(default_factory=list)  # ids of rows that say again what an earlier one said
    unknown: list[str] = field(default_factory=list)  # ids that no case has

    @property
    def samples(self) -> int:
        """Replies to each case."""
        return 1 + max((sample for _, _, sample in self.found), default=0)


@dataclass(frozen=True)
class Scored:
    """A case's sample, its prediction and the verdict."""

    case: Case
    sample: int
    prediction: Prediction | None
    verdict: Verdict


# ---------------------------------------------------------------------------------------------------- reading


def load_benches(arguments: Sequence[str], limit: int | None = None) -> list[Bench]:
    """The benchmarks of `--bench NAME=PATH ...`.

    Raises UserError for a name that is unknown or given twice, and for data that cannot be read.
    """
    benches = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or not path:
            raise UserError(f"--bench takes NAME=PATH, such as examples=heldout.jsonl; found {argument!r}.")
        if name in [bench.name for bench in benches]:
            raise UserError(f"--bench names {name} twice; put the second into a run of its own.")
        rules = benchmark(name)
        benches.append(Bench(name, path, rules, rules.load(path), limit))
    return benches


def match_predictions(rows: Iterable[tuple[str, dict]], benches: Sequence[Bench]) -> Predictions:
    """Sort the rows of a predictions file, [(where, row)], to the cases they answer.

    A row is {"id", "completion"}, where needed with "bench" (for ids that several benchmarks have) and
    "sample" (0, 1, ..., of several replies to a case); "finished" is kept, other keys do no harm. Raises
    UserError for values of another type and for an id of two benchmarks when the row does not say which.
    """
    ids = {bench.name: {case.id for case in bench.cases} for bench in benches}
    found, conflicting, repeated, unknown = {}, set(), [], []
    for where, row in rows:
        name, completion = json_field(row, "id", str, where), json_field(row, "completion", str, where)
        sample, finished = row.get("sample", 0), row.get("finished")
        if type(sample) is not int or sample < 0:
            raise UserError(f'{where}: "sample" must be a whole number from 0 on, found {sample!r}')
        asked = [json_field(row, "bench", str, where)] if "bench" in row else list(ids)
        answers = [bench for bench in asked if name in ids.get(bench, ())]
        if len(answers) > 1:
            both = " and ".join(answers)
            raise UserError(f'{where}: {both} have a case {name!r}; say with "bench" which one is meant')
        if not answers:
            unknown.append(name)
            continue
        key = (answers[0], name, sample)
        if key not in found:
            found[key] = Prediction(completion, finished if isinstance(finished, bool) else None)
        elif found[key].completion == completion:
            repeated.append(name)
        else:
            conflicting.add(key)
    return Predictions(found, conflicting, repeated, unknown)


# ---------------------------------------------------------------------------------------------------- scoring


def score_bench(bench: Bench, predictions: Predictions, samples: int, think: bool) -> list[Scored]:
    """Every sample of every chosen case, in order; without a prediction, or with several, it is wrong."""
    scored = []
    for sample in range(samples):
        for case in bench.chosen:
            key = (bench.name, case.id, sample)
            prediction = predictions.found.get(key)
            if prediction is None:
                verdict = Verdict(False, NO_PREDICTION)
            elif key in predictions.conflicting:
                verdict = Verdict(False, CONFLICTING)
            else:
                verdict = bench.rules.score(case, prediction.completion, think)
            scored.append(Scored(case, sample, prediction, verdict))
    return scored


def summarise(bench: Bench, scored: Sequence[Scored]) -> dict[str, Any]:
    """The results of one benchmark as plain JSON: accuracies, faults and the number of cut-off replies.

    With several samples an accuracy is the mean over them, and "spread" their standard deviation (n - 1).
    """
    by_sample: dict[int, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in scored:
        by_sample[row.sample][row.case.category].append(row.verdict.ok)
    tallies = [
        {category: Tally(sum(oks), len(oks)) for category, oks in categories.items()}
        for categories in by_sample.values()
    ]
    faults = Counter(row.verdict.why for row in scored if not row.verdict.ok)
    return {
        "path": bench.path,
        "cases": len(bench.chosen),
        "cases_in_data": len(bench.cases),
        "samples": len(tallies),
        "categories": {name: _over_samples([tally[name] for tally in tallies]) for name in tallies[0]},
        "totals": _totals([bench.rules.totals(tally) for tally in tallies]),
        "faults": {why: {"replies": n, "share": n / len(scored)} for why, n in faults.most_common()},
        "truncated": sum(row.prediction is not None and row.prediction.finished is False for row in scored),
    }


def _totals(by_sample: Sequence[dict[str, Tally | float]]) -> dict[str, dict]:
    return {name: _over_samples([figures[name] for figures in by_sample]) for name in by_sample[0]}


def _over_samples(figures: Sequence[Tally | float]) -> dict[str, Any]:
    """One figure from its value in each sample."""
    values = [figure.accuracy if isinstance(figure, Tally) else figure for figure in figures]
    result: dict[str, Any] = {"accuracy": statistics.fmean(values)}
    if len(values) > 1:
        result |= {"spread": statistics.stdev(values), "by_sample": values}
    if all(isinstance(figure, Tally) for figure in figures):
        result |= {"right": sum(f.right for f in figures), "replies": sum(f.count for f in figures)}
    return result


def failures(bench: Bench, scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """The wrong replies, those of the commonest fault first, else in order."""
    count = Counter(row.verdict.why for row in scored if not row.verdict.ok)
    rank = {why: place for place, (why, _) in enumerate(count.most_common())}
    wrong = sorted((row for row in scored if not row.verdict.ok), key=lambda row: rank[row.verdict.why])
    return [
        {
            "bench": bench.name,
            "why": row.verdict.why,
            "id": row.case.id,
            "category": row.case.category,
            "sample": row.sample,
            "completion": row.prediction.completion if row.prediction else None,
            "answer": row.case.gold,
        }
        for row in wrong
    ]


def problems(predictions: Predictions, scored: dict[str, list[Scored]]) -> dict[str, list[str]]:
    """What is wrong with a predictions file: kind -> ids. The first two kinds make the score wrong.

    scored: benchmark -> its scored cases.
    """
    found = {NO_PREDICTION: [], CONFLICTING: [], REPEATED: predictions.repeated, UNKNOWN: predictions.unknown}
    for row in (row for rows in scored.values() for row in rows):
        if row.verdict.why in (NO_PREDICTION, CONFLICTING):
            sample = f" (sample {row.sample})" if row.sample else ""
            found[row.verdict.why].append(row.case.id + sample)
    return found


# --------------------------------------------------------------------------------------------------- printing


def table(name: str, result: dict[str, Any]) -> str:
    """One benchmark's results for people: accuracy by category and in total, then the faults."""
    partial = result["cases"] < result["cases_in_data"]
    lines = [f"{name}: {result['cases']} cases of {result['path']}"]
    if partial:
        lines.append(f"PARTIAL: the first {result['cases']} of {result['cases_in_data']} cases (--limit)")
    if result["samples"] > 1:
        lines.append(f"mean ± standard deviation over {result['samples']} samples")
    rows = [("category", "accuracy", "right")]
    rows += [_row(label, figure) for label, figure in result["categories"].items()]
    rows += [_row(label, figure) for label, figure in result["totals"].items()]
    lines += ["", *_columns(rows)]
    if result["faults"]:
        rows = [("fault", "share", "replies")]
        for why, fault in result["faults"].items():
            rows.append((why, f"{fault['share']:.3f}", str(fault["replies"])))
        lines += ["", *_columns(rows)]
    if result["truncated"]:
        lines += ["", f"{result['truncated']} replies were cut off at --max-reply-tokens"]
    return "\n".join(lines)


def _row(label: str, figure: dict[str, Any]) -> tuple[str, str, str]:
    accuracy = f"{figure['accuracy']:.3f}"  # as train.py logs heldout_accuracy
    if "spread" in figure:
        accuracy += f" ± {figure['spread']:.3f}"
    return label, accuracy, f"{figure['right']}/{figure['replies']}" if "right" in figure else ""


def _columns(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Rows of three, the first flush left, the others flush right, indented."""
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows]


def problem_lines(source: str, found: dict[str, list[str]]) -> list[str]:
    """The problems of a predictions file in words, a line each."""
    meaning = {
        NO_PREDICTION: "cases without a prediction, counted as wrong",
        CONFLICTING: "cases with several different predictions, counted as wrong",
        REPEATED: "lines that repeat an earlier one, left out",
        UNKNOWN: "predictions for an id that no case has, left out",
    }
    lines = []
    for kind, ids in found.items():
        if ids:
            named = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
            lines.append(f"{source}: {meaning[kind]}: {len(ids)} ({named})")
    return lines
