"""The curves of runs: what is read, the text form, and the picture."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tooln1.io.errors import UserError
from tooln1.run.plot import PANELS, SPARKS, main, read_runs, series, smoothed, sparkline, text_plot

ROOT = Path(__file__).resolve().parents[1]


def write_run(folder: Path, rows: list[dict]) -> str:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


def rl_rows(steps: int, slope: float) -> list[dict]:
    rows: list[dict] = [{"step": 0, "heldout_accuracy": 0.5}]
    for step in range(1, steps + 1):
        rows.append({"step": step, "reward": 0.5 + slope * step, "kl": 0.001 * step, "entropy": 1 / step})
        rows[-1] |= {"reply_tokens_mean": 20.0, "grad_norm": None if step == 2 else 0.3}
        if step % 10 == 0:
            rows.append({"step": step, "heldout_accuracy": 0.5 + slope * step})
    return rows


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / "demo", rl_rows(30, 0.01)), write_run(tmp_path / "control", rl_rows(20, 0.0))]


def test_series_skip_nulls_and_take_the_first_metric_there_is(runs, tmp_path):
    demo = read_runs(runs)[runs[0]]
    assert series(demo, ("grad_norm",))[0] == [1, *range(3, 31)]
    assert series(demo, ("heldout_accuracy",)) == ([0, 10, 20, 30], [0.5, 0.6, 0.7, 0.8])
    assert series(demo, ("never_logged",)) == ([], [])
    sft = write_run(tmp_path / "sft", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert series(read_runs([sft])[sft], PANELS["Reward (training)"]) == ([1, 2], [2.0, 1.0])


def test_a_run_without_anything_to_draw_is_refused(tmp_path):
    with pytest.raises(UserError, match="young/metrics.jsonl has no metric to draw"):
        read_runs([write_run(tmp_path / "young", [{"step": 1, "seconds/step": 3.0, "reward": None}])])
    with pytest.raises(UserError, match="cannot read"):
        read_runs([str(tmp_path / "gone")])


def test_smoothed_and_sparkline():
    assert smoothed([0.0, 3.0, 6.0, 3.0], 3) == [1.5, 3.0, 4.0, 4.5]
    assert smoothed([1.0, 2.0, 9.0], 1) == [1.0, 2.0, 9.0]
    assert sparkline(list(range(8)), 0, 7) == SPARKS
    assert sparkline([3.0, 3.0], 3, 3) == "▁▁"  # a flat curve divides by nothing
    assert sparkline([0, 7, 0, 7], 0, 7, width=2) == "▅▅"  # two values each
    assert [len(sparkline([0.0] * length, 0, 1)) for length in (1, 48, 49, 960)] == [1, 48, 25, 48]


def test_text_needs_neither_matplotlib_nor_utf8(runs):
    lines = text_plot(read_runs(runs)).splitlines()
    assert lines[0] == "Reward (training)" and len(lines) == 3 * len(PANELS)
    assert lines[1].split()[0] == runs[0] and lines[1].endswith("0.51 -> 0.8 (steps 1-30)")
    assert lines[1].split()[1][0] == "▁" and lines[1].split()[1][-1] == "█"
    kl = [lines[7].split()[1][-1], lines[8].split()[1][-1]]  # 0.03 and 0.02, on a common scale
    assert kl[0] == "█" and kl[1] not in "▁█"
    program = "import sys; sys.modules['matplotlib'] = None; from tooln1.run.plot import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, *runs, "--text"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"0.51 -> 0.8" in done.stdout


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_images_are_written_in_the_format_of_their_name(tmp_path, runs, suffix, start):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / f"curves.{suffix}"
    main([*runs, "--out", str(out)])
    assert out.read_bytes().startswith(start) and list(out.parent.iterdir()) == [out]
    with pytest.raises(UserError, match="a.doc cannot be written: .*supported formats.* png"):
        main([*runs, "--out", str(tmp_path / "a.doc")])
