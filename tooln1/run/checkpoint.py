"""Checkpoints, written with torch.distributed.checkpoint, and the run directory that holds them.

    checkpoints/step-000020/
        index.json               format, step, Adam's step, number of ranks, notes, size of each file
        shard-00001-model-*      rank 0's rows of "model/NAME", "exp_avg/NAME" and "exp_avg_sq/NAME" (fp32), by block

Parameters are the trained ones: with LoRA the adapters. Any number of ranks can load it; nothing is pickled. Files go
by block because torch builds each in host memory first.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from tooln1.distributed import World
from tooln1.io.errors import UserError
from tooln1.io.files import atomic_write, check_writable, put_in_place, remove_temporaries
from tooln1.lora import trained_parameters
from tooln1.model import Transformer

CHECKPOINTS, INDEX = "checkpoints", "index.json"
FORMAT = 3  # 1 was a layout of our own, 2 had no position in the order of the examples
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Checkpoint:
    """What index.json says."""

    path: Path
    step: int  # completed steps
    adam_step: int  # optimizer steps that were applied
    ranks: int  # processes that wrote it
    notes: dict  # as given to `save_checkpoint`


def save_checkpoint(
    directory: Path, step: int, policy: Transformer, optimizer: torch.optim.Optimizer, world: World, notes: dict
) -> Path:
    """Write `directory`/step-NNNNNN with the JSON data `notes`; raises UserError on all ranks if one cannot write."""
    final, partial = directory / f"step-{step:06d}", directory / f".step-{step:06d}.tmp"
    what = f"the checkpoint {final} could not be written"

    def write() -> list[tuple[str, int]]:  # all ranks fail together: dcp gathers their errors
        tensors = _tensors(policy, optimizer.state)
        writer = dcp.HuggingFaceStorageWriter(str(partial), _file_numbers(tensors), save_distributed=True)
        with _as_user_error(what):
            dcp.save(tensors, storage_writer=writer)
        return [(file.name, file.stat().st_size) for file in partial.glob(f"shard-{world.rank + 1:05d}-*")]

    def complete() -> None:
        adam_step = max((int(state["step"]) for state in optimizer.state.values()), default=0)
        index = {"format": FORMAT, "step": step, "adam_step": adam_step, "ranks": world.size, "notes": notes}
        with atomic_write(partial / INDEX) as file:
            json.dump(index | {"files": dict(files)}, file)
        put_in_place(partial, final)

    try:
        files = world.gather(world.run_on_all_ranks(write, what))
        world.run_on_all_ranks(complete if world.is_main else lambda: None, what)
    except UserError as error:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{error} Make room or mend the folder, then go on with --resume auto.") from error
    return final


def load_checkpoint(path: Path, policy: Transformer, optimizer: torch.optim.Optimizer) -> Checkpoint:
    """Fill `policy` and `optimizer` in place, on all ranks, from a checkpoint of any number of ranks.

    Raises UserError where a file is missing or broken, or a tensor is missing or has another shape.
    """
    checkpoint, state = read_checkpoint(path), {}
    for parameter in trained_parameters(policy).values() if checkpoint.adam_step else ():
        device = parameter.device if optimizer.defaults.get("fused") else "cpu"  # as AdamW itself has it
        adam_step = torch.tensor(float(checkpoint.adam_step), device=device)
        state[parameter] = {"step": adam_step} | {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
    with _as_user_error(f"{path} cannot be loaded into this model"), torch.no_grad():
        dcp.load(_tensors(policy, state), storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    optimizer.state.update(state)
    return checkpoint


def read_checkpoint(path: Path) -> Checkpoint:
    """What a checkpoint says of itself. Raises UserError unless all its files are there, each with its size."""
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        if index.get("format") != FORMAT:
            raise ValueError(f"its format is {index.get('format')}, not {FORMAT}: it is of another version of Tool-N1")
        for name, size in index["files"].items():  # torch does not notice if one is missing
            if (found := (path / name).stat().st_size) != size:
                raise ValueError(f"{name} has {found} bytes, not {size}")
        return Checkpoint(path, index["step"], index["adam_step"], index["ranks"], index["notes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be resumed from: {error}. Name another, or start anew elsewhere.") from error


def _tensors(policy: Transformer, state: dict[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by key: parameters, and their moments where the optimizer's `state` has them."""
    tensors = {}
    for name, parameter in trained_parameters(policy).items():
        tensors[f"model/{name}"] = parameter
        if parameter in state:
            tensors |= {f"{moment}/{name}": state[parameter][moment] for moment in _MOMENTS}
    return tensors


