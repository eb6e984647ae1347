"""Mutated data files and model directories are used or refused, never more; the long run is `fuzz_files.py` itself."""

import pytest
from fuzz_files import base_models, fuzz_models, fuzz_rows, run, use_model

from tooln1.io.errors import UserError


def test_mutated_rows(tmp_path):
    outcomes, wrong, worst = run(fuzz_rows(600, 7, tmp_path))
    assert not wrong, "\n".join(wrong)
    assert sum(outcomes.values()) == 600 and worst[0] < 2, worst
    for kind in ("example", "prediction", "sft", "toolace", "xlam"):  # a fuzz that is always refused shows nothing
        assert outcomes[f"{kind} row accepted"] > 5 and outcomes[f"{kind} row refused"] > 20, outcomes


def test_mutated_models(tmp_path):
    outcomes, wrong, worst = run(fuzz_models(120, 7, tmp_path))
    assert not wrong, "\n".join(wrong)
    assert outcomes["model accepted"] > 5 and outcomes["model refused"] > 30, outcomes
    assert worst[0] < 10, worst


@pytest.mark.parametrize("number", range(3))
def test_the_models_that_are_mutated_are_whole(tmp_path, number):
    (tmp_path / "whole").mkdir()
    for name, data in base_models(tmp_path)[number].items():
        (tmp_path / "whole" / name).write_bytes(data)
    use_model(tmp_path / "whole", tmp_path / "marker")


def test_a_traceback_counts_as_wrong(tmp_path):
    def fails():
        raise KeyError("x")

    def refuses_without_a_row():
        raise UserError(f"{tmp_path}/rows.json is bad")

    outcomes, wrong, _ = run(iter([("x row 0", fails, tmp_path), ("x row 1", refuses_without_a_row, tmp_path / "r")]))
    assert outcomes == {"x row failed": 1, "x row refused": 1} and len(wrong) == 2
