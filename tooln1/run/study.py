"""Run a study: arms (presets and settings) x seeds, each trained and evaluated, to a table with mean and spread.

    python -m tooln1.run.study studies/demo_table4.toml        # one job after another; goes on after an interruption
    python -m tooln1.run.study studies/table4.toml --print     # the commands of each job, a line each
    python -m tooln1.run.study studies/table4.toml --job 3     # only this one: for the job array of a cluster

The file holds the fields of `Study`. A job that is done with these settings is skipped.
"""

import argparse
import importlib.util
import json
import re
import shlex
import statistics
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tooln1.config import Config, load_config
from tooln1.io.errors import UserError, exit_on_user_error
from tooln1.io.files import atomic_write
from tooln1.io.jsonl import read_text
from tooln1.run.lifecycle import recorded_settings
from tooln1.run.metrics import read_metrics
from tooln1.run.plot import figure

PREPARE = {"eval.py": "results.json"}  # what else a study file may run -> the file that says it is done
PREPARE |= dict.fromkeys(("tooln1.prepare", "tooln1.prepare.distill", "tooln1.demo"), "report.json")


@dataclass(frozen=True)
class Arm:
    """One row of the table."""

    name: str
    stages: list[dict[str, Any]]  # trained one after another: {"config": preset, and settings}; [] evaluates `model`
    model: str = ""  # where the first stage starts; empty: the preset's
    paper: float | None = None  # the paper's figure


@dataclass(frozen=True)
class Study:
    """The content of a study file."""

    title: str
    arms: list[Arm]
    eval: list[str]  # options of eval.py
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    settings: dict[str, Any] = field(default_factory=dict)  # of every stage
    prepare: list[list[str]] = field(default_factory=list)  # a key of PREPARE and its options, --out FOLDER last
    paper: str = ""  # what the arms' `paper` figures are
    gpus: int = 0  # processes that torchrun starts; 0: plain python


@dataclass(frozen=True)
class Job:
    """One arm with one seed: a training for each stage, which starts from the one before it, and the evaluation."""

    arm: Arm
    configs: list[Config]  # of the stages
    commands: list[list[str]]
    folder: Path

    def recipe(self) -> list[str]:
        """What the results depend on, which done.json holds when the job is done."""
        evaluation = self.commands[-1]
        return [*map(recorded_settings, self.configs), shlex.join(evaluation[evaluation.index("eval.py") :])]

    def is_done(self) -> bool:
        file = self.folder / "done.json"
        return file.exists() and json.loads(read_text(file)) == self.recipe()

    def scores(self) -> dict[str, float]:
        """The totals of the benchmarks in per cent; {} before the job is done."""
        found = json.loads(read_text(self.folder / "eval" / "results.json"))["benchmarks"] if self.is_done() else {}
        return {
            f"{bench}: {name}": 100 * total["accuracy"]
            for bench, result in found.items()
            for name, total in result["totals"].items()
        }


