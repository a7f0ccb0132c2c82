"""A real launcher, warden and agent process, with this test as the agent's brain.

The agent process only hands its control descriptor to the test and waits; the test speaks to the warden
through :class:`~node_agent.warden_link.WardenLink` as the agent would, and is replaced when the process is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from node_agent.warden import kernel, protocol
from node_agent.warden.marker import marked
from node_agent.warden_link import WardenLink

WITHIN = 15.0
_ROOT = Path(__file__).resolve().parents[2]
_PROCESS = _ROOT / "tests/support/warden_process.py"


async def until(condition: Callable[[], bool], within: float = WITHIN) -> None:
    """Wait for something another process does; fails when it has not happened in time."""
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110 - what the kernel shows in /proc announces nothing
            await asyncio.sleep(0.002)


async def death(pid: int, within: float = WITHIN) -> float:
    """Wait until ``pid`` has ended, and return that moment of CLOCK_BOOTTIME."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return kernel.boottime()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(within):
            await ended.wait()
        return kernel.boottime()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def running(token: str) -> list[int]:
    """Return the processes with ``token`` as an argument, so not the shells on the way; zombies excluded."""
    found = []
    for pid in kernel.processes():
        with contextlib.suppress(OSError):
            if token.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def token() -> str:
    """Return an argument for ``sleep`` that no other process has: a long time."""
    return f"7{uuid.uuid4().int % 10**12:012}"


def start(child: str, *command: str, **more: object) -> protocol.Start:
    """Return a Start of ``command`` with a fresh worker uuid."""
    return protocol.Start(worker=uuid.uuid4().hex, child=child, command=command, **more)  # type: ignore[arg-type]


def shell(child: str, script: str, **more: object) -> protocol.Start:
    """Return a Start of a shell script."""
    return start(child, "/bin/sh", "-c", script, **more)


@dataclass(slots=True, eq=False)
class Agent:
    """One agent process: its pid, and what it would say and hear."""

    pid: int
    link: WardenLink
    lost: asyncio.Event
    news: AsyncIterator[protocol.Exited | protocol.Gone]

    async def next(self, within: float = WITHIN) -> protocol.Exited | protocol.Gone:
        """Return what happens next to a worker."""
        async with asyncio.timeout(within):
            return await anext(self.news)

    async def started(self, start: protocol.Start) -> protocol.Started:
        """Start a process, which must succeed."""
        answer = await self.answer(start)
        assert isinstance(answer, protocol.Started), answer
        return answer

    async def answer(self, start: protocol.Start) -> protocol.Started | protocol.StartFailed:
        async with asyncio.timeout(WITHIN):
            return await self.link.start(start)

    async def output(self, child: str, wanted: str) -> str:
        """Wait until ``child`` has written ``wanted``; return all it wrote."""
        async with asyncio.timeout(WITHIN):
            while wanted.encode() not in (tail := await self.link.output(child, 1 << 20)).data:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        return tail.data.decode()


class Herd:
    """A launcher process and what is below it."""

    def __init__(self, directory: Path, *, partial: bool = False, wrapper: Sequence[str] = ()) -> None:
        self.config = str(directory / f"{uuid.uuid4().hex}.toml")
        self._partial = partial
        self._wrapper = tuple(wrapper)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(self.config + ".sock")
        self._socket.listen()
        self._socket.setblocking(False)
        self.process: subprocess.Popen[bytes] | None = None
        self._links: list[WardenLink] = []

    async def __aenter__(self) -> Self:
        self.launch()
        return self

    async def __aexit__(self, *_: object) -> None:
        for link in self._links:
            with contextlib.suppress(OSError, ValueError):
                link.close()
        self._socket.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        for pid in self.processes():
            kernel.kill(pid)
        await until(lambda: not self.processes())

    def launch(self) -> subprocess.Popen[bytes]:
        """Start a launcher, beside or after an earlier one."""
        mode = ["--partial"] if self._partial else []
        argv = [*self._wrapper, sys.executable, "-P", str(_PROCESS), "launcher", *mode, "-c", self.config]
        process = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(_ROOT)})
        if self.process is None or self.process.poll() is not None:
            self.process = process
        return process

    @property
    def pid(self) -> int:
        """The launcher's pid."""
        assert self.process is not None
        return self.process.pid

    def processes(self) -> list[int]:
        """Return everything alive that carries this herd's marker: wardens, agents, workers."""
        return [pid for pid, _ in marked(self.config)]

    def send(self, signum: int) -> None:
        """Signal the launcher."""
        os.kill(self.pid, signum)

    async def exit_code(self, within: float = WITHIN) -> int:
        """Wait for the launcher to end."""
        assert self.process is not None
        process = self.process
        await until(lambda: process.poll() is not None, within)
        return process.returncode

    async def agent(self, *, hang_limit: float = 60.0, stop_within: float = 30.0) -> Agent:
        """Wait for the next agent process and speak for it."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(WITHIN):
            connection, _ = await loop.sock_accept(self._socket)
            connection.setblocking(False)
            readable = asyncio.Event()
            loop.add_reader(connection.fileno(), readable.set)
            await readable.wait()
            loop.remove_reader(connection.fileno())
        with connection:
            pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            _, (control,), _, _ = socket.recv_fds(connection, 1, 1)
        lost = asyncio.Event()
        link = await WardenLink.open(control, hang_limit=hang_limit, stop_within=stop_within, lost=lost.set)
        self._links.append(link)
        return Agent(pid, link, lost, link.happenings())


@pytest.fixture(params=[pytest.param("full", marks=pytest.mark.root), "partial"])
async def herd(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Herd]:
    """A running launcher, once in a PID namespace and once without."""
    async with Herd(tmp_path, partial=request.param == "partial") as made:
        yield made


@pytest.fixture
async def full(tmp_path: Path) -> AsyncIterator[Herd]:
    """A running launcher with a PID namespace below it."""
    async with Herd(tmp_path) as made:
        yield made


@pytest.fixture
async def partial(tmp_path: Path) -> AsyncIterator[Herd]:
    """A running launcher without a PID namespace."""
    async with Herd(tmp_path, partial=True) as made:
        yield made
