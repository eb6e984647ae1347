"""What a run says about itself: metrics that know how they reduce, a console line a step, JSON lines, timers.

A metric is kept as what can be added up (a sum and a count, a least, a most) and becomes one number only
once, over all processes: so a mean does not depend on how tokens were spread over micro-batches and ranks.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tooln1.distributed import Reduce, local_reduce
from tooln1.io.errors import UserError
from tooln1.io.files import atomic_write
from tooln1.run.tensorboard import TensorBoardLog


class Metrics:
    """The metrics of one step on this rank; make a new one each step.

    Values are numbers or tensors of one element; tensors stay on their device and are read in `reduced`.
    `synchronize` (torch.cuda.synchronize on a GPU) is called at both ends of a timer: without it, work that
    was only queued would be timed in the phase that waits for it. `enter` is told of each phase that begins.
    """

    def __init__(
        self, synchronize: Callable[[], None] = lambda: None, enter: Callable[[str], None] = lambda phase: None
    ):
        self._synchronize, self._enter = synchronize, enter
        self._mean: dict[str, tuple[Any, Any]] = {}  # (sum, count)
        self._sum: dict[str, Any] = {}
        self._min: dict[str, list] = {}
        self._max: dict[str, list] = {}
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, Any] = {}

    def add_mean(self, name: str, total: Any, count: Any = 1) -> None:
        """Add `total`, a sum over `count` things; logged is sum / count over all calls and ranks."""
        before, counted = self._mean.get(name, (0.0, 0.0))
        self._mean[name] = before + _number(total), counted + _number(count)

    def add_means(self, sums: dict[str, tuple[Any, Any]]) -> None:
        """`add_mean` for each name -> (total, count)."""
        for name, (total, count) in sums.items():
            self.add_mean(name, total, count)

    def add_sum(self, name: str, value: Any) -> None:
        """Logged is the sum over all calls and ranks."""
        self._sum[name] = self._sum.get(name, 0.0) + _number(value)

    def add_min(self, name: str, value: Any) -> None:
        """Logged is the least of all calls and ranks."""
        self._min.setdefault(name, []).append(_number(value))

    def add_max(self, name: str, value: Any) -> None:
        """Logged is the most of all calls and ranks."""
        self._max.setdefault(name, []).append(_number(value))

    def add_tokens(self, phase: str, tokens: Any) -> None:
        """Tokens that `phase` worked on, for its tokens_per_second."""
        self._tokens[phase] = self._tokens.get(phase, 0.0) + _number(tokens)

    @contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to seconds/<phase>; the slowest rank's are logged."""
        self._enter(phase)
        self._synchronize()
        start = time.perf_counter()
        try:
            yield
            self._synchronize()
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def reduced(self, reduce: Reduce = local_reduce) -> dict[str, float]:
        """Every metric by name, over all ranks; a mean of nothing is NaN.

        Phases give seconds/<phase> and, where tokens were added, tokens_per_second/<phase>: the tokens of all
        ranks over the time of the slowest. Calls `reduce` four times, on every rank alike. All ranks must
        have the same metrics, else RuntimeError on each: unequal vectors would hang, or mix names up.
        """
        self._check_same_names(reduce)
        means, sums, tokens = sorted(self._mean), sorted(self._sum), sorted(self._tokens)
        parts = [float(part) for name in means for part in self._mean[name]]
        parts += [float(self._sum[name]) for name in sums] + [float(self._tokens[name]) for name in tokens]
        parts = iter(reduce(parts, "sum"))
        values = {}
        for name in means:
            total, count = next(parts), next(parts)
            values[name] = total / count if count else math.nan
        values.update((name, next(parts)) for name in sums)
        tokens_of = {name: next(parts) for name in tokens}
        least, most, phases = sorted(self._min), sorted(self._max), sorted(self._seconds)
        values.update(zip(least, reduce([_extreme(min, self._min[n]) for n in least], "min"), strict=True))
        upper = [_extreme(max, self._max[n]) for n in most] + [self._seconds[n] for n in phases]
        names = most + [f"seconds/{phase}" for phase in phases]
        values.update(zip(names, reduce(upper, "max"), strict=True))
        for phase, count in tokens_of.items():
            seconds = values.get(f"seconds/{phase}", 0.0)
            values[f"tokens_per_second/{phase}"] = count / seconds if seconds else math.nan
        return values

    def _check_same_names(self, reduce: Reduce) -> None:
        tables = (self._mean, self._sum, self._min, self._max, self._seconds, self._tokens)
        names = [sorted(table) for table in tables]
        digest = float(zlib.crc32(json.dumps(names).encode()))
        highest, negated_lowest = reduce([digest, -digest], "max")
        if highest != -negated_lowest:
            raise RuntimeError(f"the ranks do not log the same metrics; this rank has {names}.")


