"""Mistakes of users: each ends with exit code 2 and one sentence naming file and key, and changes no file."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import eval as evaluation_script
import train
from tooln1.config import Config, to_toml
from tooln1.demo import __main__ as demo
from tooln1.prepare import __main__ as prepare
from tooln1.run import plot

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {  # the entry point, and the arguments before those of the table
    "train": (train.main, "--config base.toml"),
    "eval": (evaluation_script.main, "--device cpu --bench examples=data.jsonl --out out"),
    "prepare": (prepare.main, "--out out"),
    "demo": (demo.main, ""),
    "plot": (plot.main, ""),
}
ROW = vars(tiny.examples(1)[0])
PRESET, RESUME = "--config p.toml", "--run-dir finished --resume"


def spoil_checkpoints():
    for file in Path("finished/checkpoints").rglob("*.safetensors"):
        file.write_bytes(b"x")


def rename_a_setting():
    for file in Path("finished/checkpoints").rglob("index.json"):
        file.write_text(file.read_text().replace('"kl_coef"', '"kl_coeff"'))


# program, arguments, what the sentence names, and what is changed before: {file: its content; None: removed; a dict:
# keys of its JSON to change}, or a function
TABLE = [
    ("train", "--learning-rat 1", "learning-rat learning_rate"),
    ("train", "steps=3", "steps"),
    ("train", "--steps many", "--steps many"),
    ("train", "--steps", "--steps"),
    ("train", "--kl-coef nan", "kl_coef nan"),
    ("train", "--old-logprobs sampler --sampler-correction truncated", "sampler_correction truncated old_logprobs"),
    ("train", "--group-size 0", "group_size 0"),
    ("train", "--think maybe", "think maybe"),
    ("train", "--reward binry", "reward binry binary"),
    ("train", "--prompts-per-minibatch 3", "prompts_per_minibatch prompts_per_step"),
    ("train", "--epochs 0 --steps 0", "epochs steps"),
    ("train", "--group-size 1", "group_size"),
    ("train", "--think false", "reward think binary_no_think"),
    ("train", "--lora-targets q_proj,lm_head", "lora_targets q_proj,lm_head gate_proj"),
    ("train", "--lora-rank 8 --offload-optimizer", "offload_optimizer LoRA"),
    ("train", "--config no/such.toml", "no/such.toml"),
    ("train", PRESET, "p.toml line 1", {"p.toml": "steps = \nseed = 1"}),
    ("train", PRESET, "p.toml groupsize group_size", {"p.toml": "groupsize = 4"}),
    ("train", PRESET, "p.toml steps 4.5", {"p.toml": "steps = 4.5"}),
    ("train", PRESET, "b.toml kl_coeff kl_coef", {"p.toml": 'base = "b.toml"', "b.toml": "kl_coeff = 1"}),
    ("train", "--model nowhere/at/all", "nowhere/at/all"),
    ("train", "--model org/name", "org/name"),
    ("train", "", "model/config.json", {"model/config.json": None}),
    ("train", "", "model/config.json model_type mamba", {"model/config.json": {"model_type": "mamba"}}),
    ("train", "", "model/config.json hidden_size", {"model/config.json": {"hidden_size": None}}),
    ("train", "", "model: .bin", {"model/model.safetensors": None, "model/pytorch_model.bin": "x"}),
    ("train", "", "model/model.safetensors", {"model/model.safetensors": b"\x08{}"}),
    ("train", "", "model: shape config.json", {"model/config.json": {"intermediate_size": 32}}),
    (
        "train",
        "",
        "index.json a.safe",
        {"model/model.safetensors.index.json": '{"weight_map": {"x": "a.safetensors"}}'},
    ),
    ("train", "", "model/tokenizer.json", {"model/tokenizer.json": "{"}),
    ("train", "", "259 200", {"model/config.json": {"vocab_size": 200}}),
    ("train", "", "chat template", {"model/tokenizer_config.json": {"chat_template": "{% if %}"}}),
    ("train", "", "eos_token_id 999", {"model/generation_config.json": {"eos_token_id": 999}}),
    ("train", "--train-data gone.jsonl", "gone.jsonl"),
    ("train", "", "data.jsonl", {"data.jsonl": ""}),
    ("train", "", "data.jsonl, line 1 UTF-8", {"data.jsonl": b'{"\xff": 1}'}),
    ("train", "", "data.jsonl, line 2 JSON", {"data.jsonl": json.dumps(ROW) + '\n{"id": "x"'}),
    ("train", "", 'data.jsonl, line 2 "tiny-0"', {"data.jsonl": f"{json.dumps(ROW)}\n{json.dumps(ROW)}"}),
    ("train", "--max-prompt-tokens 5", "data.jsonl max_prompt_tokens"),
    ("train", "--eval-bench nope=x", "nope NAME=PATH"),
    ("train", "--run-dir data.jsonl/run", "run_dir data.jsonl"),
    ("train", "--run-dir finished", "finished --resume"),
    ("train", f"{RESUME} no/such", "no/such"),
    ("train", RESUME, "finished/checkpoints", spoil_checkpoints),
    ("train", RESUME, "finished/checkpoints/step-000002 kl_coeff kl_coef", rename_a_setting),
    ("train", f"{RESUME} --seed 1", "step-000002 seed --allow-changes"),
    ("train", RESUME, "data.jsonl --allow-changes train_data", {"data.jsonl": json.dumps(ROW)}),
    ("eval", "--model x --tempreture 1", "--tempreture"),
    ("eval", "--model x --bench bfcl=gone", "gone"),
    ("eval", "--model model --out data.jsonl", "--out data.jsonl"),
    ("eval", "--model nowhere/at/all", "nowhere/at/all"),
    ("eval", "--predictions gone.jsonl", "gone.jsonl"),
    ("eval", "--predictions p.jsonl --base-model model", "--base-model", {"p.jsonl": "{}"}),
    ("eval", "--predictions p.jsonl", 'p.jsonl, line 1 "completion"', {"p.jsonl": '{"id": "a"}'}),
    ("eval", "--model model --out evaluated --max-reply-tokens 3", "evaluated max_reply_tokens"),
    ("prepare", "", "--xlam"),
    ("prepare", "--toolace xlam.json", 'xlam.json, row 0 "conversations"'),
    ("prepare", "--xlam xlam.json --out data.jsonl", "--out data.jsonl"),
    ("prepare", "--xlam xlam.json --mask-functions 50", "--mask-functions 0 1"),
    ("demo", "init-model --out out --tokenizer nowhere/at/all", "nowhere/at/all"),
    ("plot", "gone", "gone"),
    ("plot", "finished", "finished/metrics.jsonl line 1", {"finished/metrics.jsonl": "{\n"}),
]


def run(patch: pytest.MonkeyPatch, program: str, arguments: str) -> int:
    """The exit code of an entry point, run in this process."""
    main, usual = PROGRAMS[program]
    patch.setattr(sys, "argv", [program, *shlex.split(usual), *shlex.split(arguments)])
    return tiny.exit_code(main)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """A model, data, raw data, a preset, a finished run and a finished evaluation."""
    place = tmp_path_factory.mktemp("usual")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        tiny.write_model(Path())
        tiny.write_data(Path())
        raw = [{"query": "q", "tools": '[{"name": "f"}]', "answers": '[{"name": "f", "arguments": {}}]'}]
        Path("xlam.json").write_text(json.dumps(raw))
        small = {"prompts_per_step": 4, "prompts_per_minibatch": 2, "group_size": 2, "max_reply_tokens": 8}
        paths = {"model": "model", "train_data": "data.jsonl", "run_dir": "run"}
        Path("base.toml").write_text(to_toml(Config(device="cpu", steps=2, save_every=1, **small, **paths)))
        assert run(patch, "train", "--run-dir finished") == 0
        assert run(patch, "eval", "--model model --out evaluated --max-reply-tokens 2") == 0
    return place


@pytest.fixture
def here(usual, tmp_path, monkeypatch):
    """A copy of all that as the current directory."""
    monkeypatch.chdir(shutil.copytree(usual, tmp_path / "here"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def change_files(files: dict) -> None:
    for path, change in ((Path(name), change) for name, change in files.items()):
        if change is None:
            path.unlink()
        elif isinstance(change, dict):
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
        else:
            path.write_bytes(change if isinstance(change, bytes) else change.encode())


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in Path().rglob("*")}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]} {row[1]} {row[2]}")
def test_a_mistake_is_one_sentence_and_changes_nothing(here, monkeypatch, capfd, row):
    program, arguments, named, *changes = row
    for change in changes:
        change() if callable(change) else change_files(change)
    before = contents()
    assert run(monkeypatch, program, arguments) == 2
    told = capfd.readouterr().err
    assert "error: " in told.splitlines()[-1] and "Traceback" not in told
    assert not [word for word in named.split() if word not in told.splitlines()[-1]], told
    assert contents() == before


def process(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.slow
def test_processes_report_a_mistake_once_and_a_fault_with_its_traceback(here):
    train_py = f"{ROOT}/train.py"
    alone = process(train_py, "--stpes", "3")
    assert alone.returncode == 2 and alone.stderr.startswith("error: ") and alone.stderr.count("\n") == 1
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    both = process(*launcher, train_py, "--config", "base.toml", "--model", "nowhere/at/all")
    assert both.returncode and both.stderr.count("error: 'nowhere/at/all'") == 1
    code = "import train\ntrain.rl_step = lambda *of: 1 / 0\ntrain.exit_on_user_error(train.main)"
    fault = process("-c", code, "--config", "base.toml")
    assert fault.returncode == 1 and fault.stderr.rstrip().endswith("ZeroDivisionError: division by zero")
