"""The split into training and held-out examples: by source row, seeded, the same on every machine."""

import hashlib
import json
import re

from tooln1.data import Example
from tooln1.io.errors import UserError

IRRELEVANT = "-irrelevant"  # suffix of the ids that augment.add_irrelevance makes


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
    ranked = sorted(set(groups), key=lambda group: digest(seed, group))
    count = max(1, round(held_out * len(ranked))) if held_out else 0
    if count and count >= len(ranked):
        raise UserError(
            f"holding out {held_out} of {len(ranked)} distinct rows leaves one side empty: "
            "set the held-out share to 0 or give more rows"
        )
    chosen = set(ranked[:count])
    train = [example for example, group in zip(examples, groups, strict=True) if group not in chosen]
    return train, [example for example, group in zip(examples, groups, strict=True) if group in chosen]


def digest(*parts: str | int) -> bytes:
    """The hash that draws."""
    return hashlib.sha256(":".join(map(str, parts)).encode()).digest()


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
    """A hash of the tools, in any order, and the first message; `split` keeps equal ones on one side."""
    tools = sorted(json.dumps(tool, sort_keys=True) for tool in example.tools)
    return hashlib.sha256(json.dumps([tools, example.messages[0]["content"]]).encode()).hexdigest()
