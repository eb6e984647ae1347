"""UserError, the stop by a signal, and the exit codes of the entry points."""

import os
import sys
import time
from collections.abc import Callable


class UserError(ValueError):
    """A mistake that the user can correct, in one or two sentences: value, file or setting, and what to do.

    printed_here: whether this process of several prints it; None: the first process of each node does.
    """

    def __init__(self, text: str, printed_here: bool | None = None):
        super().__init__(text)
        self.printed_here = printed_here


class Stopped(Exception):
    """A signal stopped the run, whose complete steps are saved; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`; exit with 2 after a UserError, which goes to stderr, with 128 + n after signal n, else as Python."""
    code = 0
    try:
        main()
    except UserError as error:
        undecided, code = error.printed_here is None, 2
        if error.printed_here or (undecided and os.environ.get("LOCAL_RANK", "0") == "0"):
            print(f"error: {error}", file=sys.stderr)
        elif undecided:
            time.sleep(10)  # torchrun ends all processes when one exits: let the first of the node print before
    except (Stopped, KeyboardInterrupt) as stop:
        code = 128 + getattr(stop, "number", 2)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        os._exit(code)  # gloo's threads can abort a process whose interpreter is being finalized
    if code:
        sys.exit(code)
