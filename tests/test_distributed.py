"""One process, two, three: the same tokens, losses, gradients and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import reference

from tooln1.distributed import launch
from tooln1.io.errors import UserError
from tooln1.sampler.distributed import balance_by_cost

ROOT = Path(__file__).resolve().parents[1]
MODEL = reference("models/dev/qwen1p5b_12x2_tied_bf16_sharded")


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    """Run a script of this repository under torchrun, one thread a process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def recorded_steps(folder: Path, processes: int, budget: int, steps: int = 5, *extra: str) -> dict:
    out = folder / f"{processes}-{budget}-{len(list(folder.iterdir()))}.json"
    run = torchrun(processes, "tests/recorded_steps.py", str(MODEL), str(out), str(steps), str(budget), *extra)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(folder):
    return recorded_steps(folder, 1, 10_000)


@pytest.mark.parametrize("processes,budget,how", [(2, 60, ()), (2, 60, ("thrifty",)), (3, 10_000, ())])
def test_more_processes_give_the_same_steps_and_the_same_tokens(folder, alone, processes, budget, how):
    """Five steps on recorded rollouts; with three ranks and a large budget some ranks idle in some micro-batches."""
    several = recorded_steps(folder, processes, budget, 5, *how)
    gradients = [torch.tensor(run["gradient"], dtype=torch.float64) for run in (several, alone)]
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() <= 1e-6
    assert several["loss"] == pytest.approx(alone["loss"], rel=1e-5, abs=1e-5)
    assert several["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
    assert all(0.2 < share < 0.8 for share in alone["clipped"]) and several["clipped"] == alone["clipped"]
    for ours, theirs in zip(several["weights"], alone["weights"], strict=True):
        # Adam divides by the root of the squared gradient: where a gradient is nearly 0, its rounding shows
        close = torch.isclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)
        assert close.float().mean() > 0.999
    assert several["replies"] == alone["replies"]


@pytest.mark.parametrize("written_by,read_by", [(1, 2), (2, 1), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_checkpoint_loads_at_another_world_size(folder, written_by, read_by):
    place = folder / f"checkpoints-{written_by}"
    saved = recorded_steps(folder, written_by, 10_000, 2, f"save={place}")
    assert sorted(path.name for path in place.iterdir()) == ["latest", "step-000002"]
    loaded = recorded_steps(folder, read_by, 10_000, 1, f"load={place / 'step-000002'}")
    assert loaded["resumed"] == 2
    assert loaded["weights"] == saved["weights"]
    assert loaded["moments"] == saved["moments"] and max(map(max, saved["moments"])) > 0


def test_mixed_precision_stays_near_full_precision(folder, alone):
    """What a GPU does, but for the GPU: bf16 passes on sharded fp32 masters, fp32 gradient sums, recomputed blocks."""
    half = recorded_steps(folder, 2, 60, 5, "bf16")
    assert half["loss"] == pytest.approx(alone["loss"], abs=0.05)
    assert half["grad_norm"] == pytest.approx(alone["grad_norm"], rel=0.15)
    assert half["grad_norm"] != pytest.approx(alone["grad_norm"], rel=1e-5)


def test_work_is_dealt_by_cost():
    shares = balance_by_cost([5, 1, 9, 3, 4], 2)
    assert sorted(i for share in shares for i in share) == [0, 1, 2, 3, 4]
    assert [sum([5, 1, 9, 3, 4][i] for i in share) for share in shares] == [12, 10]
    assert [len(share) for share in balance_by_cost([100 + i for i in range(9)], 3)] == [3, 3, 3]
    assert balance_by_cost([1.0], 3) == [[0], [], []]


def test_a_gpu_that_is_not_there_is_a_sentence():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="torch finds no GPU"), launch("cuda"):
        pass
