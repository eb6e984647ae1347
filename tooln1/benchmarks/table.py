"""Print the results of an evaluation: tables, the paper's rows and notes, as text.

paper.json has what the paper reports (its Table 2, BFCL of 2025-04-13; API-Bank; ACEBench): for each benchmark
"columns" (group of columns -> heading -> the category or total that it shows), "rows" (model -> category or total ->
per cent; "reported" where the paper does not state its rules) and "notes".
"""

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tooln1.benchmarks import Case

COMPARISONS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))
WIDTH = 118  # characters of a line of notes


def report(results: Mapping[str, dict[str, Any]]) -> str:
    """Per benchmark: the first model's table, all models beside the paper's, and the notes.

    results: label of a model -> the content of its results.json.
    """
    first = next(iter(results.values()))
    parts = []
    for name, result in first["benchmarks"].items():
        remarks = [textwrap.fill(n, WIDTH, initial_indent="* ", subsequent_indent="  ") for n in result["notes"]]
        by_model = {label: other["benchmarks"][name] for label, other in results.items()}
        parts += [table(name, result), comparison(name, by_model), "\n".join(remarks)]
    if unknown := first["unknown_ids"]:
        parts.append(f"IGNORED: {len(unknown)} predictions with an id that no case has, such as {unknown[0]!r}")
    return "\n\n".join(filter(None, parts))


def notes(name: str, module: ModuleType, chosen: Iterable[Case]) -> list[str]:
    """What one must know to compare the numbers of a benchmark on the `chosen` cases, a sentence or two each."""
    ids = {case.id for case in chosen}
    never = [case_id for case_id in getattr(module, "NEVER_RIGHT", ()) if case_id in ids]
    changed = [case_id for case_id in getattr(module, "CHANGED_SINCE_PAPER", ()) if case_id in ids]
    found = list(COMPARISONS[name]["notes"]) if name in COMPARISONS else []
    if never:
        found.append(f"No answer is counted as right in {len(never)} of these cases: {', '.join(never)}.")
    if changed:
        found.append(
            f"{len(changed)} of these cases changed after the paper's date (--bfcl-changed leave-out evaluates without "
            f"them): {', '.join(changed)}."
        )
    return found


def table(name: str, result: dict[str, Any]) -> str:
    """One benchmark's results (of `runner.summarise`): accuracy by category and in total, then the faults."""
    lines = [f"{name}: {result['cases']} of {result['cases_in_data']} cases of {result['path']}"]
    if result["samples"] > 1:
        lines.append(f"mean ± standard deviation over {result['samples']} samples")
    if result["missing_categories"]:
        lines.append(f"MISSING in the data, with the totals that need them: {', '.join(result['missing_categories'])}")
    rows = [("category", "accuracy", "right")]
    rows += [_row(label, values) for label, values in (result["categories"] | result["totals"]).items()]
    lines += ["", *_indented(rows)]
    if result["faults"]:
        rows = [("fault", "share", "replies")]
        rows += [(why, f"{fault['share']:.3f}", str(fault["replies"])) for why, fault in result["faults"].items()]
        lines += ["", *_indented(rows)]
    if result["truncated"]:
        lines += ["", f"cut off at --max-reply-tokens or at the end of the context: {result['truncated']} replies"]
    return "\n".join(lines)


def _row(label: str, values: dict[str, Any]) -> tuple[str, str, str]:
    spread = f" ± {values['spread']:.3f}" if "spread" in values else ""
    right = f"{values['right']:g}/{values['replies']}" if "right" in values else ""
    return label, f"{values['accuracy']:.3f}{spread}", right


def comparison(name: str, results: Mapping[str, dict[str, Any]]) -> str:
    """Models side by side in per cent, the paper's rows below; for BFCL in the form of the paper's Table 2.

    results: label of a model -> its result on this benchmark. "" where there is nothing to compare with.
    """
    rows = {}
    for label, result in results.items():
        figures = result["categories"] | result["totals"]
        rows[label] = {key: 100 * values["accuracy"] for key, values in figures.items()}
    if name in COMPARISONS:
        groups = COMPARISONS[name]["columns"]
        rows |= {f"paper: {model}": row for model, row in COMPARISONS[name]["rows"].items()}
    else:
        groups = {"": {total: total for result in results.values() for total in result["totals"]}}
    if len(rows) == 1:
        return ""
    blocks = [["", f"{name}, per cent", *rows]]
    for group, columns in groups.items():
        cells = [[f"{row[key]:.2f}" if key in row else "-" for key in columns.values()] for row in rows.values()]
        blocks.append([group, *_columns([list(columns), *cells], left=0, gap=" ")])
    return "\n".join(_columns(list(zip(*blocks, strict=True)), left=len(blocks)))


def _columns(rows: Sequence[Sequence[str]], left: int = 1, gap: str = "  ") -> list[str]:
    """Rows of cells as lines; the first `left` columns are left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = [str.ljust if column < left else str.rjust for column in range(len(widths))]
    lines = [[place(cell, width) for place, cell, width in zip(align, row, widths, strict=True)] for row in rows]
    return [gap.join(line).rstrip() for line in lines]


def _indented(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["  " + line for line in _columns(rows)]
