"""Checkpoints: fp32 weights, Adam state, step and the run's own notes, whole or not there at all.

    checkpoints/
        latest                                   name of the newest one, written last
        step-000020/
            rank-00000-of-00002.safetensors      this rank's rows of "model/NAME", "exp_avg/NAME", "exp_avg_sq/NAME"
            rank-00001-of-00002.safetensors
            index.json                           step, notes, shape of each tensor and who has which of its rows,
                                                 size and checksum of each file

FSDP2 gives each rank consecutive rows of dimension 0, so the ranks' pieces, one after the other, are the tensor; a
run at another world size reads just the rows it needs. The directory is filled under another name, flushed to the
disk and renamed when every rank has written; only then are older ones removed. Nothing is ever pickled, which rules
out the default storage of torch.distributed.checkpoint; its Hugging Face storage builds each rank's file in memory
first, and knows no checksums.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from tooln1.distributed import World
from tooln1.io.errors import UserError
from tooln1.io.files import atomic_write, flush, put_in_place
from tooln1.model import Transformer

_NAME = re.compile(r"step-(\d{6,18})")
_MOMENTS = ("exp_avg", "exp_avg_sq")
INDEX, LATEST = "index.json", "latest"


@dataclass(frozen=True)
class Checkpoint:
    """What index.json says, but for the tensors."""

    path: Path
    step: int  # steps that are done
    ranks: int  # processes that wrote it
    notes: dict[str, Any]  # as given to `save_checkpoint`


# ------------------------------------------------------------------------------------------------------ writing


def save_checkpoint(
    directory: Path,
    step: int,
    policy: Transformer,
    optimizer: torch.optim.Optimizer,
    world: World,
    notes: dict,
    keep: int = 0,
    keep_every: int = 0,
) -> Path:
    """Write `directory`/step-NNNNNN, every rank its own file; `notes` is JSON data that comes back with it.

    Kept are the newest `keep` (0: all) and those of every `keep_every`-th step. Raises UserError on all ranks where
    one cannot write: what was there before is then still there, and what was begun is not.
    """
    final = directory / f"step-{step:06d}"
    partial = directory / f".{final.name}.tmp"
    what = f"the checkpoint {final} could not be written"

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write() -> dict:
        partial.mkdir(exist_ok=True)  # on a network's disk it may not show here yet
        file = partial / _rank_file(world.rank, world.size)
        tensors = _local_tensors(policy, optimizer)
        save_file(tensors, file)
        flush(file)
        return {"bytes": file.stat().st_size, "crc32": _checksum(file), "rows": [len(t) for t in tensors.values()]}

    def complete() -> None:
        steps = [int(state["step"]) for state in optimizer.state.values()]
        about = {"format": 1, "step": step, "adam_step": max(steps, default=0), "ranks": world.size, "notes": notes}
        index = about | {"files": files, "tensors": _table(policy, optimizer, [file.pop("rows") for file in files])}
        (partial / INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")
        flush(partial / INDEX)
        flush(partial)
        put_in_place(partial, final)
        with suppress(OSError):  # the checkpoint is there, whatever becomes of the rest
            _point_to(final)
            _retire(directory, step, keep, keep_every)

    try:
        world.run_on_all_ranks(begin if world.is_main else lambda: None, what)
        files = world.gather([world.run_on_all_ranks(write, what)])
        world.run_on_all_ranks(complete if world.is_main else lambda: None, what)
    except UserError as error:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        there = complete_checkpoints(directory)
        good = f"The last good one is {there[-1].name}" if there else "There is none before it"
        raise UserError(f"{error} {good}; make room or mend the folder, then --resume.") from error
    return final


def _table(policy: Transformer, optimizer: torch.optim.Optimizer, rows: list[list[int]]) -> dict[str, dict]:
    """Of each tensor its global shape and, rank by rank, the row behind its last: where the pieces lie."""
    shapes = [(key, parameter.shape) for key, parameter, _ in _named(policy, optimizer)]
    return {
        key: {"shape": list(shape), "ends": [sum(mine[i] for mine in rows[: rank + 1]) for rank in range(len(rows))]}
        for i, (key, shape) in enumerate(shapes)
    }


def _named(policy: Transformer, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor, Tensor]]:
    """(key, parameter, the tensor itself), in the order of the files."""
    found = []
    for name, parameter in policy.named_parameters():
        found.append((f"model/{name}", parameter, parameter))
        if parameter in optimizer.state:
            state = optimizer.state[parameter]
            found += [(f"{moment}/{name}", parameter, state[moment]) for moment in _MOMENTS]
    return found


def _local_tensors(policy: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {key: _local(tensor).detach().cpu().contiguous() for key, _, tensor in _named(policy, optimizer)}


def _point_to(checkpoint: Path) -> None:
    with atomic_write(checkpoint.parent / LATEST) as file:
        file.write(checkpoint.name + "\n")


def _retire(directory: Path, step: int, keep: int, keep_every: int) -> None:
    """Of those up to `step` remove all but the newest `keep` and the `keep_every`-th; each is gone at once or not."""
    there = [path for path in complete_checkpoints(directory) if step_of(path) <= step]
    for old in there[:-keep] if keep else []:
        if not keep_every or step_of(old) % keep_every:
            doomed = directory / f".{old.name}.removed.tmp"
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _rank_file(rank: int, ranks: int) -> str:
    return f"rank-{rank:05d}-of-{ranks:05d}.safetensors"


def _checksum(file: Path) -> int:
    total = 0
    with open(file, "rb") as handle:
        while block := handle.read(1 << 22):
            total = zlib.crc32(block, total)
    return total


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


# ----------------------------------------------------------------------------------------------------- choosing


def complete_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, oldest first, going by their names; `choose` looks at their files."""
    return sorted((path for path in directory.glob("step-*") if _NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The number in a checkpoint's name."""
    return int(_NAME.fullmatch(path.name)[1])


def choose(directory: Path, world: World) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `directory`, and for each newer one its name and why it is passed over."""
    skipped = []
    # as rank 0 sees them: a network's disk may show others something else
    for name in world.broadcast([path.name for path in reversed(complete_checkpoints(directory))]):
        if not (faults := faults_of(directory / name, world)):
            return directory / name, skipped
        skipped.append(f"{name} ({faults[0]})")
    return None, skipped


def unfinished(names: Iterable[str]) -> list[str]:
    """Of the `names` that a killed process left behind, the checkpoints that it was writing."""
    written = (name[1 : -len(".tmp")] for name in names if name.endswith(".tmp"))
    return [name for name in written if _NAME.fullmatch(name)]


def faults_of(checkpoint: Path, world: World) -> list[str]:
    """What is wrong with the files of a checkpoint, the same on every rank; each reads its share of them once."""
    faults = []
    try:
        index = _read_index(checkpoint)
        for rank in range(world.rank, index["ranks"], world.size):
            file, wanted = checkpoint / _rank_file(rank, index["ranks"]), index["files"][rank]
            if not file.exists():
                faults.append(f"{file.name} is missing")
            elif file.stat().st_size != wanted["bytes"]:
                faults.append(f"{file.name} has {file.stat().st_size} bytes, not {wanted['bytes']}")
            elif _checksum(file) != wanted["crc32"]:
                faults.append(f"{file.name} is not as it was written: its checksum differs")
    except OSError as error:
        faults.append(f"{error.filename}: {error.strerror}")
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        faults.append(f"{INDEX} cannot be read: {error!r}")
    return world.gather(faults)


def set_aside(directory: Path, after: int) -> list[str]:
    """Rename the checkpoints of later steps than `after`, which a run that goes on from there will write anew.

    The latest first: a kill in between leaves the old run with fewer checkpoints, never with a gap.
    """
    moved = []
    for path in reversed(complete_checkpoints(directory)):
        if step_of(path) > after:
            names = (f"{path.name}.set-aside{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 10_000))))
            moved.append(next(name for name in names if not (directory / name).exists()))
            path.rename(directory / moved[-1])
    if moved and (left := complete_checkpoints(directory)):
        _point_to(left[-1])
    return moved


def _read_index(checkpoint: Path) -> dict:
    index = json.loads((checkpoint / INDEX).read_text(encoding="utf-8"))
    if index["format"] != 1 or not all(type(index[key]) is int for key in ("step", "adam_step", "ranks")):
        raise ValueError("it is of another version of this program")
    notes = index["notes"]
    known = isinstance(notes, dict) and isinstance(notes.get("bad_steps", 0), int)
    known &= isinstance(notes.get("free_bytes", []), list)
    if len(index["files"]) != index["ranks"] or not known:
        raise ValueError("its parts do not belong together")
    return index


# ------------------------------------------------------------------------------------------------------ reading


def read_checkpoint(path: Path) -> Checkpoint:
    """What a checkpoint says of itself. Raises UserError where it cannot be read."""
    try:
        index = _read_index(path)
        return Checkpoint(path, index["step"], index["ranks"], index["notes"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(path, error) from error


def load_checkpoint(path: Path, policy: Transformer, optimizer: torch.optim.Optimizer, world: World) -> Checkpoint:
    """Fill `policy` and `optimizer` in place from a checkpoint that was written at any world size.

    Raises UserError where a file is missing, broken, or of another model.
    """
    try:
        index = _read_index(path)
        reader = _Reader(path, index)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                _local(parameter).copy_(reader.rows(f"model/{name}", parameter, world))
                if index["adam_step"]:
                    where = parameter.device if optimizer.defaults.get("fused") else "cpu"  # as AdamW itself has it
                    optimizer.state[parameter] = {
                        "step": torch.tensor(float(index["adam_step"]), device=where),
                        **{moment: _moment(reader, f"{moment}/{name}", parameter, world) for moment in _MOMENTS},
                    }
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    return read_checkpoint(path)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: cannot be resumed from ({type(error).__name__}: {error}). Is it of this model? Name another "
        "checkpoint with --resume DIR, or start anew in another run directory."
    )


class _Reader:
    """The files of a checkpoint, opened as they are needed."""

    def __init__(self, path: Path, index: dict):
        self.path, self.ranks, self.tensors = path, index["ranks"], index["tensors"]
        self.files: dict[int, Any] = {}

    def rows(self, key: str, parameter: Tensor, world: World) -> Tensor:
        """This rank's rows of the tensor `key`, whose pieces lie in the files one after the other."""
        shape, ends = self.tensors[key]["shape"], self.tensors[key]["ends"]
        if shape != list(parameter.shape) or len(ends) != self.ranks or ends[-1] != shape[0]:
            raise ValueError(f"{key} has shape {shape}, the model {list(parameter.shape)}")
        first, last = _own_rows(parameter, world)
        pieces = []
        for rank, (start, end) in enumerate(zip([0, *ends], ends)):  # noqa: B905  the starts have one more
            low, high = max(first, start), min(last, end)
            if low < high:
                piece = self._file(rank).get_slice(key)
                if piece.get_shape() != [end - start, *shape[1:]]:
                    raise ValueError(f"{key} has shape {piece.get_shape()} in the file of rank {rank}")
                pieces.append(piece[low - start : high - start])
        return torch.cat(pieces) if pieces else _local(parameter).new_empty(0, *parameter.shape[1:])

    def _file(self, rank: int) -> Any:
        if rank not in self.files:
            self.files[rank] = safe_open(self.path / _rank_file(rank, self.ranks), framework="pt")
        return self.files[rank]


def _own_rows(parameter: Tensor, world: World) -> tuple[int, int]:
    """The first of this rank's rows, and the one behind its last."""
    total = parameter.shape[0]
    if not isinstance(parameter, DTensor):
        return 0, total
    each = -(-total // world.size)
    return min(world.rank * each, total), min((world.rank + 1) * each, total)


def _moment(reader: _Reader, key: str, parameter: Tensor, world: World) -> Tensor:
    rows = reader.rows(key, parameter, world).to(parameter.device)
    if not isinstance(parameter, DTensor):
        return rows
    return DTensor.from_local(
        rows, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
