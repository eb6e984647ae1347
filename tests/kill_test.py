"""Kill a run again and again, resume it each time, and compare it with one that was not disturbed.

    python tests/kill_test.py                                   # 25 SIGKILLs on the demo, with 1 and with 2 processes
    python tests/kill_test.py --kills 5 --processes 2 --seed 3 --config other.toml --steps 4

Each kill comes a random moment after the run has entered a phase (load, rollout, logprobs, update, eval, save, export);
with two processes every other one hits a single rank, and torchrun must end the job. At the end weights, optimizer
state, logs and replies must be bit-equal to those of the undisturbed run, times aside. Options that are not listed by
--help go to train.py, instead of those of the demo.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny import ROOT, Job, assert_same_run, is_running, torchrun_command

PHASES = ("save", "rollout", "update", "export", "save", "logprobs", "eval", "load")
LONGEST_DELAY = {"save": 0.08, "export": 0.05, "load": 2.0}  # seconds from a phase's begin to the kill; else:
USUAL_DELAY = 0.6
DEMO = (
    f"--config {ROOT}/configs/demo.toml --steps 10 --prompts-per-step 16 --save-every 3 --keep-checkpoints 2 "
    "--keep-every 6 --eval-every 4 --max-eval-examples 40"
).split()


def start(run_dir: Path, options: list[str], processes: int) -> Job:
    """Start, or resume, a run that announces its phases."""
    launcher = torchrun_command(processes) if processes > 1 else [sys.executable]
    arguments = [*options, "--eval-before-training", "--resume", "auto", "--run-dir", str(run_dir)]
    return Job(run_dir.with_suffix(".log"), [*launcher, str(ROOT / "tests/announcing_train.py"), *arguments])


def kill_one(job: Job, draw: random.Random) -> None:
    """SIGKILL one rank; torchrun gives the others 30 s to end."""
    workers = job.workers()
    with contextlib.suppress(ProcessLookupError):
        os.kill(draw.choice(workers), signal.SIGKILL)
    job.end(40)
    assert not any(map(is_running, workers))


def kill_test(folder: Path, options: list[str], processes: int, kills: int, seed: int) -> tuple[Counter, int]:
    """Kill and resume until `kills` are done and the run has ended; (kills by phase, runs that ended, as they must)."""
    draw, killed, runs = random.Random(seed), Counter(), 0
    code, text = start(folder / "reference", options, processes).end(3600)
    assert code == 0, text
    while killed.total() < kills or not runs:
        victim, ended = folder / f"victim-{runs}", False
        while not ended:
            job, done = start(victim, options, processes), killed.total()
            phase = PHASES[(done + seed) % len(PHASES)]
            if done >= kills or not job.wait_for(f"[{phase}]", draw.choice((1, 1, 2))):
                code, text = job.end(3600)
                assert code == 0, text
                ended = True
                continue
            time.sleep(draw.uniform(0, LONGEST_DELAY.get(phase, USUAL_DELAY)))
            if job.process.poll() is None:
                if processes > 1 and done % 2:
                    kill_one(job, draw)
                else:
                    job.kill()
                killed[phase] += 1
            assert "Traceback" not in job.text() or processes > 1, job.text()
        assert_same_run(victim, folder / "reference")
        runs += 1
    return killed, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    arguments, options = parser.parse_known_args()
    for processes in arguments.processes:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            killed, runs = kill_test(Path(folder), options or DEMO, processes, arguments.kills, arguments.seed)
        kills = ", ".join(f"{count} in {phase}" for phase, count in killed.items())
        print(
            f"{processes} process(es): {killed.total()} kills ({kills}); {runs} runs came to their end, each bit-equal "
            f"to the undisturbed one; {time.monotonic() - begin:.0f} s in all",
            flush=True,
        )


if __name__ == "__main__":
    main()
