"""Shared by all tests: where the reference data lie, if this checkout has them."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"
FIXTURES = Path(__file__).parent / "fixtures"


def shared(path: str) -> Path:
    """The reference file or folder at `path`, or a skip where this checkout has none."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"reference data not here: {path}")
    return found


def reference(path: str) -> Path:
    """Reference values at `path`: the full set where this checkout has it, else the sample committed with the tests."""
    found = SHARED / "reference" / path
    return found if found.exists() else FIXTURES / "reference" / path
