"""docs/one_step.md: its numbers are those of a step of train.py."""

import re
import sys
from pathlib import Path

import pytest
import torch
from tiny import measured

import train
from tooln1.distributed import launch
from tooln1.model import load_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from one_step import BLOCKS, PAGE, Step, agree, config_of, filled  # noqa: E402


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def step():
    return Step()


@pytest.mark.slow
def test_the_page_is_what_the_step_gives(page, step):
    assert re.findall("<!-- (.*) -->", page) == [block.__name__ for block in BLOCKS]
    assert agree(page, filled(page, step))
    for block in BLOCKS:
        emptied = re.sub(rf"(<!-- {block.__name__} -->\n)(.+\n)*", r"\1", page)
        assert not agree(emptied, page) and agree(filled(emptied, step), page)


@pytest.mark.slow
def test_the_noted_step_is_that_of_an_ordinary_run(step, tmp_path):
    with launch("cpu") as world:
        train.train(config_of(tmp_path), world)
    for noted, ordinary in zip(step.policies[-1].parameters(), load_model(tmp_path / "hf").parameters(), strict=True):
        assert torch.equal(noted, ordinary)
    (row,) = measured(tmp_path)
    assert row["grad_norm"] == sum(result.grad_norm for result in step.results) / 2
    assert row["loss"] == sum(result.loss for result in step.results) / 2
    assert all(step.metrics[name] == value for name, value in row.items() if name != "step")


@pytest.mark.parametrize(
    "said, instead, same",
    [
        ("1.4530", "1.4531", True),  # ρ of a token: another CPU's rounding
        ("1.4530", "1.4730", False),
        ("2.01e-04", "2.05e-04", False),
        ("| 0.0010 | 0.0000 |", "| 0.0010 | 0.0002 |", False),
        ("of 203 tokens", "of 204 tokens", False),
        ("wrong count", "wrong names", False),
        ("| 117 | 90 |", "| 117 | 117 |", False),
        ("| 1.4530 |", "| |", False),
    ],
)
def test_a_page_may_differ_by_rounding_alone(page, said, instead, same):
    assert said in page
    assert agree(page.replace(said, instead), page) == same
