"""Launching: the command lines of the scripts, two torchruns as on two machines, processes that do not run the same."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny
from tiny import ROOT, Job, measured, write_preset

from tooln1.io.errors import UserError
from tooln1.run.checks import require_same_on_all_ranks

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


# ----------------------------------------------------------------------------------------- the same on all ranks


class Gathered:
    """A world in which the processes have these facts."""

    def __init__(self, *facts: dict):
        self.facts = [(f"node{rank}", fact) for rank, fact in enumerate(facts)]

    def gather(self, items):
        return self.facts


def test_the_ranks_that_differ_are_named():
    same, other = {"code": "a", "seed": 0}, {"code": "b", "seed": 0}
    require_same_on_all_ranks(Gathered(same, same, same), same)
    for ranks, told in (
        ((same, other), "code is 'b' and not 'a' on rank 1 (node1)."),
        ((other, same, same), "code is 'b' and not 'a' on rank 0 (node0)."),
        ((same, other, same, other, same), "code is 'b' and not 'a' on rank 1 (node1), rank 3 (node3)."),
        ((same, other, same | {"seed": 1}), "'a' on rank 1 (node1); seed is 1 and not 0 on rank 2 (node2)."),
    ):
        for facts in ranks:  # each of them raises
            with pytest.raises(UserError) as error:
                require_same_on_all_ranks(Gathered(*ranks), facts)
            assert told in str(error.value)


TRAIN_OF_A_RANK = """
import os, runpy, sys
tree = os.environ["TREE"] if os.environ["RANK"] == "2" else os.environ["PYTHONPATH"]
sys.path[:] = [tree] + [path for path in sys.path if path != os.environ["PYTHONPATH"]]
sys.argv += ["--seed", "7"] * (os.environ["RANK"] == "1")
runpy.run_path(f"{tree}/train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_other_code_and_another_setting_on_two_of_three_ranks(tmp_path, monkeypatch):
    tiny.write_model(tmp_path)
    tiny.write_data(tmp_path)
    tree = shutil.copytree(ROOT / "tooln1", tmp_path / "tree" / "tooln1").parent
    (tree / "train.py").write_text((ROOT / "train.py").read_text() + "# another version\n")
    (tmp_path / "train_of_a_rank.py").write_text(TRAIN_OF_A_RANK)
    monkeypatch.setenv("TREE", str(tree))
    done = tiny.torchrun(3, str(tmp_path / "train_of_a_rank.py"), *write_preset(tmp_path, "run"))
    assert done.returncode and done.stderr.count("error: ") == 1 and "exitcode  : 2" in done.stderr, done.stderr
    (sentence,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "seed is 7 and not 0 on rank 1 (" in sentence and "on rank 2 (" in sentence.split("code is ")[1]
    assert not (tmp_path / "run").exists()
