"""Checkpoints: what comes back is what was saved, a broken one is a sentence. Other world sizes: test_distributed."""

import errno
import json
import os

import pytest
import torch
from conftest import reference

from tooln1.distributed import World
from tooln1.io.errors import UserError
from tooln1.io.files import clear_up
from tooln1.model import load_model
from tooln1.run import checkpoint as module
from tooln1.run.checkpoint import (
    choose,
    complete_checkpoints,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    set_aside,
    unfinished,
)

OURS = ("latest", "step-*")
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


def save(folder, step, model, optimizer, **how):
    return save_checkpoint(folder, step, model, optimizer, ALONE, how.pop("notes", {}), **how)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    model, optimizer = trained()
    path = save(tmp_path, 7, model, optimizer, notes={"config": {"seed": 3}, "bad_steps": 1})
    assert names(tmp_path) == ["latest", "step-000007"] and (tmp_path / "latest").read_text() == "step-000007\n"
    want = one_more(model, optimizer)
    other, other_optimizer = trained(steps=1, seed=9)
    loaded = load_checkpoint(path, other, other_optimizer, ALONE)
    assert loaded == read_checkpoint(path)
    assert (loaded.step, loaded.ranks, loaded.notes) == (7, 1, {"config": {"seed": 3}, "bad_steps": 1})
    for ours, theirs in zip(one_more(other, other_optimizer), want, strict=True):
        assert torch.equal(ours, theirs)


def test_before_the_first_step_there_are_no_moments(tmp_path):
    model, optimizer = trained(steps=0)
    path = save(tmp_path, 0, model, optimizer)
    other, other_optimizer = trained(steps=0)
    assert load_checkpoint(path, other, other_optimizer, ALONE).step == 0
    assert not other_optimizer.state


def test_the_newest_are_kept_and_those_of_every_so_many_steps(tmp_path):
    model, optimizer = trained()
    for step in range(1, 9):
        save(tmp_path, step, model, optimizer, keep=2, keep_every=3)
    assert names(tmp_path) == ["latest", "step-000003", "step-000006", "step-000007", "step-000008"]
    save(tmp_path, 1_000_000, model, optimizer, keep=1)
    assert names(tmp_path) == ["latest", "step-1000000"]


def newest(folder):
    path, skipped = choose(folder, ALONE)
    return path and path.name, skipped


def test_the_newest_whole_one_is_chosen_and_the_others_are_named(tmp_path):
    model, optimizer = trained()
    assert newest(tmp_path / "nowhere") == (None, [])
    paths = {step: save(tmp_path, step, model, optimizer) for step in range(1, 7)}
    assert newest(tmp_path) == ("step-000006", [])
    (file,) = paths[6].glob("rank*")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    (file,) = paths[5].glob("rank*")
    file.write_bytes(file.read_bytes()[:-5])
    next(paths[4].glob("rank*")).unlink()
    (paths[3] / "index.json").write_text("{")
    name, skipped = newest(tmp_path)
    assert name == "step-000002"
    for line, words in zip(
        skipped,
        [
            "000006 (rank-00000-of-00001.safetensors is not as it was written",
            "000005 (rank-00000-of-00001.safetensors has",
            "000004 (rank-00000-of-00001.safetensors is missing",
            "000003 (index.json cannot be read",
        ],
        strict=True,
    ):
        assert line.startswith("step-" + words)


def test_what_a_kill_leaves_behind_is_cleared_up(tmp_path):
    """Killed between the two renames of a replacement, while writing, and while removing."""
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    os.replace(tmp_path / "step-000001", tmp_path / ".step-000001.old")
    (tmp_path / ".step-000002.tmp").mkdir()
    (tmp_path / ".step-000000.removed.tmp").mkdir()
    (tmp_path / ".latest.tmp").write_text("step-")
    (tmp_path / ".bashrc.old").write_text("not ours")
    (tmp_path / ".notes.tmp").write_text("nor this")
    assert unfinished(clear_up(tmp_path, OURS)) == ["step-000002"]
    assert (tmp_path / ".bashrc.old").exists() and (tmp_path / ".notes.tmp").exists()
    (tmp_path / ".bashrc.old").unlink()
    (tmp_path / ".notes.tmp").unlink()
    assert names(tmp_path) == ["latest", "step-000001"]
    os.replace(tmp_path / "step-000001", tmp_path / ".step-000001.old")
    save(tmp_path, 1, model, optimizer)
    (tmp_path / ".step-000001.old").mkdir()
    clear_up(tmp_path, OURS)
    assert names(tmp_path) == ["latest", "step-000001"] and newest(tmp_path)[0] == "step-000001"


def test_later_ones_are_set_aside(tmp_path):
    model, optimizer = trained()
    for _ in range(2):
        for step in (1, 2, 3):
            save(tmp_path, step, model, optimizer)
        moved = set_aside(tmp_path, 1)
    assert moved == ["step-000003.set-aside-2", "step-000002.set-aside-2"]
    assert (tmp_path / "latest").read_text() == "step-000001\n"
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000001"]
    assert newest(tmp_path) == ("step-000001", [])


@pytest.mark.parametrize("failing", ["save_file", "flush", "_checksum", "put_in_place"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, failing):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, failing, full)
    with pytest.raises(UserError, match="step-000002 could not be written: No space left .* good one is step-000001"):
        save(tmp_path, 2, model, optimizer, keep=1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert names(tmp_path) == ["latest", "step-000001"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Files, then the directory, then the rename, then the directory above, then `latest`, then the old ones go."""
    done = []
    for name in ("flush", "put_in_place", "_retire"):
        original = getattr(module, name)

        def recorded(path, *args, name=name, original=original):
            done.append((name, path.name))
            return original(path, *args)

        monkeypatch.setattr(module, name, recorded)
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    assert done == [
        ("flush", "rank-00000-of-00001.safetensors"),
        ("flush", "index.json"),
        ("flush", ".step-000001.tmp"),
        ("put_in_place", ".step-000001.tmp"),
        ("_retire", tmp_path.name),
    ]


def broken(tmp_path, how):
    model, optimizer = trained()
    path = save(tmp_path, 1, model, optimizer)
    (file,) = path.glob("*.safetensors")
    index = json.loads((path / "index.json").read_text())
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif how == "not json":
        (path / "index.json").write_text("{")
    elif how == "deep":
        (path / "index.json").write_text("[" * 100_000)
    elif how == "no step":
        (path / "index.json").write_text(json.dumps({"format": 1, "ranks": 1}))
    elif how == "a million ranks":
        (path / "index.json").write_text(json.dumps(index | {"ranks": 10**6}))
    elif how == "rows":
        index["tensors"]["model/model.norm.weight"]["ends"] = [10**9]
        (path / "index.json").write_text(json.dumps(index))
    elif how == "tensors":
        (path / "index.json").write_text(json.dumps(index | {"tensors": 5}))
    return path


@pytest.mark.parametrize("how", ["gone", "cut", "not json", "deep", "no step", "a million ranks", "rows", "tensors"])
def test_a_broken_checkpoint_is_a_sentence(tmp_path, how):
    path = broken(tmp_path, how)
    model, optimizer = trained()
    with pytest.raises(UserError, match="cannot be resumed from"):
        load_checkpoint(path, model, optimizer, ALONE)


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    path = broken(tmp_path, "not at all")
    model = load_model(reference("models/dev/qwen1p5b_12x2_tied_bf16_sharded"))
    with pytest.raises(UserError, match="Is it of this model"):
        load_checkpoint(path, model, torch.optim.AdamW(model.parameters()), ALONE)
