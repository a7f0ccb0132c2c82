"""Sees every worker of a cluster test from outside: who ran when, and what it did.

A worker connects to the observer's socket before it does anything, says who it is, and goes on when it is
told to.  At that moment every earlier process of the name is looked at through its pidfd: two that run at
once cannot be missed, and a death that is noticed late cannot look like an overlap.  What a worker does, it
says on the same socket, so it is known even when the worker is killed in the next instruction.
"""

from __future__ import annotations

import json
import os
import select
import selectors
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from registry.clock import SYSTEM_CLOCK
from tests.cluster.history import Effect, Life, Token

GO = b"go"


class _Worker:
    def __init__(self, connection: socket.socket, pid: int, pidfd: int) -> None:
        self.connection, self.pid, self.pidfd = connection, pid, pidfd
        self.life: int | None = None

    @property
    def dead(self) -> bool:
        return bool(select.select([self.pidfd], [], [], 0)[0])


class Observer:
    """Listens at ``path`` in a thread of its own, from :meth:`start` to :meth:`stop`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._lives: list[Life] = []
        self._effects: list[Effect] = []
        self._workers: set[_Worker] = set()
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)

    def start(self) -> None:
        self._listener.bind(str(self.path))
        self.path.chmod(0o777)
        self._listener.listen(256)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake[0], selectors.EVENT_READ, lambda: None)
        self._thread.start()

    def stop(self) -> None:
        os.write(self._wake[1], b"x")
        self._thread.join()
        for worker in self._workers:
            worker.connection.close()
            os.close(worker.pidfd)
        self._listener.close()
        self._selector.close()
        for end in self._wake:
            os.close(end)

    # What is asked of it.

    @property
    def lives(self) -> tuple[Life, ...]:
        """All lives, in the order in which they began."""
        with self._lock:
            return tuple(self._lives)

    @property
    def effects(self) -> tuple[Effect, ...]:
        with self._lock:
            return tuple(self._effects)

    def alive(self, name: str = "") -> tuple[Life, ...]:
        """The processes of a name (of all names) that live now, as far as it is known."""
        return tuple(life for life in self.lives if life.ended is None and name in ("", life.name))

    def latest(self, name: str) -> Life | None:
        """The process of a name that began last."""
        return next((life for life in reversed(self.lives) if life.name == name), None)

    def forget(self) -> None:
        """Forget the dead, and all effects: the next test begins."""
        with self._lock:
            kept = {worker.life: worker for worker in self._workers if worker.life is not None}
            lives = [(index, life) for index, life in enumerate(self._lives) if index in kept]
            for at, (index, _) in enumerate(lives):
                kept[index].life = at
            self._lives = [life for _, life in lives]
            self._effects = []

    # The thread.

    def _run(self) -> None:
        while True:
            ready = self._selector.select()
            with self._lock:
                for key, _ in ready:
                    key.data()
            if any(key.fd == self._wake[0] for key, _ in ready):
                return

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                # It was never told to go on, so it never did anything.
                connection.close()
                return
            worker = _Worker(connection, pid, pidfd)
            self._workers.add(worker)
            self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear(worker))
            self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._ended(worker))

    def _hear(self, worker: _Worker) -> None:
        # Among the ready ones may be one whose end was noticed just before.
        while worker in self._workers:
            try:
                packet = worker.connection.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                with suppress(KeyError):
                    self._selector.unregister(worker.connection)
                return
            self._take(worker, json.loads(packet))

    def _take(self, worker: _Worker, said: dict[str, object]) -> None:
        token = Token(int(str(said["epoch"])), int(str(said["start"])))
        name = str(said["name"])
        if "op" in said:
            self._effects.append(Effect(str(said["op"]), name, token, float(str(said["at"]))))
            return
        for other in tuple(self._workers):
            if other is not worker and other.dead:
                self._ended(other)
        worker.life = len(self._lives)
        self._lives.append(Life(name, token, str(said["host"]), worker.pid, SYSTEM_CLOCK.now()))
        with suppress(OSError):
            worker.connection.send(GO)

    def _ended(self, worker: _Worker) -> None:
        if worker not in self._workers:
            return
        self._hear(worker)
        self._workers.discard(worker)
        if worker.life is not None:
            self._lives[worker.life] = replace(self._lives[worker.life], ended=SYSTEM_CLOCK.now())
        with suppress(KeyError):
            self._selector.unregister(worker.connection)
        self._selector.unregister(worker.pidfd)
        worker.connection.close()
        os.close(worker.pidfd)
