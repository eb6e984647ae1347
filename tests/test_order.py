"""The split by source row and the resumable epoch order."""

import doctest
import math
from collections import Counter
from dataclasses import replace

import pytest

from tooln1 import data
from tooln1.data import EpochOrder, Example
from tooln1.io.errors import UserError
from tooln1.prepare import split as order
from tooln1.prepare.convert import add_irrelevance
from tooln1.prepare.split import split

TOOLS = [{"name": "f"}, {"name": "g"}]


def example(name, question, tools=TOOLS):
    return Example(name, "s", "", tools, [{"role": "user", "content": question}], [{"name": "f", "arguments": {}}])


def steps(rows):
    """Three steps of each of this many dialogues."""
    return [example(f"toolace-{row}-{turn}", f"q{row}") for row in range(rows) for turn in (1, 3, 5)]


def test_an_irrelevance_copy_stays_with_its_row():
    held_out = split(add_irrelevance(steps(10), 1, 0), 0, 0.1)[1]
    assert len(held_out) == 6 and len({order.source_row(e.id) for e in held_out}) == 1


def test_split_keeps_the_steps_of_a_row_together():
    examples = steps(200)
    train, held_out = split(examples, seed=0, held_out=0.1)
    rows = [{e.id.split("-")[1] for e in side} for side in (train, held_out)]
    assert len(rows[1]) == 20 and len(held_out) == 60 and not rows[0] & rows[1]
    assert sorted(train + held_out, key=lambda e: e.id) == sorted(examples, key=lambda e: e.id)
    assert [examples.index(e) for e in train] == sorted(examples.index(e) for e in train)


def test_split_depends_on_the_seed_and_not_on_order_or_ids():
    examples = steps(100)
    ids = {e.id for e in split(examples, seed=3)[1]}
    assert ids == {e.id for e in split(examples[::-1], seed=3)[1]}
    assert ids != {e.id for e in split(examples, seed=4)[1]}
    renamed = [replace(e, id=f"x{number}") for number, e in enumerate(examples)]
    held_out = {e.messages[0]["content"] for e in split(renamed, seed=3)[1]}
    assert held_out == {e.messages[0]["content"] for e in split(examples, seed=3)[1]}


def test_split_puts_equal_questions_with_equal_tools_on_one_side():
    pairs = [example(f"xlam-{i}", f"q{i % 50}", TOOLS[:: 1 if i < 50 else -1]) for i in range(100)]
    held_out = Counter(e.messages[0]["content"] for e in split(pairs, seed=0, held_out=0.2)[1])
    assert len(held_out) == 10 and set(held_out.values()) == {2}


def test_split_share():
    examples = steps(10)
    assert split(examples, 0, held_out=0) == (examples, [])
    assert len(split(examples, 0, held_out=0.001)[1]) == 3  # one row
    for share in (1, -0.1, math.nan):
        with pytest.raises(UserError, match="held-out share"):
            split(examples, 0, held_out=share)
    with pytest.raises(UserError, match="leaves one side empty"):
        split(steps(1), 0)


def test_epochs_are_permutations_without_straddling():
    whole = EpochOrder(n=10, seed=0)
    epochs = [[whole.take(step, 3) for step in range(3 * e, 3 * e + 3)] for e in range(4)]
    for epoch in epochs:
        drawn = sum(epoch, [])
        assert len(set(drawn)) == 9 and set(drawn) <= set(range(10))
    assert len({str(epoch) for epoch in epochs}) == 4
    assert [whole.epoch(step, 3) for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert whole.steps_per_epoch(3) == 3
    assert {i for step in range(60) for i in whole.take(step, 3)} == set(range(10))  # the left-out one changes


def test_order_is_a_function_of_seed_step_and_count():
    expected = [EpochOrder(7, 1).take(step, 2) for step in range(20)]
    shuffled = EpochOrder(7, 1)
    for step in (19, 3, 3, 0, 11):
        assert shuffled.take(step, 2) == expected[step]
    assert [EpochOrder(7, 2).take(step, 2) for step in range(20)] != expected
    # the same permutation whatever the count, and on every machine: these values are numpy's raw PCG64 stream
    assert EpochOrder(7, 1).take(0, 7) == sum([EpochOrder(7, 1).take(step, 1) for step in range(7)], [])
    assert EpochOrder(7, 1).take(0, 7) == [2, 4, 5, 0, 6, 3, 1]


def test_order_errors():
    for count in (0, 8):
        with pytest.raises(UserError, match="prompts a step"):
            EpochOrder(7, 0).take(0, count)


def test_order_docstring():
    assert doctest.testmod(data) == (0, 3)
