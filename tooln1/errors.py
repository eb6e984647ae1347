"""What every room needs to fail politely: the error a user can mend, and files that are never half-written."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class UserError(ValueError):
    """A mistake that the user can mend: a wrong key, a missing file, a malformed row.

    Its text is one or two plain sentences: what is wrong, with the value and the file or key, and the way out.
    Entry points print it on stderr and exit with code 2; any other exception keeps its traceback.
    """


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run an entry point; a `UserError` becomes its sentence on stderr and exit code 2, an interrupt code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


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
        os.unlink(temporary)
        raise


@contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Fill a new directory that takes the place of `path` only when the block ends well.

    The block gets a temporary sibling directory to write into; afterwards every file in it is flushed to the disk
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
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
            os.replace(path, retired / path.name)
            try:
                os.replace(temporary, path)
            except BaseException:
                os.replace(retired / path.name, path)
                raise
            finally:
                shutil.rmtree(retired, ignore_errors=True)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
