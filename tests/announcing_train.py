"""train.py, which also writes down what it is doing, so that kill_test.py can kill it right there."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from tooln1.errors import exit_on_user_error

FILE = os.open(os.environ["ANNOUNCE_TO"], os.O_WRONLY | os.O_APPEND)


def announced(phase, function):
    def announcing(*args, **kwargs):
        os.write(FILE, f"{phase}\n".encode())
        return function(*args, **kwargs)

    return announcing


if os.environ.get("RANK", "0") == "0":
    for name, phase in {
        "sample": "rollout", "log_probs": "logprobs", "optimizer_step": "update", "evaluate": "eval",
        "save_checkpoint": "save", "save_model": "export", "load_models": "load",
    }.items():  # fmt: skip
        setattr(train, name, announced(phase, getattr(train, name)))
exit_on_user_error(train.main)
