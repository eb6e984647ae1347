"""Kill a run again and again, resume it each time, and compare with one that was left alone.

    python tests/kill_test.py                                   # 25 SIGKILLs on the demo, 1 and 2 processes
    python tests/kill_test.py --kills 5 --processes 2 --seed 3

Each kill comes a random moment after the run has entered a phase (load, rollout, logprobs, update, eval, save, export);
with two processes it hits, in turn, everything at once or one of them, which must end the job within seconds. In the
end weights, optimizer state, logs and replies must be bit-equal to those of the run that was left alone, times aside.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("save", "rollout", "update", "export", "save", "logprobs", "eval", "load")
LENGTH = {"save": 0.08, "export": 0.05, "load": 2.0}  # seconds in which the kill comes; else:
USUALLY = 0.6
PATIENCE = 240  # seconds in which a phase must come
DEMO = [
    "--config",
    str(ROOT / "configs" / "demo.toml"),
    "--steps",
    "10",
    "--prompts-per-step",
    "16",
    "--save-every",
    "3",
    "--keep-checkpoints",
    "2",
    "--keep-every",
    "6",
    "--eval-every",
    "4",
    "--eval-rows",
    "40",
]
TIMES = ("seconds/", "tokens_per_second/")


@dataclass
class Report:
    """What happened to the victim."""

    kills: Counter = field(default_factory=Counter)  # by phase
    runs: int = 0  # that came to their end
    slowest_end: float = 0.0  # seconds from the death of one process to the end of the job
    unfinished: int = 0  # starts that found a half-written checkpoint


class Job:
    """A run in processes of its own, which announces its phases."""

    def __init__(self, run_dir: Path, options: list[str], processes: int, announcements: Path):
        announcements.write_bytes(b"")
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launcher, str(ROOT / "tests" / "announcing_train.py"), *options, "--run-dir", str(run_dir)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ANNOUNCE_TO": str(announcements)}
        self.output = announcements.with_suffix(".log").open("w+")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.announcements, self.processes = announcements, processes

    def wait_for(self, phase: str, count: int) -> bool:
        """Until the phase has begun for the `count`-th time; False where the job ends before."""
        until = time.monotonic() + PATIENCE
        while self.announcements.read_bytes().split().count(phase.encode()) < count:
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < until, f"{phase} did not come\n{self.text()}"
            time.sleep(0.002)
        return True

    def workers(self) -> list[int]:
        """Process ids of the ranks."""
        if self.processes == 1:
            return [self.process.pid]
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def kill(self, one: random.Random | None) -> float:
        """SIGKILL everything, or one rank drawn by `one`; returns the seconds until the job has ended."""
        workers = self.workers()
        start = time.monotonic()
        for pid in [one.choice(workers)] if one and len(workers) > 1 else [self.process.pid, *workers]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=60)
        for pid in workers:  # orphans of a killed torchrun: they must be gone before the next start
            while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
                time.sleep(0.01)
        return time.monotonic() - start

    def text(self) -> str:
        """What the job has printed."""
        self.output.seek(0)
        return self.output.read()


def finish(run_dir: Path, options: list[str], processes: int, announcements: Path) -> None:
    """A run that is left alone."""
    job = Job(run_dir, options, processes, announcements)
    assert job.process.wait(timeout=3600) == 0, job.text()


def kill_test(folder: Path, options: list[str], processes: int, kills: int, seed: int) -> Report:
    """Run once undisturbed, then kill and resume until `kills` are done and the run has come to its end."""
    draw, report, announcements = random.Random(seed), Report(), folder / "announcements"
    reference, options = folder / "reference", [*options, "--eval-before-training"]
    finish(reference, options, processes, announcements)
    while sum(report.kills.values()) < kills or not report.runs:
        victim, ended = folder / f"victim-{report.runs}", False
        while not ended:
            job = Job(victim, [*options, "--resume", "auto"], processes, announcements)
            done = sum(report.kills.values())
            phase = PHASES[(done + seed) % len(PHASES)]
            if done >= kills or not job.wait_for(phase, draw.choice((1, 1, 2))):
                assert job.process.wait(timeout=3600) == 0, job.text()
                ended = True
            else:
                time.sleep(draw.uniform(0, LENGTH.get(phase, USUALLY)))
                if job.process.poll() is None:
                    one = draw if done % 2 else None
                    seconds = job.kill(one)
                    if one:
                        report.slowest_end = max(report.slowest_end, seconds)
                    report.kills[phase] += 1
            report.unfinished += "writing it was not finished" in job.text()
            assert "Traceback" not in job.text() or processes > 1, job.text()
        compare(reference, victim)
        report.runs += 1
    return report


def compare(reference: Path, victim: Path) -> None:
    """Bit-equal weights, optimizer state and logs; every step once; nothing left over."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        ours, theirs = measured(victim / name), measured(reference / name)
        assert ours == theirs, f"{name} differs"
    steps = [row["step"] for row in measured(victim / "metrics.jsonl")]
    assert steps == list(range(len(steps))), steps
    files = {path.relative_to(reference) for path in reference.rglob("*") if path.is_file()}
    there = {path.relative_to(victim) for path in victim.rglob("*") if path.is_file()}
    assert there == files, f"files differ: {sorted(map(str, there ^ files))}"
    for path in files:
        if path.suffix == ".safetensors" or path.parts[0] == "hf":
            assert (victim / path).read_bytes() == (reference / path).read_bytes(), f"{path} differs"


def measured(log: Path) -> list[dict]:
    """The rows of a log, but for the times; those of metrics.jsonl merged by step."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").split("\n")[:-1]]
    if log.name == "metrics.jsonl":
        steps: dict[int, dict] = {}
        for row in rows:
            steps.setdefault(row["step"], {}).update(row)
        rows = list(steps.values())
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for processes in arguments.processes:
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            report = kill_test(Path(folder), DEMO, processes, arguments.kills, arguments.seed)
        kills = ", ".join(f"{count} in {phase}" for phase, count in report.kills.items())
        print(
            f"{processes} process(es): {sum(report.kills.values())} kills ({kills}); {report.runs} runs came to their "
            f"end, each bit-equal to the undisturbed one; {report.unfinished} starts found a half-written "
            f"checkpoint; a job ended {report.slowest_end:.1f} s after the death of one process at the latest; "
            f"{time.monotonic() - start:.0f} s in all",
            flush=True,
        )


if __name__ == "__main__":
    main()