def _file_numbers(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Key -> number of its file, from 1: a block's tensors share one, as does any other parameter with its moments."""
    numbers: dict[str, int] = {}
    groups = {key: tuple(key.partition("/")[2].split(".")[:3]) for key in tensors}  # ("model", "layers", "7")
    return {key: numbers.setdefault(group, len(numbers) + 1) for key, group in groups.items()}


@contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    """Raise the first error in a CheckpointException, which is not an Exception, as the UserError "`what`: why"."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise UserError(f"{what}: {getattr(cause, 'strerror', None) or repr(cause)}.") from error


def complete_checkpoints(directory: Path) -> dict[int, Path]:
    """Step -> checkpoint, oldest first, going by the names in `directory`; `read_checkpoint` looks at the files."""
    steps = {path.name.removeprefix("step-"): path for path in directory.glob("step-*")}
    return {int(step): steps[step] for step in sorted(filter(str.isdecimal, steps), key=int)}


def remove_old(directory: Path, keep: int, keep_every: int) -> None:
    """Remove all checkpoints but the newest `keep` (0: all stay) and those of every `keep_every`-th step."""
    for step, path in list(complete_checkpoints(directory).items())[:-keep] if keep else ():
        if not keep_every or step % keep_every:
            with suppress(OSError):  # the run goes on with one too many
                shutil.rmtree(path.rename(directory / f".{path.name}.removed.tmp"))  # a kill leaves no half of one


def set_aside(directory: Path, after: int) -> list[str]:
    """Rename the checkpoints of later steps than `after`, which a run that resumes from there will write anew."""
    # The latest first: a kill in between leaves the old run with fewer checkpoints, never with a gap.
    later = [path for step, path in reversed(complete_checkpoints(directory).items()) if step > after]
    return [path.rename(f"{path}.set-aside-{time.strftime('%Y%m%d-%H%M%S')}").name for path in later]


def find_checkpoint(run_dir: Path, resume: str, world: World) -> Checkpoint | None:
    """The checkpoint to resume from, None to begin with the first step; changes nothing.

        resume    the directory is new           it has logs or checkpoints
        ""        None                           refused
        "auto"    None                           the newest complete one; none at all: None; none complete: refused
        a path    that one, if it is complete    that one, if it is of this directory; else refused

    Rank 0 decides, and prints which ones it passes over, and why. What is refused is a UserError on all ranks.
    """

    def find() -> Checkpoint | None:
        there = complete_checkpoints(run_dir / CHECKPOINTS)
        used = bool(there) or (run_dir / "metrics.jsonl").exists()
        if used and not resume:
            raise UserError(f"{run_dir} already holds a run: go on with --resume auto, or choose another --run-dir.")
        if resume != "auto":
            found = read_checkpoint(Path(resume)) if resume else None
            if used and not is_in(found.path, run_dir):
                raise UserError(f"{run_dir} already holds another run than {resume} is of: choose another --run-dir.")
            return found
        for step, path in reversed(there.items()):
            try:
                return read_checkpoint(path)
            except UserError as error:
                if step == min(there):
                    raise
                print(f"passed over: {error}")
        print(f"no checkpoint in {run_dir / CHECKPOINTS}: beginning with step 1")
        return None

    return world.broadcast(world.run_on_all_ranks(find if world.is_main else lambda: None, f"reading {run_dir}"))


def is_in(checkpoint: Path, run_dir: Path) -> bool:
    """Whether a checkpoint is one of this directory's own."""
    return checkpoint.resolve().parent == (run_dir / CHECKPOINTS).resolve()


@contextmanager
def claimed(run_dir: Path, world: World) -> Iterator[None]:
    """Make the run directory if need be, lock it for the length of the block, remove what a killed process left in it.

    Raises UserError on all ranks where rank 0 cannot write to it, another process holds it, or a rank does not see it.
    """

    def prepare() -> int:
        check_writable(run_dir, "run_dir")
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(run_dir, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):  # else it is a network file system without locks
                raise UserError(f"{run_dir}: another process is writing there; wait for it, or end it.") from None
        written = remove_temporaries(run_dir, ("config.toml", "metrics.jsonl", "rollouts.jsonl", "hf", "hf_adapter"))
        for name in written + remove_temporaries(run_dir / CHECKPOINTS, ("step-*",)):
            print(f"removed {name}, which a killed process left unfinished")
        return lock

    lock = world.run_on_all_ranks(prepare if world.is_main else lambda: None, f"{run_dir} cannot be written to")
    try:
        world.run_on_all_ranks(lambda: os.stat(run_dir), f"{run_dir} is not on storage that all nodes share")
        yield
    finally:
        if world.is_main:
            os.close(lock)
            with suppress(OSError):  # it is not empty: the run has begun
                os.removedirs(run_dir)
