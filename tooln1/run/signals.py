"""SIGTERM and SIGINT (Ctrl-C) stop a run where no complete step is lost; a second signal ends the process at once."""

import os
import signal
import time
from typing import Self

from tooln1.distributed import World
from tooln1.io.errors import Stopped

MESSAGE = "stopping, then saving the complete steps; a second signal ends the run at once, without saving"


class StopRequest:
    """A context in which SIGTERM and SIGINT only set a flag; `check` raises `Stopped` on all ranks."""

    def __init__(self, world: World):
        self.world = world
        self.number = 0  # of the first signal
        self.time = 0.0  # of the first signal, in seconds

    def __enter__(self) -> Self:
        self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether this process has received a signal."""
        return self.number != 0

    def check(self) -> None:
        """Raise `Stopped` on all ranks if any of them has received a signal (a collective)."""
        (number,) = self.world.all_reduce([self.number], "max")
        if number:
            raise Stopped(int(number))

    def _handle(self, number: int, frame) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if not self.number:
            self.number, self.time = number, now
            if self.world.is_main:
                os.write(2, f"\n{name}: {MESSAGE}\n".encode())  # print could be interrupted in itself
        elif now - self.time > 1:  # job managers signal torchrun and its processes, and torchrun signals these again
            os.write(2, f"{name} again: rank {self.world.rank} exits\n".encode())
            os._exit(128 + number)
