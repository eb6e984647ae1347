"""train.py that prints "[phase]" whenever a phase begins: kill_test.py and test_faults.py stop it there.

With STOP_IN=forward:7, say, rank 0 sends itself a SIGTERM when it begins the seventh forward pass.
"""

import os
import signal
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from tooln1 import update
from tooln1.io.errors import exit_on_user_error
from tooln1.run import lifecycle, setup

STOP_IN = os.environ.get("STOP_IN", "")
begun = Counter()


def announced(phase, function):
    def announcing(*args, **kwargs):
        begun[phase] += 1
        os.write(1, f"[{phase}]\n".encode())
        if f"{phase}:{begun[phase]}" == STOP_IN:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    return announcing


if os.environ.get("RANK", "0") == "0":
    for module, name, phase in (
        (train, "sample", "rollout"),
        (train, "log_probs", "logprobs"),
        (train, "optimizer_step", "update"),
        (update, "batch_logprobs", "forward"),
        (lifecycle, "evaluate", "eval"),
        (lifecycle, "save_checkpoint", "save"),
        (lifecycle, "save_model", "export"),
        (setup, "load_models", "load"),
    ):
        setattr(module, name, announced(phase, getattr(module, name)))
exit_on_user_error(train.main)
