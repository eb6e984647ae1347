"""Files and directories that are never half-written: temporary name, flush, rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tooln1.io.errors import UserError


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing that appears under `path` only when the block ends well.

    Written under a temporary name in the same folder, flushed to the disk, then renamed over `path`; if the block
    raises, the temporary file is removed and whatever stood at `path` before is untouched. Text is UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private; a result file is not a secret
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    flush(path.parent)


@contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Fill a new directory that takes the place of `path` only when the block ends well.

    The block gets a temporary sibling directory to write into; afterwards everything in it is flushed to the disk
    and the directory is renamed. What stood at `path` before is kept until then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
            flush(file)
        flush(temporary)
        put_in_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def put_in_place(new: Path, path: Path) -> None:
    """Rename the directory `new` to `path`, on the disk when this returns; an older one there is removed afterwards."""
    retired = path.parent / f".{path.name}.old"
    if path.exists():
        shutil.rmtree(retired, ignore_errors=True)
        os.replace(path, retired)
    try:
        os.replace(new, path)
    except BaseException:
        if retired.exists():
            os.replace(retired, path)
        raise
    flush(path.parent)
    shutil.rmtree(retired, ignore_errors=True)


def flush(path: Path) -> None:
    """Have the disk hold what is written: a file's content, or a directory's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear_up(folder: Path, names: Iterable[str]) -> list[str]:
    """Undo what a killed process left in `folder` of things that the functions above write there under `names` (globs).

    One that was set aside comes back, half-written ones go. Returns the names of those that went.
    """
    for name in names:
        for leftover in folder.glob(f".{name}.old"):
            place = folder / leftover.name[1 : -len(".old")]
            if not place.exists():  # killed between the two renames of `put_in_place`
                os.replace(leftover, place)
    patterns = [pattern for name in names for pattern in (f".{name}.tmp", f".{name}.*.tmp", f".{name}.old")]
    leftovers = sorted({leftover for pattern in patterns for leftover in folder.glob(pattern)})
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return [leftover.name for leftover in leftovers]


def check_writable(folder: str | os.PathLike, setting: str) -> Path:
    """`folder` as a path, which may not be there yet; raises UserError, naming `setting`, where it cannot be made."""
    folder = Path(folder)
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{setting} {folder}: {nearest} is not a folder that can be written to; name another.")
    return folder
