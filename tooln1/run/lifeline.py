"""A dead process ends the whole job at once, and the others say which one it was.

Collectives notice a lost peer late and never say whose fault it was. So each process keeps a socket open to rank 0.
When a process dies, however it dies, the kernel closes its end: rank 0 hears of it, tells the others, and all end with
one sentence. A process that merely hangs keeps its socket: that is left to the timeout of the collectives, whose error
gets a note on who was doing what. The lines that travel are JSON objects.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

PARENT_SECONDS = 1.0  # between two looks whether torchrun is still there
KILLED = "its process died without a word (killed, or out of memory?)"
PATIENCE = 2.0  # seconds that processes which fail together wait for each other's words
PLACE = f"process {os.getpid()} on {socket.gethostname()}"
WAY_ON = "Go on from the last checkpoint with --resume auto."


class Lifeline:
    """This process's end. Made by `connect`; `note` says what it is doing, `fail` and `leave` how it ends."""

    def __init__(self, rank: int):
        self.rank = rank
        self.doing: dict[int, tuple[str, float]] = {}  # rank -> (what it last said it was doing, when); all, on rank 0
        self.ending = threading.Event()  # this process is about to end by itself
        self.answered = threading.Event()  # rank 0 has answered `fail`
        self.said_there = False  # ... that it had the same to say
        self.own_failure = ""
        self.ended: dict[int, str] = {}  # on rank 0: the others that said they end, and what they failed of
        self.sockets: dict[int, socket.socket] = {}  # rank 0: to each other rank; there: to rank 0
        self.places = {rank: PLACE}  # rank -> process and machine; all, on rank 0
        self.stop_asked = False  # whether a process of the job was asked to stop

    # ------------------------------------------------------------------------------------------ the main thread

    def note(self, doing: str) -> None:
        """Say what this process turns to now."""
        self.doing[self.rank] = doing, time.monotonic()
        if self.rank:
            self._send(0, {"doing": doing})

    def ask_to_stop(self) -> None:
        """Let all processes know that this one was asked to stop."""
        self.stop_asked = True
        for rank in list(self.sockets):  # rank 0 passes it on
            self._send(rank, {"stop": True})

    def leave(self) -> None:
        """Say that this process ends in good order; rank 0 goes last, so that nobody misses it."""
        if self.rank:
            self.ending.set()
            self._send(0, {"left": True})
            return
        self._wait_for_all()
        self.ending.set()

    def fail(self, sentence: str) -> bool:
        """Say why this process ends; returns whether rank 0 says the same, so that it need not be printed again.

        The words have arrived when this returns; processes that fail alike at the same time do not count as lost.
        """
        self.own_failure = sentence
        self.ending.set()
        if self.rank:
            self._send(0, {"failed": sentence})
            self.answered.wait(2 * PATIENCE)
            return self.said_there
        self._wait_for_all()
        for rank in list(self.sockets):
            if rank in self.ended:
                self._send(rank, {"same": self.ended[rank] == sentence})
            else:
                self._send(rank, {"gone": 0, "why": ""})  # this one has said why itself
        return False

    def _wait_for_all(self) -> None:
        """On rank 0: until all others have said that they end, for a while."""
        until = time.monotonic() + PATIENCE
        while len(self.ended) < len(self.sockets) and time.monotonic() < until:
            time.sleep(0.02)

    def wait_for_news(self) -> None:
        """After an error that a lost process may have caused: if one is lost, this process ends in here."""
        time.sleep(PATIENCE)

    def whereabouts(self) -> str:
        """What every process (on rank 0), or this one, last said it was doing, in words."""
        now = time.monotonic()
        return "; ".join(
            f"rank {rank} ({self.places.get(rank, '')}): {what}, for {now - when:.0f} s"
            for rank, (what, when) in sorted(self.doing.items())
        )

    # ---------------------------------------------------------------------------------------- the thread beside it

    def _serve(self, server: socket.socket, token: str) -> None:
        """On rank 0: take in the others, listen to them, tell them of each other."""
        selector, rest, rank_of = selectors.DefaultSelector(), {}, {}
        selector.register(server, selectors.EVENT_READ)
        while True:
            for peer in [key.fileobj for key, _ in selector.select()]:
                if peer is server:
                    with suppress(OSError):  # it hung up again, or there is no room for more
                        peer, _ = server.accept()
                        _keep_alive(peer)
                        selector.register(peer, selectors.EVENT_READ)
                        rest[peer] = b""
                    continue
                data = _receive(peer)
                *lines, rest[peer] = (rest[peer] + data).split(b"\n")
                for message in map(_read, lines):
                    if peer in rank_of:
                        self._hear(rank_of[peer], message)
                    elif message.get("token") == token and isinstance(message.get("rank"), int):
                        rank_of[peer] = message["rank"]
                        self.places[message["rank"]] = str(message.get("place"))
                        self.sockets[message["rank"]] = peer
                if not data or (peer not in rank_of and len(rest[peer]) > 1000):
                    selector.unregister(peer)
                    peer.close()
                    if peer in rank_of and rank_of[peer] not in self.ended:
                        self._lost(rank_of[peer], KILLED + self._last(rank_of[peer]))

    def _last(self, rank: int) -> str:
        """Where `rank` was last seen, in words."""
        what, when = self.doing.get(rank, ("", 0.0))
        return f"; it was last seen in {what}, {time.monotonic() - when:.0f} s ago" if what else ""

    def _hear(self, rank: int, message: dict) -> None:
        if "doing" in message:
            self.doing[rank] = str(message["doing"]), time.monotonic()
        elif "stop" in message:
            self.ask_to_stop()
        elif "left" in message:
            self.ended[rank] = ""
        elif "failed" in message:
            self.ended[rank] = str(message["failed"])
            threading.Thread(target=self._answer, args=(rank, self.ended[rank]), daemon=True).start()

    def _answer(self, rank: int, failure: str) -> None:
        """Give rank 0 a moment to fail of the same; then end the job for what `rank` says."""
        until = time.monotonic() + PATIENCE
        while not self.own_failure and time.monotonic() < until:
            time.sleep(0.02)
        self._send(rank, {"same": self.own_failure == failure})
        if not self.own_failure:
            time.sleep(0.2)  # let it print
            self._lost(rank, failure)

    def _listen(self) -> None:
        """On the other ranks: hear from rank 0 who is gone, or that it is gone itself."""
        rest = b""
        while True:
            data = _receive(self.sockets[0])
            *lines, rest = (rest + data).split(b"\n")
            for message in map(_read, lines):
                if "same" in message:
                    self.said_there = message["same"]
                    self.answered.set()
                elif "stop" in message:
                    self.stop_asked = True
                elif "gone" in message:
                    self._end(message["gone"], message["why"])
            if not data:
                self.answered.set()
                return self._end(0, KILLED)

    def _lost(self, rank: int, why: str) -> None:
        for other in list(self.sockets):
            if other != rank:
                self._send(other, {"gone": rank, "why": why})
        self._end(rank, why)

    def _end(self, rank: int, why: str) -> None:
        """End this process because of another, unless it is ending by itself."""
        if not self.ending.is_set():
            if why:
                doing = self.doing[self.rank][0]
                text = f"rank {self.rank} ends ({doing}) because rank {rank} is gone: {why.rstrip('.')}. {WAY_ON}\n"
                os.write(2, text.encode(errors="replace"))
            os._exit(1)  # the main thread waits for a process that will not come

    def _send(self, rank: int, message: dict) -> None:
        with suppress(OSError, KeyError):  # it is gone: the thread that listens to it finds out
            self.sockets[rank].sendall(json.dumps(message).encode() + b"\n")


