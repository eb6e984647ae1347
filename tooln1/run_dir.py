"""The directory of a run: whose it is, what a killed process left in it, and where the run goes on from."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tooln1.checkpoint import Checkpoint, choose, complete_checkpoints, faults_of, read_checkpoint, unfinished
from tooln1.distributed import World
from tooln1.errors import UserError, check_writable, clear_up

CHECKPOINTS = "checkpoints"


def find_checkpoint(run_dir: Path, resume: str, world: World) -> Checkpoint | None:
    """The checkpoint that `resume` asks for ("": none, "auto": the newest whole one, else its path); changes nothing.

    None: the run begins with its first step. A process that torchrun has restarted goes on from the newest, whatever
    the command line says. Rank 0 says what is passed over, and why. Raises UserError where there is no such
    checkpoint, where none of those there is whole, and for a directory that another run has written to.
    """
    folder, say = run_dir / CHECKPOINTS, print if world.main else lambda *words: None
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (complete_checkpoints(folder) or not resume):
        resume = "auto"
    has_logs = world.from_main((run_dir / "metrics.jsonl").exists())
    if not resume:
        if has_logs:
            raise UserError(f"{run_dir} already holds a run: go on with --resume, or choose another --run-dir.")
        return None
    if resume == "auto":
        path, skipped = choose(folder, world)
        if skipped:
            say(f"passed over: {'; '.join(skipped)}")
        if path:
            return read_checkpoint(path)
        if complete_checkpoints(folder):
            raise UserError(f"{folder}: no checkpoint is whole; start anew in another --run-dir, or restore one.")
        say(f"no checkpoint in {folder}: beginning with step 1")
        return None
    path = Path(resume)
    if not path.is_dir():
        others = ", ".join(other.name for other in complete_checkpoints(folder)) or "none"
        raise UserError(f"{path}: there is no such checkpoint; {folder} has {others}.")
    if has_logs and path.resolve().parent != folder.resolve():
        raise UserError(f"{run_dir} already holds another run than {path} is of: choose another --run-dir.")
    if faults := faults_of(path, world):
        raise UserError(f"{path} is not whole: {faults[0]}. Name another, or let --resume auto choose.")
    return read_checkpoint(path)


@contextmanager
def claimed(run_dir: Path, world: World) -> Iterator[None]:
    """Hold the directory for the length of the block: made if need be, what a killed process left in it cleared up.

    Rank 0 does it, all learn how it went: UserError where it cannot be written to, or another process holds it. If
    nothing comes to stand in it, it is gone again afterwards.
    """
    lock = None

    def prepare() -> None:
        nonlocal lock
        check_writable(run_dir, "run_dir")
        (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        lock = _lock(run_dir)
        for name in unfinished(clear_up(run_dir) + clear_up(run_dir / CHECKPOINTS)):
            print(f"passed over, and removed: {name} (writing it was not finished)")

    world.together(prepare if world.main else lambda: None, f"{run_dir} cannot be written to")
    try:
        if not run_dir.is_dir():
            where = "--run-dir must be on storage that all nodes share"
            raise UserError(f"{run_dir}: not seen by rank {world.rank}; {where}.")
        yield
    finally:
        if lock is not None:
            os.close(lock)
        if world.main:
            with suppress(OSError):  # it is not empty
                (run_dir / CHECKPOINTS).rmdir()
                run_dir.rmdir()


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
