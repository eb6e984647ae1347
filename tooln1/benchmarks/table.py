"""The results of an evaluation for people: tables, footnotes and what is wrong, as text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from tooln1.benchmarks.paper import COMPARISONS
from tooln1.benchmarks.runner import CONFLICTING, MISSING_CATEGORIES, NO_PREDICTION, REPEATED, TOO_LONG, UNKNOWN, Bench

WIDTH = 118  # of footnotes


def table(name: str, result: dict[str, Any]) -> str:
    """One benchmark's results, as `evaluation.summarise` gives them: accuracy by category and in total, then faults."""
    lines = [f"{name}: {result['cases']} cases of {result['path']}"]
    if result["cases"] < result["cases_in_data"]:
        lines.append(f"PARTIAL: {result['cases']} of {result['cases_in_data']} cases (--limit or --bfcl-changed)")
    if result["samples"] > 1:
        lines.append(f"mean ± standard deviation over {result['samples']} samples")
    rows = [("category", "accuracy", "right")]
    rows += [_row(label, figure) for label, figure in (result["categories"] | result["totals"]).items()]
    lines += ["", *_indented(rows)]
    if result["faults"]:
        rows = [("fault", "share", "replies")]
        for why, fault in result["faults"].items():
            rows.append((why, f"{fault['share']:.3f}", str(fault["replies"])))
        lines += ["", *_indented(rows)]
    if result["truncated"]:
        lines += ["", f"cut off at --max-reply-tokens, or where the context ended: {result['truncated']} replies"]
    if TOO_LONG in result["faults"]:
        count = result["faults"][TOO_LONG]["replies"]
        lines += ["", f"not asked and wrong, as the model's context cannot hold the prompt: {count} replies"]
    return "\n".join(lines)


def _row(label: str, figure: dict[str, Any]) -> tuple[str, str, str]:
    accuracy = f"{figure['accuracy']:.3f}"  # as train.py logs heldout_accuracy
    if "spread" in figure:
        accuracy += f" ± {figure['spread']:.3f}"
    return label, accuracy, f"{figure['right']}/{figure['replies']}" if "right" in figure else ""


def comparison(name: str, results: Mapping[str, dict[str, Any]]) -> str:
    """Models side by side in per cent, the paper's below them; on BFCL in the form of its Table 2.

    results: label -> a model's result on this benchmark. "" where there is nothing to compare it with.
    """
    rows = {label: _per_cent(result) for label, result in results.items()}
    if name in COMPARISONS:
        groups = COMPARISONS[name].columns
        rows |= {f"paper: {model}": row for model, row in COMPARISONS[name].rows.items()}
    else:
        groups = {"": {total: total for result in results.values() for total in result["totals"]}}
    if len(rows) == 1:
        return ""
    blocks = [["", f"{name}, per cent", *rows]]
    for group, columns in groups.items():
        cells = [[f"{row[key]:.2f}" if key in row else "-" for key in columns.values()] for row in rows.values()]
        blocks.append([group, *_columns([list(columns), *cells], left=0, gap=" ")])
    return "\n".join(_columns(list(zip(*blocks, strict=True)), left=len(blocks)))


def _per_cent(result: dict[str, Any]) -> dict[str, float]:
    return {key: 100 * figure["accuracy"] for key, figure in (result["categories"] | result["totals"]).items()}


def _columns(rows: Sequence[Sequence[str]], left: int = 1, gap: str = "  ") -> list[str]:
    """Rows of cells as lines: the first `left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if column < left else str.rjust for column in range(len(widths))]
    lines = [[side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)] for row in rows]
    return [gap.join(line).rstrip() for line in lines]


def _indented(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["  " + line for line in _columns(rows)]


def footnotes(bench: Bench) -> list[str]:
    """What a reader of a benchmark's figures must know: a sentence or two each."""
    chosen, there = {case.id for case in bench.chosen}, {case.id for case in bench.cases}
    never = [name for name in getattr(bench.rules, "NEVER_RIGHT", ()) if name in chosen]
    changed = getattr(bench.rules, "CHANGED_SINCE_PAPER", ())
    notes = list(COMPARISONS[bench.name].notes) if bench.name in COMPARISONS else []
    if never:
        notes.append(f"No right answer wins {len(never)} of these cases: {', '.join(never)}.")
    if counted := [name for name in changed if name in chosen]:
        gone = [name for name in changed if name not in there]
        notes.append(
            f"{len(changed)} entries changed after the paper's date; {len(counted)} of them are counted here "
            f"(--bfcl-changed leave-out: none): {', '.join(changed)}."
            f"{' Not in these data: ' + ', '.join(gone) + '.' if gone else ''}"
        )
    elif changed:
        notes.append(f"The {len(changed)} entries that changed after the paper's date are not counted here.")
    return notes


def note_lines(notes: Sequence[str]) -> str:
    """Footnotes as lines."""
    return "\n".join(textwrap.fill(note, WIDTH, initial_indent="* ", subsequent_indent="  ") for note in notes)


def problem_lines(source: str, found: dict[str, list[str]]) -> list[str]:
    """What is wrong with data and predictions in words, a line each."""
    meaning = {
        NO_PREDICTION: "cases without a prediction, counted as wrong",
        CONFLICTING: "cases with several different predictions, counted as wrong",
        MISSING_CATEGORIES: "categories that the data lack; figures that need them are left out",
        REPEATED: "lines that repeat an earlier one, left out",
        UNKNOWN: "predictions for an id that no case has, left out",
    }
    lines = []
    for kind, ids in found.items():
        if ids:
            named = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
            where = "--bench" if kind == MISSING_CATEGORIES else source
            lines.append(f"{where}: {meaning[kind]}: {len(ids)} ({named})")
    return lines
