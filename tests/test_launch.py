"""The launch scripts: the command lines that they give, and two torchruns that find each other as on two machines."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny
from tiny import ROOT, Job, measured, write_preset

STUB = f"""#!{sys.executable}
import json, os, sys
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
environment = {{key: os.environ.get(key) for key in ("NNODES", "HEAD_NODE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")}}
if name == "scontrol":
    print("node7", "node8", sep="\\n")
    sys.exit()
print(json.dumps([name, *arguments, environment]), flush=True)
if name == "srun":
    first = next(i for i, argument in enumerate(arguments) if not argument.startswith("-"))
    os.execvp(arguments[first], arguments[first:])
"""
ONE_TORCHRUN = ["--nproc-per-node", "gpu", "--max-restarts", "3"]
SCRIPT = [str(ROOT / "train.py"), "--resume", "auto", "--config", "a preset.toml"]


@pytest.fixture
def launched(tmp_path):
    """The programs that a script starts, in place of which stubs say how: [name, argument, ..., environment] each."""
    for name in ("torchrun", "srun", "scontrol"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)

    def launched(script: str, **environment: str) -> list[list]:
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **environment}
        command = ["bash", f"scripts/{script}", "--config", "a preset.toml"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return launched


def test_one_machine(launched):
    ((*command, environment),) = launched("train.sh")
    assert command == ["torchrun", "--standalone", *ONE_TORCHRUN, *SCRIPT]
    assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "540"


def test_several_machines(launched):
    ((*command, environment),) = launched("train_nodes.sh", NNODES="4", HEAD_NODE="node1", SHUTDOWN="60", NPROC="8")
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node1:29500", "--rdzv-id", "tooln1"]
    assert command == ["torchrun", "--nnodes", "4", "--nproc-per-node", "8", "--max-restarts", "3", *meeting, *SCRIPT]
    assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "60"
    with pytest.raises(AssertionError, match="HEAD_NODE: unbound variable"):
        launched("train_nodes.sh", NNODES="4")


def test_slurm(launched):
    """srun starts the script for several machines on each node, which meet at the first one."""
    step, (*command, _) = launched(
        "train.slurm", SLURM_JOB_NODELIST="node[7-8]", SLURM_JOB_NUM_NODES="2", SLURM_JOB_ID="123456"
    )
    assert step[:3] == ["srun", "--kill-on-bad-exit=1", "--cpu-bind=none"]
    assert step[3:-1] == ["scripts/train_nodes.sh", "--config", "a preset.toml"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node7:23456", "--rdzv-id", "123456"]
    assert command == ["torchrun", "--nnodes", "2", *ONE_TORCHRUN, *meeting, *SCRIPT]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_two_machines_restart_together_from_the_last_checkpoint(tmp_path):
    """Two torchruns of one process each; when a process of the second dies, both start theirs again."""
    tiny.write_model(tmp_path)
    tiny.write_data(tmp_path)
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    where = dict(NNODES="2", HEAD_NODE="localhost", PORT=str(free_port()), NPROC="1", PATH=path)
    command = ["scripts/train_nodes.sh", *write_preset(tmp_path, "run", steps=4, device="cpu", save_every=1)]
    machines = [Job(tmp_path / f"{name}.log", command, **where) for name in ("first", "second")]
    try:
        until = time.monotonic() + 120
        while not any("step 2/" in one.text() or "step      2/" in one.text() for one in machines):
            assert time.monotonic() < until, machines[0].text()
            time.sleep(0.02)
        os.kill(machines[1].workers()[0], signal.SIGKILL)
        ends = [one.end(120) for one in machines]
    finally:
        for one in machines:
            one.kill()
    text = "".join(text for _, text in ends)
    assert [code for code, _ in ends] == [0, 0], text
    assert "resuming from" in text and "done: the model is in" in text
    assert [row["step"] for row in measured(tmp_path / "run")] == [1, 2, 3, 4]
