"""Faults: processes that die or hang, signals, full disks, broken run directories, lack of memory, infinite numbers."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import tiny
import torch
from tiny import ROOT, Job, assert_same_run, is_running, measured, run, torchrun_command, write_preset

import train
from tooln1.distributed import World
from tooln1.io.errors import Stopped, UserError
from tooln1.model import load_model
from tooln1.rewards import REWARDS
from tooln1.run import lifecycle
from tooln1.run.signals import StopRequest

ENDLESS = dict(steps=100_000, eval_every=0, save_every=0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    tiny.write_model(folder)
    tiny.write_data(folder)
    return folder


@pytest.fixture
def start(place):
    """Starts train.py in processes of its own, which the test does not outlive."""
    jobs, path = [], f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # for the script's torchrun

    def start(name, *arguments, processes=2, prefix=(), script="train.py", stop_in="", **changes) -> Job:
        launcher = torchrun_command(processes) if processes > 1 else [sys.executable]
        launcher = [] if script == "scripts/train.sh" else launcher
        command = [*prefix, *launcher, script, *write_preset(place, name, **changes), *arguments]
        jobs.append(Job(place / f"{name}.log", command, STOP_IN=stop_in, NPROC=str(processes), PATH=path))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def steps_of(run_dir) -> list[int]:
    return [row["step"] for row in measured(run_dir)]


# ---------------------------------------------------------------------------------------------- processes


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_ends_the_job_and_torchrun_names_it(start, victim):
    job = start(f"dead-{victim}", **ENDLESS)
    assert job.wait_for("step      2/")
    workers = job.workers()
    os.kill(workers[victim], signal.SIGKILL)
    code, text = job.end(40)  # torchrun waits 30 s for the other one
    assert code == 1 and not any(map(is_running, workers))
    cause = text.split("Root Cause")[1]
    assert f"rank      : {victim}" in cause and "exitcode  : -9" in cause


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_by_the_timeout(start):
    job = start("hangs", collective_timeout=3, **ENDLESS)
    assert job.wait_for("step      2/")
    hanging = job.workers()[1]
    os.kill(hanging, signal.SIGSTOP)
    assert job.wait_for("Timed out", seconds=20) and job.wait_for("closing signal SIGTERM", seconds=20)
    os.kill(hanging, signal.SIGKILL)  # torchrun would do so after 30 s
    code, text = job.end()
    assert code == 1 and "rank      : 0" in text.split("Root Cause")[1]


@pytest.mark.slow
def test_ranks_end_when_torchrun_is_killed(start):
    job = start("orphans", **ENDLESS)
    assert job.wait_for("step      2/")
    workers = job.workers()
    os.kill(job.process.pid, signal.SIGKILL)
    until = time.monotonic() + 5
    while any(map(is_running, workers)):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_the_launch_script_restarts_from_the_last_checkpoint(start, place):
    """The restarted processes must not meet at the addresses that the dead ones left in torchrun's store."""
    undisturbed = run(place, "undisturbed", steps=6)
    job = start("restarted", script="scripts/train.sh", steps=6)
    assert job.wait_for("step 3/")
    os.kill(job.workers()[1], signal.SIGKILL)
    code, text = job.end()
    assert code == 0 and "step-000002 after step 2" in text, text
    rows, wanted = measured(place / "restarted"), measured(undisturbed)
    assert steps_of(place / "restarted") == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in wanted], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("option,words", [("--train-dat", "'train_data'"), ("--train-data", "read nowhere.jsonl")])
def test_a_mistake_is_printed_once_and_the_exit_code_is_2(start, place, option, words):
    """Before the processes have met, and after."""
    code, text = start(f"mistake{option}", option, "nowhere.jsonl").end()
    assert code == 1  # torchrun's own
    assert text.count("error: ") == 1 and words in text and "exitcode  : 2" in text.split("Root Cause")[1]
    assert not (place / f"mistake{option}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes,kills", [("1", "2"), ("2", "2")])
def test_a_killed_run_ends_as_an_undisturbed_one(place, processes, kills):
    """The short form of `python tests/kill_test.py`."""
    preset = write_preset(place, "kills", steps=3, save_every=1)
    command = [sys.executable, "tests/kill_test.py", "--kills", kills, "--processes", processes, "--seed", "4", *preset]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    assert f"{processes} process(es): {kills} kills" in result.stdout


# ------------------------------------------------------------------------------------------------- signals


