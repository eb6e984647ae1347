"""Metrics that reduce rightly over ranks, logs that survive a crash, and lines that a person can read."""

import errno
import json
import math
import os
import threading
import time
import warnings

import numpy as np
import pytest
import torch

from tooln1.io.errors import UserError
from tooln1.io.progress import progress
from tooln1.run.metrics import JsonlLog, Metrics, RunLog, best_and_worst, console_line, read_jsonl, to_json
from tooln1.run.tensorboard import TensorBoardLog


class Ranks:
    """Several ranks as threads: `reduce(rank)` is what World.reduce is between processes."""

    def __init__(self, size: int):
        self.size = size
        self.board: list = [None] * size
        self.barrier = threading.Barrier(size, timeout=10)
        self.calls = [0] * size

    def reduce(self, rank: int):
        pick = {"sum": sum, "min": min, "max": max}

        def over_ranks(values: list[float], op: str) -> list[float]:
            self.calls[rank] += 1
            self.board[rank] = list(values)
            self.barrier.wait()
            columns = list(zip(*self.board, strict=True))
            self.barrier.wait()
            return [pick[op](column) for column in columns]

        return over_ranks

    def reduced(self, metrics: list[Metrics]) -> list:
        """Each rank's result, or the exception it ended in."""
        results: list = [None] * self.size

        def work(rank: int) -> None:
            try:
                results[rank] = metrics[rank].reduced(self.reduce(rank))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


# --- reduction


def test_a_mean_is_over_things_not_over_calls():
    metrics = Metrics()
    metrics.add_mean("kl", 3.0, 1)
    metrics.add_mean("kl", 3.0, 5)
    assert metrics.reduced() == {"kl": 1.0}  # (3 + 3) / (1 + 5), not (3 + 0.6) / 2


def test_reduction_over_ranks_does_not_depend_on_who_had_what():
    values = [1.0, 2.0, 4.0, 8.0, 16.0]

    def split(cuts: list[list[float]]) -> dict:
        ranks = []
        for own in cuts:
            metrics = Metrics()
            metrics.add_means({"mean": (sum(own), len(own))})
            metrics.add_sum("sum", sum(own))
            for value in own or [4.0]:
                metrics.add_min("min", value)
                metrics.add_max("max", value)
            ranks.append(metrics)
        results = Ranks(len(cuts)).reduced(ranks)
        assert all(result == results[0] for result in results)
        return results[0]

    whole = split([values])
    assert whole == {"mean": 6.2, "sum": 31.0, "min": 1.0, "max": 16.0}
    assert split([values[:1], values[1:]]) == whole
    assert split([values[:2], values[2:4], values[4:], []]) == whole


def test_names_are_matched_however_they_were_added():
    first, second = Metrics(), Metrics()
    for name, value in (("b", 1.0), ("a", 10.0)):
        first.add_mean(name, value)
    for name, value in (("a", 20.0), ("b", 3.0)):
        second.add_mean(name, value)
    assert Ranks(2).reduced([first, second]) == [{"a": 15.0, "b": 2.0}] * 2


@pytest.mark.parametrize("other", ["name", "kind", "missing"])
def test_ranks_that_log_different_metrics_all_fail(other):
    first, second = Metrics(), Metrics()
    first.add_mean("kl", 1.0)
    if other == "name":
        second.add_mean("lk", 1.0)
    elif other == "kind":
        second.add_max("kl", 1.0)
    ranks = Ranks(2)
    results = ranks.reduced([first, second])
    assert [type(result) for result in results] == [RuntimeError] * 2
    assert ranks.calls == [1, 1]  # found out before any metric was reduced
    assert "kl" in str(results[0])


def test_every_rank_makes_the_same_collectives_whatever_it_logs():
    for fill in (lambda m: None, lambda m: m.add_mean("a", 1), lambda m: m.add_min("a", 1)):
        metrics = [Metrics(), Metrics()]
        for each in metrics:
            fill(each)
        ranks = Ranks(2)
        ranks.reduced(metrics)
        assert ranks.calls == [4, 4]


