"""One GPU, 25 minutes: is the CUDA path correct, how fast is it beside the card's limits, and where does time go?

    python perf/gpu.py --all --markdown gpu.md        # every part in a process of its own, of at most 8 minutes
    python perf/gpu.py --part rollout-7B              # one part, in this process
    python perf/gpu.py --markdown gpu.md              # only the tables, of what --out has
    python perf/gpu.py --all --dry-run                # the same on the CPU with a tiny model: does the script run?

A part's results replace its earlier ones in the JSON file --out. gpu_parts.py says what is measured, and how.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_parts import DRY_RUN, Row, Scale, Tables, rollout, update
from shapes import DEMO, ROOT, machine

from tooln1.io.files import atomic_write
from tooln1.io.jsonl import read_jsonl
from tooln1.model import random_model, save_model

PART_SECONDS, ALL_SECONDS = 480, 1500
TITLES = {
    "environment": "Environment",
    "tests": "Tests",
    "checks": "Engine checks",
    "limits": "Measured limits: a large matrix product in bf16, a large copy",
    "prefill": "Prefill of 64 prompts",
    "decode": "Decoding; the limit is max(FLOPs / matmul rate, bytes of weights and each row's KV cache / bandwidth)",
    "batches": "Whole batches, five ragged replies to a prompt",
    "generate": "Beside transformers' generate, 64 prompts x 5",
    "update": "Update, on executed tokens",
    "steps": "Runs of train.py: seconds of a step by phase",
    "losses": "The five largest losses: time beyond the limit of a kind of kernel",
}


def environment(scale: Scale) -> Tables:
    """Versions of what is below us, and the card's memory."""
    row: Row = {"device": machine(), "torch": torch.__version__}
    if scale.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        row |= {"triton": metadata.version("triton"), "cuDNN": torch.backends.cudnn.version()}
        row |= {"driver, memory": subprocess.check_output(query, text=True).splitlines()[0]}
    yield "environment", [row]


def run(*arguments: str) -> str:
    """Run Python with these arguments, show what it prints, and return its last line; it must end with 0."""
    last, command = "", [sys.executable, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        for line in child.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    if child.returncode:
        raise SystemExit(f"{arguments[:2]}: exit code {child.returncode}, {last}")
    return last


def tests(scale: Scale) -> Tables:
    """What only a GPU can show, slow tests too."""
    os.environ["TOOLN1_TEST_DEVICE"] = scale.device
    what = ("slow or not slow", "tests/test_cuda.py", "tests/test_paged_attention.py")
    yield "tests", [{"result": run("-m", "pytest", "-q", "-m", *what)}]


def checks(scale: Scale) -> Tables:
    """The engine's tokens and log-probs."""
    yield "checks", json.loads(run("perf/rollout.py", "--device", scale.device, "--only", "check"))["check"]


def train(scale: Scale, **settings: object) -> Tables:
    """A short run of train.py with the demo's settings, changed by `settings`."""
    settings |= {"device": scale.device, "steps": scale.train[0], "eval_data": "", "eval_before_training": "false"}
    with tempfile.TemporaryDirectory() as folder:
        words = (word for key, value in settings.items() for word in (f"--{key}", str(value)))
        run("train.py", "--run_dir", f"{folder}/run", *words)
        steps = [row for row in read_jsonl(f"{folder}/run/metrics.jsonl") if "seconds/step" in row]
    phases = ("rollout", "reward", "logprobs", "update", "sync", "step")
    rows = [{"number": s["step"]} | {phase: s[f"seconds/{phase}"] for phase in phases} for s in steps]
    usual = statistics.median(row["step"] for row in rows[1:])
    for row in rows:
        row |= {"/ median": row["step"] / usual, "goal": 1.1 if row["number"] > 3 else ""}
    yield "steps", rows


def step(scale: Scale, size: str) -> Tables:
    """A few whole steps of a Qwen2.5 shape with random weights, on the demo's tokens and data."""
    _, prompts, minibatch, reply = scale.train
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(scale.shape(size), 0, torch.bfloat16)
        model.source = DEMO  # the tokenizer comes from there
        save_model(model, f"{folder}/model")
        del model
        sizes = {"prompts_per_step": prompts, "prompts_per_minibatch": minibatch, "group_size": 5}
        sizes |= {"max_reply_tokens": reply, "tokens_per_microbatch": scale.budget}
        memory = {"activation_checkpointing": "auto", "save_every": 0}
        yield from train(scale, model=f"{folder}/model", learning_rate=1e-6, **sizes, **memory)


PARTS = {"environment": environment, "tests": tests, "demo": train, "checks": checks}
for _work, _sizes in {rollout: ("1.5B", "3B", "7B"), update: ("1.5B", "3B"), step: ("1.5B",)}.items():
    PARTS |= {f"{_work.__name__}-{size}": partial(_work, size=size) for size in _sizes}


# ------------------------------------------------------------------------------------------------ running, reporting


def load(file: Path) -> dict[str, dict]:
    """The results so far: part -> status, seconds, device, and rows by table."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def save(file: Path, part: str, record: dict) -> None:
    """Replace a part's results."""
    done = load(file) | {part: record}
    with atomic_write(file) as out:
        json.dump(done, out, indent=1)


def run_part(part: str, scale: Scale, file: Path) -> None:
    """Measure, saving each table as soon as it is there."""
    start, record = time.perf_counter(), {"status": "did not end", "device": machine()}
    save(file, part, record)
    for table, rows in PARTS[part](scale):
        rows = [{"part": part} | row for row in rows]
        record |= {table: record.get(table, []) + rows, "seconds": time.perf_counter() - start}
        save(file, part, record)
        print("\n".join(markdown_table(rows)), flush=True)
    record["status"] = "ok"
    save(file, part, record)
    print(json.dumps({part: record}))


def run_all(arguments: list[str], file: Path) -> None:
    """Each part in a process of its own, one after another, whatever becomes of the others."""
    end = time.monotonic() + ALL_SECONDS
    for part in PARTS:
        print(f"\n===== {part}", flush=True)
        limit = max(0.0, min(PART_SECONDS, end - time.monotonic()))
        command = [sys.executable, __file__, "--part", part, "--out", file, *arguments]
        child = subprocess.Popen(command, start_new_session=True)
        try:
            status = f"exit code {child.wait(limit)}"
        except subprocess.TimeoutExpired:
            status = f"ended after {limit:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with what it started, which would keep the card's memory
        if child.wait():
            save(file, part, load(file).get(part, {}) | {"status": status})


def markdown_table(rows: list[Row]) -> list[str]:
    """The lines of a table of the rows, which may lack columns."""

    def shown(cell: object) -> str:
        if isinstance(cell, float):
            return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
        return f"{cell:,}" if isinstance(cell, int) else str(cell).replace("|", "/").replace("<", "&lt;")

    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([shown(row.get(column, "")) for column in columns] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def report(done: dict[str, dict]) -> str:
    """All tables, as Markdown."""
    about = ("status", "seconds", "device")
    lines = markdown_table([{"part": part} | {key: done[part].get(key, "") for key in about} for part in done])
    for table, title in TITLES.items():
        rows = [row for part in PARTS for row in done.get(part, {}).get(table, [])]
        lines += ["", f"### {title}", "", *markdown_table(rows)] if rows else []
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    if args.part:
        run_part(args.part, DRY_RUN if args.dry_run else Scale(), args.out)
    if args.all:
        run_all(["--dry-run"] if args.dry_run else [], args.out)
    if args.markdown:
        args.markdown.write_text(report(load(args.out)), encoding="utf-8")


if __name__ == "__main__":
    main()
