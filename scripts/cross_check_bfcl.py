"""Score the same replies with bfcl-eval and with tooln1.benchmarks.bfcl, and compare every verdict and error type.

    python scripts/cross_check_bfcl.py [--rounds 3] [--seed 0]

Runs where bfcl-eval is installed, which is best in an environment of its own: pip install --no-deps
bfcl-eval==2026.3.23, then numpy pandas python-dotenv filelock overrides tqdm. Each case gets a reply made of its
accepted values: as they are in the first round, with a random change in the others. `write_results` writes the
replies, bfcl-eval's own runner scores the files. What it imports for other models, and is not installed, is left empty.
"""

import argparse
import importlib.util
import json
import os
import random
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bfcl_fixtures import gold_calls, mutated  # noqa: E402

from tooln1.benchmarks import bfcl  # noqa: E402
from tooln1.io.files import atomic_write  # noqa: E402
from tooln1.prompt import format_reply  # noqa: E402

# bfcl-eval knows no Tool-N1. This model's handler reads the JSON list that a call block holds, keeps dots in names,
# and fails to decode "".
OFFICIAL_MODEL = "Salesforce/Llama-xLAM-2-8b-fc-r"


class Empty(types.ModuleType):
    """Stands for a module that is not installed, and for whatever is called or inherited from in it."""

    __path__: list = []

    def __init__(self, name="", *_, **__):
        super().__init__(str(name))

    def __call__(self, *_, **__):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Empty(name)


def official_runner():
    """bfcl-eval's runner module, with empty modules for whatever is not installed."""
    while True:
        try:
            from bfcl_eval.eval_checker import eval_runner

            return eval_runner
        except ModuleNotFoundError as error:
            sys.modules[error.name] = Empty(error.name)


def write_results(predictions: dict[str, str], cases: list, folder: Path) -> None:
    """Write replies (id -> text) as the result files of OFFICIAL_MODEL, which bfcl-eval scores as `bfcl.score` does."""
    rows: dict[str, list[dict]] = {category: [] for category in bfcl.CATEGORIES}
    for case in cases:
        output = bfcl.stored_output(predictions[case.id])
        result = "" if bfcl.decoded(output) is None else json.dumps(output or [])
        rows[case.category].append({"id": case.id, "result": result})
    for category, results in rows.items():
        group = "live" if category.startswith("live_") else "non_live"
        name = f"BFCL_v4_{category}_result.json"
        with atomic_write(folder / OFFICIAL_MODEL.replace("/", "_") / group / name) as file:
            file.writelines(json.dumps(row) + "\n" for row in results)


def official_faults(predictions: dict[str, str], cases: list, folder: Path) -> dict[str, str]:
    """Id -> bfcl-eval's error type, "" where right, as its runner writes them into score files."""
    write_results(predictions, cases, folder / "result")
    found, scored = dict.fromkeys(predictions, ""), 0
    official_runner().runner(None, list(bfcl.CATEGORIES), folder / "result", folder / "score")
    for file in folder.glob("score/*/*/*_score.json"):
        header, *wrong = map(json.loads, file.read_text().splitlines())
        assert header["total_count"] - header["correct_count"] == len(wrong)
        found.update({row["id"]: row["error_type"] for row in wrong})
        scored += header["total_count"]
    assert scored == len(predictions), "its runner left replies out"
    return found


def main() -> None:
    """Compare, print what differs, and exit with 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None:
        sys.exit("bfcl-eval is not installed here: pip install --no-deps bfcl-eval==2026.3.23")
    cases, rng, differing = bfcl.load(Path(spec.origin).parent), random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BFCL_PROJECT_ROOT"] = folder  # where it puts its lock files
        for number in range(options.rounds):
            blocks = [mutated(gold_calls(case), rng) if number else gold_calls(case) for case in cases]
            predictions = {case.id: format_reply(block) for case, block in zip(cases, blocks, strict=True)}
            ours = {case.id: bfcl.score(case, predictions[case.id]).why for case in cases}
            theirs = official_faults(predictions, cases, Path(folder, str(number)))
            wrong = [name for name in ours if ours[name] != theirs[name]]
            for name in wrong[:5]:
                print(f"{name}: {ours[name]!r}, bfcl-eval {theirs[name]!r}: {predictions[name]}")
            print(f"round {number}: {len(ours)} replies, {list(ours.values()).count('')} right, {len(wrong)} differ")
            differing += len(wrong)
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
