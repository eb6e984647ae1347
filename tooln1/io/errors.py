"""What every room needs to fail politely: the error a user can mend, and files that are never half-written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake that the user can mend: a wrong key, a missing file, a malformed row, a full disk.

    Its text is one or two plain sentences: what is wrong, with the value and the file or key, and the way out.
    Entry points print it on stderr and exit with code 2; any other exception keeps its traceback.
    """

    told = False  # another process of the same job has printed it already


class Stopped(Exception):
    """A signal asked the run to stop, and it did so in good order; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run an entry point, and end it with the exit code that its failure has.

    2: a `UserError`, whose sentence goes to stderr; 128 + n: stopped by signal n (130: Ctrl-C); 1, with a traceback:
    anything else. Of what is wrong with the command line, which all processes of a job share, one on each node speaks.
    """
    code = 0
    try:
        main()
    except UserError as error:
        if not error.told and os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        code = 2
    except Stopped as stop:
        code = 128 + stop.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # All is done and closed. While the interpreter takes itself down, gloo's threads may still want its lock, and
        # now and then one of them aborts the process ("terminate called without an active exception").
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)