@pytest.mark.slow
@pytest.mark.parametrize("processes,to", [(1, "job"), (2, "rank 1")])
def test_a_run_stopped_by_a_signal_resumes_bit_equal(start, place, processes, to):
    number = signal.SIGTERM if to == "job" else signal.SIGINT
    name, reference = f"{number.name}-{processes}-{to}", f"{number.name}-{processes}-{to}-reference"
    job = start(name, processes=processes, **ENDLESS)
    assert job.wait_for("step      2/")
    os.kill(job.process.pid if to == "job" else job.workers()[1], number)
    code, text = job.end(25)
    assert code == (128 + number if processes == 1 else 1), text
    done = len(measured(place / name))
    assert f"stopped after step {done} of 100000" in text
    assert to == "job" or f"exitcode  : {128 + number}" in text.split("Root Cause")[1]
    for run_name in (name, reference):
        job = start(run_name, "--resume", "auto", processes=processes, **(ENDLESS | dict(steps=done + 1)))
        assert job.end()[0] == 0, job.text()
    assert measured(place / name)[-1] == measured(place / reference)[-1]
    for part in ("hf", f"checkpoints/step-{done + 1:06d}"):
        assert_same_tensors(place / name / part, place / reference / part)


def assert_same_tensors(folder, reference) -> None:
    """Bit-equal safetensors files."""
    files = sorted(path.name for path in reference.glob("*.safetensors"))
    assert files and files == sorted(path.name for path in folder.glob("*.safetensors"))
    assert all(tiny.tensors(folder / file) == tiny.tensors(reference / file) for file in files)


# Each step has two mini-batches of several micro-batches; steps 0, 2 and 3 are evaluated, and step 3 is the last.
SETTINGS = dict(steps=3, tokens_per_microbatch=1500, save_every=0, keep_checkpoints=1, eval_before_training=True)
STOPS = [  # the function whose n-th call a signal precedes, n, the steps that are complete then
    (train, "sample", 2, 1),
    (train, "log_probs", 4, 1),
    (train, "optimizer_step", 4, 2),
    (lifecycle, "evaluate", 3, 3),
]


