"""The study runner: its jobs, what it skips and goes on with, its table."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from tooln1.io.errors import UserError
from tooln1.run.study import jobs_of, markdown, read_study

ROOT = Path(__file__).resolve().parents[1]
STUDIES = sorted((ROOT / "studies").glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_of_the_repository(path):
    """All settings are known, each arm has its own directory, and the data that is prepared is what is read."""
    study = read_study(path)
    jobs = jobs_of(study, Path("runs"))
    assert len({job.folder for job in jobs}) == len(jobs) >= 3 * sum(bool(arm.stages) for arm in study.arms)
    made = [command[-1] for command in study.prepare] + ["data/tool_n1"]  # which README makes
    if path.stem == "table3":
        made += ["data/distilled"]  # by a teacher that costs money: docs/data.md
    for job in jobs:
        for file in (file for config in job.configs for file in (config.train_data, config.eval_data) if file):
            assert Path(file).exists() or str(Path(file).parent) in made, file


def write_study(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path


def tiny_study(folder: Path) -> Path:
    """Two arms, one of them of two stages, on a tiny model."""
    model = tiny.write_model(folder)
    tiny.write_data(folder)
    return write_study(
        folder,
        f"""
        title = "Tiny"
        seeds = [0, 1]
        paper = "points"
        eval = ["--bench", "examples={folder}/data.jsonl", "--max-reply-tokens", "8", "--limit", "2"]
        [settings]
        train_data = "{folder}/data.jsonl"
        eval_data = ""
        steps = 2
        prompts_per_step = 4
        prompts_per_minibatch = 4
        group_size = 2
        max_reply_tokens = 8
        max_prompt_tokens = 4096
        [[arms]]
        name = "no training"
        stages = []
        model = "{model}"
        [[arms]]
        name = "SFT, then RL"
        stages = [{{model = "{model}", mode = "sft"}}, {{think = false, reward = "binary_no_think"}}]
        paper = 1.5
        """,
    )


def test_jobs(tmp_path):
    study = read_study(tiny_study(tmp_path))
    raw, first, second = jobs_of(study, tmp_path / "out")
    assert raw.configs == [] and len(raw.commands) == 1
    assert [config.mode for config in first.configs] == ["sft", "rl"]
    assert [config.seed for config in second.configs] == [1, 1]
    assert first.configs[1].model == f"{first.configs[0].run_dir}/hf"
    *_, evaluation = first.commands
    assert evaluation[evaluation.index("--model") + 1] == f"{first.configs[1].run_dir}/hf"
    assert "--no-think" in evaluation and "--no-think" not in raw.commands[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("title = 'x'\nseed = [0]\narms = []\neval = []", "unexpected keyword argument 'seed'"),
        ("title = 'x'\neval = []", "'arms'"),
        ("title = 'x'\neval = []\n[[arms]]\nname = 'a'", "'stages'"),
        ("title = ", "is not a study"),
        ("title = 'x'\neval = []\narms = []\nprepare = [['os', '--out', 'x']]", "prepare takes"),
        ("title = 'x'\neval = []\narms = []\nprepare = [['tooln1.prepare', '--out', 'x', '--xlam']]", "prepare takes"),
    ],
)
def test_a_wrong_study_is_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        read_study(write_study(tmp_path, change))


def test_wrong_settings_end_it_before_anything_runs(tmp_path):
    path = write_study(tmp_path, "title='x'\neval=[]\n[[arms]]\nname='a'\nstages=[{stepz = 3}]")
    with pytest.raises(UserError, match="Did you mean 'steps'"):
        jobs_of(read_study(path), tmp_path)


def test_table(tmp_path):
    study = read_study(tiny_study(tmp_path))
    jobs = jobs_of(study, tmp_path / "out")
    for job, accuracy in zip(jobs, (0.5, 0.9, 0.92), strict=True):
        (job.folder / "eval").mkdir(parents=True)
        totals = {"overall": {"accuracy": accuracy}}
        (job.folder / "eval" / "results.json").write_text(json.dumps({"benchmarks": {"examples": {"totals": totals}}}))
        (job.folder / "done.json").write_text(json.dumps(job.recipe()))
    assert markdown(study, jobs).splitlines()[2:] == [
        "| arm | seeds | examples: overall | paper: points |",
        "|---|---|---|---|",
        "| no training | 1 | 50.0 | - |",
        "| SFT, then RL | 2 | 91.0 ± 1.4 | 1.50 |",
    ]
    (jobs[2].folder / "done.json").unlink()
    assert "| SFT, then RL | 1 | 90.0 | 1.50 |" in markdown(study, jobs)
    path = tmp_path / "study.toml"
    for change in (("steps = 2", "steps = 3"), ('"--limit", "2"', '"--limit", "1"')):
        path.write_text(tiny_study(tmp_path).read_text().replace(*change))
        assert not jobs_of(read_study(path), tmp_path / "out")[1].is_done()


@pytest.mark.slow
def test_an_interrupted_study_goes_on_and_skips_what_is_done(tmp_path):
    path = tiny_study(tmp_path)
    path.write_text(path.read_text().replace("seeds = [0, 1]", "seeds = [0]"))
    command = [sys.executable, "-m", "tooln1.run.study", str(path), "--out", str(tmp_path / "out")]
    how = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs ignore
    started = subprocess.Popen(command, **how)
    for line in started.stdout:
        if line.startswith("step 1/2"):
            os.killpg(started.pid, signal.SIGINT)
            break
    started.stdout.read()
    assert started.wait(60) == 130
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "resuming from" in second.stdout and "| SFT, then RL | 1 |" in second.stdout
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "train.py" not in third.stdout and "| SFT, then RL | 1 |" in third.stdout