def test_tensors_are_summed_in_fp64_without_their_graph_and_left_alone():
    metrics = Metrics()
    value = torch.tensor(2.0**24, requires_grad=True)
    metrics.add_mean("x", value, torch.tensor(1))
    metrics.add_mean("x", torch.tensor(1.0), torch.tensor(0))
    metrics.add_sum("y", value)
    metrics.add_sum("y", torch.tensor(1.0))
    metrics.add_max("z", value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when a number is read off a tensor with a graph
        found = metrics.reduced()
    assert found == {"x": 2.0**24 + 1, "y": 2.0**24 + 1, "z": 2.0**24}  # fp32 would lose the 1
    assert all(type(number) is float for number in found.values())
    assert value.item() == 2.0**24


def test_a_mean_of_nothing_and_an_extreme_with_nan():
    metrics = Metrics()
    metrics.add_mean("none", 0.0, 0)
    metrics.add_max("max", 1.0)
    metrics.add_max("max", math.nan)
    metrics.add_min("min", math.nan)
    metrics.add_min("min", 1.0)
    assert all(math.isnan(value) for value in metrics.reduced().values())


# --- timers


def test_timer_adds_up_takes_the_slowest_rank_and_divides_tokens_by_it(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 11.0, 20.0, 24.0])  # rank 0: 1 s + 1 s; rank 1: 4 s
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    first, second = Metrics(), Metrics()
    for _ in range(2):
        with first.timer("rollout"):
            first.add_tokens("rollout", 100)
    with second.timer("rollout"):
        second.add_tokens("rollout", 200)
    assert first.reduced() == {"seconds/rollout": 2.0, "tokens_per_second/rollout": 100.0}
    both = {"seconds/rollout": 4.0, "tokens_per_second/rollout": 100.0}  # (200 + 200) / 4
    assert Ranks(2).reduced([first, second]) == [both, both]


def test_timer_synchronises_at_both_ends_and_counts_a_failed_block():
    calls = []
    metrics = Metrics(synchronize=lambda: calls.append(1))
    with metrics.timer("update"):
        assert calls == [1]
    assert calls == [1, 1]
    with pytest.raises(KeyError), metrics.timer("update"):
        time.sleep(0.02)
        raise KeyError
    assert metrics.reduced()["seconds/update"] >= 0.02


def test_tokens_without_a_timer_have_no_rate():
    metrics = Metrics()
    metrics.add_tokens("rollout", 3)
    assert math.isnan(metrics.reduced()["tokens_per_second/rollout"])


# --- the console line


def test_console_line():
    values = {
        "reward": 0.53125,
        "accuracy": 0.5,
        "kl": 0.00123,
        "entropy": 0.21,
        "reply_tokens_mean": 23.4,
        "learning_rate": 3e-4,
        "grad_norm": 0.4121,
        "seconds/step": 12.34,
        "heldout_accuracy": 0.7131,
        "tokens_per_second/rollout": 5120.4,
        "tokens_per_second/update": 99.0,
        "loss": 0.1,
        "skipped_steps": 0.0,
        "something_else": 1.0,
    }
    assert console_line(3, 40, values) == (
        "step  3/40 · reward 0.531 · accuracy 0.500 · kl 0.0012 · entropy 0.210 · reply 23 tokens · "
        "lr 3.0e-04 · grad 0.412 · 12.3 s · sampling 5,120 tokens/s · held-out 0.713"
    )
    assert console_line(40, 40, {}) == "step 40/40"
    bad = {"loss": 2.0, "grad_norm": math.nan, "skipped_steps": 2.0, "tokens_per_second/update": 1234.0}
    assert console_line(1, 9, bad) == "step 1/9 · loss 2.0000 · grad nan · skipped 2 · update 1,234 tokens/s"


# --- JSON lines


def test_json_is_strict_and_plain():
    record = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "np": np.float32(0.5),
        "i": np.int64(3),
        "t": torch.tensor(2),
        "bool": True,
        "none": None,
        "nested": {"a": (1, math.nan)},
        "text": "工具\u2028\n",
    }
    line = to_json(record)
    assert "\n" not in line and "工具" in line
    back = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert back == {
        "nan": None,
        "inf": [None, None],
        "np": 0.5,
        "i": 3,
        "t": 2,
        "bool": True,
        "none": None,
        "nested": {"a": [1, None]},
        "text": "工具\u2028\n",
    }


