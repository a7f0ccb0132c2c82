"""Agents without workers: the real directory, router, peers and gRPC server over an in-memory registry.

Their children are functions, so a test says what a daemon does with each request; ``crash`` is what kill -9
of a host looks like to the others (connections reset), ``leave`` what the registry says afterwards.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from registry import wire
from registry.clock import SYSTEM_CLOCK, Boottime
from registry.config import ListenConfig
from registry.directory import Directory
from registry.errors import HerdError
from registry.events import EventLog
from registry.link import Reply
from registry.names import Names
from registry.nodes import NodeRecord, NodeState, encode_node, new_node
from registry.ownership import (
    NODES,
    OWNERS,
    SPECS,
    STATUSES,
    Method,
    Status,
    WorkerState,
    cluster_prefix,
    encode_owner,
    encode_status,
    epoch_of,
)
from registry.peers import Peers
from registry.router import Router
from registry.security import channel
from registry.server import Server, Service
from registry.specs import Desired, SpecRecord, encode_spec
from registry.v1 import messages_pb2 as pb
from tests.support.memory_store import MemoryStore

PREFIX = cluster_prefix("test")

Handler = Callable[[pb.Frame, Boottime, Reply], None]


def echo(frame: pb.Frame, deadline: Boottime, reply: Reply) -> None:
    """A daemon that returns what it was sent."""
    answer = pb.Frame(kind=pb.KIND_REPLY, epoch=1, start=1)
    wire.put_body(answer, wire.body_of(frame))
    reply(answer)


def refuses(error: HerdError) -> Handler:
    """Return a daemon that answers everything with ``error``."""
    return lambda frame, deadline, reply: reply(wire.error_reply(frame, error))


@dataclass
class Keeps:
    """A daemon that keeps requests until it is told to answer them."""

    requests: list[tuple[pb.Frame, Boottime, Reply]] = field(default_factory=list)

    def __call__(self, frame: pb.Frame, deadline: Boottime, reply: Reply) -> None:
        self.requests.append((frame, deadline, reply))

    @property
    def bodies(self) -> list[wire.Body]:
        """The payloads that arrived, in order."""
        return [wire.body_of(frame) for frame, _, _ in self.requests]

    def answer(self) -> None:
        """Echo everything kept."""
        requests, self.requests = self.requests, []
        for frame, deadline, reply in requests:
            echo(frame, deadline, reply)


class Children:
    """Implements :class:`registry.router.Local`; a handler for each name."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}

    def owns(self, name: str) -> bool:
        return name in self.handlers

    def deliver(self, frame: pb.Frame, deadline: Boottime, reply: Reply) -> None:
        self.handlers[frame.to](frame, deadline, reply)


class Agent:
    """One agent of a :class:`Herd`, on a port of loopback."""

    def __init__(self, herd: Herd, host: str) -> None:
        self.host = host
        self.node = new_node(host)
        self.children = Children()
        self.events = EventLog()
        self.directory = Directory(herd.store, PREFIX, SYSTEM_CLOCK, self.events)
        self.peers = Peers(
            self.directory, SYSTEM_CLOCK, self.events, host=host, node=lambda: self.node, connect=channel
        )
        self.router = Router(self.directory, self.peers, self.children, SYSTEM_CLOCK)
        self.ready = True
        self.port = 0
        self._herd = herd
        self._tasks: list[asyncio.Task[None]] = []
        self._server = self._new_server()

    @property
    def address(self) -> str:
        """host:port of its gRPC service."""
        return f"127.0.0.1:{self.port}"

    def _new_server(self, services: Sequence[Service] = ()) -> Server:
        return Server(
            services=services,
            router=self.router,
            peers=self.peers,
            directory=self.directory,
            clock=SYSTEM_CLOCK,
            node=lambda: self.node,
            ready=lambda: self.ready and self.directory.in_sync,
            read_owner=Names(self._herd.store, PREFIX).read_owner,
        )

    async def start(self) -> None:
        """Listen, join the registry, and wait until this agent knows of it."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self.directory.run()), loop.create_task(self.peers.run())]
        await self.listen()
        record = NodeRecord(
            node=self.node,
            host=self.host,
            address=self.address,
            version="test",
            protocol=1,
            containment="full",
            state=NodeState.READY,
        )
        self._herd.store.put(PREFIX + NODES + self.node, encode_node(record))
        await self.directory.synced()

    async def listen(self, path: Path | None = None) -> None:
        """Start the server, at the same port as before if there was one, and at ``path``."""
        self.port = await self._server.start(path, ListenConfig(grpc=f"127.0.0.1:{self.port}"))

    async def serve_at(self, listen: ListenConfig) -> None:
        """Start the server somewhere else."""
        self.port = await self._server.start(None, listen)

    async def deafen(self, services: Sequence[Service] = ()) -> None:
        """Close the port and every connection, as a crash does; the next server has ``services``."""
        await self._server.stop(0)
        self._server = self._new_server(services)

    async def stop(self) -> None:
        """End it; the registry is not told."""
        self.router.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.stop(0)


class Herd:
    """Agents that share one in-memory registry, which a test writes as it likes."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.agents: list[Agent] = []

    async def agent(self, host: str) -> Agent:
        """Start one more agent."""
        agent = Agent(self, host)
        self.agents.append(agent)
        await agent.start()
        await self.settled()
        return agent

    def declare(self, name: str, desired: Desired = Desired.RUNNING) -> None:
        """Write a spec."""
        spec = SpecRecord(name=name, toml="", desired=desired, who="test", at=0.0, digest="")
        self.store.put(PREFIX + SPECS + name, encode_spec(spec))

    def undeclare(self, name: str) -> None:
        """Delete a spec."""
        self.store.delete(PREFIX + SPECS + name)

    def own(self, name: str, agent: Agent, state: WorkerState | None = WorkerState.READY) -> int:
        """Make an agent the owner of a name; return the epoch."""
        owner = encode_owner(node=agent.node, host=agent.host, claim=uuid.uuid4().hex, incarnation=0)
        epoch = epoch_of(0, self.store.put(PREFIX + OWNERS + name, owner))
        if state is not None:
            status = Status(
                name=name,
                epoch=epoch,
                start=1,
                state=state,
                pid=1,
                since=0.0,
                methods=(Method("echo", "call"),),
            )
            self.store.put(PREFIX + STATUSES + name, encode_status(status))
        return epoch

    def release(self, name: str) -> None:
        """Let nobody own a name."""
        self.store.delete(PREFIX + OWNERS + name)

    def leave(self, agent: Agent) -> None:
        """Delete a node's key, as the end of its lease does."""
        self.store.delete(PREFIX + NODES + agent.node)

    async def serve(self, name: str, agent: Agent, handler: Handler = echo) -> int:
        """Declare a name, let an agent own and serve it, and wait until every agent knows."""
        agent.children.handlers[name] = handler
        self.declare(name)
        epoch = self.own(name, agent)
        await self.settled()
        return epoch

    async def settled(self) -> None:
        """Wait until every agent has seen the present revision of the registry."""
        await until(lambda: all(agent.directory.revision >= self.store.revision for agent in self.agents))

    async def close(self) -> None:
        """Stop every agent."""
        for agent in self.agents:
            await agent.stop()
        await self.store.close()


@asynccontextmanager
async def a_herd() -> AsyncIterator[Herd]:
    """A herd without agents yet."""
    herd = Herd()
    try:
        yield herd
    finally:
        await herd.close()


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Return once ``condition`` holds; looks after every turn of the loop."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the condition is in code that must not know of tests
            await asyncio.sleep(0)
