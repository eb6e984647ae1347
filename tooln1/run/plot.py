"""The training curves of one or several runs (those of the paper's Figures 6 and 7), as a picture or as text.

    python -m tooln1.run.plot RUN [RUN ...] [--out FILE.png | --text]

RUN is a run directory. The picture needs matplotlib (requirements-extra.txt); `--text` does not.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from tooln1.io.errors import UserError, exit_on_user_error
from tooln1.io.files import atomic_write
from tooln1.run.metrics import read_metrics

PANELS = {  # title -> metric; the first metric that a run has logged is drawn
    "Reward (training)": ("reward", "loss"),
    "Held-out accuracy": ("heldout_accuracy",),
    "KL to the reference": ("kl",),
    "Entropy": ("entropy",),
    "Reply length, tokens": ("reply_tokens_mean",),
    "Gradient norm": ("grad_norm",),
}
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 48  # characters

Run = list[dict[str, Any]]  # metrics by step
Series = tuple[list[float], list[float]]  # steps, values


def read_runs(paths: list[str]) -> dict[str, Run]:
    """The metrics of the runs in these directories, by path. UserError for a log that cannot be read or drawn."""
    runs = {path: read_metrics(Path(path) / "metrics.jsonl") for path in paths}
    for path, run in runs.items():
        if not any(series(run, metrics)[0] for metrics in PANELS.values()):
            raise UserError(f"{path}/metrics.jsonl has no metric to draw yet.")
    return runs


def series(run: Run, metrics: tuple[str, ...]) -> Series:
    """Steps and values of the first of the metrics that the run has; null (NaN, infinity) is left out."""
    for name in metrics:
        rows = [row for row in run if isinstance(row.get(name), int | float)]
        if rows:
            return [row["step"] for row in rows], [row[name] for row in rows]
    return [], []


def smoothed(values: list[float], window: int) -> list[float]:
    """The mean of each value and its neighbours, `window` in all; fewer at both ends.

    >>> smoothed([0.0, 3.0, 6.0, 3.0], 3)
    [1.5, 3.0, 4.0, 4.5]
    """
    reach = window // 2
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(near) / len(near) for near in windows]


def sparkline(values: list[float], low: float, high: float, width: int = SPARK_WIDTH) -> str:
    """The values between `low` and `high` as at most `width` characters, each the mean of equally many values.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7], 0, 7)
    '▁▂▃▄▅▆▇█'
    """
    size = math.ceil(len(values) / width)
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((mean - low) * scale)] for mean in means)


def text_plot(runs: dict[str, Run]) -> str:
    """The panels as text: a sparkline per run, on one scale for all runs, with its first and last value."""
    lines, name_width = [], max(map(len, runs))
    for title, metrics in PANELS.items():
        curves = {name: series(run, metrics) for name, run in runs.items()}
        everything = [value for _, values in curves.values() for value in values]
        lines += [title] if everything else []
        for name, (steps, values) in curves.items():
            if values:
                spark = sparkline(values, min(everything), max(everything))
                ends = f"{values[0]:.4g} -> {values[-1]:.4g} (steps {steps[0]}-{steps[-1]})"
                lines.append(f"  {name:<{name_width}}  {spark:<{SPARK_WIDTH}}  {ends}")
    return "\n".join(lines)


def figure(runs: dict[str, Run]) -> Any:
    """The panels as a matplotlib Figure; curves of 20 values or more are smoothed. UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed; pip install -r requirements-extra.txt, or pass --text.") from None
    drawing = Figure(figsize=(10.5, 5.6), layout="constrained")  # inches
    for (title, metrics), axis in zip(PANELS.items(), drawing.subplots(2, 3).flat, strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(axis="y", alpha=0.4)
        axis.set_visible(any(series(run, metrics)[0] for run in runs.values()))
        for number, (name, run) in enumerate(runs.items()):
            steps, values = series(run, metrics)
            window = 1 if title.startswith("Held-out") else len(values) // 20 * 2 + 1
            if window > 1:
                axis.plot(steps, values, color=f"C{number}", alpha=0.3)
            marker = "o" if len(values) < 20 else None
            axis.plot(steps, smoothed(values, window), color=f"C{number}", marker=marker, markersize=3, label=name)
    drawing.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return drawing


def main(argv: list[str] | None = None) -> None:
    """Read the runs and draw them."""
    parser = argparse.ArgumentParser("python -m tooln1.run.plot", description="Draw the training curves of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, help="image to write (.png, .svg, .pdf); default: RUN/curves.png")
    where.add_argument("--text", action="store_true", help="print the curves as text; does not need matplotlib")
    options = parser.parse_args(argv)
    runs = read_runs(options.runs)
    if options.text:
        sys.stdout.reconfigure(errors="replace")  # a terminal without the characters
        print(text_plot(runs))
        return
    out, drawing = options.out or Path(options.runs[0]) / "curves.png", figure(runs)
    try:
        with atomic_write(out, "wb") as file:
            drawing.savefig(file, format=out.suffix[1:], dpi=160)
    except (OSError, ValueError) as error:  # matplotlib's ValueError lists the formats that it knows
        raise UserError(f"--out {out} cannot be written: {error}.") from None
    print(f"wrote {out}")


if __name__ == "__main__":
    exit_on_user_error(main)
