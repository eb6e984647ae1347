"""Files and directories that are never half-written: temporary name, flush, rename."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tooln1.io.errors import UserError


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing (text as UTF-8) that replaces `path` only when the block succeeds."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


@contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A new, empty directory to fill, which replaces `path` only when the block succeeds."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in (*temporary.rglob("*"), temporary):
            flush(file)
        put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(new: Path, path: Path) -> None:
    """Rename the directory `new` to `path`, in the place of an older one."""
    shutil.rmtree(path, ignore_errors=True)
    os.replace(new, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Write a file's content, or a directory's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(folder: Path, names: Iterable[str]) -> list[str]:
    """Remove what a killed process left of the files and directories `names` (globs) that the above functions write.

    Returns the names of what was removed.
    """
    leftovers = sorted(path for name in names for path in folder.glob(f".{name}.tmp"))
    for leftover in leftovers:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return [leftover.name for leftover in leftovers]


def check_writable(folder: str | os.PathLike, setting: str) -> Path:
    """`folder` as a path, which need not exist yet; raises UserError, naming `setting`, if it cannot be made."""
    folder = Path(folder)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{setting} {folder}: {nearest} is not a folder that can be written to; name another.")
    return folder