def _number(value: Any) -> Any:
    """A number, or a tensor of one element in fp64 and without its graph (not copied to the host yet)."""
    return value.detach().double() if hasattr(value, "detach") else float(value)


def _extreme(pick: Callable, values: list) -> float:
    numbers = [float(value) for value in values]
    return math.nan if any(math.isnan(number) for number in numbers) else pick(numbers)


# label, metric, format: the parts of the console line, in order; what a step did not measure is left out
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
SUPERVISED_ONLY = ("loss", "tokens_per_second/update")  # left out of the line of a step with a reward


def console_line(step: int, total: int, values: dict[str, float]) -> str:
    """One readable line: the step of how many, then what was measured.

    >>> console_line(3, 40, {"reward": 0.51, "kl": 0.00123, "seconds/step": 4.24})
    'step  3/40 · reward 0.510 · kl 0.0012 · 4.2 s'
    """
    parts = [f"step {step:>{len(str(total))}}/{total}"]
    for label, name, form in CONSOLE:
        value = values.get(name)
        if value is None or (name == "skipped_steps" and not value):
            continue
        if name in SUPERVISED_ONLY and "reward" in values:
            continue
        text = form.format(value) if math.isfinite(value) else str(value)
        parts.append(f"{label} {text}".strip())
    return " · ".join(parts)


def to_json(record: Any) -> str:
    """One line of strict JSON: NaN and infinity become null, tensors and numpy numbers become numbers."""
    text = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which a model's JSON may hold, has no UTF-8 form
        text = json.dumps(_plain(record), allow_nan=False)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonlLog:
    """An append-only file of JSON objects, one a line, written line by line."""

    def __init__(self, path: str | os.PathLike):
        """Go on with the file at `path`, or begin it. A last line cut off by a crash is taken away."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            content = self.path.read_bytes()
            os.truncate(self.path, content.rfind(b"\n") + 1)
        self._file = self._open()

    def _open(self) -> IO[bytes]:
        return self.path.open("ab", buffering=0)  # nothing is held back that a full disk could refuse later

    def append(self, record: dict[str, Any]) -> None:
        """Write one line. Raises UserError where the disk does not take it."""
        line = (to_json(record) + "\n").encode("utf-8")
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise UserError(f"{self.path} cannot be written to: {error.strerror}.") from error

    def last(self) -> dict[str, Any]:
        """The last line's object; {} where there is none."""
        rows = read_jsonl(self.path)
        return rows[-1] if rows else {}

    def replace_last(self, record: dict[str, Any]) -> None:
        """Write `record` in the place of the last line, in one move. UserError where the disk does not take it."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
            self._rewrite([*lines[:-1], (to_json(record) + "\n").encode("utf-8")])
        except OSError as error:
            raise UserError(f"{self.path} cannot be written to: {error.strerror}.") from error

    def flush(self) -> None:
        """Have the disk hold what was written."""
        os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> None:
        """Take away, in one move, the lines whose "step" is above `step`: a resumed run writes them again.

        So are lines behind that of `step` which a power cut has made unreadable.
        """
        kept = [record for record in read_jsonl(self.path, enough=step) if not _is_after(record.get("step"), step)]
        self._rewrite((to_json(record) + "\n").encode("utf-8") for record in kept)

    def _rewrite(self, lines: Iterable[bytes]) -> None:
        with atomic_write(self.path, "wb") as file:
            file.writelines(lines)
        self._file.close()
        self._file = self._open()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _is_after(value: Any, step: int) -> bool:
    return isinstance(value, int | float) and value > step


def read_jsonl(path: str | os.PathLike, enough: int | None = None) -> list[dict[str, Any]]:
    """The objects of a log file. A last line without its newline, cut off by a crash, is left out.

    enough: behind a line of this "step" or a later one, unreadable lines end the reading instead of being an error.
    Raises `UserError` for a file that cannot be read and for any other line that is not a JSON object.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}.") from None
    rows = []
    lines = text.split("\n")[:-1]  # not splitlines(): U+2028 and its like may stand inside a JSON string
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if enough is not None and rows and _is_after(rows[-1].get("step"), enough - 1):
                break
            raise UserError(f"{path}, line {number} is not JSON: {error}.") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is not a JSON object; is this the log of a run?")
        rows.append(row)
    return rows


