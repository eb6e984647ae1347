"""Checkpoints: fp32 weights, Adam state and step, one safetensors file per rank; whole or not there at all.

    checkpoints/step-000020/
        rank-00000-of-00002.safetensors    "model/NAME", "exp_avg/NAME", "exp_avg_sq/NAME": this rank's rows of each
        rank-00001-of-00002.safetensors
        state.json                         step, world size, Adam's step count

FSDP2 gives each rank consecutive rows of dimension 0, so the ranks' pieces, one after the other, are the tensor; a
run at another world size reads just the rows it needs. The directory is filled under another name and renamed when
every rank has written, so a name that is there is a whole checkpoint. Nothing is ever pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from tooln1.distributed import World
from tooln1.errors import UserError
from tooln1.model import Transformer

_NAME = re.compile(r"step-(\d{6,})")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(
    directory: Path, step: int, policy: Transformer, optimizer: torch.optim.Optimizer, world: World, keep: int
) -> Path:
    """Write `directory`/step-NNNNNN, every rank its own file, then remove all but the newest `keep` (0: keep all)."""
    final = directory / f"step-{step:06d}"
    partial = directory / f".{final.name}.tmp"
    if world.main:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
        partial.mkdir(parents=True)
    world.wait()
    file = partial / _rank_file(world.rank, world.size)
    save_file(_local_tensors(policy, optimizer), file)
    _flush(file)
    world.wait()
    if world.main:
        steps = [int(state["step"]) for state in optimizer.state.values()]
        state = {"step": step, "ranks": world.size, "adam_step": max(steps, default=0)}
        (partial / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
        _flush(partial / "state.json")
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        for old in complete_checkpoints(directory)[:-keep] if keep else []:
            shutil.rmtree(old)
    world.wait()
    return final


def complete_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, oldest first."""
    found = [path for path in directory.glob("step-*") if _NAME.fullmatch(path.name) and (path / "state.json").exists()]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))


def load_checkpoint(
    checkpoint: Path, policy: Transformer, optimizer: torch.optim.Optimizer, world: World
) -> int:
    """Fill `policy` and `optimizer` in place from `checkpoint`, written at any world size; returns its step.

    Raises UserError where a file is missing, broken, or of another model.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        step, ranks, adam_step = int(state["step"]), int(state["ranks"]), int(state["adam_step"])
        files = [safe_open(checkpoint / _rank_file(rank, ranks), framework="pt") for rank in range(ranks)]
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                local = _local(parameter)
                local.copy_(_rows(files, f"model/{name}", parameter, world))
                if adam_step:
                    where = parameter.device if optimizer.defaults.get("fused") else "cpu"  # as AdamW itself has it
                    optimizer.state[parameter] = {
                        "step": torch.tensor(float(adam_step), device=where),
                        **{moment: _moment(files, f"{moment}/{name}", parameter, world) for moment in _MOMENTS},
                    }
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{checkpoint}: cannot be resumed from ({error}). Is it of this model? Name another checkpoint with "
            "--resume DIR, or start anew in another run directory."
        ) from error
    return step


def _rank_file(rank: int, ranks: int) -> str:
    return f"rank-{rank:05d}-of-{ranks:05d}.safetensors"


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _local_tensors(policy: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in policy.named_parameters():
        tensors[f"model/{name}"] = _local(parameter).detach().cpu().contiguous()
        for moment in _MOMENTS:
            if parameter in optimizer.state:
                tensors[f"{moment}/{name}"] = _local(optimizer.state[parameter][moment]).cpu().contiguous()
    return tensors


def _moment(files: list, key: str, parameter: Tensor, world: World) -> Tensor:
    rows = _rows(files, key, parameter, world).to(parameter.device)
    if not isinstance(parameter, DTensor):
        return rows
    return DTensor.from_local(
        rows, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def _rows(files: list, key: str, parameter: Tensor, world: World) -> Tensor:
    """This rank's rows of the tensor `key`, whose pieces lie in `files` one after the other."""
    total = parameter.shape[0]
    each = -(-total // world.size) if isinstance(parameter, DTensor) else total
    first = min(world.rank * each, total) if isinstance(parameter, DTensor) else 0
    last = min(first + each, total)
    pieces, start = [], 0
    for file in files:
        piece = file.get_slice(key)
        stop = start + piece.get_shape()[0]
        low, high = max(first, start), min(last, stop)
        if low < high:
            pieces.append(piece[low - start : high - start])
        start = stop
    if start != total:
        raise ValueError(f"{key} has {start} rows, the model {total}")
    return torch.cat(pieces) if pieces else _local(parameter).new_empty(0, *parameter.shape[1:])


def _flush(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
