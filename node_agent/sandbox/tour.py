"""The demo: a tour through the promises that checks itself, step by step, on a sandbox.

Each step does something to the cluster, checks, and says in one line what was done, what one could have
typed, and how long it took.  The first check that fails ends the tour.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import grpc

from node_agent.sandbox.cluster import TTL, Host, Sandbox
from node_agent.sandbox.traffic import Traffic
from node_agent.sandbox.witness import Zombie
from registry import security
from registry.client import Answer, Client, Whereabouts
from registry.errors import HerdError
from registry.v1 import cluster_pb2, cluster_pb2_grpc, messages_pb2, messages_pb2_grpc

NAME = "sweeper"
PATIENCE = 40.0
"""Seconds within which anything must happen."""
PAUSE = 0.005
"""Seconds between two looks."""


class CheckFailed(Exception):
    """A promise was not kept."""


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the tour: what was done, what one could have typed, the seconds it took."""

    done: str
    typed: str
    seconds: float


class Tour:
    """The steps, in order; ``tell`` gets each line as it is finished."""

    def __init__(self, sandbox: Sandbox, tell: Callable[[Step], None]) -> None:
        self._sandbox = sandbox
        self._tell = tell
        self._traffic = Traffic(sandbox)

    async def run(self) -> None:
        """Walk through; raises CheckFailed, ServerFailed or HerdError when something is not as promised."""
        await self._start()
        async with self._traffic.flowing():
            owner = await self._one_name()
            await self._three_doors(owner)
            owner = await self._kill_worker(owner)
            async with Zombie.of(self._sandbox.conninfo, owner) as zombie:
                owner = await self._kill_host(owner)
                await self._refused(zombie)
            await self._kill_agent(owner)
            await self._balance()

    # Steps.

    async def _start(self) -> None:
        with _Watch() as watch:
            await self._sandbox.start()
        hosts, members = len(self._sandbox.hosts), len(self._sandbox.etcd.endpoints)
        version = (await self._sandbox.sql("show server_version")).split()[0]
        self._say(f"{hosts} hosts, {members} etcd members, PostgreSQL {version}", "pgherd sandbox", watch)

    async def _one_name(self) -> Whereabouts:
        with _Watch() as watch:
            await self._sandbox.apply_sweeper()
            owner = await self._ready()
        self._say(f"one name, one owner: {_owner(owner)}", f"pgherd whereis {NAME}", watch)
        return owner

    async def _three_doors(self, owner: Whereabouts) -> None:
        """The same call from the command line, from Python, and from a plain gRPC stub."""
        with _Watch() as watch:
            printed = await self._sandbox.pgherd("call", NAME, "status")
        check(str(owner.epoch) in printed, f"pgherd call answered {printed!r}, not epoch {owner.epoch}")
        self._say("called from the shell", f"pgherd call {NAME} status", watch)
        async with Client(self._sandbox.a_living_host().target) as herd:
            with _Watch() as watch:
                answer = await herd.ask(NAME, "status")
        check(answer.epoch == owner.epoch, f"Python: {answer}")
        self._say("called from Python", f"python: await Client().call('{NAME}', 'status')", watch)
        host = next(h for h in self._sandbox.hosts.values() if h.name != owner.host)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{host.port}") as channel:
            stub = messages_pb2_grpc.MessagesStub(channel)
            with _Watch() as watch:
                response = await stub.Call(messages_pb2.CallRequest(name=NAME, method="status"), timeout=5)
        check(response.epoch == owner.epoch, f"gRPC: {response}")
        self._say(
            f"called over plain gRPC, through {host.name}",
            f"grpcurl -plaintext … 127.0.0.1:{host.port} pgherd.v1.Messages/Call",
            watch,
        )

    async def _kill_worker(self, before: Whereabouts) -> Whereabouts:
        async with Client(self._sandbox.hosts[before.host].target) as herd:
            await _swept(herd)
            with _Watch() as watch:
                os.kill(before.pid, signal.SIGKILL)
                answer = await _answer(herd, lambda a: a.start > before.start)
        check(answer.epoch == before.epoch, f"a local restart changed the epoch: {answer}")
        self._say(
            f"worker killed: restarted on {before.host}, epoch {answer.epoch}, start {answer.start}",
            f"kill -9 {before.pid}",
            watch,
        )
        return await self._ready()

    async def _kill_host(self, before: Whereabouts) -> Whereabouts:
        """Kill everything of the owner's host at once; the same call finds the next owner."""
        sandbox, host = self._sandbox, self._sandbox.hosts[before.host]
        pid = host.pid
        other = next(h for h in sandbox.hosts.values() if h is not host)
        async with Client(other.target) as herd:
            await _swept(herd)
            with _Watch() as watch:
                await sandbox.kill_host(host)
                sandbox.point_at_a_living_host()
                asked = asyncio.create_task(_answer(herd, lambda a: a.epoch > before.epoch))
                why = await self._why_while_ownerless()
                answer = await asked
        after = await self._ready()
        check(after.host != before.host, f"{NAME} is still on the host that was killed")
        check(answer.epoch == after.epoch, f"{answer} and {after} differ")
        self._say(
            f"whole host {before.host} killed; meanwhile: {why}", f"kill -9 {pid}; pgherd why {NAME}", watch
        )
        over = watch.seconds - TTL
        self._say(
            f"same call again: {_owner(after)}; {over:+.1f} s from the lease's {TTL} s",
            f"pgherd call {NAME} status",
            watch,
        )
        return after

    async def _why_while_ownerless(self) -> str:
        """Ask why, until the answer is about the missing owner."""
        host = self._sandbox.a_living_host()
        async with security.channel(host.target) as channel:
            stub = cluster_pb2_grpc.ClusterStub(channel)
            async for _ in _patiently("why never spoke of the lost owner"):
                lines = (await stub.Why(cluster_pb2.WhyRequest(name=NAME), timeout=2)).lines
                for line in lines:
                    if (
                        "nobody owns" in line.what
                        or "no owner" in line.what
                        or "not in the directory" in line.what
                    ):
                        return line.what
        raise AssertionError

    async def _refused(self, zombie: Zombie) -> None:
        """A superseded owner that is still alive cannot write."""
        with _Watch() as watch:
            opened, begun = await zombie.wake()
        check("57P01" in opened or "PH001" in opened, f"a transaction from before the takeover: {opened}")
        check("PH001" in begun, f"a transaction begun after the takeover: {begun}")
        self._say(f"old owner lives on, its open transaction: {opened}", "psql: commit", watch)
        self._say(
            f"and its next one: {begun}", f"psql: select herd.fence('{NAME}', {zombie.epoch}, …)", watch
        )

    async def _kill_agent(self, owner: Whereabouts) -> None:
        """The agent is not a liability: its worker is not interrupted, and is adopted."""
        host = self._sandbox.hosts[owner.host]
        before = await self._agent_of(host)
        async with Client(host.target) as herd:
            first = await herd.ask(NAME, "status")
            with _Watch() as watch:
                os.kill(before.pids["agent"], signal.SIGKILL)
                answer = await _answer(herd, lambda a: True)
        after = await self._agent_of(host)
        check(after.generation > before.generation, "the agent was not replaced")
        same = (first.epoch, first.start) == (answer.epoch, answer.start)
        check(same, f"the worker was interrupted: {first}, then {answer}")
        now = await self._ready()
        check(now.pid == owner.pid, f"the worker is another process: {now.pid}, it was {owner.pid}")
        self._say(
            f"agent of {host.name} killed: worker {owner.pid} adopted, not interrupted",
            f"kill -9 {before.pids['agent']}",
            watch,
        )

    async def _balance(self) -> None:
        """No row was swept twice, and none is lost."""
        with _Watch() as watch:
            await self._traffic.finished()
            inserted, swept, left, owners = await self._traffic.balance()
        check(inserted == swept + left, f"{inserted} rows inserted, {swept} swept, {left} left")
        check(owners >= 2, f"only {owners} process swept anything")
        self._say(
            f"{inserted} rows inserted = {swept} swept by {owners} processes + {left} left",
            "psql: table herd_sweeper.log",
            watch,
        )

    # Looking.

    def _say(self, done: str, typed: str, watch: _Watch) -> None:
        self._tell(Step(done, typed, watch.seconds))

    async def _ready(self) -> Whereabouts:
        async with Client(self._sandbox.a_living_host().target) as herd:
            async for _ in _patiently(f"{NAME} was never ready"):
                with suppress(HerdError):
                    found = await herd.whereis(NAME)
                    if found.state == "ready" and self._sandbox.hosts[found.host].pid:
                        return found
        raise AssertionError

    async def _agent_of(self, host: Host) -> cluster_pb2.StatusResponse:
        async with security.channel(host.target) as channel:
            async for _ in _patiently(f"the agent of {host.name} never answered"):
                with suppress(grpc.aio.AioRpcError):
                    return await cluster_pb2_grpc.ClusterStub(channel).Status(
                        cluster_pb2.StatusRequest(), timeout=2
                    )
        raise AssertionError


class _Watch:
    """A stopwatch."""

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self.seconds = 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began


def check(holds: bool, what: str) -> None:
    """Raise CheckFailed unless it holds."""
    if not holds:
        raise CheckFailed(what)


def _owner(name: Whereabouts) -> str:
    return f"{NAME} on {name.host}, epoch {name.epoch}"


async def _answer(herd: Client, good: Callable[[Answer], bool]) -> Answer:
    """Call until a good answer comes; a call whose outcome is unknown is made again, for it only reads."""
    async for _ in _patiently("no call was answered"):
        with suppress(HerdError):
            answer = await herd.ask(NAME, "status", timeout=15.0)
            if good(answer):
                return answer
    raise AssertionError


async def _swept(herd: Client) -> None:
    """Wait until the present process has deleted something: its rows must be found in the books later."""
    await _answer(herd, lambda a: a.value["deleted"] > 0)


async def _patiently(what: str) -> AsyncIterator[None]:
    """Yield until the caller is content; raise CheckFailed after PATIENCE."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        yield
        await asyncio.sleep(PAUSE)
    raise CheckFailed(f"{what} within {PATIENCE:g} s")
