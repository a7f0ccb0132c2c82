"""Server processes that cannot outlive whoever started them.

A :class:`Process` writes its output into a file, ends with its parent (PR_SET_PDEATHSIG, so the thread that
spawns it must live as long as it should), and is awaited and signalled through a pidfd: no pid is ever reused
under us, and any event loop will do.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import random
import signal
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from node_agent.sandbox.leash import leashed

_LOOPBACK = "127.0.0.1"


class ServerFailed(Exception):
    """A server did not start, or a program failed; the message says which, why, and where the log is."""


@dataclass(frozen=True, slots=True)
class User:
    """Whom a server runs as."""

    name: str
    uid: int
    gid: int

    @classmethod
    def named(cls, name: str) -> User:
        """Return the account ``name``; KeyError when there is none."""
        entry = pwd.getpwnam(name)
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid)

    def can_enter(self, directory: Path) -> bool:
        """Tell whether the mode of ``directory`` lets this user pass through it."""
        status = directory.stat()
        if status.st_uid == self.uid:
            return bool(status.st_mode & 0o100)
        return bool(status.st_mode & (0o010 if status.st_gid == self.gid else 0o001))

    def barrier(self, path: Path) -> Path | None:
        """Return the outermost directory on the way to ``path`` that this user cannot pass, if any."""
        path = path.resolve()
        return next(
            (d for d in (*reversed(path.parents), path) if d.is_dir() and not self.can_enter(d)), None
        )


class Process:
    """One running program; made by :meth:`spawn`."""

    def __init__(self, popen: subprocess.Popen[bytes], log: Path) -> None:
        self._popen = popen
        self.log = log

    @classmethod
    def spawn(
        cls,
        argv: Sequence[str | Path],
        *,
        log: Path,
        directory: Path,
        environment: Mapping[str, str],
        death_signal: signal.Signals = signal.SIGKILL,
        user: User | None = None,
    ) -> Process:
        """Start ``argv`` in a session of its own (the terminal's Ctrl-C is not for it), appending to ``log``.

        ``death_signal`` is what the kernel sends it when the calling thread ends.  A program that cannot be
        executed ends with exit code 127 and the reason in its log.
        """
        with log.open("ab") as output:
            popen = subprocess.Popen(
                leashed(argv, death_signal, uid=user.uid if user else None, gid=user.gid if user else None),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=directory,
                env=dict(environment),
                start_new_session=True,
            )
        return cls(popen, log)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when the process is gone."""
        self._popen.send_signal(number)

    async def wait(self) -> int:
        """Return the exit code (negative: the signal) once the process is gone."""
        if self._popen.poll() is None:
            await _readable(os.pidfd_open(self.pid))
        return self._popen.wait()

    async def stop(self, stages: Iterable[tuple[signal.Signals, float]]) -> int:
        """Send each stage's signal and wait so many seconds, then SIGKILL; return the exit code."""
        for number, patience in stages:
            self.send(number)
            with suppress(TimeoutError):
                return await asyncio.wait_for(self.wait(), patience)
        self.send(signal.SIGKILL)
        return await self.wait()

    def tail(self, lines: int = 10) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def failure(self, what: str) -> ServerFailed:
        """Return the error that says ``what`` with the end of the log and its path."""
        code = self._popen.poll()
        how = "" if code is None else f" (exit code {code})"
        return ServerFailed(f"{what}{how}; log: {self.log}\n{self.tail()}")


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def until(ready: Callable[[], bool], process: Process, what: str, seconds: float) -> None:
    """Return once ``ready()``; raise ServerFailed when ``process`` ends or ``seconds`` pass before that."""
    give_up = asyncio.get_running_loop().time() + seconds
    while not ready():
        if not process.running:
            raise process.failure(f"{what} ended before it was ready")
        if asyncio.get_running_loop().time() > give_up:
            raise process.failure(f"{what} was not ready after {seconds:g} s")
        await asyncio.sleep(0.005)


def free_ports(count: int) -> tuple[int, ...]:
    """Return unused TCP ports of the loopback interface, below the range the kernel hands out by itself.

    Nothing reserves them: use them soon.
    """
    found: dict[int, None] = {}
    for port in random.sample(range(15000, 32000), 2000):
        if len(found) == count:
            break
        with socket.socket() as probe, suppress(OSError):
            probe.bind((_LOOPBACK, port))
            found[port] = None
    if len(found) < count:
        raise ServerFailed(f"no {count} free ports between 15000 and 32000 on {_LOOPBACK}")
    return tuple(found)
