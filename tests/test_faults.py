"""Processes that die or hang, signals, full disks, memory that runs out, numbers that are not finite: for real."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import kill_test
import pytest
import tiny
import torch
from kill_test import Job, measured
from test_distributed import ROOT
from test_train import run, settings, weights

import train
from tooln1.config import Config, to_toml
from tooln1.io.errors import Stopped, UserError
from tooln1.run import lifecycle, setup
from tooln1.run.metrics import read_jsonl
from tooln1.run.signals import StopRequest

ENDLESS = dict(steps=100_000, eval_every=0, save_every=0)


@pytest.fixture(autouse=True)
def nothing_runs_on():
    """A test that fails leaves no endless run behind."""
    yield
    while Torchrun.started:
        job = Torchrun.started.pop()
        if job.process.poll() is None:
            job.kill(None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    tiny.write_model(folder)
    tiny.write_data(folder)
    return folder


def preset(place, name, **changes):
    file = place / f"{name}.toml"
    file.write_text(to_toml(Config(**settings(place, name, **changes))))
    return ["--config", str(file)]


class Torchrun(Job):
    """train.py as two processes under torchrun, or alone."""

    started: list = []

    def __init__(self, place, name, *arguments, processes=2, flags=(), limit=None, **changes):
        self.log, self.processes = place / f"{name}.log", processes
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *flags]
        command = [sys.executable, *(launcher if processes > 1 else []), "train.py"]
        self.output = self.log.open("w+")
        self.process = subprocess.Popen(
            [*command, *preset(place, name, **changes), *arguments],
            cwd=ROOT,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            preexec_fn=limit,
        )
        self.started.append(self)

    def wait_for_text(self, words, seconds=120):
        until = time.monotonic() + seconds
        while words not in self.text():
            assert self.process.poll() is None and time.monotonic() < until, self.text()
            time.sleep(0.02)

    def end(self, seconds=60):
        """Wait for the end; (exit code, seconds it took, what was printed)."""
        start = time.monotonic()
        return self.process.wait(timeout=seconds), time.monotonic() - start, self.text()


# ---------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_job_at_once_with_its_rank_and_the_reason(place, victim):
    job = Torchrun(place, f"dead-{victim}", **ENDLESS)
    job.wait_for_text("step      2/")
    os.kill(job.workers()[victim], signal.SIGKILL)
    code, seconds, text = job.end()
    assert code and seconds < 15
    assert f"rank {1 - victim} ends (step " in text and f"because rank {victim} is gone: its process died" in text
    assert "Go on from the last checkpoint" in text


def test_a_process_that_hangs_is_told_from_one_that_is_slow(place):
    job = Torchrun(place, "hangs", collective_timeout=3, **ENDLESS)
    job.wait_for_text("step      2/")
    stopped = job.workers()[1]
    os.kill(stopped, signal.SIGSTOP)
    start = time.monotonic()
    job.wait_for_text("error: rank 0: it waited 3 s for another process in vain. rank 0 (process ", seconds=20)
    assert time.monotonic() - start > 2.5
    job.wait_for_text("closing signal SIGTERM")
    os.kill(stopped, signal.SIGKILL)  # torchrun would give it 30 seconds
    code, _, text = job.end()
    assert code and "raise collective_timeout" in text and f"(process {stopped} on " in text
    assert "Traceback" not in text.split("closing signal")[0]


def test_processes_end_when_torchrun_is_killed(place):
    job = Torchrun(place, "orphans", **ENDLESS)
    job.wait_for_text("step      2/")
    workers = job.workers()
    os.kill(job.process.pid, signal.SIGKILL)
    until = time.monotonic() + 15
    while any(os.path.exists(f"/proc/{pid}/status") for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert time.monotonic() < until and "torchrun is gone, and so this process ends" in job.text()


def test_torchrun_restarts_from_the_last_checkpoint(place):
    """No --resume on the command line; the restarted processes meet although old addresses lie about."""
    undisturbed = run(place, "undisturbed", steps=6)
    job = Torchrun(place, "restarted", flags=("--max-restarts=1",), steps=6)
    job.wait_for_text("step 3/")
    os.kill(job.workers()[1], signal.SIGKILL)
    code, _, text = job.end(120)
    assert code == 0, text
    assert "going on from" in text and "done: the model is in" in text
    rows, wanted = measured(place / "restarted/metrics.jsonl"), measured(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in wanted], abs=1e-5)


def test_a_restart_does_not_take_up_a_run_of_another_job(place):
    """What the first start refuses, the second refuses as well: nothing of the other run is touched."""
    other = run(place, "other-job", steps=2, save_every=1)
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    job = Torchrun(place, "other-job", flags=("--max-restarts=1",), steps=4)
    code, _, text = job.end(120)
    assert code and text.count("error: ") - text.count("rank 1: ") >= 2
    assert "already holds a run" in text and "going on from" not in text
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before


def test_a_mistake_of_all_processes_is_told_once(place):
    job = Torchrun(place, "mistaken", "--train-data", "nowhere.jsonl", steps=2)
    code, seconds, text = job.end()
    assert code == 1  # torchrun's own
    assert text.count("nowhere.jsonl") == text.count("error: cannot") == 1 and "exitcode  : 2" in text
    assert not (place / "mistaken").exists()


@pytest.mark.parametrize("before,after", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(place, before, after):
    how = dict(steps=4, learning_rate=1e-4)
    wanted = measured(run(place, f"whole-{before}", **how) / "metrics.jsonl")
    name = f"moved-{before}"
    for processes, steps in ((before, 2), (after, 4)):
        job = Torchrun(place, name, "--resume", "auto", processes=processes, **(how | dict(steps=steps)))
        code, _, text = job.end(120)
        assert code == 0, text
    rows = measured(place / name / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for key in ("loss", "policy_loss", "kl", "grad_norm", "reward", "entropy"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in wanted], abs=1e-5), key


def test_a_killed_run_ends_as_one_that_was_left_alone(place, tmp_path):
    """The short version; `python tests/kill_test.py` is the long one."""
    options = preset(place, "kills", steps=4, save_every=1, eval_every=2)
    report = kill_test.kill_test(tmp_path, options, processes=1, kills=4, seed=random.randrange(1000))
    assert sum(report.kills.values()) >= 4 and report.runs >= 1


def test_killed_processes_end_as_if_left_alone(place, tmp_path):
    options = preset(place, "kills-2", steps=3, save_every=1, eval_every=2)
    report = kill_test.kill_test(tmp_path, options, processes=2, kills=2, seed=4)
    assert report.slowest_end < 15


# ------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("processes,number", [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_saves_what_is_done(place, processes, number):
    name = f"signal-{processes}-{number}"
    job = Torchrun(place, name, processes=processes, **ENDLESS)
    job.wait_for_text("step      2/")
    job.process.send_signal(number)
    code, seconds, text = job.end()
    assert seconds < 20 and text.count("Traceback") == processes - 1  # torchrun's own
    assert code == (128 + number if processes == 1 else 1), text
    done = len(measured(place / name / "metrics.jsonl"))
    assert f"stopped after step {done} of 100000; --resume auto" in text
    there = sorted(path.name for path in (place / name / "checkpoints").iterdir())
    assert there == ["latest", f"step-{done:06d}"]


def test_one_process_asked_is_all_asked(place):
    job = Torchrun(place, "one-asked", **ENDLESS)
    job.wait_for_text("step      2/")
    os.kill(job.workers()[1], signal.SIGTERM)
    _, seconds, text = job.end()
    assert seconds < 20 and "stopped after step" in text and "is gone" not in text


# Each step has two mini-batches of several micro-batches; steps 0, 2 and 3 are evaluated, and step 3 is the last.
HOW = dict(steps=3, tokens_per_microbatch=1500, save_every=0, keep_checkpoints=1, eval_before_training=True)
STOPS = [  # function of train.py that is called, for which time, when the signal comes; steps that are complete
    ("sample", 2, 1),
    ("log_probs", 3, 1),
    ("log_probs", 4, 1),
    ("optimizer_step", 3, 1),
    ("optimizer_step", 4, 2),
    ("evaluate", 2, 2),
    ("evaluate", 3, 3),
]


def module_of(name):
    return train if hasattr(train, name) else lifecycle


@pytest.fixture(scope="module")
def not_stopped(place):
    return run(place, "not-stopped", **HOW)


@pytest.mark.parametrize("name,count,done", STOPS)
def test_a_run_stopped_anywhere_ends_as_one_that_was_not(place, not_stopped, monkeypatch, name, count, done):
    """A step is given up until its first optimizer step; after that it is completed, but not its evaluation."""
    requests, calls, function, stopped = [], [], getattr(module_of(name), name), f"stopped-{name}-{count}"

    class Request(StopRequest):
        def __init__(self, world):
            super().__init__(world)
            requests.append(self)

    def asked(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
            until = time.monotonic() + 5
            while not requests[0].asked() and time.monotonic() < until:
                time.sleep(0.001)
        return function(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped) as stop:
        patch.setattr(setup, "StopRequest", Request)
        patch.setattr(module_of(name), name, asked)
        run(place, stopped, **HOW)
    assert stop.value.number == signal.SIGTERM and len(calls) == count
    assert (place / stopped / "checkpoints/latest").read_text() == f"step-{done:06d}\n"
    rows = measured(place / stopped / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(done + 1)) and "heldout_accuracy" not in rows[-1]
    run(place, stopped, resume="auto", **HOW)
    kill_test.compare(not_stopped, place / stopped)


def test_a_run_that_dies_in_an_evaluation_has_saved_the_step(place, not_stopped, monkeypatch):
    how, evaluate, calls = HOW | dict(save_every=1, keep_checkpoints=3), lifecycle.evaluate, []

    def dies(given):
        calls.append(given.done)
        if given.done == 2:
            raise RuntimeError("dies")
        return evaluate(given)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="dies"):
        patch.setattr(lifecycle, "evaluate", dies)
        run(place, "dies", **how)
    assert calls == [0, 2] and (place / "dies/checkpoints/latest").read_text() == "step-000002\n"
    run(place, "dies", resume="auto", **how)
    rows = measured(place / "dies/metrics.jsonl")
    assert rows == measured(not_stopped / "metrics.jsonl")
    last = str(place / "dies/checkpoints/step-000003")
    branch = run(place, "branch-of-the-last", resume=last, **how)  # it has no row of its own for it
    assert measured(branch / "metrics.jsonl") == [{"step": 3, "heldout_accuracy": rows[3]["heldout_accuracy"]}]


def test_processes_stopped_between_micro_batches_save_the_step_before(place, tmp_path, monkeypatch):
    """Weights and gradients that FSDP holds whole at that moment do not get into the checkpoint.

    A step has two micro-batches a rank, and so six forward passes: policy, reference, update.
    """
    how = HOW | dict(
        prompts_per_minibatch=4, accumulate_whole="on", eval_before_training=False, eval_every=0, keep_checkpoints=3
    )
    options = preset(place, "two-stopped", **how)
    saved = {}
    for name, where in (
        ("whole", ""),
        ("in-logprobs", "forward:7"),
        ("in-reference", "forward:9"),
        ("in-update", "forward:11"),
    ):
        monkeypatch.setenv("STOP_IN", where)
        job = Job(tmp_path / name, [*options, "--save-every", "0" if where else "1"], 2, tmp_path / "announcements")
        assert job.process.wait(timeout=120) == bool(where), job.text()
        assert ("stopped after step 1 of 3" in job.text()) == bool(where), job.text()
        passes = (tmp_path / "announcements").read_text().split().count("forward")
        assert passes == (int(where.split(":")[1]) if where else 18)
        files = (tmp_path / name / "checkpoints/step-000001").glob("*.safetensors")
        saved[name] = [file.read_bytes() for file in sorted(files)]
    assert len(saved["whole"]) == 2 and all(files == saved["whole"] for files in saved.values())


def test_a_second_signal_is_obeyed_at_once():
    """Even where the main thread does not come back to Python; two at the same moment are one."""
    code = (
        "import os, signal, time, torch\n"
        "from tooln1.distributed import World\n"
        "from tooln1.interrupt import StopRequest\n"
        "with StopRequest(World(0, 1, torch.device('cpu'))) as request:\n"
        "    for pause in (0.1, 0.1, 1):\n"
        "        time.sleep(pause)\n"
        "        print(request.asked(), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(30)\n"
    )
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 128 + signal.SIGTERM and time.monotonic() - start < 25
    assert result.stdout.split() == ["False", "True", "True"]
    assert "a second signal stops at once" in result.stderr and "stops at once" in result.stderr


def test_signals_are_as_before_afterwards():
    from tooln1.distributed import World

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest(World(0, 1, torch.device("cpu"))) as request:
        assert not request.asked()
        request.check()
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# ------------------------------------------------------------------------------------------ disk and directory


def small_files():
    """Files may grow to 60 kB: logs and indices do not, a checkpoint's part does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_good_one(place, processes):
    name = f"full-{processes}"
    job = Torchrun(place, name, processes=processes, steps=2, save_every=2)
    assert job.end(120)[0] == 0
    before = {path: path.read_bytes() for path in (place / name / "checkpoints").rglob("*") if path.is_file()}
    job = Torchrun(
        place,
        name,
        "--resume",
        "auto",
        processes=processes,
        limit=small_files,
        steps=9,
        save_every=1,
        max_failed_saves=2,
        eval_every=0,
    )
    code, _, text = job.end(120)
    assert code == (2 if processes == 1 else 1), text
    assert text.count("warning: the checkpoint") == 1 and "step-000003 could not be written" in text
    assert "File too large" in text and "good one is step-000002; make room" in text
    assert "Trying again after the next step (attempt 1 of 2)" in text
    assert text.count("\nerror: ") == 1 and "\nerror: the checkpoint" in text
    assert {path: path.read_bytes() for path in (place / name / "checkpoints").rglob("*") if path.is_file()} == before
    assert [row["step"] for row in measured(place / name / "metrics.jsonl")] == [1, 2, 3, 4]
    job = Torchrun(place, name, "--resume", "auto", processes=processes, steps=4, save_every=2)  # room was made
    assert job.end(120)[0] == 0
    wanted = measured(run(place, f"roomy-{processes}", steps=4) / "metrics.jsonl")
    losses = [row["loss"] for row in measured(place / name / "metrics.jsonl")]
    assert losses == pytest.approx([row["loss"] for row in wanted], abs=1e-5)


