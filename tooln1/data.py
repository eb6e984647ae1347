"""`Example` and `Rollout`, JSONL files of examples, and the resumable order of an epoch."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import numpy as np

from tooln1.io.errors import UserError
from tooln1.io.files import atomic_write
from tooln1.io.jsonl import field as json_field
from tooln1.io.jsonl import kind_of, read_rows, shown

NOT_JSON = "holds NaN, infinity, half a surrogate pair or very deep nesting"


@dataclass(frozen=True)
class Example:
    """One training or evaluation instance: the context up to a call, and the calls that answer it. Plain JSON data."""

    id: str  # unique in a file: "xlam-12" (row 12, from 0), "toolace-17-3" (the call at turn 3 of row 17)
    source: str  # "xlam", "toolace_single_turn", "toolace_multiple_turn", or the user's own label
    system: str  # text before the tools section of the system prompt
    tools: list[dict]  # candidate tools, each {"name", "description", "parameters", ...} as in the source
    messages: list[dict]  # {"role": "user" | "assistant" | "tool", "content": str}; never ends with assistant
    answer: list[dict]  # gold calls, each {"name": str, "arguments": dict}; [] where no call is right
    reply: str | None = None  # the text that supervised training imitates, without the stop token; None: the calls
    extra: dict[str, Any] = field(default_factory=dict)  # further JSON fields of the row, for a task file


@dataclass(frozen=True)
class Rollout:
    """One sampled reply."""

    group: int  # index of its prompt in the `generate` batch; replies of one group are compared with each other
    sample: int  # which of the group's replies it is, 0 .. G-1
    prompt: list[int]  # token ids
    reply: list[int]  # token ids, the stop token included
    logprobs: list[float]  # of each reply token at the sampling temperature, before top-k and top-p
    finished: bool  # ended with a stop token; False: cut off at max_new_tokens


def is_call(value: Any) -> bool:
    """Whether a JSON value is {"name": str, "arguments": object, ...}."""
    named = isinstance(value, dict) and isinstance(value.get("name"), str)
    return named and isinstance(value.get("arguments"), dict)


def is_storable(value: Any) -> bool:
    """Whether strict JSON in UTF-8 can hold it: no NaN, no infinity, no half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        return False
    return True


def write_examples(examples: list[Example], path: str | os.PathLike) -> None:
    """Write one JSON object a line, atomically. Raises UserError for what `read_examples` would refuse."""
    seen = set()
    with atomic_write(path) as file:
        for example in examples:
            row = {key: value for key, value in vars(example).items() if value not in (None, {})}
            checked_example(row, f'{path}, example "{example.id}"', seen, bool(example.extra))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_examples(path: str | os.PathLike, allow_extra: bool = False) -> list[Example]:
    """Examples from JSONL (or a JSON array) of objects with exactly the keys of `Example`; "reply" may be left out.

    allow_extra: rows may have more keys, which become `Example.extra`.
    Raises UserError naming file, line and reason: broken UTF-8 or JSON, NaN, missing or unknown keys, wrong
    types, ids given twice, answers without name and arguments, no messages, a last message by the assistant.
    """
    seen = set()
    return [checked_example(row, where, seen, allow_extra) for where, row in read_rows(path)]


def checked_example(row: dict, where: str, seen: set[str], allow_extra: bool = False) -> Example:
    """The Example of a JSON row, or a UserError that begins with `where`. `seen` collects the ids of a file."""
    *known, last = [part.name for part in fields(Example)]
    extra = {key: value for key, value in row.items() if key not in (*known, last)}
    extra |= json_field({last: {}} | row, last, dict, where)
    if extra and not allow_extra:
        raise UserError(f"{where}: unknown key {shown(min(extra))}; an example has {', '.join(known)}")
    for key in ("id", "source", "system"):
        json_field(row, key, str, where)
    if row.get("reply") is not None:
        json_field(row, "reply", str, where)
    for number, tool in enumerate(json_field(row, "tools", list, where)):
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise UserError(f'{where}: tools[{number}] must be an object with a "name" that is a string')
    messages = json_field(row, "messages", list, where)
    for number, message in enumerate(messages):
        place = f"{where}, messages[{number}]"
        if not isinstance(message, dict):
            raise UserError(f"{place}: expected an object, found {kind_of(message)}")
        json_field(message, "content", str, place)
        if (role := json_field(message, "role", str, place)) not in ("user", "assistant", "tool"):
            raise UserError(f"{place}: the role must be user, assistant or tool, found {shown(role)}")
    if not messages or messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: messages must end with a user or tool turn, which the answer answers")
    for number, call in enumerate(json_field(row, "answer", list, where)):
        if not is_call(call) or len(call) > 2:
            raise UserError(f'{where}: answer[{number}] must be {{"name": a string, "arguments": an object}}')
    if not is_storable(row):
        raise UserError(f"{where}: {NOT_JSON}, which a row cannot carry; remove the row or the value")
    if row["id"] in seen:
        raise UserError(f'{where}: the id "{row["id"][:80]}" was given before; ids must be unique in a file')
    seen.add(row["id"])
    return Example(**{key: row[key] for key in known if key in row}, extra=extra)


@dataclass(frozen=True)
class EpochOrder:
    """The endless order in which `n` examples are trained on, a pure function of the seed.

    Every epoch is a permutation of its own, drawn from (seed, epoch). What is taken never spans two epochs: the rest of
    one that is too short is left out (drop_last, as in the released run).

        >>> order = EpochOrder(n=5, seed=0)
        >>> first, position = order.take(0, count=2)
        >>> second, position = order.take(position, count=2)
        >>> len({*first, *second}), order.take(position, count=2)[1]
        (4, 7)
    """

    n: int  # examples
    seed: int  # >= 0

    def take(self, position: int, count: int) -> tuple[list[int], int]:
        """The next `count` <= n distinct indices (0 <= i < n) at `position` (from 0), and the position behind them."""
        epoch, start = divmod(position, self.n)
        if start + count > self.n:
            epoch, start = epoch + 1, 0
        end = start + count
        return _permutation(self.n, self.seed, epoch)[start:end].tolist(), epoch * self.n + end

    def steps_per_epoch(self, count: int) -> int:
        """n // count. Raises UserError when an epoch cannot fill a single step."""
        if not 1 <= count <= self.n:
            raise UserError(f"cannot take {count} prompts a step from {self.n} examples; lower prompts_per_step")
        return self.n // count


@lru_cache(maxsize=2)  # neighbouring steps share an epoch
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    # sorted raw draws: numpy keeps PCG64's bits stable over its versions, but not Generator.permutation
    return np.argsort(np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n), kind="stable")


def fingerprint(examples: Iterable[Example]) -> str:
    """A hash of examples and their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(vars(example)).encode())
    return digest.hexdigest()[:16]
