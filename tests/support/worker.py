"""Workers as real processes, and the agent's end of their socket, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from node_agent.attachment import Attachment, WorkerSocket
from registry.clock import SYSTEM_CLOCK
from registry.events import EventLog
from registry.v1 import messages_pb2, names_pb2

ROOT = Path(__file__).resolve().parents[2]
WITHIN = 15.0
"""Seconds a test waits for anything before it fails."""

DAEMONS = "tests.support.daemons"


class Nursery:
    """Starts workers by forking them from a process with the runtime in memory."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forkserver"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._living: set[int] = set()

    def start(self, stderr: Path, **start: Any) -> WorkerProcess:
        """Fork a worker; the arguments are the fields of :class:`node_agent.warden.protocol.Start`."""
        pid = self._ask({"start": start, "stderr": str(stderr)})["pid"]
        self._living.add(pid)
        return WorkerProcess(self, pid, start["worker"], stderr)

    def reap(self, pid: int) -> int:
        """Return the exit code of a worker that has ended."""
        self._living.discard(pid)
        return int(self._ask({"wait": pid})["code"])

    def close(self) -> None:
        """Kill the workers that are left, and end."""
        for pid in tuple(self._living):
            os.kill(pid, signal.SIGKILL)
            self.reap(pid)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(10)
        self._server.stdout.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer


