"""One process, two, three: the same tokens, losses, gradients and weights."""

import json
import re
import sys

import pytest
import tiny
import torch
from conftest import reference

from tooln1.model import load_model, save_model
from tooln1.sampler.distributed import balance_by_cost

MODEL = reference("models/dev/qwen1p5b_12x2_tied_bf16_sharded")


def test_two_processes_and_a_resume_give_what_one_process_gives(tmp_path):
    """The same replies, then the same metrics up to rounding. With Qwen3, which has the more kinds of weights."""
    tiny.write_model(tmp_path, **tiny.QWEN3)
    tiny.write_data(tmp_path)
    one, two = tiny.run(tmp_path, "one"), tmp_path / "two"
    preset = tiny.write_preset(tmp_path, "two")
    for steps in ("1", "3"):
        result = tiny.torchrun(2, "train.py", *preset, "--resume", "auto", "--steps", steps)
        assert result.returncode == 0, result.stderr[-3000:]
    assert "step-000001" in result.stdout  # where the second start goes on from
    rows, wanted = tiny.measured(two), tiny.measured(one)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted] == [1, 2, 3]
    for ours, theirs in zip(rows[:2], wanted[:2], strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    replies = [
        sorted((row["id"], row["reply"], row["reward"]) for row in tiny.measured(run, "rollouts.jsonl")[:24])
        for run in (one, two)
    ]
    assert replies[0] == replies[1]  # of two steps


@pytest.mark.slow
def test_replicas_of_two_nodes_give_what_one_process_gives(tmp_path):
    """Two nodes of two processes. Imitation: where all rewards are equal, Adam makes steps of rounding errors."""
    tiny.write_model(tmp_path)
    tiny.write_data(tmp_path)
    how = {"mode": "sft", "eval_data": "", "steps": 2}
    one, preset = tiny.run(tmp_path, "one", **how), tiny.write_preset(tmp_path, "two", sharding="hybrid", **how)
    result = tiny.torchrun(4, "--no-python", "env", "LOCAL_WORLD_SIZE=2", sys.executable, "train.py", *preset)
    assert result.returncode == 0, result.stderr[-3000:]
    rows, wanted = tiny.measured(tmp_path / "two"), tiny.measured(one)
    for name in ("loss", "grad_norm"):
        values, expected = ([row[name] for row in log] for log in (rows, wanted))
        assert values == pytest.approx(expected, rel=1e-5, abs=1e-5), name
    assert len({row["loss"] for row in wanted}) == 2


@pytest.mark.slow
def test_a_process_reads_its_shards_and_holds_no_more(tmp_path):
    """A model of 26 million parameters in bf16, policy and reference in fp32, some of their shards uneven or empty."""
    shape = {"hidden_size": 510, "intermediate_size": 2047, "num_attention_heads": 255, "num_key_value_heads": 1}
    save_model(load_model(tiny.write_model(tmp_path, **shape, num_hidden_layers=7)), tmp_path / "half", torch.bfloat16)
    result = tiny.torchrun(4, "tests/load_shards.py", str(tmp_path / "half"), "hybrid")
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [json.loads(row) for row in re.findall("{.*?}", result.stdout)]
    assert len(ranks) == 4
    for rank in ranks:
        assert rank["shards"] == pytest.approx(rank["weights"] / 2, rel=0.02)
        assert rank["peak"] < rank["shards"] + rank["largest"] + 16, rank


def recorded_steps(folder, processes: int, budget: int, steps: int = 5, *extra: str) -> dict:
    out = folder / f"{processes}-{budget}-{len(list(folder.iterdir()))}.json"
    run = tiny.torchrun(processes, "tests/recorded_steps.py", str(MODEL), str(out), str(steps), str(budget), *extra)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one_process(folder):
    return recorded_steps(folder, 1, 10_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes,budget,how",
    [
        (4, 10_000, ()),
        (4, 60, ("thrifty", "hybrid")),
    ],
)
def test_more_processes_give_the_same_steps_and_the_same_tokens(folder, one_process, processes, budget, how):
    """Five steps on recorded rollouts; with four ranks and a large budget some ranks idle in some micro-batches."""
    several = recorded_steps(folder, processes, budget, 5, *how)
    gradients = [torch.tensor(run["gradient"], dtype=torch.float64) for run in (several, one_process)]
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() <= 1e-6
    assert several["loss"] == pytest.approx(one_process["loss"], rel=1e-5, abs=1e-5)
    assert several["grad_norm"] == pytest.approx(one_process["grad_norm"], rel=1e-5)
    assert all(0.2 < share < 0.8 for share in one_process["clipped"]) and several["clipped"] == one_process["clipped"]
    for ours, theirs in zip(several["weights"], one_process["weights"], strict=True):
        # Adam divides by the root of the squared gradient: where a gradient is nearly 0, its rounding shows
        close = torch.isclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)
        assert close.float().mean() > 0.999
    assert several["replies"] == one_process["replies"]


@pytest.mark.slow
def test_a_checkpoint_loads_at_another_world_size_and_mesh(folder):
    checkpoints = folder / "checkpoints"
    saved = recorded_steps(folder, 4, 10_000, 2, f"save={checkpoints}", "hybrid")
    loaded = recorded_steps(folder, 2, 10_000, 1, f"load={checkpoints / 'step-000002'}")
    assert loaded["resumed"] == 2
    assert loaded["weights"] == saved["weights"]
    assert loaded["moments"] == saved["moments"] and max(map(max, saved["moments"])) > 0


@pytest.mark.slow
def test_mixed_precision_stays_near_full_precision(folder, one_process):
    """As on a GPU: bf16 passes on sharded fp32 masters, fp32 gradient sums, recomputed blocks."""
    half = recorded_steps(folder, 2, 60, 5, "bf16")
    assert half["loss"] == pytest.approx(one_process["loss"], abs=0.05)
    assert half["grad_norm"] == pytest.approx(one_process["grad_norm"], rel=0.15)
    assert half["grad_norm"] != pytest.approx(one_process["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_lora_shards_bf16_weights_with_fp32_adapters(folder):
    """FSDP2 holds both in one group; one process holds them as they are."""
    one, two = (recorded_steps(folder, processes, 60, 5, "lora") for processes in (1, 2))
    gradients = [torch.tensor(run["gradient"]) for run in (one, two)]
    assert 0 < (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 0.02
    assert one["loss"] == pytest.approx(two["loss"], abs=0.05)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=0.15)


def test_prompts_are_balanced_by_cost():
    costs = [5, 1, 9, 3, 4]
    shares = balance_by_cost(costs, 2)
    assert sorted(i for share in shares for i in share) == [0, 1, 2, 3, 4]
    assert [sum(costs[i] for i in share) for share in shares] == [12, 10]
    assert [len(share) for share in balance_by_cost([100 + i for i in range(9)], 3)] == [3, 3, 3]
    assert balance_by_cost([1.0], 3) == [[0], [], []]
