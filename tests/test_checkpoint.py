"""Checkpoints: what comes back is what was saved, a broken one is a sentence. Other world sizes: test_distributed."""

import json

import pytest
import torch
from conftest import reference

from tooln1.checkpoint import complete_checkpoints, load_checkpoint, save_checkpoint
from tooln1.distributed import World
from tooln1.errors import UserError
from tooln1.model import load_model

ALONE = World(0, 1, torch.device("cpu"))


def trained(steps=2, seed=0):
    """A tiny model after a few noisy optimizer steps, and its optimizer."""
    model = load_model(reference("models/dev/qwen_mha_tied_fp32"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return model, optimizer


def one_more(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path, 7, model, optimizer, ALONE, keep=2)
    want = one_more(model, optimizer)
    other, other_optimizer = trained(steps=1, seed=9)
    assert load_checkpoint(tmp_path / "step-000007", other, other_optimizer, ALONE) == 7
    for ours, theirs in zip(one_more(other, other_optimizer), want, strict=True):
        assert torch.equal(ours, theirs)


def test_before_the_first_step_there_are_no_moments(tmp_path):
    model, optimizer = trained(steps=0)
    save_checkpoint(tmp_path, 0, model, optimizer, ALONE, keep=0)
    other, other_optimizer = trained(steps=0)
    assert load_checkpoint(tmp_path / "step-000000", other, other_optimizer, ALONE) == 0
    assert not other_optimizer.state


def test_the_newest_are_kept_and_half_written_ones_do_not_count(tmp_path):
    model, optimizer = trained()
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, model, optimizer, ALONE, keep=2)
    (tmp_path / ".step-000011.tmp").mkdir()
    (tmp_path / "step-000012").mkdir()  # a name without its files
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000002", "step-000010"]


def broken(tmp_path, how):
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, 1, model, optimizer, ALONE, keep=0)
    (file,) = path.glob("*.safetensors")
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif how == "not json":
        (path / "state.json").write_text("{")
    elif how == "no step":
        (path / "state.json").write_text(json.dumps({"ranks": 1}))
    return path, optimizer


@pytest.mark.parametrize("how", ["gone", "cut", "not json", "no step"])
def test_a_broken_checkpoint_is_a_sentence(tmp_path, how):
    path, _ = broken(tmp_path, how)
    model, optimizer = trained()
    with pytest.raises(UserError, match="cannot be resumed from"):
        load_checkpoint(path, model, optimizer, ALONE)


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    path, _ = broken(tmp_path, "not at all")
    model = load_model(reference("models/dev/qwen1p5b_12x2_tied_bf16_sharded"))
    with pytest.raises(UserError, match="Is it of this model"):
        load_checkpoint(path, model, torch.optim.AdamW(model.parameters()), ALONE)