def test_a_full_disk(place, tmp_path):
    """A real one: a file system of 600 kB, which holds one checkpoint of 300 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        with pytest.raises(UserError, match="No space left on device") as error:
            run(place, str(disk / "run"), steps=9, save_every=1, max_failed_saves=1, keep_checkpoints=9)
        good = str(error.value).split("good one is ")[1][:11] if "good one" in str(error.value) else "step-000001"
        assert (disk / "run/checkpoints/latest").read_text().strip() == good
        assert not list((disk / "run").rglob("*.tmp"))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # the traceback still holds the logs


def test_a_log_that_cannot_be_written_ends_the_run_in_words(place, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    run(place, "log", steps=1)
    monkeypatch.setattr(
        "tooln1.run.metrics.JsonlLog._open",
        lambda self: type("Full", (), {"write": full, "close": lambda self: None, "fileno": lambda self: 0})(),
    )
    with pytest.raises(UserError, match=r"log/metrics.jsonl cannot be written to: No space left on device"):
        run(place, "log", steps=2, resume="auto")


def test_two_runs_do_not_share_a_directory(place):
    job = Torchrun(place, "shared", processes=1, **ENDLESS)
    job.wait_for_text("step      1/")
    with pytest.raises(UserError, match="another process is writing there"):
        run(place, "shared", resume="auto")
    job.kill(None)
    run(place, "shared", resume="auto", steps=1)


def test_a_run_that_cannot_start_leaves_nothing(place):
    with pytest.raises(UserError, match="no such directory"):
        run(place, "deep/er/nothing", model="nowhere/at all")
    assert not (place / "deep/er/nothing").exists()


def test_going_on_from_an_older_checkpoint_sets_the_later_ones_aside(place, capsys):
    whole = run(place, "rewound", steps=4, save_every=1, keep_checkpoints=9)
    before = measured(whole / "metrics.jsonl")
    oldest = whole / "checkpoints/step-000001"
    with pytest.raises(ZeroDivisionError):
        lifecycle.save, save = lambda *args, **how: 1 / 0, lifecycle.save
        try:
            run(place, "rewound", steps=4, resume=str(oldest))
        finally:
            lifecycle.save = save
    assert "step-000002.set-aside" in capsys.readouterr().out
    run(place, "rewound", steps=4, save_every=1, keep_checkpoints=9, resume="auto")  # not from the abandoned step 4
    assert measured(whole / "metrics.jsonl") == before
    with pytest.raises(UserError, match="already holds another run"):
        run(place, "undone", steps=1)
        run(place, "undone", steps=4, resume=str(oldest))
    with pytest.raises(ZeroDivisionError):  # killed in its first step: it has a checkpoint of its own already
        train.rl_step, step = lambda *args: 1 / 0, train.rl_step
        try:
            run(place, "branch", steps=4, resume=str(oldest))
        finally:
            train.rl_step = step
    assert (place / "branch/checkpoints/latest").read_text() == "step-000001\n"
    branch = run(place, "branch", steps=4, resume="auto")
    assert [row["step"] for row in measured(branch / "metrics.jsonl")] == [2, 3, 4]
    assert measured(branch / "metrics.jsonl") == before[1:]


def test_old_checkpoints_alone_are_a_run_too(place):
    folder = run(place, "no-logs", steps=2, save_every=1)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="already holds a run"):
        run(place, "no-logs", steps=1)


def test_what_a_power_cut_made_of_the_end_of_a_log_is_cut_off(place):
    whole = run(place, "power", steps=3, save_every=2)
    before = measured(whole / "metrics.jsonl")
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (whole / "metrics.jsonl").write_text("".join(lines[:2]) + "\0" * 500 + "\n" + lines[2])
    shutil.rmtree(whole / "checkpoints/step-000003")
    run(place, "power", steps=3, save_every=2, resume="auto")
    assert measured(whole / "metrics.jsonl") == before
    (whole / "metrics.jsonl").write_text(lines[0] + "\0" * 500 + "\n" + lines[2])  # a line that is needed
    with pytest.raises(UserError, match="line 2 is not JSON"):
        run(place, "power", steps=3, resume="auto")


def test_other_weights_or_another_tokenizer_at_the_same_place_are_noticed(place, tmp_path):
    run(place, "swapped", steps=1)
    shutil.copytree(place / "model", tmp_path / "moved")
    go_on = dict(resume="auto", steps=2)
    run(place, "swapped", model=str(tmp_path / "moved"), **go_on)  # the same model elsewhere
    tiny.write_model(tmp_path / "another", seed=1)
    for file in ("model.safetensors", "tokenizer_config.json"):
        shutil.copytree(place / "model", tmp_path / file)
        text = (tmp_path / "another/model" / file).read_bytes()
        (tmp_path / file / file).write_bytes(text.replace(b"<|im_end|>\\n", b"<|im_end|>\\n\\n"))
        with pytest.raises(UserError, match="does not hold what .*--allow-changes model"):
            run(place, "swapped", model=str(tmp_path / file), resume="auto", steps=3)
    run(place, "swapped", model=str(tmp_path / "model.safetensors"), resume="auto", steps=3, allow_changes="model")


def test_a_half_written_checkpoint_is_passed_over_and_named(place, capsys):
    folder = run(place, "half-written", steps=2, save_every=1)
    (folder / "checkpoints/.step-000003.tmp").mkdir()
    (folder / ".hf.abc.tmp").mkdir()
    run(place, "half-written", steps=2, resume="auto")
    out = capsys.readouterr().out
    assert "passed over, and removed: step-000003 (writing it was not finished)" in out
    assert not list(folder.rglob("*.tmp"))


def test_a_run_whose_checkpoints_are_all_broken_is_not_begun_anew(place):
    folder = run(place, "broken", steps=2, save_every=1)
    for index in (folder / "checkpoints").glob("*/index.json"):
        index.write_text("{}")
    with pytest.raises(UserError, match="no checkpoint is whole"):
        run(place, "broken", steps=3, resume="auto")
    with pytest.raises(UserError, match="is not whole: index.json cannot be read"):
        run(place, "broken", steps=3, resume=str(folder / "checkpoints/step-000001"))
    assert len(measured(folder / "metrics.jsonl")) == 2


# ------------------------------------------------------------------------------------- settings that changed


def test_changed_settings_are_refused_by_name_unless_allowed(place, tmp_path):
    run(place, "changed", steps=1)
    go_on = dict(resume="auto", steps=2)
    with pytest.raises(UserError, match=r"kl_coef 0.001 \(now 0.5\), .*learning_rate 0.001 \(now 0.1\)"):
        run(place, "changed", learning_rate=0.1, kl_coef=0.5, **go_on)
    with pytest.raises(UserError, match="--allow-changes kl_coef"):
        run(place, "changed", learning_rate=0.1, kl_coef=0.5, allow_changes="learning_rate", **go_on)
    with pytest.raises(UserError, match="steps 1 .now 2."):
        run(place, "changed", lr_schedule="cosine", allow_changes="lr_schedule", **go_on)
    with pytest.raises(UserError, match="no setting 'kl_cof'. Did you mean 'kl_coef'"):
        run(place, "changed", kl_coef=0.5, allow_changes="kl_cof", **go_on)
    other = tmp_path / "data.jsonl"
    other.write_text((place / "data.jsonl").read_text().replace("Add 3 ", "Sum 3 "))
    with pytest.raises(UserError, match="data.jsonl does not hold what .*--allow-changes train_data"):
        run(place, "changed", train_data=str(other), **go_on)
    same = tmp_path / "moved.jsonl"
    same.write_text((place / "data.jsonl").read_text())
    run(place, "changed", train_data=str(same), tokens_per_microbatch=60, eval_every=1, **go_on)  # only where it lies
    run(place, "changed", learning_rate=0.1, allow_changes="learning_rate", resume="auto", steps=3)
    row = read_jsonl(place / "changed/metrics.jsonl")[-1]
    assert (row["step"], row["learning_rate"]) == (3, 0.1)
    config = (place / "changed/config.toml").read_text()
    assert 'allow_changes = ""' in config and 'resume = ""' in config


# ------------------------------------------------------------------------------------------ memory and numbers


def test_memory_that_runs_out_names_the_knobs(place, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total ...")

    monkeypatch.setattr(train, "optimizer_step", out_of_memory)
    words = r"out of memory \(step 1, update\): CUDA out of memory. .*tokens_per_microbatch \(5000\).*kl_coef \(0.001\)"
    with pytest.raises(UserError, match=words):
        run(place, "oom-update", steps=1)
    monkeypatch.setattr(train, "generate_distributed", out_of_memory)
    with pytest.raises(UserError, match=r"\(step 1, rollout\).*rollout_rows \(0\).*max_reply_tokens \(12\)"):
        run(place, "oom-rollout", steps=1)


def test_memory_of_the_host_that_really_runs_out(place):
    """An address space with room for the program, not for the logits of 2^20 positions."""
    code = (
        "import resource, sys, torch\n"
        "from tooln1.faults import explain_oom\n"
        "from tooln1.errors import exit_on_user_error\n"
        "def main():\n"
        "    with explain_oom(dict.fromkeys(('rollout_rows', 'rollout_cache_tokens', 'max_reply_tokens'), 7),\n"
        "                         print) as turn_to:\n"
        "        turn_to('step 3, rollout')\n"
        "        used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))\n"
        "        torch.zeros(2**20, 2**12)\n"
        "exit_on_user_error(main)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "out of memory (step 3, rollout)" in result.stderr and "rollout_rows (7)" in result.stderr


def test_steps_that_are_not_finite_are_skipped_kept_and_end_the_run(place, monkeypatch):
    start = weights(run(place, "finite", steps=1, learning_rate=1e-12))
    monkeypatch.setitem(train.REWARDS, "binary", lambda text, answer: float("nan") if "a" in text.lower() else 1.0)
    how = dict(steps=9, max_bad_steps=3, eval_every=0, save_every=1)
    with pytest.raises(UserError, match=r"3 optimizer steps in a row .* stops at step 2. .*skipped. If the weights"):
        run(place, "nan", **how)
    rows = read_jsonl(place / "nan/metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [2] and rows[0]["loss"] is None
    files = sorted(path.name for path in (place / "nan/skipped").iterdir())
    assert files == ["step-000001-1.jsonl", "step-000001-2.jsonl", "step-000002-3.jsonl"]
    replies = read_jsonl(place / "nan/skipped" / files[-1])
    assert len(replies) == 6 and {row["advantage"] for row in replies} >= {None}
    for row in replies:
        assert len(row["reply_tokens"]) == len(row["old_logprobs"]) == len(row["ref_logprobs"]) > 0
        assert row["prompt"].startswith("<|im_start|>system") and row["reply"]
    with pytest.raises(UserError, match="stops at step 2"):  # the count goes on where it was
        run(place, "nan", resume="auto", **(how | dict(max_bad_steps=4)))
    files = sorted(path.name for path in (place / "nan/skipped").iterdir())
    assert files == ["step-000001-1.jsonl", "step-000001-2.jsonl", "step-000002-3.jsonl", "step-000002-4.jsonl"]
    with pytest.raises(UserError, match="stops at step 2"):
        run(place, "nan", resume="auto", **(how | dict(max_bad_steps=3)))
    assert len(list((place / "nan/skipped").iterdir())) == 3  # the newest
    monkeypatch.undo()
    run(place, "nan", resume="auto", **(how | dict(steps=1)))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(place / "nan"), start, strict=True))


def test_a_loss_that_is_not_finite_is_skipped_even_if_its_gradient_is(place, monkeypatch):
    from tooln1.update import PolicyLoss

    original = PolicyLoss.__call__

    def infinite(*args):
        loss, sums = original(*args)
        return loss + torch.inf, sums

    monkeypatch.setattr(PolicyLoss, "__call__", infinite)
    with pytest.raises(UserError, match="loss or gradient that is not finite"):
        run(place, "inf", steps=9, max_bad_steps=2)
