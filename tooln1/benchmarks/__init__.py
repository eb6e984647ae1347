"""The interface of a benchmark, and the list of benchmarks.

A benchmark is a module of this package with three functions:

    load(path) -> list[Case]
        The cases in a file or directory, in a fixed order. Raises UserError for what it cannot read.
    score(case, completion, think=True) -> Verdict
        The verdict on a reply's text, special tokens included; never raises. think: reasoning was asked for.
    totals(by_category: dict[str, Tally]) -> dict[str, Tally | float]
        Name -> accuracy in the order of printing, the main one last: a share of cases as a Tally, a mean of means as a
        number. What needs a category that `by_category` lacks is left out. Where verdicts have other rules,
        `by_category` has their rows too (`row_by_rule`).

and, where they apply, these names:

    CATEGORIES                          all categories; one without cases in the data is reported
    NEVER_RIGHT, CHANGED_SINCE_PAPER    ids of cases whose rules accept no answer, and of those that changed

To add one: write the module and put its name into NAMES; the paper's rows for it go into paper.json.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from tooln1.data import Example
from tooln1.io.errors import UserError

NAMES = ("examples", "bfcl", "acebench", "api_bank")


@dataclass(frozen=True)
class Case:
    """One question of a benchmark."""

    id: str  # unique in its benchmark
    category: str  # the row of the table it counts in
    example: Example  # what the model is asked; prompt.build_messages renders it
    gold: Any  # JSON: the right answer as the benchmark writes it, shown beside a failure
    functions: list[dict] = field(default_factory=list)  # as the data describe them, where the rules need that
    messages: list[dict] = field(default_factory=list)  # the prompt, where prompt.py does not render it


@dataclass(frozen=True)
class Verdict:
    """The verdict on one reply."""

    ok: bool
    why: str  # a short, countable name of the first fault, such as "wrong_arguments"; "" when ok
    also: Mapping[str, bool] = field(default_factory=dict)  # another rule -> right by it; has rows of its own
    reward: float | None = None  # by a task file; it counts, in place of `ok`


def row_by_rule(category: str, rule: str) -> str:
    """The table row of a category by one of the rules of `Verdict.also`."""
    return f"{category}, {rule}"


@dataclass(frozen=True)
class Tally:
    """Counts of right replies, or the sum of their rewards by a task file, and of all replies."""

    right: float
    count: int  # at least 1

    @property
    def accuracy(self) -> float:
        """The share that is right, in [0, 1]."""
        return self.right / self.count


def benchmark(name: str) -> ModuleType:
    """The module of the benchmark `name`. Raises UserError for a name that is not in NAMES."""
    if name not in NAMES:
        known = ", ".join(NAMES)
        raise UserError(f"there is no benchmark {name!r}; --bench takes NAME=PATH with NAME one of {known}.")
    return importlib.import_module(f"tooln1.benchmarks.{name}")
