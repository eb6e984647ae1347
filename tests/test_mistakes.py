"""Each mistake of mistakes.py is one sentence on stderr and exit code 2, and leaves everything as it was."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import mistakes
import pytest
import tiny
import torch
from test_distributed import ROOT, torchrun
from test_train import settings

import eval as evaluation_script
import train
from tooln1.config import Config, to_toml
from tooln1.demo import __main__ as demo
from tooln1.io.errors import exit_on_user_error
from tooln1.prepare import __main__ as data
from tooln1.run import plot

TRAIN = (train.main, "--config base.toml")
EVAL = (evaluation_script.main, "--device cpu --bench examples=data.jsonl --out out")
CONVERT, DEMO, PLOT = (data.main, "--out out"), (demo.main, ""), (plot.main, "")
TABLE = [
    pytest.param(*program, *row[1:3], row[3:], id=f"{title}: {row[0]}")
    for title, program, rows in (
        ("settings", TRAIN, mistakes.SETTINGS),
        ("model", TRAIN, mistakes.MODEL),
        ("data", TRAIN, mistakes.DATA),
        ("run", TRAIN, mistakes.RUN),
        ("eval", EVAL, mistakes.EVAL),
        ("convert", CONVERT, mistakes.CONVERT),
        ("demo", DEMO, mistakes.DEMO),
        ("plot", PLOT, mistakes.PLOT),
        ("plot", PLOT, mistakes.WITH_MATPLOTLIB if find_spec("matplotlib") else []),
    )
    for row in rows
]


def run(patch, main, *arguments: str) -> int:
    """The exit code of an entry point, run in this process."""
    patch.setattr(sys, "argv", ["program", *(word for text in arguments for word in shlex.split(text))])
    try:
        exit_on_user_error(main)
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """What all programs work with: two models, data, raw data, a preset, a finished run, a finished evaluation."""
    place = tmp_path_factory.mktemp("usual")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        tiny.write_model(Path("narrow"), hidden_size=16).rename("other")
        shutil.rmtree("narrow")
        tiny.write_model(Path())
        tiny.write_data(Path())
        tools, answers = [{"name": "f", "parameters": {}}], [{"name": "f", "arguments": {}}]
        raw = [{"query": f"q{i}", "tools": json.dumps(tools), "answers": json.dumps(answers)} for i in range(4)]
        Path("xlam.json").write_text(json.dumps(raw))
        config = settings(Path(), "run", steps=2, eval_data="", eval_every=0, save_every=1, device="cpu")
        Path("base.toml").write_text(to_toml(Config(**config)))
        assert run(patch, *TRAIN, "--run-dir finished") == 0
        assert run(patch, *EVAL, "--model model --out evaluated --max-reply-tokens 2") == 0
        shutil.copytree("finished/checkpoints", "moved")
    return place


@pytest.fixture
def here(usual, tmp_path, monkeypatch):
    """A copy of all that as the current directory; no process group is left behind."""
    monkeypatch.chdir(shutil.copytree(usual, tmp_path / "here"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def break_files(files: dict) -> None:
    for path, change in ((Path(name), change) for name, change in files.items()):
        path.parent.mkdir(exist_ok=True)
        if change is None:
            path.unlink()
        elif isinstance(change, dict):
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
        else:
            path.write_bytes(change if isinstance(change, bytes) else change.encode())


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def sentence(stderr: str) -> str:
    """The one sentence on stderr; argparse shows the usage before it, and train.py the warnings of its checks."""
    *before, last = stderr.splitlines()
    if before and before[0].startswith("usage: "):
        assert all(line.startswith(" ") for line in before[1:]), stderr
        return last[last.index(": error: ") + 9 :]
    assert all(line.startswith("warning: ") for line in before), stderr
    assert last.startswith("error: ") and len(last) < 700, stderr
    return last.removeprefix("error: ")


@pytest.mark.parametrize(("main", "usual_arguments", "arguments", "words", "broken"), TABLE)
def test_a_mistake_is_a_sentence_and_changes_nothing(
    here, monkeypatch, capfd, main, usual_arguments, arguments, words, broken
):
    for change in broken:
        change(monkeypatch) if callable(change) else break_files(change)
    before = everything(Path())
    assert run(monkeypatch, main, usual_arguments, arguments) == 2
    told = sentence(capfd.readouterr().err)
    for word in words.split(" | "):
        assert word in told, told
    assert everything(Path()) == before


def process(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([f"{ROOT}/train.py", "--config", "base.toml", "--stpes", "3"], "there is no setting 'stpes'"),
        ([f"{ROOT}/eval.py", "--bench", "examples=gone", "--model", "x", "--out", "o"], "cannot read gone"),
        (["-m", "tooln1.prepare", "--xlam", "gone", "--out", "o"], "cannot read gone"),
        (["-m", "tooln1.demo", "data", "--out", "data.jsonl"], "data.jsonl is not a folder"),
        (["-m", "tooln1.run.plot", "gone"], "cannot read gone"),
    ],
    ids=["train", "eval", "data", "demo", "plot"],
)
def test_each_program_says_it_for_real(here, command, words):
    result = process(*command)
    assert result.returncode == 2
    assert words in sentence(result.stderr)


def test_two_processes_say_it_once(here):
    result = torchrun(2, "train.py", "--config", str(Path("base.toml").resolve()), "--model", "nowhere/at/all")
    assert result.returncode != 0 and result.stderr.count("\nerror: ") + result.stderr.startswith("error: ") == 1
    assert "error: 'nowhere/at/all': no such directory" in result.stderr


def test_an_unexpected_fault_keeps_its_traceback(here):
    code = "import train\ntrain.rl_step = lambda run, step, metrics: 1 / 0\ntrain.exit_on_user_error(train.main)"
    result = process("-c", code, "--config", "base.toml")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and result.stderr.rstrip().endswith("ZeroDivisionError: division by zero")
    assert "error: " not in result.stderr.replace("ZeroDivisionError: ", "")
