"""Mutated data files are used or refused; `fuzz_files.py` itself makes the long run."""

import pytest
from fuzz_files import KINDS, fuzz_rows, run


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_rows(tmp_path, count):
    outcomes, wrong = run(fuzz_rows(count, 7, tmp_path))
    assert not wrong, "\n".join(wrong)
    for kind in KINDS:  # a fuzz that is always refused, or never, shows nothing
        assert outcomes[f"{kind} row accepted"] and outcomes[f"{kind} row refused"], outcomes
