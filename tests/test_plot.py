"""The curves of runs: what is read, what is drawn, and what happens without matplotlib."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tooln1.io.errors import UserError
from tooln1.run.plot import PANELS, SPARKS, choose_metric, figure, main, read_runs, smoothed, sparkline, text_plot

ROOT = Path(__file__).resolve().parents[1]


def write_run(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def rl_rows(steps: int, slope: float = 0.01) -> list[dict]:
    rows: list[dict] = [{"step": 0, "heldout_accuracy": 0.5}]
    for step in range(1, steps + 1):
        row = {"step": step, "reward": 0.5 + slope * step, "kl": 0.001 * step, "entropy": 1 / step}
        row |= {"reply_tokens_mean": 20.0, "grad_norm": None if step == 2 else 0.3}
        if step % 10 == 0:
            row["heldout_accuracy"] = 0.5 + slope * step
        rows.append(row)
    return rows


@pytest.fixture
def runs(tmp_path):
    paths = [write_run(tmp_path / "demo", rl_rows(30)), write_run(tmp_path / "control", rl_rows(20, 0.0))]
    return [str(path) for path in paths]


def curves(axis) -> list[tuple[list, list]]:
    """The lines of an axis that hold points."""
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()]
    return [(x, y) for x, y in lines if x]


# --- reading


def test_series_skip_nulls_and_rows_without_the_metric(runs):
    demo = read_runs(runs)[0]
    assert demo.series("grad_norm")[0] == [1, *range(3, 31)]
    assert demo.series("heldout_accuracy") == ([0, 10, 20, 30], [0.5, 0.6, 0.7, 0.8])
    assert demo.series("never_logged") == ([], [])


def test_series_skip_what_is_no_finite_number(tmp_path):
    values = [0.5, float("nan"), float("inf"), True, "1", 0.25]
    rows = [{"step": step, "kl": kl} for step, kl in enumerate(values)]
    run = read_runs([str(write_run(tmp_path / "odd", [*rows, {"kl": 9.0}]))])[0]
    assert run.series("kl") == ([0, 5], [0.5, 0.25])


def test_a_file_reads_like_its_directory(runs):
    assert read_runs([runs[0] + "/metrics.jsonl"]) == read_runs([runs[0] + "/"]) == read_runs([runs[0]])


def test_names_tell_runs_apart(tmp_path, runs):
    assert [run.name for run in read_runs(runs)] == ["demo", "control"]
    other = str(write_run(tmp_path / "elsewhere" / "demo", rl_rows(3)))
    assert [run.name for run in read_runs([runs[0], other])] == [runs[0], other]


def test_a_run_without_anything_to_draw_is_refused(tmp_path):
    folder = write_run(tmp_path / "young", [{"step": 1, "seconds/step": 3.0, "reward": None}])
    with pytest.raises(UserError, match="young.*nothing to draw"):
        read_runs([str(folder)])
    with pytest.raises(UserError, match="cannot read"):
        read_runs([str(tmp_path / "gone")])


def test_a_supervised_run_shows_its_loss_where_the_reward_would_be(tmp_path, runs):
    sft = str(write_run(tmp_path / "sft", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]))
    assert choose_metric(PANELS[0], read_runs([sft])) == "loss"
    assert choose_metric(PANELS[0], read_runs([sft, *runs])) == "reward"
    assert choose_metric(PANELS[2], read_runs([sft])) is None
    assert text_plot(read_runs([sft])).startswith("Loss\n  sft")


# --- the text form


def test_smoothed():
    assert smoothed([0.0, 3.0, 6.0, 3.0], 3) == [1.5, 3.0, 4.0, 4.5]
    assert smoothed([1.0, 2.0, 9.0], 1) == [1.0, 2.0, 9.0]
    assert smoothed([], 3) == []


def test_sparkline():
    assert sparkline(list(range(8)), 0, 7) == SPARKS
    assert sparkline([3.0, 3.0], 3, 3) == "▁▁"  # a flat curve divides by nothing
    assert sparkline([0, 7, 0, 7], 0, 7, width=2) == "▅▅"  # two values each
    assert sparkline([5.0], 0, 10, width=48) == "▅"
    for length in (47, 48, 49, 1000):
        assert len(sparkline([0.0] * length, 0, 1)) == min(48, length)


def test_text_plot_has_a_line_a_run_on_one_scale(runs):
    lines = text_plot(read_runs(runs)).splitlines()
    assert lines[0] == "Reward (training)"
    assert lines[1].split()[0] == "demo" and lines[1].endswith("0.51 -> 0.8  (steps 1-30)")
    assert lines[1].split()[1][0] == "▁" and lines[1].split()[1][-1] == "█"
    assert set(lines[2].split()[1]) == {"▁"}  # the control stays at the bottom of the common scale
    low, high = read_runs(runs)
    low, high = replace(low, rows=[{"step": 1, "kl": 1}]), replace(high, rows=[{"step": 1, "kl": 3}])
    assert [line.split()[1] for line in text_plot([low, high]).splitlines()[1:]] == ["▁", "█"]
    assert sum(line.startswith("  ") for line in lines) == 12  # six panels, two runs


def test_text_needs_no_matplotlib(runs):
    program = "import sys; sys.modules['matplotlib'] = None; from tooln1.plot import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", program, *runs, "--text"], capture_output=True, cwd=ROOT)
    assert done.returncode == 0 and "▁" in done.stdout.decode("utf-8")


def test_text_survives_a_terminal_without_the_characters(runs):
    environment = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tooln1.run.plot", *runs, "--text"], capture_output=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0 and b"0.51 -> 0.8" in done.stdout


# --- the figure


def test_figure_draws_every_run_in_every_panel(runs):
    pytest.importorskip("matplotlib")
    drawing = figure(read_runs(runs))
    axes = drawing.get_axes()
    assert [axis.get_title(loc="left") for axis in axes] == [panel.title for panel in PANELS]
    demo_faint, demo, control_faint, control = curves(axes[0])
    assert demo_faint[0] == list(range(1, 31)) and demo_faint[1][-1] == pytest.approx(0.8)
    assert demo[1] == pytest.approx(smoothed(demo_faint[1], 3)) and demo[1] != demo_faint[1]
    assert control[0] == list(range(1, 21)) and control_faint[1] == [0.5] * 20
    assert [x for x, _ in curves(axes[1])] == [[0, 10, 20, 30], [0, 10, 20]]  # measured, so not smoothed
    assert [text.get_text() for text in drawing.legends[0].get_texts()] == ["demo", "control"]


def test_one_run_needs_no_legend_and_says_what_was_not_logged(tmp_path):
    pytest.importorskip("matplotlib")
    folder = write_run(tmp_path / "short", [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.6}])
    drawing = figure(read_runs([str(folder)]))
    assert not drawing.legends and drawing.get_suptitle() == "short"
    axes = drawing.get_axes()
    assert curves(axes[0]) == [([1, 2], [0.5, 0.6])]  # too short to smooth
    assert [text.get_text() for text in axes[2].texts] == ["not logged"]


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_images_are_written_in_the_asked_format(tmp_path, runs, capsys, suffix, magic):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / f"curves.{suffix}"
    main([*runs, "--out", str(out)])
    assert out.read_bytes().startswith(magic)
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert list(out.parent.iterdir()) == [out]


def test_default_place_is_beside_the_log(runs, tmp_path):
    pytest.importorskip("matplotlib")
    main([runs[0] + "/metrics.jsonl"])
    assert (tmp_path / "demo" / "curves.png").read_bytes().startswith(b"\x89PNG")