def read_study(path: Path) -> Study:
    """The study in a TOML file. Raises UserError for one that cannot be read, and for unknown or missing keys."""
    text = read_text(path)
    try:
        table = tomllib.loads(text)
        study = Study(**table | {"arms": [Arm(**arm) for arm in table["arms"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a study: {error}.") from None
    for name, *options in study.prepare:
        if name not in PREPARE or options[-2:-1] != ["--out"]:
            raise UserError(f"{path}: prepare takes {', '.join(PREPARE)} with --out FOLDER last, not {name!r}.")
    return study


def jobs_of(study: Study, out: Path) -> list[Job]:
    """The jobs, all settings checked. An arm without training has one, whatever the seeds."""
    return [
        make_job(study, arm, seed, out / re.sub(r"\W+", "_", arm.name) / f"seed{seed}")
        for arm in study.arms
        for seed in (study.seeds if arm.stages else study.seeds[:1])
    ]


def make_job(study: Study, arm: Arm, seed: int, folder: Path) -> Job:
    """The job with its commands, which write into `folder`. Raises UserError for settings that are wrong."""
    start = ["torchrun", "--standalone", "--nproc-per-node", str(study.gpus)] if study.gpus else [sys.executable]
    model, configs, commands = arm.model, [], []
    for number, stage in enumerate(arm.stages, start=1):
        run_dir = str(folder / f"stage{number}")
        settings = study.settings | stage | {"seed": seed, "run_dir": run_dir} | ({"model": model} if model else {})
        options = []
        for key, value in settings.items():
            options += [f"--{key.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
        configs.append(load_config(options, "configs/demo.toml"))
        commands.append([*start, "train.py", *options, "--resume", "auto"])
        model = f"{run_dir}/hf"
    think = ["--no-think"] if configs and not configs[-1].think else []
    commands.append([*start, "eval.py", "--model", model, *study.eval, *think, "--out", str(folder / "eval")])
    return Job(arm, configs, commands, folder)


def run(command: list[str]) -> None:
    """Run a command to its end; an interrupted one may save first. Raises UserError where it fails."""
    print(f"$ {shlex.join(command)}", flush=True)
    process = subprocess.Popen(command)
    try:
        process.wait()
    finally:  # after Ctrl-C, which the terminal sent to the command too
        process.wait()
    if code := process.returncode:
        raise UserError(f"exit code {code} of {shlex.join(command)}; run the study again to go on from there.")


def markdown(study: Study, jobs: list[Job]) -> str:
    """The table: for each arm and total the mean over the seeds ± their standard deviation (n - 1)."""
    columns = list(dict.fromkeys(name for job in jobs for name in job.scores()))
    heading = ["arm", "seeds", *columns, *([f"paper: {study.paper}"] if study.paper else [])]
    lines = [f"# {study.title}", "", f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for arm in study.arms:
        rows = [scores for scores in (job.scores() for job in jobs if job.arm is arm) if scores]
        cells = [arm.name, str(len(rows))]
        for name in columns:
            values = [row[name] for row in rows]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}" if values else "-")
        cells += ["-" if arm.paper is None else f"{arm.paper:.2f}"] if study.paper else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean_run(jobs: list[Job]) -> list[dict[str, Any]]:
    """The metrics of the last stage by step, each the mean over the jobs."""
    runs = [read_metrics(Path(job.configs[-1].run_dir) / "metrics.jsonl") for job in jobs]
    return [
        {
            name: statistics.fmean(row[name] for row in rows)
            for name in rows[0]
            if all(row.get(name) is not None for row in rows)
        }
        for rows in zip(*runs, strict=False)
    ]


def main() -> None:
    """Read the study; run, or print, its jobs; write the table and the curves."""
    parser = argparse.ArgumentParser("python -m tooln1.run.study", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, metavar="TOML", help="a study, such as studies/demo_table4.toml")
    parser.add_argument("--out", type=Path, help="directory to write into (runs/studies/NAME)")
    parser.add_argument("--job", type=int, metavar="N", help="run only this job, counted from 0 as --print lists them")
    parser.add_argument("--print", action="store_true", help="print each job's commands and run nothing")
    options = parser.parse_args()
    study = read_study(options.study)
    out = options.out or Path("runs/studies") / options.study.stem
    jobs = jobs_of(study, out)
    missing = [
        [sys.executable, *([name] if name == "eval.py" else ["-m", name]), *arguments]
        for name, *arguments in study.prepare
        if not (Path(arguments[-1]) / PREPARE[name]).exists()
    ]
    if options.print:
        print(*(f"# first: {shlex.join(command)}" for command in missing), sep="\n")
        print(*(" && ".join(map(shlex.join, job.commands)) for job in jobs), sep="\n")
        return
    if options.job is not None:  # of several at once, perhaps
        if missing or not 0 <= options.job < len(jobs):
            raise UserError(f"--job takes 0 to {len(jobs) - 1}, and the data that --print says to prepare first.")
        jobs = jobs[options.job :][:1]
    for command in missing:
        run(command)
    for job in jobs:
        if not job.is_done():
            print(f"\n{job.folder}")
            for command in job.commands:
                run(command)
            with atomic_write(job.folder / "done.json") as file:
                json.dump(job.recipe(), file)
    if options.job is not None:
        return
    with atomic_write(out / "table.md") as file:
        file.write(markdown(study, jobs))
    print(f"\n{markdown(study, jobs)}\nwritten: {out}/table.md")
    if importlib.util.find_spec("matplotlib"):
        trained = [job for job in jobs if job.configs and job.configs[-1].mode == "rl" and job.scores()]
        arms = {arm.name: [job for job in trained if job.arm is arm] for arm in study.arms}
        figure({name: mean_run(mine) for name, mine in arms.items() if mine}).savefig(out / "curves.png", dpi=100)


if __name__ == "__main__":
    exit_on_user_error(main)
