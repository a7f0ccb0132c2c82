"""Fifty names, and a nemesis that picks at random: whatever happens, the history must be right."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from registry.clock import SYSTEM_CLOCK
from registry.errors import HerdError
from tests.cluster.herd import Herd
from tests.support.hosts import Host
from tests.support.proxy import Mode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

LASTS = 45.0
"""Seconds for which faults are made."""
SETTLED = 40.0
"""Seconds after the last fault in which every name answers: a host's start, a lease, fifty claims."""
CALLS_BETWEEN = 60
log = logging.getLogger(__name__)


class Chaos:
    """Picks faults, and undoes some of the last ones from time to time."""

    def __init__(self, herd: Herd, seed: int) -> None:
        self.herd, self.random = herd, random.Random(seed)
        self.undo: list[Callable[[], Awaitable[None] | None]] = []
        self.faults: list[Callable[[], Awaitable[None]]] = [
            self.kill_workers,
            self.kill_workers,
            self.kill_workers,
            self.kill_agent,
            self.kill_agent,
            self.kill_agent_and_workers,
            self.kill_warden,
            self.kill_host,
            self.stop_agent,
            self.stop_worker,
            self.stop_host,
            self.lose_member,
            self.stop_member,
            self.cut_host,
        ]

    async def go_on(self, seconds: float) -> None:
        """Make one fault after the other; each when some calls have ended since the last."""
        until = SYSTEM_CLOCK.now() + seconds
        while SYSTEM_CLOCK.now() < until:
            fault = self.random.choice(self.faults)
            log.warning("%.1f s left: %s", until - SYSTEM_CLOCK.now(), fault.__name__)
            await fault()
            before = sum(call.finished is not None for call in self.herd.calls)
            while sum(call.finished is not None for call in self.herd.calls) < before + CALLS_BETWEEN:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            while len(self.undo) > 2 or (self.undo and self.random.random() < 0.5):
                done = self.undo.pop(0)()
                if done is not None:
                    await done
        self.herd.nemesis.resume_all()

    def host(self) -> Host:
        return self.random.choice(list(self.herd.hosts.values()))

    async def pids(self, host: Host) -> dict[str, int]:
        status = await host.status()
        return dict(status.pids) if status else {}

    def workers(self) -> list[int]:
        alive = self.herd.observer.alive()
        return [life.pid for life in self.random.sample(alive, min(len(alive), self.random.randint(1, 6)))]

    async def kill_workers(self) -> None:
        self.herd.nemesis.kill(*self.workers())

    async def kill_agent(self) -> None:
        pids = await self.pids(self.host())
        if pids:
            self.herd.nemesis.kill(pids["agent"])

    async def kill_agent_and_workers(self) -> None:
        pids = await self.pids(self.host())
        if pids:
            self.herd.nemesis.kill(pids["agent"], *self.workers())

    async def kill_warden(self) -> None:
        pids = await self.pids(self.host())
        if pids:
            self.herd.nemesis.kill(pids["warden"])

    async def kill_host(self) -> None:
        host = self.host()
        await host.kill()
        self.undo.append(lambda: self.revive(host))

    @staticmethod
    def revive(host: Host) -> None:
        """Start a host again, unless another fault's end has done it already."""
        if not host.running:
            host.start()

    async def stop_agent(self) -> None:
        pids = await self.pids(self.host())
        if pids:
            await self._stop(pids["agent"])

    async def stop_worker(self) -> None:
        await self._stop(*self.workers()[:1])

    async def stop_host(self) -> None:
        host = self.host()
        pids = await self.pids(host)
        if pids:
            await self._stop(pids["launcher"], pids["warden"], pids["agent"])
            # Its timer ends it; and whoever started it starts it again.
            self.undo.append(lambda: self.revive(host))

    async def _stop(self, *pids: int) -> None:
        with suppress(ProcessLookupError):
            await self.herd.nemesis.stop(*pids)
            self.undo.append(lambda: self.herd.nemesis.resume(*pids))

    async def lose_member(self) -> None:
        member = self.random.choice(self.herd.cluster.etcd.members)
        if all(each.process and each.process.poll() is None for each in self.herd.cluster.etcd.members):
            member.kill()
            self.undo.append(lambda: self.herd.start_members(member))

    async def stop_member(self) -> None:
        member = self.random.choice(self.herd.cluster.etcd.members)
        member.pause()
        self.undo.append(member.resume)

    async def cut_host(self) -> None:
        host = self.host()
        self.herd.cluster.network(host, self.random.choice([Mode.CUT, Mode.DEAF]))
        self.undo.append(lambda: self.herd.cluster.network(host))


async def test_fifty_names_through_a_minute_of_faults(herd: Herd) -> None:
    seed = secrets.randbits(32)
    log.warning("seed %d", seed)
    ledgers = [herd.name(f"ledger{number}") for number in range(24)]
    fenced = [herd.name(f"fenced{number}") for number in range(6)]
    commands = [herd.name(f"command{number}") for number in range(20)]
    await herd.apply(*(herd.ledger(name, intensity=50) for name in ledgers))
    await herd.apply(*(herd.ledger(name, intensity=50, fence=True) for name in fenced))
    await herd.apply(*(herd.command(name, "--orphan", intensity=50) for name in commands))
    for name in (*ledgers, *fenced, *commands):
        await herd.runs(name, within=20.0)
    chaos = Chaos(herd, seed)
    hosts = list(herd.hosts)
    async with (
        herd.traffic(ledgers, vias=hosts, callers=4),
        herd.traffic(fenced, methods=("write",), vias=hosts, callers=2),
    ):
        await chaos.go_on(LASTS)
    await herd.restore()
    until = SYSTEM_CLOCK.now() + SETTLED
    for name in (*ledgers, *fenced):
        with suppress(HerdError):
            await herd.answers(name, within=max(until - SYSTEM_CLOCK.now(), 1.0))
    for name in commands:
        await herd.runs(name, within=max(until - SYSTEM_CLOCK.now(), 1.0))
    outcomes = {
        each: sum(call.outcome == each for call in herd.calls) for each in ("reply", "refused", "unknown")
    }
    log.warning("%d calls %s, %d lives", len(herd.calls), outcomes, len(herd.observer.lives))
    assert outcomes["reply"] > 100
