"""The socket between the processes of a job: who may speak on it, and what is made of it. Real jobs: test_faults."""

import json
import os
import signal
import socket
import time

import pytest
import torch

from tooln1.distributed import World
from tooln1.run import lifeline as module
from tooln1.run.lifeline import connect
from tooln1.run.signals import StopRequest

TOKEN = "a" * 32


@pytest.fixture
def hub(monkeypatch):
    """Rank 0's end, its port, and what it would have ended with."""
    told, ends = {}, []
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(module.secrets, "token_hex", lambda size: TOKEN)
    monkeypatch.setattr(module.os, "_exit", lambda code: ends.append(code))
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    lifeline = connect(0, lambda value: told.update(value) or value)
    yield lifeline, told["port"], ends
    lifeline.leave()


class Peer:
    """Another process's end, by hand."""

    def __init__(self, port, rank=None, token=TOKEN):
        self.socket = socket.create_connection(("localhost", port), timeout=5)
        if rank is not None:
            self.say(token=token, rank=rank)

    def say(self, **message):
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def hear(self):
        return json.loads(self.socket.makefile("rb").readline())


def soon(true):
    until = time.monotonic() + 5
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    assert true()


def test_strangers_are_not_listened_to(hub):
    lifeline, port, ends = hub
    strangers = [Peer(port), Peer(port, 1, token="guessed"), Peer(port)]
    strangers[0].socket.sendall(b"\xff\x00[[[[" * 1000)
    strangers[2].say(failed="made up")
    for stranger in strangers:
        stranger.socket.close()
    known = Peer(port, 1)
    known.say(doing="step 1, rollout")
    soon(lambda: "): step 1, rollout" in lifeline.whereabouts())
    time.sleep(0.1)
    assert not ends and lifeline.ended == {}


def test_a_closed_socket_is_a_dead_process(hub, capfd):
    lifeline, port, ends = hub
    dying, other = Peer(port, 1), Peer(port, 2)
    soon(lambda: len(lifeline.sockets) == 2)
    lifeline.note("step 5, update")
    dying.socket.close()
    assert other.hear() == {"gone": 1, "why": module.KILLED}
    soon(lambda: ends)
    assert "rank 0 ends (step 5, update) because rank 1 is gone: its process died" in capfd.readouterr().err


def test_who_says_good_bye_is_not_missed(hub):
    lifeline, port, ends = hub
    peer = Peer(port, 1)
    soon(lambda: lifeline.sockets)
    peer.say(left=True)
    peer.socket.close()
    soon(lambda: 1 in lifeline.ended)
    time.sleep(0.1)
    assert not ends


def test_the_reason_of_a_failure_is_passed_on(hub, capfd):
    lifeline, port, ends = hub
    failing, other = Peer(port, 1), Peer(port, 2)
    soon(lambda: len(lifeline.sockets) == 2)
    failing.say(failed="data.jsonl: not there.")
    assert failing.hear() == {"same": False}
    assert other.hear() == {"gone": 1, "why": "data.jsonl: not there."}
    soon(lambda: ends)
    assert "because rank 1 is gone: data.jsonl: not there. Go on" in capfd.readouterr().err


def test_a_process_asked_to_stop_lets_all_know(hub):
    lifeline, port, ends = hub
    asked, other = Peer(port, 1), Peer(port, 2)
    soon(lambda: len(lifeline.sockets) == 2)
    request = StopRequest(World(0, 3, torch.device("cpu"), lifeline))
    assert not request.asked()
    asked.say(stop=True)
    assert other.hear() == {"stop": True}
    soon(request.asked)
    assert not request.number and not ends


def test_rank_0_asked_to_stop_lets_all_know(hub):
    lifeline, port, _ = hub
    peer = Peer(port, 1)
    soon(lambda: lifeline.sockets)
    with StopRequest(World(0, 2, torch.device("cpu"), lifeline)) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert peer.hear() == {"stop": True}
        assert request.asked()


@pytest.mark.parametrize("first", ["rank 0", "rank 1"])
def test_processes_that_fail_alike_say_it_once(hub, first):
    lifeline, port, ends = hub
    alike, late = Peer(port, 1), Peer(port, 2)
    soon(lambda: len(lifeline.sockets) == 2)
    if first == "rank 1":
        alike.say(failed="the same")
        soon(lambda: 1 in lifeline.ended)
    assert lifeline.fail("the same") is False  # rank 0 speaks
    if first == "rank 1":
        assert alike.hear() == {"same": True}
    assert late.hear() == {"gone": 0, "why": ""}  # it ends, too, without a word
    assert not ends


def test_the_environment_must_be_torchruns(monkeypatch):
    from tooln1.distributed import launch
    from tooln1.io.errors import UserError

    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is not set, but others of it are; start with"), launch("cpu"):
        pass
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("MASTER_ADDR", "head")  # as job scripts have it
    with launch("cpu") as world:
        assert world.size == 1
    monkeypatch.setattr(os, "environ", dict(os.environ, RANK="x", WORLD_SIZE="2", MASTER_ADDR="a", MASTER_PORT="1"))
    with pytest.raises(UserError, match="RANK is 'x'"), launch("cpu"):
        pass
