"""The project's own Example JSONL as a benchmark, scored by the binary reward (paper, Eq. 5).

The category is the example's source. `why` is the fault that `tooln1.rewards.Fault` names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from tooln1.benchmarks import Case, Tally, Verdict
from tooln1.data import Example, read_examples
from tooln1.rewards import fault_of
from tooln1.task import Task


def load(path: str | os.PathLike) -> list[Case]:
    """A case for each example of a JSONL file. Raises UserError as `read_examples` does."""
    return cases_of(read_examples(path))


def cases_of(examples: Iterable[Example]) -> list[Case]:
    """A case for each example."""
    return [Case(example.id, example.source, example, example.answer) for example in examples]


def score(case: Case, completion: str, think: bool = True) -> Verdict:
    """Right where the calls equal the example's answer and, with `think`, the reply contains reasoning."""
    fault = fault_of(completion, case.gold, think)
    return Verdict(True, "") if fault == "none" else Verdict(False, fault)


def totals(by_category: dict[str, Tally]) -> dict[str, Tally | float]:
    """All examples together."""
    tallies = by_category.values()
    return {"overall": Tally(sum(tally.right for tally in tallies), sum(tally.count for tally in tallies))}


@dataclass(frozen=True)
class TaskExamples:
    """The examples of a task file: asked with its messages; their accuracy is the mean of its reward."""

    task: Task
    totals = staticmethod(totals)

    def load(self, path: str) -> list[Case]:
        """A case for each example that the task reads."""
        return self.cases_of(self.task.read(path))

    def cases_of(self, examples: Iterable[Example]) -> list[Case]:
        """A case for each example."""
        messages = self.task.messages
        return [Case(one.id, one.source, one, one.extra or one.answer, messages=messages(one)) for one in examples]

    def score(self, case: Case, completion: str, think: bool = True) -> Verdict:
        """Right where the reward is above 0."""
        reward = self.task.reward(completion, case.example)
        return Verdict(reward > 0, "" if reward > 0 else "no_reward", reward=reward)
