"""Shared by all tests: one thread a process, and where the reference data lie, if this checkout has them."""

import gzip
import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, also for the processes that tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"
FIXTURES = Path(__file__).parent / "fixtures"


def shared(path: str) -> Path:
    """The reference file or folder at `path`, or a skip where this checkout has none."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"reference data not here: {path}")
    return found


def shared_rows(path: str) -> list[dict]:
    """The rows of a compressed JSONL file of the reference data, or a skip."""
    with gzip.open(shared(path), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def reference(path: str) -> Path:
    """Reference values at `path`: the full set where this checkout has it, else the sample committed with the tests."""
    found = SHARED / "reference" / path
    return found if found.exists() else FIXTURES / "reference" / path


# The reference models of the families that model.py knows.
MODELS = sorted(path.name for path in reference("models/dev").iterdir())
