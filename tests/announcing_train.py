"""train.py, which also writes down what it is doing, so that kill_test.py can kill it right there.

With STOP_IN, "update:3", say, rank 0 asks itself to stop when it begins the third update.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from tooln1 import update
from tooln1.io.errors import exit_on_user_error
from tooln1.run import lifecycle, setup

FILE = os.open(os.environ["ANNOUNCE_TO"], os.O_WRONLY | os.O_APPEND)
PHASE, _, COUNT = os.environ.get("STOP_IN", "").partition(":")
requests, begun = [], []


class Request(setup.StopRequest):
    def __init__(self, world):
        super().__init__(world)
        requests.append(self)


def stop():
    os.kill(os.getpid(), signal.SIGTERM)
    while not requests[0].asked():
        time.sleep(0.001)


def announced(phase, function):
    def announcing(*args, **kwargs):
        os.write(FILE, f"{phase}\n".encode())
        begun.append(phase)
        if phase == PHASE and begun.count(phase) == int(COUNT):
            stop()
        return function(*args, **kwargs)

    return announcing


if os.environ.get("RANK", "0") == "0":
    setup.StopRequest = Request
    for module, name, phase in (
        (train, "sample", "rollout"),
        (train, "log_probs", "logprobs"),
        (train, "optimizer_step", "update"),
        (lifecycle, "evaluate", "eval"),
        (lifecycle, "save_checkpoint", "save"),
        (lifecycle, "save_model", "export"),
        (setup, "load_models", "load"),
    ):
        setattr(module, name, announced(phase, getattr(module, name)))
    update.batch_logprobs = announced("forward", update.batch_logprobs)
exit_on_user_error(train.main)