def test_half_a_surrogate_pair_can_be_logged(tmp_path):
    log = JsonlLog(tmp_path / "r.jsonl")
    log.append({"step": 1, "answer": "\ud83d"})
    assert read_jsonl(log.path) == [{"step": 1, "answer": "\ud83d"}]


def test_log_appends_flushes_and_goes_on(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    log = JsonlLog(path)
    log.append({"step": 1, "text": "a\u2028b"})
    assert read_jsonl(path) == [{"step": 1, "text": "a\u2028b"}]  # there before it is closed
    again = JsonlLog(path)
    again.append({"step": 2})
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]


@pytest.mark.parametrize("torn", [b'{"step": 3, "rew', b'{"step": 3}', b"\xe5\xb7"])
def test_a_torn_last_line_is_left_out_and_written_over(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    if torn.startswith(b"{"):
        assert [row["step"] for row in read_jsonl(path)] == [1, 2]
    log = JsonlLog(path)
    log.append({"step": 3, "again": True})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_truncate_after_cuts_what_a_resumed_run_writes_again(tmp_path):
    log = JsonlLog(tmp_path / "metrics.jsonl")
    for step in (0, 1, 2, 3, 2):
        log.append({"step": step, "n": 0.1})
    log.append({"note": "no step"})
    log.truncate_after(2)
    log.append({"step": 3, "n": 0.2})
    steps = [row.get("step") for row in read_jsonl(log.path)]
    assert steps == [0, 1, 2, 2, None, 3]
    assert list(tmp_path.iterdir()) == [log.path]


def test_truncate_after_is_all_or_nothing(tmp_path, monkeypatch):
    log = JsonlLog(tmp_path / "metrics.jsonl")
    for step in range(3):
        log.append({"step": step})
    before = log.path.read_bytes()

    def no_disk(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", no_disk)
    with pytest.raises(OSError):
        log.truncate_after(1)
    assert log.path.read_bytes() == before and list(tmp_path.iterdir()) == [log.path]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b'{"a": 1}\nnot json\n', "line 2"), (b"[1]\n", "line 1"), (b"\n", "line 1"), (b"\xff\n", "UTF-8")],
)
def test_a_broken_log_is_refused_with_its_line(tmp_path, content, words):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_jsonl(path)


def test_a_missing_log_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read .*gone.jsonl"):
        read_jsonl(tmp_path / "gone.jsonl")


# --- best and worst replies


def reply(example: str, reward: float, text: str = "") -> dict:
    return {"id": example, "reward": reward, "reply": text}


def test_best_and_worst():
    rows = [reply("a", 0.2, "x"), reply("b", 1.0, "y"), reply("c", 0.0, "z"), reply("d", 0.5, "w")]
    kept = best_and_worst(7, rows, 1)
    assert kept == [
        {"step": 7, "kind": "best", "id": "b", "reward": 1.0, "reply": "y"},
        {"step": 7, "kind": "worst", "id": "c", "reward": 0.0, "reply": "z"},
    ]
    assert [(row["kind"], row["id"]) for row in best_and_worst(1, rows, 2)] == [
        ("best", "b"),
        ("best", "d"),
        ("worst", "c"),
        ("worst", "a"),
    ]
    assert rows[0] == reply("a", 0.2, "x")  # untouched


def test_no_reply_is_kept_twice_and_none_or_few_will_do():
    rows = [reply("a", 1.0), reply("b", 0.0), reply("c", 0.5)]
    assert sorted(row["id"] for row in best_and_worst(1, rows, 9)) == ["a", "b", "c"]
    assert best_and_worst(1, rows, 0) == [] and best_and_worst(1, [], 4) == []


def test_equal_replies_of_other_examples_come_first():
    rows = [
        reply("a", 1.0, "a1"),
        reply("a", 1.0, "a2"),
        reply("b", 1.0, "b1"),
        reply("c", 0.0, "c1"),
        reply("c", 0.0, "c2"),
        reply("d", 0.0, "d1"),
    ]
    assert [row["reply"] for row in best_and_worst(1, rows, 2)] == ["a1", "b1", "c1", "d1"]
    assert [row["reply"] for row in best_and_worst(1, rows, 3)] == ["a1", "b1", "a2", "c1", "d1", "c2"]


