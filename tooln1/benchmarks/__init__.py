"""The interface of a benchmark, and the list of benchmarks.

A benchmark is a module of this package with three functions (`Benchmark`):

    load(path)                          its cases
    score(case, completion, think)      whether one reply is right, and if not, its first fault
    totals(by_category)                 the accuracies over all categories, the main one last

and optionally CATEGORIES, all categories; one without cases in the data is reported.

To add one: write the module and put its name into NAMES; the paper's rows for it go into paper.py.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tooln1.data import Example
from tooln1.io.errors import UserError

NAMES = ("examples", "bfcl", "acebench", "api_bank")


@dataclass(frozen=True)
class Case:
    """One question of a benchmark. A module whose rules need more may subclass it."""

    id: str  # unique in its benchmark
    category: str  # the row of the table it counts in
    example: Example  # what the model is asked; prompt.build_messages renders it
    gold: Any  # JSON: the right answer as the benchmark writes it, shown beside a failure


@dataclass(frozen=True)
class Verdict:
    """The verdict on one reply."""

    ok: bool
    why: str  # a short, countable name of the first fault, such as "wrong_arguments"; "" when ok
    also: Mapping[str, bool] = field(default_factory=dict)  # another rule -> right by it; has rows of its own


def row_by_rule(category: str, rule: str) -> str:
    """The table row of a category by one of the rules of `Verdict.also`."""
    return f"{category}, {rule}"


@dataclass(frozen=True)
class Tally:
    """Counts of right replies and of all replies."""

    right: int
    count: int  # at least 1

    @property
    def accuracy(self) -> float:
        """The share that is right, in [0, 1]."""
        return self.right / self.count


class Benchmark(Protocol):
    """The functions of a benchmark module."""

    def load(self, path: str | os.PathLike) -> list[Case]:
        """The cases in a file or folder, in a fixed order. Raises UserError for what it cannot read."""

    def score(self, case: Case, completion: str, think: bool = True) -> Verdict:
        """The verdict on a reply's text, special tokens included; raises for no text.

        think: reasoning was asked for; ignored by a benchmark whose rules do not check it.
        """

    def totals(self, by_category: dict[str, Tally]) -> dict[str, Tally | float]:
        """Name -> accuracy, in the order of printing, the main one last.

        A share of cases is a Tally, a mean of means a number. A category without cases is absent from
        `by_category`, and what cannot be computed without it from the result. Where verdicts have other rules,
        `by_category` has their rows too (`row_by_rule`).
        """


def benchmark(name: str) -> Benchmark:
    """The module of the benchmark `name`. Raises UserError for a name that is not in NAMES."""
    if name not in NAMES:
        known = ", ".join(NAMES)
        raise UserError(f"there is no benchmark {name!r}; --bench takes NAME=PATH with NAME one of {known}.")
    return importlib.import_module(f"tooln1.benchmarks.{name}")
