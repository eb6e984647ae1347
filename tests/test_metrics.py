"""Metrics reduced over ranks, logs that survive a crash, the console line, best and worst replies, TensorBoard."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch

from tooln1.distributed import World
from tooln1.io.errors import UserError
from tooln1.io.jsonl import read_jsonl
from tooln1.run.lifecycle import log_step
from tooln1.run.metrics import (
    Metrics,
    RunLog,
    best_and_worst,
    read_metrics,
    to_json,
)


def reduced(*ranks: Metrics) -> dict[str, float]:
    """What every one of several ranks gets: each gathers the entries of all."""
    everyone: list = []
    for metrics in ranks:
        metrics.reduced(lambda own: everyone.extend(own) or own)
    return ranks[0].reduced(lambda own: everyone)


# --- reduction


def test_a_mean_is_over_items_not_over_calls():
    metrics = Metrics()
    metrics.add_mean("kl", 3.0, 1)
    metrics.add_mean("kl", torch.tensor(3.0), torch.tensor(5))
    assert metrics.reduced() == {"kl": 1.0}  # (3 + 3) / (1 + 5), not (3 + 0.6) / 2


def test_the_result_does_not_depend_on_which_rank_had_which_value():
    values = [1.0, 2.0, 4.0, 8.0, 16.0]

    def split(*shares):
        ranks = []
        for share in shares:
            metrics = Metrics()
            metrics.add_means({"mean": (sum(share), len(share))})
            metrics.add("sum", "sum", sum(share))
            for value in share:
                metrics.add("min", "min", value)
                metrics.add("max", "max", value)
            ranks.append(metrics)
        return reduced(*ranks)

    expected = {"mean": 6.2, "sum": 31.0, "min": 1.0, "max": 16.0}
    assert split(values) == expected
    assert split(values[:1], values[1:]) == expected
    assert split([], values[:2], values[2:4], values[4:]) == expected  # a rank may lack a metric


def test_timers_add_up_the_slowest_rank_counts_and_divides_the_tokens_of_all(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 11.0, 20.0, 24.0])  # rank 0: 1 s + 1 s; rank 1: 4 s
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    first, second, calls = Metrics(enter=lambda phase: calls.append(phase)), Metrics(), []
    for _ in range(2):
        with first.timer("rollout"):
            first.add_tokens("rollout", 100)
    with second.timer("rollout"):
        second.add_tokens("rollout", 200)
    assert calls == ["rollout", "rollout"]
    assert first.reduced() == {"tokens_per_second/rollout": 100.0, "seconds/rollout": 2.0}
    assert reduced(first, second) == {"tokens_per_second/rollout": 100.0, "seconds/rollout": 4.0}  # (200 + 200) / 4


# --- the console line


def test_the_console_explains_once_why_nothing_is_learned(tmp_path, capsys):
    log = RunLog(tmp_path, 99)
    log.step(1, {"zero_variance_fraction": 0.99, "accuracy": 0.1})
    for step in range(2, 11):
        log.step(step, {"zero_variance_fraction": 0.5, "accuracy": 0.0})
        log.step(step, {"heldout_accuracy": 0.0})  # an evaluation
    assert "note:" not in capsys.readouterr().out
    log.step(11, {"zero_variance_fraction": 1.0, "accuracy": 0.0})
    text = capsys.readouterr().out
    assert text.count("note:") == 2 and "dynamic_sampling" in text and "no reply of 10 steps" in text
    for step in range(12, 32):
        log.step(step, {"zero_variance_fraction": step % 2, "accuracy": 0.0})
    assert "note:" not in capsys.readouterr().out


# --- JSON lines


def test_json_is_strict_readable_and_valid_utf8():
    record = {
        "nan": math.nan,
        "inf": [1, (math.inf, True)],
        "text": "工具\u2028\n\\",
        "lone": "a\\\ud83d",
        "none": None,
    }
    line = to_json(record)
    assert "\n" not in line and "工具" in line and line.encode("utf-8")
    back = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert back == record | {"nan": None, "inf": [1, [None, True]]}


@pytest.mark.parametrize("torn", ['{"step": 3, "rew', '{"step": 3}'])
def test_lines_are_flushed_and_a_torn_last_one_is_left_out_and_overwritten(tmp_path, torn):
    path, log = tmp_path / "metrics.jsonl", RunLog(tmp_path, 9)
    log.step(1, {"text": 1.0})
    assert read_jsonl(path) == [{"step": 1, "text": 1.0}]  # before it is closed
    path.write_text(path.read_text() + torn)
    assert read_jsonl(path) == [{"step": 1, "text": 1.0}]
    RunLog(tmp_path, 9, completed=1).step(2, {"text": 2.0})
    assert read_jsonl(path) == [{"step": 1, "text": 1.0}, {"step": 2, "text": 2.0}]


def test_a_full_disk_is_one_sentence(tmp_path):
    log = RunLog(tmp_path, 9)
    log._metrics = open("/dev/full", "w")  # noqa: SIM115
    run = SimpleNamespace(log=log, world=World(0, 1, torch.device("cpu")), completed_steps=1)
    with pytest.raises(UserError, match="the logs could not be written: No space left"):
        log_step(run, Metrics())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1}\nnot json\n', "line 2: not valid JSON"),
        (b"[" * 99999 + b"\n", "line 1: JSON nested"),
        (b"\xff\n", "line 1: not UTF-8"),
        (None, "cannot read .*metrics.jsonl: No such file"),
    ],
)
def test_a_broken_log_is_refused_with_its_line(tmp_path, content, words):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_jsonl(path)


# --- best and worst replies


def reply(example: str, reward: float, text: str = "") -> dict:
    return {"id": example, "reward": reward, "reply": text}


def test_best_and_worst():
    rows = [reply("a", 0.2, "x"), reply("b", 1.0, "y"), reply("c", 0.0, "z"), reply("d", 0.5, "w")]
    assert best_and_worst(7, rows, 1) == [
        {"step": 7, "kind": "best", "id": "b", "reward": 1.0, "reply": "y"},
        {"step": 7, "kind": "worst", "id": "c", "reward": 0.0, "reply": "z"},
    ]
    assert [row["id"] for row in best_and_worst(1, rows, 2)] == ["b", "d", "c", "a"]
    assert sorted(row["id"] for row in best_and_worst(1, rows, 9)) == ["a", "b", "c", "d"]  # none twice
    assert best_and_worst(1, rows, 0) == [] and best_and_worst(1, [], 4) == []


# --- the log of a run


def test_a_resumed_run_continues_after_the_steps_of_its_checkpoint(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("a broken log of an older run\n")
    log = RunLog(tmp_path, 4)
    log.step(0, {"heldout_accuracy": 0.5})
    for step in (1, 2, 3):
        log.step(step, {"reward": step / 4, "kl": math.nan})
        log.rollouts(step, [reply("a", 1.0), reply("b", 0.0)], 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["step 0/4 · held-out 0.500", "step 1/4 · reward 0.250 · kl nan"]
    log = RunLog(tmp_path, 4, completed=2)
    assert log.row == {"step": 2, "reward": 0.5, "kl": None}
    log.step(3, {"reward": 0.9})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[3] == {"step": 3, "reward": 0.9}
    kept = [(row["step"], row["kind"]) for row in read_jsonl(tmp_path / "rollouts.jsonl")]
    assert kept == [(1, "best"), (1, "worst"), (2, "best"), (2, "worst")]


def test_an_evaluation_has_a_row_of_its_own_that_readers_merge(tmp_path):
    log = RunLog(tmp_path, 4)
    log.step(1, {"reward": 0.5})
    log.step(2, {"reward": 0.6})
    written = (tmp_path / "metrics.jsonl").read_bytes()
    log.step(2, {"heldout_accuracy": 0.25})
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(written)  # append-only
    merged = {"step": 2, "reward": 0.6, "heldout_accuracy": 0.25}
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": 0.5}, merged]
    assert log.row == RunLog(tmp_path, 4, completed=2).row == merged


# --- TensorBoard, progress bars


def test_tensorboard_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, 2, tensorboard=True)
    log.step(1, {"reward": 0.25, "seconds/step": 2.0, "kl": math.nan})
    log.step(2, {"reward": 0.5})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["reward", "seconds/step"]  # NaN is left out
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.25), (2, 0.5)]