# --- a run's log


def test_run_log_writes_prints_and_resumes(tmp_path, capsys):
    log = RunLog(tmp_path, 4)
    log.step(0, {"heldout_accuracy": 0.5})
    for step in (1, 2, 3):
        log.step(step, {"reward": step / 4, "kl": math.nan})
        log.rollouts(step, [reply("a", 1.0), reply("b", 0.0)], 1)
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["step 0/4 · held-out 0.500", "step 1/4 · reward 0.250 · kl nan"]
    assert read_jsonl(tmp_path / "metrics.jsonl")[1] == {"step": 1, "reward": 0.25, "kl": None}
    log = RunLog(tmp_path, 4, completed=2)  # the checkpoint of step 2
    log.step(3, {"reward": 0.9})
    log.close()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[3] == {"step": 3, "reward": 0.9}
    kept = [(row["step"], row["kind"]) for row in read_jsonl(tmp_path / "rollouts.jsonl")]
    assert kept == [(1, "best"), (1, "worst"), (2, "best"), (2, "worst")]


def test_figures_are_added_to_a_steps_row(tmp_path, capsys):
    log = RunLog(tmp_path, 4)
    log.step(1, {"reward": 0.5})
    log.step(2, {"kl": math.nan, "text": "line\u2028break\r"})
    log.step(2, {"heldout_accuracy": 0.25})
    log.close()
    assert capsys.readouterr().out.splitlines()[1:] == ["step 2/4 · kl nan", "step 2/4 · held-out 0.250"]
    log = RunLog(tmp_path, 4, completed=2)  # by a run that goes on, too
    assert log.row == {"step": 2, "kl": None, "text": "line\u2028break\r", "heldout_accuracy": 0.25}
    log.step(2, {"seconds/eval": 3.0})
    log.step(3, {"reward": 1.0})
    log.close()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0] == {"step": 1, "reward": 0.5} and rows[1]["heldout_accuracy"] == 0.25
    assert rows[1]["kl"] is None and rows[1]["seconds/eval"] == 3.0


def test_a_row_that_cannot_be_rewritten_stays(tmp_path, monkeypatch):
    log = RunLog(tmp_path, 4)
    log.step(1, {"reward": 0.5})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tooln1.io.files.os.replace", full)
    with pytest.raises(UserError, match="metrics.jsonl cannot be written to: No space left"):
        log.step(1, {"heldout_accuracy": 0.25})
    assert [path.name for path in tmp_path.iterdir() if "metrics" in path.name] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_new_run_begins_its_logs_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("a broken log of an older run\n")
    log = RunLog(tmp_path, 4)
    log.step(1, {})
    log.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_run_log_of_another_rank_does_nothing(tmp_path, capsys):
    log = RunLog(tmp_path / "run", 4, tensorboard=True, write=False)
    log.step(1, {"reward": 1.0})
    log.rollouts(1, [reply("a", 1.0)], 1)
    log.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


# --- TensorBoard, progress bars


def test_tensorboard_missing_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="requirements-extra.txt"):
        TensorBoardLog(tmp_path, 0)


def test_tensorboard_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, 2, tensorboard=True)
    log.step(1, {"reward": 0.25, "seconds/step": 2.0, "kl": math.nan})
    log.step(2, {"reward": 0.5})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["reward", "seconds/step"]  # NaN is left out
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.25), (2, 0.5)]


def test_progress_is_silent_without_a_terminal_and_on_other_ranks(capsys, monkeypatch):
    assert list(progress([1, 2, 3], "work")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress(10, "work", show=False) as bar:
        bar.update(4)
    assert capsys.readouterr() == ("", "")


def test_progress_draws_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress(10, "sampling", "replies") as bar:
        bar.update(4)
        bar.refresh()
    drawn = capsys.readouterr().err
    assert "sampling" in drawn and "4/10" in drawn and "replies" in drawn
