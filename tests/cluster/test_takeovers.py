"""Owners that lose a name while they are alive, and requests and transactions under way meanwhile."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from registry.clock import SYSTEM_CLOCK
from tests.cluster.herd import FAILOVER, RESTART, Herd
from tests.support.hosts import TTL, eventually
from tests.support.proxy import Mode

pytestmark = pytest.mark.slow

FREEZER = Path("/sys/fs/cgroup/freezer")


def keys(herd: Herd, *what: str) -> str:
    return herd.cluster.etcd.ctl(*what)


async def test_an_owner_whose_key_is_deleted_is_killed_at_once(herd: Herd) -> None:
    name = herd.name("command")
    (first,) = await herd.up(herd.command(name, "--deaf", "--orphan", prefer=["alpha"]), names=[name])
    keys(herd, "del", f"/pgherd/test/names/{name}")
    await herd.ended(first, 1.0)
    await herd.runs(name, above=first.token, within=RESTART)


@pytest.mark.parametrize("cut", [False, True], ids=["told by etcd", "told by its peers"])
async def test_a_lease_that_etcd_ends_too_early_makes_no_second_owner(herd: Herd, cut: bool) -> None:
    """A stale leader that believes in its own clock does this (etcd issue 15247)."""
    name, command = herd.name("ledger"), herd.name("command")
    first, plain = await herd.up(
        herd.ledger(name, prefer=["alpha"], fence=True),
        herd.command(command, "--deaf", prefer=["alpha"]),
        names=[name, command],
    )
    await herd.answers(name, within=RESTART)
    before = await herd.hosts["alpha"].ready()
    async with herd.traffic([name], methods=("add", "write"), vias=["alpha", "beta", "gamma"]):
        if cut:
            herd.cluster.network(herd.hosts["alpha"], Mode.DEAF)
        owner = keys(herd, "get", f"/pgherd/test/nodes/{before.node}", "-w=fields")
        (lease,) = (line.split(":")[1].strip() for line in owner.splitlines() if line.startswith('"Lease"'))
        keys(herd, "lease", "revoke", f"{int(lease):x}")
        await herd.answers(name, within=FAILOVER, above=first.token, via="beta", method="write")
        await herd.runs(command, above=plain.token)


async def test_an_etcd_leader_that_was_away_for_longer_than_a_lease_ends_nothing_twice(herd: Herd) -> None:
    names = [herd.name(f"on-{host}") for host in herd.hosts]
    lives = await herd.up(
        *(herd.ledger(name, prefer=[host]) for name, host in zip(names, herd.hosts, strict=True)), names=names
    )
    leader = await herd.leader()
    async with herd.traffic(names, vias=list(herd.hosts)):
        leader.pause()
        until = SYSTEM_CLOCK.now() + TTL + 1
        await eventually(lambda: SYSTEM_CLOCK.now() > until, TTL + 2, "the lease would have ended")
        assert set(herd.observer.alive()) == set(lives)
        leader.resume()
        await asyncio.to_thread(herd.cluster.etcd.wait_healthy)
        # It may end leases that its successor has renewed since; what follows is for the checker.
        until = SYSTEM_CLOCK.now() + 1.5
        await eventually(lambda: SYSTEM_CLOCK.now() > until, 2.0, "its mistakes are known")
        for name in names:
            await herd.answers(name, within=FAILOVER)


async def test_a_call_made_when_the_host_is_dead_already_waits_for_the_next_owner(herd: Herd) -> None:
    name = herd.name("ledger")
    (first,) = await herd.up(herd.ledger(name, prefer=["alpha"]), names=[name])
    await herd.answers(name, within=RESTART, via="beta")
    pids = await herd.pids(herd.hosts["alpha"])
    await herd.hosts["alpha"].kill()
    await herd.nemesis.gone(*pids.values())
    answered = await asyncio.gather(*(herd.call(name, via="beta", timeout=9.5) for _ in range(20)))
    assert {call.outcome for call in answered} == {"reply"}, answered
    assert all(call.token and call.token > first.token for call in answered)


async def test_a_transaction_of_a_killed_worker_does_not_outlive_its_successor(herd: Herd) -> None:
    name = herd.name("ledger")
    (first,) = await herd.up(herd.ledger(name, fence=True), names=[name])
    slow = asyncio.create_task(herd.call(name, "write_slowly", timeout=5.0, seconds=3.0))
    sleeping = "select pid from pg_stat_activity where wait_event = 'PgSleep'"
    await eventually(lambda: len(herd.cluster.sql(sleeping)) == 1, 2.0, "its transaction is open")
    herd.nemesis.kill(first.pid)
    await herd.answers(name, within=RESTART, above=first.token, method="write")
    assert (await slow).outcome == "unknown"
    assert herd.cluster.sql(f"select op from ledger where op = '{(await slow).op}'") == []


async def test_a_crash_of_postgresql_leaves_every_answered_write(herd: Herd) -> None:
    assert herd.cluster.postgres is not None
    names = [herd.name(f"ledger{number}") for number in range(4)]
    lives = await herd.up(*(herd.ledger(name, fence=True, intensity=50) for name in names), names=names)
    async with herd.traffic(names, methods=("write",), vias=list(herd.hosts)):
        for name in names:
            await herd.answers(name, within=RESTART, method="write")
        await herd.cluster.postgres.kill()
        herd.nemesis.kill(lives[0].pid)
        await eventually(lambda: any(call.outcome != "reply" for call in herd.calls), 5.0, "writes fail")
        await herd.cluster.postgres.start()
        for name in names:
            await herd.answers(name, within=15.0, method="write")
    written = {commit.op for commit in herd.history().commits}
    assert {call.op for call in herd.calls if call.kind == "call" and call.outcome == "reply"} <= written


async def test_an_agent_that_dies_again_and_again_costs_its_workers_nothing(herd: Herd) -> None:
    name, command = herd.name("ledger"), herd.name("command")
    lives = await herd.up(
        herd.ledger(name, prefer=["alpha"]), herd.command(command, prefer=["alpha"]), names=[name, command]
    )
    killed: set[int] = set()
    for _ in range(4):
        status = await herd.hosts["alpha"].wait_status(lambda status: status.pids["agent"] not in killed)
        killed.add(status.pids["agent"])
        herd.nemesis.kill(status.pids["agent"])
    await herd.hosts["alpha"].ready()
    assert await herd.answers(name, within=RESTART, via="beta") == lives[0]
    assert set(herd.observer.alive()) == set(lives)


@pytest.mark.parametrize("what", ["deleted", "stopped", "changed"])
async def test_a_wish_that_changes_while_the_agent_is_away_is_followed(herd: Herd, what: str) -> None:
    name = herd.name("ledger")
    (first,) = await herd.up(herd.ledger(name, prefer=["alpha"]), names=[name])
    status = await herd.hosts["alpha"].ready()
    await herd.client("beta")
    herd.nemesis.kill(status.pids["agent"])
    if what == "deleted":
        await herd.wish("Delete", name, via="beta")
    elif what == "stopped":
        await herd.wish("Stop", name, via="beta")
    else:
        await herd.apply(herd.ledger(name, prefer=["alpha"], env={"ROUND": "2"}), via="beta")
    await herd.ended(first, 10.0)
    if what == "changed":
        second = await herd.answers(name, within=RESTART, above=first.token, via="beta")
        assert (second.host, second.token.epoch) == ("alpha", first.token.epoch)
    else:
        await herd.unowned(name, via="beta")


@contextmanager
def freezer(chosen: list[int]) -> Iterator[None]:
    """Freeze processes as `docker pause` does."""
    group = FREEZER / f"pgherd-test-{os.getpid()}"
    group.mkdir()
    state = group / "freezer.state"
    try:
        for frozen in chosen:
            (group / "cgroup.procs").write_text(str(frozen))
        state.write_text("FROZEN")
        yield
    finally:
        state.write_text("THAWED")
        # A process that dies is in its group until it is reaped.
        while pids := (group / "cgroup.procs").read_text().split():
            for pid in pids:
                with suppress(OSError):
                    (FREEZER / "cgroup.procs").write_text(pid)
        group.rmdir()


@pytest.mark.root
@pytest.mark.skipif(not FREEZER.is_dir(), reason="this machine has no cgroup freezer")
async def test_a_frozen_container_that_thaws_too_late_writes_nothing(herd: Herd) -> None:
    """Nothing can end it before it thaws, so this is for the fence alone: P1 is not judged, P2 is."""
    name = herd.name("ledger")
    (first,) = await herd.up(herd.ledger(name, prefer=["alpha"], fence=True), names=[name])
    await herd.answers(name, within=RESTART, method="write", via="beta")
    pids = await herd.pids(herd.hosts["alpha"])
    slow = asyncio.create_task(herd.call(name, "write_slowly", via="beta", timeout=9.0, seconds=2.0))
    await eventually(
        lambda: herd.calls[-1].op in {effect.op for effect in herd.observer.effects}, 2.0, "it is under way"
    )
    herd.not_judged = {"P1"}
    frozen = [pids["launcher"], pids["warden"], pids["agent"], first.pid]
    async with herd.traffic([name], methods=("write",), vias=["alpha", "beta", "gamma"]):
        with freezer(frozen):
            await herd.answers(name, within=FAILOVER, above=first.token, via="beta", method="write")
        await herd.ended(first, 1.0)
        await herd.answers(name, within=FAILOVER, above=first.token, via="beta", method="write")
    assert (await slow).outcome == "unknown"
