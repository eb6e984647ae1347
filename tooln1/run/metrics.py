"""The log of a run: metrics reduced over ranks, JSON lines files, one console line per step, TensorBoard."""

import json
import math
import operator
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from tooln1.io.errors import UserError
from tooln1.io.files import atomic_write
from tooln1.io.jsonl import read_jsonl

Entry = tuple[str, float, float]  # (how it is reduced: mean, sum, rate, min or max; value; count of a mean)


class Metrics:
    """The metrics of one step on this rank: collected while the step runs, reduced over all ranks once.

    A mean is kept as a sum and a count, so it does not depend on how tokens were spread over micro-batches and ranks.
    synchronize: called at both ends of a timer (torch.cuda.synchronize on a GPU, where calls only queue work).
    enter: called with the name of each phase that a timer starts.
    """

    def __init__(
        self, synchronize: Callable[[], None] = lambda: None, enter: Callable[[str], None] = lambda phase: None
    ):
        self._synchronize, self._enter = synchronize, enter
        self._entries: dict[str, Entry] = {}
        self._seconds: dict[str, float] = {}  # by phase

    def add_mean(self, name: str, total: Any, count: Any = 1) -> None:
        """Add `total`, a sum over `count` items (numbers or tensors of one element); sum / count is logged."""
        self.add(name, "mean", total, count)

    def add_means(self, sums: dict[str, tuple[Any, Any]]) -> None:
        """`add_mean` for each name -> (total, count)."""
        for name, (total, count) in sums.items():
            self.add_mean(name, total, count)

    def add(self, name: str, how: Literal["mean", "sum", "rate", "min", "max"], value: Any, count: Any = 0) -> None:
        """Add a value to a sum, minimum or maximum over all calls and ranks."""
        self._entries[name] = _combine(self._entries.get(name), (how, float(value), float(count)))

    def add_tokens(self, phase: str, tokens: Any) -> None:
        """Add tokens that the timed `phase` processed; tokens_per_second/<phase> is logged."""
        self.add(f"tokens_per_second/{phase}", "rate", tokens)

    @contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to seconds/<phase>."""
        self._enter(phase)
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def reduced(self, gather: Callable[[list], list] = list) -> dict[str, float]:
        """Every metric by name, over all ranks; a mean over no items is NaN.

        gather: `World.gather`, called once; without it the metrics of this process. Seconds are those of the slowest
        rank; tokens per second are the tokens of all ranks divided by them.
        """
        seconds = {f"seconds/{phase}": ("max", value, 0.0) for phase, value in self._seconds.items()}
        merged: dict[str, Entry] = {}
        for entries in gather([self._entries | seconds]):
            for name, entry in entries.items():
                merged[name] = _combine(merged.get(name), entry)
        values = {}
        for name, (how, value, count) in merged.items():
            if how == "mean":
                value = value / count if count else math.nan
            elif how == "rate":
                value /= merged[name.replace("tokens_per_second", "seconds")][1]
            values[name] = value
        return values


def _combine(first: Entry | None, second: Entry) -> Entry:
    if first is None:
        return second
    how, value, count = first
    combine = {"min": min, "max": max}.get(how, operator.add)
    return how, combine(value, second[1]), count + second[2]


# label, metric, format: the parts of the console line in order; a metric that a step does not have is left out
CONSOLE = (
    ("loss", "loss", "{:.4f}"),
    ("reward", "reward", "{:.3f}"),
    ("accuracy", "accuracy", "{:.3f}"),
    ("kl", "kl", "{:.4f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("reply", "reply_tokens_mean", "{:.0f} tokens"),
    ("lr", "learning_rate", "{:.1e}"),
    ("grad", "grad_norm", "{:.3f}"),
    ("skipped", "skipped_steps", "{:.0f}"),
    ("", "seconds/step", "{:.1f} s"),
    ("sampling", "tokens_per_second/rollout", "{:,.0f} tokens/s"),
    ("update", "tokens_per_second/update", "{:,.0f} tokens/s"),
    ("held-out", "heldout_accuracy", "{:.3f}"),
    ("", "seconds/eval", "{:.1f} s"),
)

ALL_EQUAL = (
    "all replies to each prompt of this step got one reward, so all advantages and the policy's loss are 0: only the "
    "KL is left. See rollouts.jsonl. If all are wrong, check reward and data, or train with mode sft first; if all are "
    "right, take harder prompts; if it is some of both, raise temperature or group_size, or set dynamic_sampling."
)
NEVER_RIGHT = (
    "no reply of 10 steps in a row was right. See rollouts.jsonl. Are they cut off (max_reply_tokens), not in the form "
    "that the reward wants (format_ok), wild (lower temperature), or just wrong (train with mode sft first, or take "
    "easier prompts; dynamic_sampling goes on to prompts that are solved at times)?"
)
# metric, value, steps in a row with it, after which the console says, once, what it means
NOTHING_TO_LEARN = (("zero_variance_fraction", 1.0, 1, ALL_EQUAL), ("accuracy", 0.0, 10, NEVER_RIGHT))


def console_line(step: int, total: int, values: dict[str, float]) -> str:
    """One line for the console: the step, the number of steps, and the metrics of `CONSOLE`.

    >>> console_line(3, 40, {"reward": 0.51, "kl": 0.00123, "seconds/step": 4.24})
    'step  3/40 · reward 0.510 · kl 0.0012 · 4.2 s'
    """
    hidden = {"loss", "tokens_per_second/update"} if "reward" in values else set()  # shown in supervised training
    hidden |= set() if values.get("skipped_steps") else {"skipped_steps"}
    parts = [
        f"{label} {form.format(values[name])}".strip()
        for label, name, form in CONSOLE
        if name in values and name not in hidden
    ]
    return " · ".join([f"step {step:>{len(str(total))}}/{total}", *parts])


def to_json(record: Any) -> str:
    """One line of strict JSON: NaN and infinity become null, a lone surrogate (which UTF-8 lacks) its escape."""
    text = json.dumps(_without_nan(record), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The metrics of each step of a metrics.jsonl: rows with equal "step" (training, evaluation) merged."""
    steps: dict[Any, dict[str, Any]] = {}
    for row in read_jsonl(path):
        steps.setdefault(row.get("step"), {}).update(row)
    return list(steps.values())


