"""The project's own Example JSONL as a benchmark, scored by the binary reward (paper, Eq. 5).

The category is the example's source. `why` is the fault that `tooln1.rewards.Fault` names.
"""

import os
from collections.abc import Iterable
from types import SimpleNamespace

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


def of_task(task: Task) -> SimpleNamespace:
    """This benchmark for a task file: asked with its messages, and the accuracy is the mean of its reward."""

    def cases(examples: Iterable[Example]) -> list[Case]:
        return [Case(one.id, one.source, one, one.extra or one.answer, messages=task.messages(one)) for one in examples]

    def verdict(case: Case, completion: str, think: bool = True) -> Verdict:
        reward = task.reward(completion, case.example)
        return Verdict(reward > 0, "" if reward > 0 else "no_reward", reward=reward)

    return SimpleNamespace(load=lambda path: cases(task.read(path)), cases_of=cases, score=verdict, totals=totals)
