"""The curves of a run, those of the paper's figures 6 and 7.

    python -m tooln1.run.plot RUN [RUN ...] [--out FILE.png | --text]

RUN is a run directory or its metrics.jsonl; several runs are drawn over one another. `--text` prints lines of
characters instead and does without matplotlib, which is optional (requirements-extra.txt).
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tooln1.io.errors import UserError, exit_on_user_error
from tooln1.io.files import atomic_write, check_writable
from tooln1.run.metrics import read_jsonl

INK, FAINT = "#333333", "#dddddd"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 48  # characters


@dataclass(frozen=True)
class Panel:
    """One plot: the first of `metrics` that any run has logged."""

    title: str
    metrics: tuple[str, ...]
    marked: bool = False  # a metric of few steps: a dot at each


PANELS = (
    Panel("Reward (training)", ("reward", "cross_entropy", "loss")),
    Panel("Held-out accuracy", ("heldout_accuracy",), marked=True),
    Panel("KL to the reference", ("kl",)),
    Panel("Entropy", ("entropy",)),
    Panel("Reply length, tokens", ("reply_tokens_mean",)),
    Panel("Gradient norm", ("grad_norm", "clip_fraction")),
)


@dataclass(frozen=True)
class Run:
    """The log of a run."""

    name: str
    rows: list[dict[str, Any]]

    def series(self, metric: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was logged as a number."""
        rows = [row for row in self.rows if _is_number(row.get("step")) and _is_number(row.get(metric))]
        return [row["step"] for row in rows], [row[metric] for row in rows]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_runs(paths: list[str]) -> list[Run]:
    """The runs in these directories (or metrics.jsonl files), under names that tell them apart.

    Raises `UserError` for a log that is missing, broken, or without any metric that is drawn.
    """
    files = [Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path) for path in paths]
    folders = [file.resolve().parent for file in files]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = paths
    runs = [Run(name, read_jsonl(file)) for name, file in zip(names, files, strict=True)]
    for run, file in zip(runs, files, strict=True):
        if not any(run.series(metric)[0] for panel in PANELS for metric in panel.metrics):
            raise UserError(f"{file} holds nothing to draw yet; it is written as the run goes on.")
    return runs


def choose_metric(panel: Panel, runs: list[Run]) -> str | None:
    """The metric that a panel shows for these runs; None where none has been logged."""
    return next((metric for metric in panel.metrics if any(run.series(metric)[0] for run in runs)), None)


def _title(panel: Panel, metric: str | None) -> str:
    return panel.title if metric in (None, panel.metrics[0]) else metric.replace("_", " ").capitalize()


def smoothed(values: list[float], window: int) -> list[float]:
    """The mean of each value and its neighbours, `window` in all; fewer where there are no more.

    >>> smoothed([0.0, 3.0, 6.0, 3.0], 3)
    [1.5, 3.0, 4.0, 4.5]
    """
    reach = window // 2
    near = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(some) / len(some) for some in near]


def sparkline(values: list[float], low: float, high: float, width: int = SPARK_WIDTH) -> str:
    """The course of the values between `low` and `high` in at most `width` characters, neighbours averaged.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7], 0, 7)
    '▁▂▃▄▅▆▇█'
    """
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((mean - low) * scale)] for mean in means)


def text_plot(runs: list[Run]) -> str:
    """The panels as sparklines: run, course (on one scale for all runs), first and last value."""
    lines = []
    name_width = max(len(run.name) for run in runs)
    for panel in PANELS:
        metric = choose_metric(panel, runs)
        if metric is None:
            continue
        lines.append(_title(panel, metric))
        everything = [value for run in runs for value in run.series(metric)[1]]
        for run in runs:
            steps, values = run.series(metric)
            if values:
                course = sparkline(values, min(everything), max(everything))
                ends = f"{values[0]:.4g} -> {values[-1]:.4g}  (steps {steps[0]}-{steps[-1]})"
                lines.append(f"  {run.name:<{name_width}}  {course:<{SPARK_WIDTH}}  {ends}")
    return "\n".join(lines)


def figure(runs: list[Run]) -> Any:
    """The panels as a matplotlib Figure. Raises `UserError` where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UserError("matplotlib is not installed; pip install -r requirements-extra.txt, or pass --text.") from None
    drawing = Figure(figsize=(10.5, 5.6), layout="constrained")
    axes = drawing.subplots(2, 3)
    for panel, axis in zip(PANELS, axes.flat, strict=True):
        metric = choose_metric(panel, runs)
        axis.set_title(_title(panel, metric), loc="left", fontsize=10, color=INK)
        for i, run in enumerate(runs):
            _draw(axis, *run.series(metric or ""), COLOURS[i % len(COLOURS)], panel.marked)
        if metric is None:
            axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", color=INK, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.grid(axis="y", color=FAINT, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8, colors=INK, length=0)
        for side, spine in axis.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(FAINT)
    for axis in axes[1]:
        axis.set_xlabel("step", fontsize=9, color=INK)
    lines = [axes[0][0].plot([], [], color=COLOURS[i % len(COLOURS)])[0] for i in range(len(runs))]
    names = [run.name for run in runs]
    if len(runs) > 1:
        style = {"frameon": False, "fontsize": 9, "labelcolor": INK}
        drawing.legend(lines, names, loc="outside lower center", ncols=4, **style)
    else:
        drawing.suptitle(names[0], x=0.01, ha="left", fontsize=11, color=INK)
    return drawing


def _draw(axis: Any, steps: list[float], values: list[float], colour: str, marked: bool) -> None:
    """One run's curve: the mean over a twentieth of the run in front of the faint values themselves."""
    if marked:
        axis.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3.5)
        return
    window = len(values) // 20 * 2 + 1  # 1, which smooths nothing, below 20 values
    if window > 1:
        axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    axis.plot(steps, smoothed(values, window), color=colour, linewidth=1.6)


def save_figure(drawing: Any, path: Path) -> None:
    """Write the figure in the format that its name ends in. Raises `UserError` for an unknown one."""
    kinds = drawing.canvas.get_supported_filetypes()
    kind = path.suffix[1:].lower()
    if kind not in kinds:
        ending = f"the ending {path.suffix}" if path.suffix else "a name without an ending"
        raise UserError(f"--out {path}: {ending} names no image format; take .png or .svg.")
    check_writable(path.parent, "--out")
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; name a file in it.")
    with atomic_write(path, "wb") as file:
        drawing.savefig(file, format=kind, dpi=160, facecolor="white")


def main(argv: list[str] | None = None) -> None:
    """Read the runs and draw them."""
    parser = argparse.ArgumentParser("python -m tooln1.run.plot", description="Draw the curves of some runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, or its metrics.jsonl")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, help="image to write (.png, .svg, .pdf); default: RUN/curves.png")
    where.add_argument("--text", action="store_true", help="print sparklines instead; needs no matplotlib")
    options = parser.parse_args(argv)
    runs = read_runs(options.runs)
    if options.text:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        print(text_plot(runs))
        return
    first = Path(options.runs[0])
    out = options.out or (first if first.is_dir() else first.parent) / "curves.png"
    save_figure(figure(runs), out)
    print(f"wrote {out}")


if __name__ == "__main__":
    exit_on_user_error(main)
