"""The directory of a run: whose it is, what a killed process left in it, and where the run goes on from."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tooln1.distributed import World
from tooln1.io.errors import UserError
from tooln1.io.files import check_writable, clear_up
from tooln1.run.checkpoint import (
    LATEST,
    Checkpoint,
    choose,
    complete_checkpoints,
    faults_of,
    read_checkpoint,
    unfinished,
)

CHECKPOINTS = "checkpoints"
WRITTEN = ("config.toml", "metrics.jsonl", "rollouts.jsonl", "hf")  # beside them


def find_checkpoint(run_dir: Path, resume: str, world: World) -> Checkpoint | None:
    """The checkpoint to go on from, None to begin with the first step; changes nothing.

        resume    the directory is new           it has logs or checkpoints
        ""        None                           refused
        "auto"    None                           the newest whole one; none at all: None; none whole: refused
        a path    that one, if it is whole       that one, if it is of this directory; else refused

    Rank 0 says what is passed over, and why. What is refused is a UserError.
    """
    folder, say = run_dir / CHECKPOINTS, print if world.is_main else lambda *words: None
    there = world.broadcast([path.name for path in complete_checkpoints(folder)])
    used = world.broadcast((run_dir / "metrics.jsonl").exists()) or there
    if not resume:
        if used:
            raise UserError(f"{run_dir} already holds a run: go on with --resume, or choose another --run-dir.")
        return None
    if resume == "auto":
        path, skipped = choose(folder, world)
        if skipped:
            say(f"passed over: {'; '.join(skipped)}")
        if path:
            return read_checkpoint(path)
        if there:
            raise UserError(f"{folder}: no checkpoint is whole; start anew in another --run-dir, or restore one.")
        say(f"no checkpoint in {folder}: beginning with step 1")
        return None
    path = Path(resume)
    if not path.is_dir():
        raise UserError(f"{path}: there is no such checkpoint; {folder} has {', '.join(there) or 'none'}.")
    if used and not is_in(path, run_dir):
        raise UserError(f"{run_dir} already holds another run than {path} is of: choose another --run-dir.")
    if faults := faults_of(path, world):
        raise UserError(f"{path} is not whole: {faults[0]}. Name another, or let --resume auto choose.")
    return read_checkpoint(path)


def refuse_other_contents(checkpoint: Checkpoint, notes: dict, places: dict[str, str], allowed: set[str]) -> None:
    """Raise UserError where a fingerprint in `notes` is not the checkpoint's.

    places: setting -> the file or folder it names, of those whose contents count; allowed: settings that may differ.
    """
    for name, place in places.items():
        if checkpoint.notes.get(name) != notes[name] and name not in allowed:
            raise UserError(
                f"{place} does not hold what {checkpoint.path} was made with: other examples (or others are too long), "
                f"other weights or another tokenizer; give those, or allow it with --allow-changes {name}."
            )


def is_in(checkpoint: Path, run_dir: Path) -> bool:
    """Whether a checkpoint is one of this directory's own."""
    return checkpoint.resolve().parent == (run_dir / CHECKPOINTS).resolve()


@contextmanager
def claimed(run_dir: Path, world: World) -> Iterator[None]:
    """Hold the directory for the length of the block: made if need be, what a killed process left in it cleared up.

    Rank 0 does it, all learn how it went: UserError where it cannot be written to, or another process holds it. If
    nothing comes to stand in it, it is gone again afterwards.
    """
    lock = None
    made = [parent for parent in run_dir.absolute().parents if not os.path.exists(parent)]

    def prepare() -> None:
        nonlocal lock
        check_writable(run_dir, "run_dir")
        (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        lock = _lock(run_dir)
        clear_up(run_dir, WRITTEN)
        for name in unfinished(clear_up(run_dir / CHECKPOINTS, (LATEST, "step-*"))):
            print(f"passed over, and removed: {name} (writing it was not finished)")

    world.run_on_all_ranks(prepare if world.is_main else lambda: None, f"{run_dir} cannot be written to")
    try:
        if not run_dir.is_dir():
            where = "--run-dir must be on storage that all nodes share"
            raise UserError(f"{run_dir}: not seen by rank {world.rank}; {where}.")
        yield
    finally:
        if world.is_main:
            with suppress(OSError):  # it is not empty
                for folder in (run_dir / CHECKPOINTS, run_dir, *made):
                    folder.rmdir()
        if lock is not None:
            os.close(lock)


def _lock(run_dir: Path) -> int | None:
    """A handle that holds `run_dir` until it is closed or the process ends; UserError where another holds it."""
    handle = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"{run_dir}: another process is writing there; wait for it, or end it.") from None
    except OSError:  # not every network's disk knows locks
        os.close(handle)
        return None
    return handle
