"""Sees the processes of a program that tells nobody about itself.

A thread looks for them in /proc every few milliseconds, and holds a pidfd of each.  A life is noted as
shorter than it was, by as little as that: from the last moment at which it can have begun to the last at
which it was seen to run.  So two lives that overlap here have overlapped.
"""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from registry.clock import SYSTEM_CLOCK
from tests.cluster.history import NOBODY, Life, Token
from tests.support.hosts import eventually

_EVERY_MS = 5
_TICK = 1 / os.sysconf("SC_CLK_TCK")
_STARTED = 22 - 3
"""Where proc(5) has the start time, counted from behind the name of the program."""


class Watcher:
    """Watches who executes ``program`` with ``argument`` among its arguments, between start() and stop()."""

    def __init__(self, program: Path, argument: str) -> None:
        self._program, self._argument = str(program.resolve()), argument.encode()
        self._lock = threading.Lock()
        self._lives: list[Life] = []
        self._running: dict[int, int] = {}
        """pidfd -> index of the life."""
        self._poll = select.poll()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        for pidfd in self._running:
            os.close(pidfd)

    @property
    def lives(self) -> tuple[Life, ...]:
        """All lives, in the order in which they were seen."""
        with self._lock:
            return tuple(self._lives)

    @property
    def alive(self) -> tuple[Life, ...]:
        """Those that have not ended."""
        with self._lock:
            return tuple(self._lives[index] for index in self._running.values())

    async def runs(self, *, above: Token = NOBODY, within: float = 10.0) -> Life:
        """Wait until a process with a token above that one runs."""
        found: list[Life] = []

        def is_there() -> bool:
            found[:] = [life for life in self.alive if life.token > above]
            return bool(found)

        try:
            await eventually(is_there, within, f"{self._program} runs above {above}")
        except AssertionError as late:
            raise AssertionError(f"{late}\n" + "\n".join(map(str, self.lives))) from None
        return found[0]

    # The thread.

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                self._look()
            self._poll.poll(_EVERY_MS)

    def _look(self) -> None:
        known = {self._lives[index].pid for index in self._running.values()}
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) not in known and self._is_one(int(entry)):
                # It may end at any moment of this.
                with suppress(FileNotFoundError, ProcessLookupError):
                    self._met(int(entry))
        at = SYSTEM_CLOCK.now()
        ended = {pidfd for pidfd, _ in self._poll.poll(0)}
        for pidfd, index in tuple(self._running.items()):
            if pidfd in ended:
                self._poll.unregister(pidfd)
                del self._running[pidfd]
                os.close(pidfd)
            else:
                self._lives[index] = replace(self._lives[index], ended=at)

    def _is_one(self, pid: int) -> bool:
        with suppress(OSError):
            return os.readlink(f"/proc/{pid}/exe") == self._program and self._argument in Path(
                f"/proc/{pid}/cmdline"
            ).read_bytes().split(b"\0")
        return False

    def _met(self, pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            said = dict(variable.partition("=")[::2] for variable in variables)
            ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_STARTED])
            life = Life(
                said["PGHERD_NAME"],
                Token(int(said["PGHERD_EPOCH"]), int(said["PGHERD_START"])),
                said["PGHERD_NODE"].rpartition("-")[0],
                pid,
                min((ticks + 1) * _TICK, SYSTEM_CLOCK.now()),
            )
        except BaseException:
            os.close(pidfd)
            raise
        self._running[pidfd] = len(self._lives)
        self._lives.append(life)
        self._poll.register(pidfd, select.POLLIN)