class WorkerProcess:
    """One worker."""

    def __init__(self, nursery: Nursery, pid: int, worker: str, stderr: Path) -> None:
        self.pid = pid
        self.worker = worker
        self._nursery = nursery
        self._stderr = stderr
        self._code: int | None = None

    def kill(self, signum: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal."""
        os.kill(self.pid, signum)

    async def exit_code(self) -> int:
        """Wait for its end; negative: the signal that ended it."""
        if self._code is None:
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            descriptor = os.pidfd_open(self.pid)
            try:
                asyncio.get_running_loop().add_reader(descriptor, _set, ended)
                await asyncio.wait_for(ended, WITHIN)
            finally:
                asyncio.get_running_loop().remove_reader(descriptor)
                os.close(descriptor)
            self._code = self._nursery.reap(self.pid)
        return self._code

    @property
    def output(self) -> str:
        """What it has written to stdout and stderr."""
        return self._stderr.read_text() if self._stderr.exists() else ""


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Gate:
    """Something a daemon waits for (``wait_at``), in another process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def let_one_pass(self) -> None:
        """Release one waiter, now or when it comes."""
        os.write(self._descriptor, b".")

    def close(self) -> None:
        """Free the descriptor."""
        os.close(self._descriptor)


@dataclass
class Watched:
    """Everything the agent heard about one worker; implements ``AttachHandler``."""

    methods: Sequence[names_pb2.Method] = ()
    attachment: Attachment | None = None
    attached: int = 0
    ready: int = 0
    was_ready: bool = False
    crashed: list[tuple[str, str]] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    late: list[messages_pb2.Frame] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def on_attached(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.attached += 1
        attachment.epoch, attachment.start = 7, 1
        self.changed.set()

    def on_ready(self) -> None:
        self.ready += 1
        self.changed.set()

    def on_crashed(self, why: str, traceback: str) -> None:
        self.crashed.append((why, traceback))
        self.changed.set()

    def on_late_reply(self, reply: messages_pb2.Frame) -> None:
        self.late.append(reply)
        self.changed.set()

    def on_closed(self, why: str) -> None:
        self.closed.append(why)
        self.changed.set()

    async def until(self, condition: Callable[[Watched], object]) -> None:
        """Wait until something was heard that makes ``condition`` true."""
        async with asyncio.timeout(WITHIN):
            while not condition(self):
                self.changed.clear()
                await self.changed.wait()

    # Requests.

    def ask(
        self,
        method: str,
        arguments: str | bytes = "{}",
        *,
        kind: messages_pb2.Kind.ValueType = messages_pb2.KIND_CALL,
        timeout: float = WITHIN,
        epoch: int = 0,
        key: str = "",
    ) -> asyncio.Future[messages_pb2.Frame]:
        """Send a request; the future is its reply."""
        assert self.attachment is not None
        frame = messages_pb2.Frame(
            kind=kind, to="probe", method=method, epoch=epoch, idempotency_key=key, sender="uid:0"
        )
        if isinstance(arguments, bytes):
            frame.data = arguments
        else:
            frame.json = arguments
        answered: asyncio.Future[messages_pb2.Frame] = asyncio.get_running_loop().create_future()

        def reply(answer: messages_pb2.Frame) -> None:
            assert not answered.done(), "answered twice"
            answered.set_result(answer)

        self.attachment.send(frame, SYSTEM_CLOCK.now() + timeout, reply)
        return answered

    def send(self, method: str, arguments: str | bytes = "{}", **more: Any) -> None:
        """Send a request whose answer does not matter."""
        _ = self.ask(method, arguments, **more)

    def cast(self, method: str, arguments: str | bytes = "{}", **more: Any) -> Awaitable[messages_pb2.Frame]:
        """Send a cast."""
        return self.ask(method, arguments, kind=messages_pb2.KIND_CAST, **more)

    async def call(self, method: str, arguments: str | bytes = "{}", **more: Any) -> Any:
        """Return the result of a call that must succeed."""
        answer = await asyncio.wait_for(self.ask(method, arguments, **more), WITHIN)
        assert not answer.HasField("error"), answer.error
        return answer.data if answer.WhichOneof("body") == "data" else json.loads(answer.json)

    async def until_handling(self, method: str | None) -> None:
        """Wait until the handler of ``method`` runs (None: none does)."""
        async with asyncio.timeout(WITHIN):
            while (await self.ping())["handling"] != method:
                pass

    async def ping(self) -> dict[str, Any]:
        """Return what the runtime says about itself."""
        result: dict[str, Any] = await self.call("ping", kind=messages_pb2.KIND_SYSTEM)
        return result


class Desk:
    """The agent's side: a worker socket that can be closed and opened again, and the workers at it."""

    def __init__(self, nursery: Nursery, directory: Path) -> None:
        self.path = directory / "worker.sock"
        self.events = EventLog()
        self.gate = Gate(directory / "gate")
        self.watched: dict[str, Watched] = {}
        self._nursery = nursery
        self._directory = directory
        self._socket: WorkerSocket | None = None

    async def open(self) -> None:
        """Listen, as a new agent that knows the same workers."""
        self._socket = WorkerSocket(self.path, self._accept, self.events)
        await self._socket.start()

    async def close(self) -> None:
        """Stop listening and drop every connection."""
        if self._socket is not None:
            await self._socket.close()
            self._socket = None

    def _accept(self, worker: str, methods: Sequence[names_pb2.Method], ready: bool) -> str | Watched:
        watched = self.watched.get(worker)
        if watched is None:
            return "nobody started it"
        watched.methods, watched.was_ready = methods, ready
        return watched

    def start(self, behaviour: str, **more: Any) -> tuple[WorkerProcess, Watched]:
        """Start a worker that this side expects."""
        worker = more.pop("worker", uuid.uuid4().hex)
        watched = self.watched[worker] = Watched()
        start = {
            "worker": worker,
            "child": "probe",
            "name": "probe",
            "epoch": 7,
            "behaviour": behaviour if ":" in behaviour else f"{DAEMONS}:{behaviour}",
            "socket": str(self.path),
            "node": "alpha-1",
            "host": "alpha",
        } | more
        if start["behaviour"] == f"{DAEMONS}:Probe":
            start["args"] = {"gate": str(self.gate.path)} | start.get("args", {})
        return self._nursery.start(self._directory / f"{worker}.log", **start), watched

    async def ready(self, behaviour: str, **more: Any) -> tuple[WorkerProcess, Watched]:
        """Start a worker and wait until it serves."""
        process, watched = self.start(behaviour, **more)
        await watched.until(lambda w: w.ready or w.crashed)
        assert not watched.crashed, watched.crashed
        return process, watched


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Forks workers."""
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest_asyncio.fixture
async def desk(nursery: Nursery, tmp_path: Path) -> AsyncIterator[Desk]:
    """The agent's side of the worker socket, open."""
    desk = Desk(nursery, tmp_path)
    await desk.open()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(desk.gate.close)
        stack.push_async_callback(desk.close)
        yield desk
