"""The benchmarks: a disturbed turn is noticed, the script for a GPU runs before it meets one, the simulation works."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "perf"))

from edge import dealt, load, simulate, update  # noqa: E402
from shapes import quiet_turns, run_queue_seconds  # noqa: E402


def busy(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.fixture
def neighbour():
    """A busy process on the core that this one is pinned to as well."""
    if not any(Path("/proc/self/task").glob("*/schedstat")):
        pytest.skip("this system does not tell how long a thread waited for a core")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield
    process.kill()
    process.communicate()
    os.sched_setaffinity(0, cores)


def test_a_turn_beside_a_busy_neighbour_is_named_and_left_out(neighbour, capsys):
    turns, waited = quiet_turns(lambda turn: (time.sleep if turn == 0 else busy)(0.4) or turn, 2)
    assert turns == [0] and waited[0] < 0.05 < 0.2 < waited[1] < 1
    assert f"turn 2 was disturbed: its threads waited {waited[1]:.0%}" in capsys.readouterr().out
    assert quiet_turns(lambda turn: busy(0.4) or turn, 2)[0] == [0, 1]
    assert "all turns were disturbed" in capsys.readouterr().out


def test_the_wait_is_that_of_all_threads_that_the_system_tells_of(monkeypatch, tmp_path):
    for thread, (ran, waited) in enumerate([(7, 1), (9, 3)]):
        (tmp_path / str(thread)).write_text(f"{ran}000000000 {waited}000000000 5\n")
    monkeypatch.setattr(Path, "glob", lambda *_: [tmp_path / "0", tmp_path / "1", tmp_path / "ended"])
    assert run_queue_seconds() == 4
    monkeypatch.setattr(Path, "glob", lambda *_: [])
    assert quiet_turns(lambda turn: turn, 1) == ([0], [0])


def test_the_edge_of_the_load_breaks_nothing_and_is_balanced():
    """A prompt of 4,096 tokens, a reply of 8,192 and a cache that holds little more; `simulate` checks the blocks."""
    prompts, replies = load(1000, prompts=12)
    assert max(prompts) == 4096 and max(map(max, replies)) == 8192
    small = 100 * 128 * 57344  # bytes of about 100 blocks
    ranks = simulate(prompts, replies, dealt(prompts, 3), cache_bytes=small)
    assert sum(rank.scheduler.stats.prefilled for rank in ranks) == sum(prompts)
    assert sum(rank.scheduler.stats.preemptions for rank in ranks) > 0
    for mean, count in ((105, 8), (1000, 256)):
        _, bound, planned = update(*load(mean), count)
        assert bound <= planned < 1.02 * bound


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_dry(tmp_path):
    out, report = tmp_path / "gpu.json", tmp_path / "gpu.md"
    base = [sys.executable, str(ROOT / "perf" / "gpu.py"), "--dry-run", "--out", str(out)]
    for part in ("rollout-7B", "update-3B", "step-1.5B"):
        subprocess.run([*base, "--part", part], check=True, cwd=tmp_path)
    subprocess.run([*base, "--markdown", str(report)], check=True)
    done = json.loads(out.read_text())
    assert [record["status"] for record in done.values()] == ["ok"] * 3
    assert [row["rows"] for row in done["rollout-7B"]["decode"]] == [5, 10, 15]
    for part in ("rollout-7B", "update-3B"):
        lost = [row["lost ms"] for row in done[part]["losses"]]
        assert len(lost) == 5 and lost == sorted(lost, reverse=True) and lost[0] > 0
        assert done[part]["losses"][0]["kind"] in report.read_text()
    assert all(row["of limit"] < 1 for row in done["rollout-7B"]["decode"])
    steps = done["step-1.5B"]["steps"]
    assert len(steps) == 4 and all(row["rollout"] + row["update"] < row["step"] for row in steps)