def best_and_worst(step: int, rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The `count` replies of a step with the highest reward, and of the others as many with the lowest.

    rows: one dict per reply with "id" (of the example), "reward" and what else is logged. Each is returned with
    "step" and "kind" ("best" or "worst") added. Of equal rewards, replies to different examples come first.
    """
    seen: Counter[tuple] = Counter()
    repeats = []  # earlier replies to the same example with the same reward
    for row in rows:
        repeats.append(seen[row["id"], row["reward"]])
        seen[row["id"], row["reward"]] += 1
    best = sorted(range(len(rows)), key=lambda i: (-rows[i]["reward"], repeats[i]))[:count]
    others = [i for i in range(len(rows)) if i not in best]
    worst = sorted(others, key=lambda i: (rows[i]["reward"], repeats[i]))[:count]
    kinds = [("best", i) for i in best] + [("worst", i) for i in worst]
    return [{"step": step, "kind": kind, **rows[i]} for kind, i in kinds]


class RunLog:
    """The logs of a run directory: metrics.jsonl, rollouts.jsonl, the console, and TensorBoard if asked for.

    Both files are append-only, one JSON object per line, flushed after each. Steps count from 1; what is measured
    before training is logged as step 0.
    """

    def __init__(self, run_dir: Path, total_steps: int, completed: int = 0, tensorboard: bool = False):
        """Start new logs, or cut those of a resumed run back to the rows of the steps that are `completed`."""
        self.total_steps = total_steps
        paths = (run_dir / "metrics.jsonl", run_dir / "rollouts.jsonl")
        for path in paths:
            rows = read_jsonl(path) if completed and path.exists() else []
            with atomic_write(path) as file:
                file.writelines(to_json(row) + "\n" for row in rows if row["step"] <= completed)
        self.row = (read_metrics(paths[0]) or [{}])[-1]  # the metrics logged last: all those of one step
        self._metrics, self._rollouts = (path.open("a", encoding="utf-8") for path in paths)
        self._in_a_row: Counter[str] = Counter()  # of NOTHING_TO_LEARN
        self._tensorboard = None
        if tensorboard:
            first_step = completed + 1 if completed else 0
            self._tensorboard = tensorboard_writer()(str(run_dir / "tensorboard"), purge_step=first_step)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Log metrics of a step and print a line of them; the figures of an evaluation get a row of their own."""
        self.row = (self.row if self.row.get("step") == step else {}) | {"step": step} | values
        print(to_json({"step": step} | values), file=self._metrics, flush=True)
        if self._tensorboard is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        print(console_line(step, self.total_steps, values), flush=True)
        for metric, value, count, meaning in NOTHING_TO_LEARN:
            if metric in values and self._in_a_row[metric] < count:  # at count, it has been said
                self._in_a_row[metric] = self._in_a_row[metric] + 1 if values[metric] == value else 0
                if self._in_a_row[metric] == count:
                    print(f"note: {meaning}", flush=True)

    def rollouts(self, step: int, rows: Sequence[dict[str, Any]], count: int) -> None:
        """Log the best and the worst `count` replies of a step; `rows` as for `best_and_worst`."""
        for row in best_and_worst(step, rows, count):
            print(to_json(row), file=self._rollouts, flush=True)

    def sync(self) -> None:
        """Wait until the disk has the logs: a checkpoint written next must not know more steps than they."""
        for file in (self._metrics, self._rollouts):
            os.fsync(file.fileno())


def tensorboard_writer() -> type:
    """torch's SummaryWriter. Raises UserError if the package that it needs is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "tensorboard is on, but not installed; pip install -r requirements-extra.txt, or set tensorboard to false."
        ) from None
    return SummaryWriter
