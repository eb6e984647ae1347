"""What the paper reports on the benchmarks: rows of its Table 2 (BFCL of 2025-04-13), API-Bank, ACEBench.

paper.json has for each benchmark "columns" (group of columns -> heading -> the category or total that it shows), "rows"
(model -> category or total -> per cent; "reported" where the paper does not state its rules) and "notes".
`table.comparison` prints the rows below ours, under the same headings.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from tooln1.benchmarks import Case

COMPARISONS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))


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
