"""A task in one file: what it may replace, how its faults are told, what a checkpoint remembers; eval.py --ask."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

import train
from tooln1.benchmarks.runner import GenerationConfig, load_benchmarks
from tooln1.data import read_examples, write_examples
from tooln1.io.errors import UserError
from tooln1.io.jsonl import read_jsonl
from tooln1.run.checkpoint import read_checkpoint
from tooln1.run.checks import template, train_eval_overlap
from tooln1.run.task_file import load_task
from tooln1.tokenizer import load_tokenizer

# Rewards the letter that each row names, in a prompt of its own; the reply comes without its stop token.
LETTERS = """
def messages(example):
    return [{"role": "user", "content": example.extra["letter"]}]

def reward(reply, example):
    assert not reply.endswith("<|im_end|>")
    return float(reply.startswith(example.extra["letter"]))

def metrics(reply, example):
    return {"length": len(reply)}
"""
WRONG = "def reward(reply, example): "
READ_OF_A_RANK = """
from tooln1.data import read_examples
def read(path):
    return read_examples(path, allow_extra=True)[:: -1 if os.environ["RANK"] == "1" else 1]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A model, data with a further field, a preset and a task file in the current directory."""
    monkeypatch.chdir(tmp_path)
    tiny.write_model(Path())
    rows = [vars(example) | {"letter": "ab"[i % 2], "reply": "ab"[i % 2]} for i, example in enumerate(tiny.examples(8))]
    tiny.write_rows(Path("data.jsonl"), rows)
    Path("task.py").write_text(LETTERS)
    tiny.write_preset(tmp_path, "run", device="cpu", save_every=1, temperature=1.5)
    return tmp_path


def start(monkeypatch, *arguments: str) -> int:
    """The exit code of train.py with the preset."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "run.toml", *arguments])
    return tiny.exit_code(train.main)


def test_a_task_replaces_prompt_reward_and_metrics(here, monkeypatch):
    assert start(monkeypatch, "--task", "task.py", "--steps", "1") == 0
    replies, letters = read_jsonl(Path("run/rollouts.jsonl")), {row["id"]: row["letter"] for row in rows("data.jsonl")}
    assert all(row["reward"] == row["reply"].startswith(letters[row["id"]]) for row in replies) and replies
    measured = tiny.measured(Path("run"))[-1]
    lengths = [len(row["reply"].removesuffix("<|im_end|>").removesuffix("<|endoftext|>")) for row in replies]
    assert measured["task/length"] == pytest.approx(sum(lengths) / len(lengths))
    assert measured["prompt_tokens_prefilled"] < 100  # four prompts of one letter in the tiny chat template
    assert "accuracy" not in measured and 0 <= measured["heldout_accuracy"] <= 1


def rows(path: str) -> list[dict]:
    return tiny.read_rows(Path(path))


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("def rewards(reply, example): ...", ["task.py has no function reward(reply, example)"]),
        (f"{WRONG}return float('nan')", ["task.py, reward of 'tiny-", "is nan; it must be a finite number"]),
        (f"{WRONG}return None", ["is None; it must be a finite number"]),
        (f"{WRONG}return 10**400", ["it must be a finite number"]),
        (f"{WRONG}return 1\ndef metrics(reply, example): return {{'x': None}}", ["metrics of", "{'x': None}"]),
        (f"{WRONG}return 1 / 0", ["task.py, reward of 'tiny-", "line 1, in reward", "ZeroDivisionError"]),
        ("import no_such_module", ["import of 'task.py' failed", "line 1, in <module>", "No module named"]),
        (None, ["cannot read task.py"]),
    ],
)
def test_a_fault_of_the_file_is_told_with_exit_code_2(here, monkeypatch, capsys, code, told):
    Path("task.py").write_text(code) if code else Path("task.py").unlink()
    assert start(monkeypatch, "--task", "task.py") == 2
    error = capsys.readouterr().err
    assert "error: " in error and all(words in error for words in told), error


def test_a_fault_in_a_later_step_leaves_the_checkpoint(here, monkeypatch, capsys):
    Path("task.py").write_text(f"calls = []\n{WRONG}calls.append(1); return 1 / (len(calls) < 20)")  # step 2 of 12 each
    assert start(monkeypatch, "--task", "task.py", "--eval-data", "") == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert read_checkpoint(Path("run/checkpoints/step-000001")).step == 1