def best_and_worst(step: int, rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Of the replies of a step, the `count` with the most reward and as many others with the least.

    `rows`: one dict a reply: "id" (of the example), "reward", and what else is kept ("reply", "answer").
    Each comes back with "step" and "kind" ("best" or "worst") in front. Ties are the rule under a binary
    reward: among equals, a second reply to one example comes after the first replies to others.
    """
    best = _pick(rows, range(len(rows)), count, sign=-1)
    rest = [index for index in range(len(rows)) if index not in set(best)]
    worst = _pick(rows, rest, count, sign=1)
    kinds = [("best", index) for index in best] + [("worst", index) for index in worst]
    return [{"step": step, "kind": kind, **rows[index]} for kind, index in kinds]


def _pick(rows: Sequence[dict[str, Any]], indices: Iterable[int], count: int, sign: int) -> list[int]:
    """The `count` indices with the least sign * reward; ties as `best_and_worst` says, then in order."""
    seen: dict[tuple, int] = {}
    keys = []
    for index in indices:
        reward, example = float(rows[index]["reward"]), rows[index]["id"]
        earlier = seen.get((reward, example), 0)
        seen[reward, example] = earlier + 1
        keys.append((sign * reward, earlier, index))
    return [index for _, _, index in sorted(keys)[:count]]


class RunLog:
    """The logs of a run directory: metrics.jsonl, rollouts.jsonl, the console, and TensorBoard when asked.

    A step is counted when it is complete: the first one logs as 1, what is measured before it as 0.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        total_steps: int,
        *,
        completed: int | None = None,
        tensorboard: bool = False,
        write: bool = True,
    ):
        """Begin the logs anew, or, resumed with so many steps `completed`, go on where those end.

        With `write` False (every rank but the first) nothing is opened, and every call does nothing.
        """
        self.total_steps = total_steps
        self._metrics = self._rollouts = self._tensorboard = None
        self.row: dict[str, Any] = {}  # the last one of metrics.jsonl
        if not write:
            return
        paths = [Path(run_dir) / name for name in ("metrics.jsonl", "rollouts.jsonl")]
        if completed is None:
            for path in paths:
                path.unlink(missing_ok=True)
        self._metrics, self._rollouts = (JsonlLog(path) for path in paths)
        if completed is not None:
            self._metrics.truncate_after(completed)
            self._rollouts.truncate_after(completed)
            self.row = self._metrics.last()
        if tensorboard:
            first_step = 0 if completed is None else completed + 1
            self._tensorboard = TensorBoardLog(Path(run_dir) / "tensorboard", first_step)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Log the metrics of a step, or add some to those it has already, and print a line of them."""
        if self._metrics is None:
            return
        if self.row.get("step") == step:
            self.row = {**self.row, **values}
            self._metrics.replace_last(self.row)
        else:
            self.row = {"step": step, **values}
            self._metrics.append(self.row)
        if self._tensorboard is not None:
            self._tensorboard.write(step, values)
        print(console_line(step, self.total_steps, values), flush=True)

    def rollouts(self, step: int, rows: Sequence[dict[str, Any]], count: int) -> None:
        """Keep the best and worst `count` replies of a step; `rows` as `best_and_worst` takes them."""
        if self._rollouts is not None:
            for row in best_and_worst(step, rows, count):
                self._rollouts.append(row)

    def flush(self) -> None:
        """Have the disk hold what was logged: a checkpoint that follows must not know of more steps than the logs."""
        for log in (self._metrics, self._rollouts):
            if log is not None:
                log.flush()

    def close(self) -> None:
        """Close the files."""
        for log in (self._metrics, self._rollouts, self._tensorboard):
            if log is not None:
                log.close()