@pytest.fixture(scope="module")
def undisturbed(place):
    return run(place, "not-stopped", **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("module,name,count,done", STOPS)
def test_a_run_stopped_anywhere_ends_as_an_undisturbed_one(place, undisturbed, monkeypatch, module, name, count, done):
    """A step is given up until its first optimizer step; after that it is completed, but not its evaluation."""
    calls, function, stopped = [], getattr(module, name), f"stopped-{name}-{count}"

    def signalled(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped) as stop:
        patch.setattr(module, name, signalled)
        run(place, stopped, **SETTINGS)
    assert stop.value.number == signal.SIGTERM and len(calls) == count
    assert (place / stopped / f"checkpoints/step-{done:06d}/index.json").exists()
    assert steps_of(place / stopped) == list(range(done + 1))
    assert "heldout_accuracy" not in measured(place / stopped)[-1]
    run(place, stopped, resume="auto", **SETTINGS)
    assert_same_run(place / stopped, undisturbed)


@pytest.mark.slow
def test_ranks_stopped_between_micro_batches_save_the_step_before(start, place):
    """The unsharded weights and gradients that FSDP holds at that moment do not get into the checkpoint.

    A step has two mini-batches of four micro-batches a rank, and so 20 forward passes: the reference; the policy, from
    the second mini-batch on, and the reference; two updates.
    """
    settings = dict(prompts_per_minibatch=2, tokens_per_microbatch=1000, accumulate_unsharded="on", keep_checkpoints=3)
    announcing = partial(start, script="tests/announcing_train.py", steps=3, eval_every=0, **settings)
    assert announcing("not-stopped-2", save_every=1).end()[0] == 0
    for phase, number in (("reference", 22), ("logprobs", 26), ("update", 34)):
        code, text = announcing(f"stopped-in-{phase}", save_every=0, stop_in=f"forward:{number}").end()
        assert code == 1 and "stopped after step 1 of 3" in text, text
        assert text.count("[forward]") == number
        checkpoints = (place / name / "checkpoints/step-000001" for name in (f"stopped-in-{phase}", "not-stopped-2"))
        assert_same_tensors(*checkpoints)


def test_a_second_signal_exits_at_once(monkeypatch):
    """But two within a second are one: a job manager signals torchrun and its processes, and torchrun these again."""
    exits, numbers = [], (signal.SIGTERM, signal.SIGINT)
    monkeypatch.setattr("tooln1.run.signals.os._exit", exits.append)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest(World(0, 1, torch.device("cpu"))) as request:
        request.check()
        assert not request.asked()
        for number in numbers:
            os.kill(os.getpid(), number)
        assert request.asked() and not exits
        with pytest.raises(Stopped) as stop:
            request.check()
        assert stop.value.number == signal.SIGTERM
        request.time -= 1.1
        os.kill(os.getpid(), signal.SIGINT)
        assert exits == [130]
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_signal_that_comes_again_while_the_run_saves_does_not_end_it(place, monkeypatch):
    """A job manager signals torchrun and its processes, and torchrun, a little later, signals these again."""
    ended, calls, functions = [], [], {train: train.sample, lifecycle: lifecycle.save_checkpoint}

    def signalled(module, *args, **kwargs):
        calls.append(module)
        if len(calls) > 1:  # in the second step, and in the save that follows
            os.kill(os.getpid(), signal.SIGTERM)
        return functions[module](*args, **kwargs)

    monkeypatch.setattr("tooln1.run.signals.os._exit", lambda code: None)  # if it is more than a second later
    monkeypatch.setattr(train, "sample", partial(signalled, train))
    monkeypatch.setattr(lifecycle, "save_checkpoint", partial(signalled, lifecycle))
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    with pytest.raises(Stopped):
        run(place, "signalled-twice", steps=2, eval_every=0, save_every=0)
    signal.signal(signal.SIGTERM, before)
    assert calls == [train, train, lifecycle] and not ended
    assert (place / "signalled-twice/checkpoints/step-000001/index.json").exists()


# ------------------------------------------------------------------------------------------ disk and directory


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_good_one(start, place, processes=2):
    name = f"full-{processes}"
    assert start(name, processes=processes, steps=2).end()[0] == 0
    checkpoints = place / name / "checkpoints"
    before = {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    settings = dict(steps=9, save_every=1, max_failed_saves=2, eval_every=0)
    small_files = ("bash", "-c", 'ulimit -f 60 && exec "$@"', "bash")  # 60 kB: enough for a log, not for weights
    job = start(name, "--resume", "auto", processes=processes, prefix=small_files, **settings)
    code, text = job.end()
    assert code == (2 if processes == 1 else 1), text
    assert text.count("(attempt 1 of 2)") == 1 and text.count("\nerror: ") == 1 and "File too large" in text
    assert {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()} == before
    assert steps_of(place / name) == [1, 2, 3, 4]
    assert start(name, "--resume", "auto", processes=processes, steps=4).end()[0] == 0  # there is room again
    wanted = measured(run(place, f"{name}-reference", steps=4))
    assert [row["loss"] for row in measured(place / name)] == pytest.approx([row["loss"] for row in wanted], abs=1e-5)


def test_a_run_that_cannot_start_leaves_nothing(place):
    with pytest.raises(UserError, match="nowhere/at all"):
        run(place, "deep/er/nothing", model="nowhere/at all")
    assert not (place / "deep").exists()


@pytest.mark.slow
def test_resuming_from_an_older_checkpoint_sets_the_later_ones_aside(place, monkeypatch):
    settings = dict(steps=4, save_every=1, keep_checkpoints=9)
    first = run(place, "rewound", **settings)
    before, oldest = measured(first), str(first / "checkpoints/step-000001")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(lifecycle, "save", lambda *args, **kwargs: 1 / 0)
        run(place, "rewound", steps=4, resume=oldest)
    run(place, "rewound", resume="auto", **settings)  # not from the abandoned step 4
    assert measured(first) == before
    assert measured(run(place, "branch", steps=4, resume=oldest)) == before[1:]
    with pytest.raises(UserError, match="another run"):
        run(place, "branch", steps=4, resume=oldest)


# ------------------------------------------------------------------------------------------ memory and numbers


@pytest.mark.parametrize(
    "function,words",
    [
        ("optimizer_step", r"\(step 1, update\): CUDA .*tokens_per_microbatch \(5000\).*kl \(k3\)"),
        ("generate_distributed", r"\(step 1, rollout\).*max_num_seqs \(0\).*max_reply_tokens \(12\)"),
    ],
)
def test_lack_of_gpu_memory_names_the_settings(place, monkeypatch, function, words):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total ...")

    monkeypatch.setattr(train, function, out_of_memory)
    with pytest.raises(UserError, match=words):
        run(place, f"memory-{function}", steps=1)


def test_steps_that_are_not_finite_are_skipped_kept_and_end_the_run(place, monkeypatch):
    def weights(run_dir):
        return list(load_model(run_dir / "hf").parameters())

    start = weights(run(place, "finite", steps=1, learning_rate=1e-12))
    monkeypatch.setitem(REWARDS, "binary", lambda text, answer: float("nan") if "a" in text.lower() else 1.0)
    settings, skipped = dict(steps=9, eval_every=0, save_every=1), place / "nan/skipped"
    with pytest.raises(UserError, match=r"3 optimizer steps in a row .* step 2. .*skipped"):
        run(place, "nan", max_bad_steps=3, **settings)
    rows = measured(place / "nan")
    assert [row["skipped_steps"] for row in rows] == [2] and rows[0]["loss"] is None
    files = sorted(path.name for path in skipped.iterdir())
    assert files == ["step-000001-1.rank0.jsonl", "step-000001-2.rank0.jsonl", "step-000002-1.rank0.jsonl"]
    replies = measured(skipped, files[-1])
    assert len(replies) == 6 and {row["advantage"] for row in replies} >= {None}
    for row in replies:
        assert len(row["sampler_logprobs"]) > 0 and row["old_logprobs"] is None  # the step's first mini-batch
    assert all(len(row["old_logprobs"]) == len(row["sampler_logprobs"]) for row in measured(skipped, files[1]))
    monkeypatch.undo()
    run(place, "nan", resume="auto", max_bad_steps=3, **(settings | dict(steps=1)))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(place / "nan"), start, strict=True))