def test_a_checkpoint_refuses_another_task(here, monkeypatch, capsys):
    assert start(monkeypatch, "--task", "task.py", "--steps", "1") == 0
    Path("task.py").write_text(LETTERS + "# changed\n")
    for other in ([], ["--task", "task.py"]):
        assert start(monkeypatch, "--resume", *other) == 2
    assert "--allow-changes task" in capsys.readouterr().err
    assert start(monkeypatch, "--resume", "--task", "task.py", "--steps", "2", "--allow-changes", "task") == 0


def test_the_file_as_it_is_now_is_what_runs(here, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for reward in (0.5, 0.7, 0.9):  # rewritten within a second, with equally many bytes
        Path("task.py").write_text(f"{WRONG}return {reward}")
        assert load_task("task.py").reward("", tiny.examples(1)[0]) == reward


def test_only_the_command_line_names_a_task(here, monkeypatch, capsys):
    Path("run.toml").write_text('task = "task.py"\n')
    assert start(monkeypatch) == 2
    assert "there is no setting 'task'" in capsys.readouterr().err
    with pytest.raises(UserError, match="line 1: unknown key 'letter'"):
        read_examples("data.jsonl")


def test_the_metrics_of_tool_calls_need_tools(here):
    Path("task.py").write_text(f"{WRONG}return 0")
    task, example = load_task("task.py"), tiny.examples(1)[0]
    assert task.metrics("no call", example) == {"accuracy": False, "format_ok": False}
    assert task.metrics("no call", replace(example, tools=[])) == {}


def test_further_fields_survive_writing_and_reading(here):
    task = load_task("task.py")
    examples = task.read("data.jsonl")
    assert examples[1].extra == {"letter": "b"}
    write_examples(examples, "again.jsonl")
    assert task.read("again.jsonl") == examples


def test_checks_look_at_the_prompts_of_the_task(here):
    task = load_task("task.py")
    examples = task.read("data.jsonl")
    (overlap,) = train_eval_overlap(examples[:1], examples[1:4], task)  # prompts a, and b a b
    assert overlap.level == "warning" and "1 of 3 held-out examples share their prompt" in overlap.text
    (finding,) = template(load_tokenizer("model"), examples, task, True)
    assert finding.level == "ok", finding


def test_eval_scores_examples_by_the_task(here, capsys):
    replies = [{"id": f"tiny-{i}", "completion": "a<|im_end|>"} for i in range(8)]
    tiny.write_rows(Path("replies.jsonl"), replies)
    arguments = ("--bench", "examples=data.jsonl", "--predictions", "replies.jsonl", "--out", "out")
    assert tiny.run_eval(*arguments, "--task", "task.py") == 0
    overall = json.loads(Path("out/results.json").read_text())["benchmarks"]["examples"]["totals"]["overall"]
    assert overall == {"accuracy": 0.5, "right": 4, "replies": 8}
    assert {row["why"] for row in rows("out/failures.jsonl")} == {"no_reward"}
    (loaded,) = load_benchmarks(["examples=data.jsonl"], task=load_task("task.py"))
    assert GenerationConfig().messages(loaded.cases[1]) == [{"role": "user", "content": "b"}]


def test_ask_prints_prompt_thought_calls_and_faults(here, monkeypatch, capsys):
    Path("tools.json").write_text(json.dumps(tiny.examples(1)[0].tools))
    arguments = ("--device", "cpu", "--model", "model", "--tools", "tools.json", "--ask", "Add 1 and 2")
    assert tiny.run_eval(*arguments, "--max-reply-tokens", "5") == 0
    told = capsys.readouterr().out
    assert told.startswith("prompt:  1") and "fault:   cut off; the reply as it is:\n" in told
    reply = '<think>Sum.</think> <tool_call>[{"name": "add", "arguments": {"a": 1}}]</tool_call><|im_end|>'
    monkeypatch.setattr("tooln1.tokenizer.Tokenizer.decode", lambda *of: reply)
    assert tiny.run_eval(*arguments, "--max-reply-tokens", "500") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[1:3] == ["thought: Sum.", 'call:    {"name": "add", "arguments": {"a": 1}}']


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "told"),
    [
        (f"{WRONG}return 1 / (os.environ['RANK'] == '0')", "ZeroDivisionError"),
        (LETTERS + READ_OF_A_RANK, "Not all processes run the same: content of train_data is"),
    ],
)
def test_a_fault_on_one_of_two_processes_ends_both(here, code, told):
    Path("task.py").write_text(f"import os\n{code}")
    done = tiny.torchrun(2, "train.py", "--task", str(here / "task.py"), "--config", str(here / "run.toml"))
    assert done.returncode and done.stderr.count("error: ") == 1 and told in done.stderr, done.stderr
