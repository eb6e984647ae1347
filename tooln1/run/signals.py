"""SIGTERM and Ctrl-C ask a run to stop at the next place where nothing is lost; a second one stops it at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

from tooln1.distributed import World
from tooln1.io.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
WORDS = "stopping, then saving the steps that are complete; a second signal stops at once, without saving"
SAME = 0.5  # seconds: a job manager signals torchrun and its processes, and torchrun passes its own on


class StopRequest:
    """A context in which SIGTERM and SIGINT are requests; `asked` says whether one came, here or elsewhere in the job.

    A thread of its own looks at them: the main one may be deep in a collective, where Python handles no signal.
    """

    def __init__(self, world: World):
        self.world = world
        self.number = 0  # of the first signal
        self.since = 0.0

    def __enter__(self) -> StopRequest:
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self.wakeup = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.writer.close()  # ends the thread

    def asked(self) -> bool:
        """Whether this process was asked to stop, or another one has let it know that it was."""
        return self.number != 0 or (self.world.lifeline is not None and self.world.lifeline.stop_asked)

    def check(self) -> None:
        """Raise `Stopped` on all ranks where any of them was asked (a collective)."""
        (number,) = self.world.all_reduce([self.number], "max")
        if number:
            raise Stopped(int(number))

    def _watch(self) -> None:
        while received := self.reader.recv(1):
            number, now = received[0], time.monotonic()
            if number not in SIGNALS:
                continue
            name = signal.Signals(number).name
            if not self.number:
                self.number, self.since = number, now
                if self.world.lifeline:
                    self.world.lifeline.ask_to_stop()
                if self.world.is_main:
                    os.write(2, f"\n{name}: {WORDS}\n".encode())
            elif now - self.since > SAME:
                os.write(2, f"{name} again: rank {self.world.rank} stops at once\n".encode())
                os._exit(128 + number)
        self.reader.close()
