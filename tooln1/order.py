"""Which examples are held out, and in which order the others are seen: seeded, the same on every machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from tooln1.errors import UserError

if TYPE_CHECKING:  # data.py, which defines it, offers these functions under its own name
    from tooln1.data import Example

IRRELEVANT = "-irrelevant"  # suffix of the ids that data.add_irrelevance makes


@dataclass(frozen=True)
class EpochOrder:
    """An order of `n` examples, a pure function of (seed, step, count): to resume it, know the step.

    Every epoch is a permutation of its own, drawn from (seed, epoch). A step never straddles two epochs: the
    n % count examples at an epoch's end are left out of it (drop_last, as in the released run).

        >>> order = EpochOrder(n=5, seed=0)
        >>> first, second, third = (order.take(step, count=2) for step in range(3))
        >>> len({*first, *second}), order.epoch(1, count=2), order.epoch(2, count=2)
        (4, 0, 1)
    """

    n: int  # examples
    seed: int  # >= 0

    def __post_init__(self):
        if self.n < 1 or self.seed < 0:
            raise UserError(f"an epoch order needs n >= 1 and seed >= 0, got n={self.n} and seed={self.seed}")

    def take(self, step: int, count: int) -> list[int]:
        """The `count` distinct indices (0 <= i < n) of step `step` (from 0)."""
        epoch, position = divmod(self._checked(step), self.steps_per_epoch(count))
        return _permutation(self.n, self.seed, epoch)[position * count : (position + 1) * count].tolist()

    def epoch(self, step: int, count: int) -> int:
        """The epoch (from 0) in which step `step` (from 0) falls."""
        return self._checked(step) // self.steps_per_epoch(count)

    def steps_per_epoch(self, count: int) -> int:
        """n // count. Raises UserError when an epoch cannot fill a single step."""
        if not 1 <= count <= self.n:
            raise UserError(
                f"cannot take {count} examples a step from {self.n}: lower the number of prompts a step "
                f"to between 1 and {self.n}, or give more data"
            )
        return self.n // count

    def _checked(self, step: int) -> int:
        if step < 0:
            raise UserError(f"steps are counted from 0, got {step}")
        return step


@lru_cache(maxsize=2)  # neighbouring steps share an epoch
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    # sorted raw draws: numpy keeps PCG64's bits stable over its versions, but not Generator.permutation
    return np.argsort(np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n), kind="stable")


def split(examples: list[Example], seed: int, held_out: float = 0.1) -> tuple[list[Example], list[Example]]:
    """(train, held out), both in the order of `examples`: about `held_out` of the source rows, drawn by seed.

    Whole rows go to one side, so the steps of one dialogue never fall on both; so do rows with the same tools
    and the same first message, which are often duplicates. The draw hashes that content: it depends neither
    on the order of the examples nor on their ids. The released split is by instance and unseeded.
    Raises UserError for a share outside 0 <= held_out < 1, and where one side would come out empty.
    """
    if not 0 <= held_out < 1:
        raise UserError(f"the held-out share must be at least 0 and below 1, got {held_out}")
    groups = _groups(examples)
    ranked = sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    count = max(1, round(held_out * len(ranked))) if held_out else 0
    if count and count >= len(ranked):
        raise UserError(
            f"holding out {held_out} of {len(ranked)} distinct rows leaves one side empty: "
            "set the held-out share to 0 or give more rows"
        )
    chosen = set(ranked[:count])
    train = [example for example, group in zip(examples, groups, strict=True) if group not in chosen]
    return train, [example for example, group in zip(examples, groups, strict=True) if group in chosen]


def source_row(example_id: str) -> str:
    """The source row an id came from: the steps "toolace-17-3" and "toolace-17-7" share "toolace-17"."""
    return re.sub(r"^(toolace-\d+)-\d+$", r"\1", example_id.removesuffix(IRRELEVANT))


def _groups(examples: list[Example]) -> list[str]:
    """A key for each example; examples of one row, and examples with equal content, have equal keys.

    Union-find over rows and contents; a group's key is the smallest content digest in it.
    """
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    rows = ["row " + source_row(example.id) for example in examples]
    for example, row in zip(examples, rows, strict=True):
        one, other = root(row), root("content " + content_digest(example))  # "content" sorts before "row"
        parent[max(one, other)] = min(one, other)
    return [root(row) for row in rows]


def content_digest(example: Example) -> str:
    """A hash of the tools, in any order, and the first message: what `split` never lets fall on both sides."""
    tools = sorted(json.dumps(tool, sort_keys=True) for tool in example.tools)
    return hashlib.sha256(json.dumps([tools, example.messages[0]["content"]]).encode()).hexdigest()


def fingerprint(examples: Iterable[Example | tuple[Example, str]]) -> str:
    """A hash of examples (or pairs with the reply to imitate) and their order: with the seed, what a run sees when."""
    digest = hashlib.sha256()
    for one in examples:
        example, reply = one if isinstance(one, tuple) else (one, None)
        digest.update(json.dumps([vars(example), reply]).encode())
    return digest.hexdigest()[:16]
