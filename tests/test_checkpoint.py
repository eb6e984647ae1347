"""Checkpoints and the run directory, in one process; other numbers of processes: test_distributed.py."""

import os
from pathlib import Path

import pytest
import torch
from conftest import reference

from tooln1.distributed import World
from tooln1.io.errors import UserError
from tooln1.model import load_model
from tooln1.run import checkpoint as module
from tooln1.run.checkpoint import claimed, complete_checkpoints, find_checkpoint, load_checkpoint, save_checkpoint

WORLD = World(0, 1, torch.device("cpu"))
EMBEDDING, BLOCK_0, BLOCK_1, NORM = (f"shard-00001-model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4))
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # no process group in these tests


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


def save(run_dir, *steps):
    """Write checkpoints of these steps in a run directory; returns the last."""
    return [save_checkpoint(run_dir / "checkpoints", step, *trained(), WORLD, {}) for step in steps][-1]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_resumed_run_takes_the_same_next_step(tmp_path):
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, 7, model, optimizer, WORLD, {"config": {"seed": 3}, "bad_steps": 1})
    assert names(tmp_path) == ["step-000007"]
    assert names(path) == ["index.json", EMBEDDING, BLOCK_0, BLOCK_1, NORM]
    want = one_more(model, optimizer)
    other, other_optimizer = trained(steps=1, seed=9)
    loaded = load_checkpoint(path, other, other_optimizer)
    assert (loaded.step, loaded.ranks, loaded.notes) == (7, 1, {"config": {"seed": 3}, "bad_steps": 1})
    assert all(map(torch.equal, one_more(other, other_optimizer), want))


def test_before_the_first_step_there_are_no_moments(tmp_path):
    path = save_checkpoint(tmp_path, 0, *trained(steps=0), WORLD, {})
    model, optimizer = trained(steps=0)
    assert load_checkpoint(path, model, optimizer).step == 0 and not optimizer.state


def test_the_newest_are_kept_and_those_of_every_so_many_steps(tmp_path):
    for step in (*range(1, 9), 1_000_000):
        (tmp_path / f"step-{step:06d}").mkdir()
    module.remove_old(tmp_path, keep=0, keep_every=3)
    assert len(names(tmp_path)) == 9
    module.remove_old(tmp_path, keep=2, keep_every=3)
    assert list(complete_checkpoints(tmp_path)) == [3, 6, 8, 1_000_000] and len(names(tmp_path)) == 4


@pytest.mark.parametrize(
    "resume,new,used",
    [
        ("", None, "already holds a run: go on with --resume auto"),
        ("auto", None, 2),
        ("run/checkpoints/step-000001", "cannot be resumed from: .*No such file", 1),
        ("other/checkpoints/step-000005", 5, "already holds another run"),
        ("nowhere", "cannot be resumed from: .*No such file", "cannot be resumed from: .*No such file"),
    ],
)
def test_where_a_run_goes_on(tmp_path, monkeypatch, resume, new, used):
    monkeypatch.chdir(tmp_path)
    save(Path("other"), 5)
    for wanted in (new, used):
        if isinstance(wanted, str):
            with pytest.raises(UserError, match=wanted):
                find_checkpoint(Path("run"), resume, WORLD)
        else:
            found = find_checkpoint(Path("run"), resume, WORLD)
            assert (found and found.step) == wanted
        save(Path("run"), 1, 2)


@pytest.mark.parametrize(
    "file,content,why",
    [
        (EMBEDDING, None, "No such file"),
        (EMBEDDING, "x", "has 1 bytes, not"),
        ("index.json", "{", "Expecting property name"),
        ("index.json", '{"format": 1, "step": 2}', "its format is 1, not 3"),
    ],
)
def test_a_damaged_checkpoint_is_refused_or_passed_over(tmp_path, capsys, file, content, why):
    path = save(tmp_path, 1, 2)
    (path / file).unlink() if content is None else (path / file).write_text(content)
    for refused in (lambda: load_checkpoint(path, *trained()), lambda: find_checkpoint(tmp_path, str(path), WORLD)):
        with pytest.raises(UserError, match=f"step-000002 cannot be resumed from: .*{why}"):
            refused()
    assert find_checkpoint(tmp_path, "auto", WORLD).step == 1
    assert "passed over: " in capsys.readouterr().out
    (tmp_path / "checkpoints/step-000001/index.json").unlink()
    with pytest.raises(UserError, match="step-000001 cannot be resumed from"):
        find_checkpoint(tmp_path, "auto", WORLD)


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    model = load_model(reference("models/dev/qwen1p5b_12x2_tied_bf16_sharded"))
    with pytest.raises(UserError, match="cannot be loaded into this model: .*Size mismatch"):
        load_checkpoint(save(tmp_path, 1), model, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize("failing", ["write_data", "put_in_place"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, failing):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    save(tmp_path, 1)
    monkeypatch.setattr(module if failing == "put_in_place" else module.dcp.HuggingFaceStorageWriter, failing, full)
    with pytest.raises(UserError, match="step-000002 could not be written: No space left on device"):
        save(tmp_path, 2)
    assert find_checkpoint(tmp_path, "auto", WORLD).step == 1
    assert names(tmp_path / "checkpoints") == ["step-000001"]


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(f"-> {Path(new).name}"), replace(old, new)))
    save(tmp_path, 1)
    renamed = done.index("-> step-000001")
    assert {EMBEDDING, BLOCK_0, BLOCK_1, NORM, "-> index.json", ".step-000001.tmp"} <= set(done[:renamed])
    assert done[renamed + 1] == done[-1] == "checkpoints"


def test_a_run_directory_is_locked_and_cleared_of_what_a_kill_left(tmp_path, capsys):
    """Killed while writing and while removing."""
    folder = save(tmp_path, 1).parent
    for left in (".step-000002.tmp", ".step-000000.removed.tmp", ".notes.tmp"):  # the last is not ours
        (folder / left).mkdir()
    with claimed(tmp_path, WORLD):
        assert names(folder) == [".notes.tmp", "step-000001"]
        assert "removed .step-000002.tmp, which a killed process left unfinished" in capsys.readouterr().out
        with pytest.raises(UserError, match="another process is writing there"), claimed(tmp_path, WORLD):
            pass
    with claimed(tmp_path, WORLD):
        assert find_checkpoint(tmp_path, "auto", WORLD).step == 1


def test_later_ones_are_set_aside(tmp_path):
    folder = save(tmp_path, 1, 2, 3).parent
    moved = module.set_aside(folder, 1)
    assert [name[:21] for name in moved] == ["step-000003.set-aside", "step-000002.set-aside"]
    assert names(folder) == ["step-000001", *sorted(moved)]