def end_with_torchrun() -> None:
    """End this process when torchrun, which started it, is gone: it would train on, in nobody's hands."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os.write(2, f"torchrun is gone, and so this process ends. {WAY_ON}\n".encode())
        os._exit(1)

    threading.Thread(target=watch, name="torchrun", daemon=True).start()


def connect(rank: int, share: Callable[[Any], Any]) -> Lifeline | None:
    """Join the processes of this job; None where rank 0 cannot be reached (a firewall): the job then goes on without.

    `share`: hands rank 0's value to all ranks (a collective).
    """
    lifeline = Lifeline(rank)
    host = os.environ.get("MASTER_ADDR", "localhost")
    server, told = None, None
    if rank == 0:
        server = _server(host)
        told = {"port": server.getsockname()[1], "token": secrets.token_hex(16)}
    told = share(told)
    if rank == 0:
        work, arguments = lifeline._serve, (server, told["token"])
    else:
        try:
            lifeline.sockets[0] = socket.create_connection((host, told["port"]), timeout=10)
        except OSError as error:
            print(f"rank {rank}: no lifeline to rank 0 ({error}); a lost process may be noticed late.", file=sys.stderr)
            return None
        lifeline.sockets[0].settimeout(None)
        _keep_alive(lifeline.sockets[0])
        lifeline._send(0, {"token": told["token"], "rank": rank, "place": PLACE})
        work, arguments = lifeline._listen, ()
    lifeline.note("starting")
    threading.Thread(target=work, args=arguments, name="lifeline", daemon=True).start()
    return lifeline


def _server(host: str) -> socket.socket:
    """A listening socket: at the address of `host` where the whole job is on one machine, else at all addresses."""
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _keep_alive(peer: socket.socket) -> None:
    """Notice within half a minute when the machine at the other end is gone, whether something is under way or not."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _receive(peer: socket.socket) -> bytes:
    """What has come, or nothing where the other end is gone."""
    try:
        return peer.recv(65536)
    except OSError:
        return b""


def _read(line: bytes) -> dict:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}
