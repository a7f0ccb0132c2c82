"""etcd members die, hang and are out of reach, for everybody or for one host."""

from __future__ import annotations

import asyncio

import pytest

from tests.cluster.herd import FAILOVER, RESTART, Herd
from tests.support.hosts import TTL, eventually
from tests.support.proxy import Mode

pytestmark = pytest.mark.slow

OUTAGE = 20.0
"""Seconds in which a name answers again after etcd is back: members, sessions, claims, starts."""


async def spread(herd: Herd) -> dict[str, str]:
    """Run one Ledger on each host; return the names by host."""
    names = {host: herd.name(f"on-{host}") for host in herd.hosts}
    await herd.up(
        *(herd.ledger(name, prefer=[host], fence=True) for host, name in names.items()),
        names=list(names.values()),
    )
    for name in names.values():
        await herd.answers(name, within=RESTART, method="write")
    return names


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_losing_the_etcd_leader_moves_nothing(herd: Herd, how: str) -> None:
    names = await spread(herd)
    before = herd.observer.alive()
    leader = await herd.leader()
    async with herd.traffic(list(names.values()), vias=list(herd.hosts)):
        leader.kill() if how == "killed" else leader.pause()
        survivors = [member for member in herd.cluster.etcd.members if member is not leader]
        await asyncio.to_thread(herd.cluster.etcd.wait_healthy, *survivors)
        for name in names.values():
            for via in herd.hosts:
                await herd.answers(name, within=2 * TTL, via=via)
        if how == "stopped":
            # The deposed leader may still believe in leases its successor has renewed.
            leader.resume()
            await asyncio.to_thread(herd.cluster.etcd.wait_healthy)
        else:
            await herd.start_members(leader)
        for name in names.values():
            await herd.answers(name, within=2 * TTL)
    assert herd.observer.alive() == before
    assert {life.name: life.host for life in before} == {name: host for host, name in names.items()}


async def test_without_a_majority_named_workers_end_before_their_leases_do(herd: Herd) -> None:
    names = await spread(herd)
    local = herd.observer.alive()
    async with herd.traffic(list(names.values()), vias=list(herd.hosts)):
        lost = herd.cluster.etcd.members[:2]
        for member in lost:
            member.kill()
        for life in local:
            await herd.ended(life, TTL)
        await herd.says(names["alpha"], "from memory", via="beta")
        await herd.start_members(*lost)
        for life in local:
            await herd.answers(life.name, within=OUTAGE, above=life.token, method="write")


@pytest.mark.parametrize("how", ["killed", "killed and stopped"])
async def test_names_that_nobody_may_hold_are_refused_by_every_agent(herd: Herd, how: str) -> None:
    """Also by the agents that had them: what is not executed must not end as unknown."""
    names = await spread(herd)
    local = herd.observer.alive()
    first, second = herd.cluster.etcd.members[:2]
    first.kill()
    second.kill() if how == "killed" else second.pause()
    for life in local:
        await herd.ended(life, 2 * TTL)
    for host in herd.hosts.values():
        await host.wait_status(
            lambda status: status.state not in ("ready", "lost") and not status.in_sync, 2 * TTL
        )
    for name in names.values():
        for via in herd.hosts:
            call = await herd.call(name, via=via, timeout=0.5)
            assert call.outcome == "refused", call
            assert call.error.startswith("NO_OWNER"), call
            assert "not in sync" in call.error, call


async def test_a_name_given_up_while_etcd_is_away_is_claimed_again_by_the_same_host(herd: Herd) -> None:
    name = herd.name("ledger")
    spec = herd.ledger(name, placement={"require": {"only": "alpha"}}, intensity=0)
    (first,) = await herd.up(spec, names=[name])
    await herd.answers(name, within=RESTART)
    lost = herd.cluster.etcd.members[:2]
    for member in lost:
        member.kill()
    herd.nemesis.kill(first.pid)
    await herd.ended(first, 1.0)
    await herd.hosts["alpha"].wait_status(lambda status: status.state == "lost", 10.0)
    await herd.start_members(*lost)
    await herd.answers(name, within=OUTAGE, above=first.token)


async def test_an_etcd_outage_shorter_than_the_lease_is_only_heard_of(herd: Herd) -> None:
    names = await spread(herd)
    before = herd.observer.alive()
    for member in herd.cluster.etcd.members:
        member.pause()
    for host, name in names.items():
        assert (await herd.call(name, via=host)).outcome == "reply"
    for member in herd.cluster.etcd.members:
        member.resume()
    for name in names.values():
        await herd.answers(name, within=RESTART, method="write")
    assert herd.observer.alive() == before


@pytest.mark.parametrize("mode", [Mode.CUT, Mode.DEAF], ids=["refused", "silent"])
async def test_a_host_cut_off_from_etcd_stops_before_its_names_run_elsewhere(herd: Herd, mode: Mode) -> None:
    names = await spread(herd)
    command = herd.name("command")
    (plain,) = await herd.up(herd.command(command, "--deaf", prefer=["alpha"]), names=[command])
    first = herd.observer.alive(names["alpha"])[0]
    others = [life for life in herd.observer.alive() if life.host != "alpha"]
    async with herd.traffic(list(names.values()), methods=("add", "write"), vias=list(herd.hosts)):
        herd.cluster.network(herd.hosts["alpha"], mode)
        for life in (first, plain):
            await herd.ended(life, TTL)
        moved = await herd.answers(names["alpha"], within=FAILOVER, above=first.token, via="beta")
        assert moved.host != "alpha"
        assert (await herd.runs(command, above=plain.token)).host != "alpha"
        # It knows nothing new, and says so; what it passes on is for others to decide.
        await herd.says(names["beta"], "from memory", via="alpha")
        herd.cluster.network(herd.hosts["alpha"])
        await herd.hosts["alpha"].ready()
        await herd.answers(names["alpha"], within=RESTART, via="alpha")
    assert [life for life in herd.observer.alive() if life in others] == others


async def test_the_agent_of_a_cut_off_host_may_be_replaced_and_still_stops_in_time(herd: Herd) -> None:
    names = await spread(herd)
    first = herd.observer.alive(names["alpha"])[0]
    pids = await herd.pids(herd.hosts["alpha"])
    async with herd.traffic(list(names.values()), vias=["beta", "gamma"]):
        herd.cluster.network(herd.hosts["alpha"], Mode.DEAF)
        herd.nemesis.kill(pids["agent"])
        await herd.ended(first, TTL)
        await herd.answers(names["alpha"], within=FAILOVER, above=first.token, via="beta")


async def test_a_slow_way_to_etcd_moves_nothing(herd: Herd) -> None:
    names = await spread(herd)
    before = herd.observer.alive()
    herd.cluster.network(herd.hosts["alpha"], delay=0.1)
    late = herd.name("late")
    async with herd.traffic(list(names.values()), vias=list(herd.hosts)):
        (added,) = await herd.up(herd.ledger(late, prefer=["alpha"]), names=[late])
        herd.nemesis.kill(added.pid)
        await herd.answers(late, within=RESTART, above=added.token)
    assert [life for life in herd.observer.alive() if life.name != late] == list(before)


async def test_an_orderly_stop_without_etcd_ends_in_time(herd: Herd) -> None:
    names = await spread(herd)
    host = herd.hosts["alpha"]
    herd.cluster.network(host, Mode.DEAF)
    assert host.process is not None
    herd.nemesis.signal(host.process.pid, 15)
    assert await asyncio.wait_for(host.process.wait(), 15.0) == 0
    await eventually(lambda: not [x for x in herd.observer.alive() if x.host == "alpha"], 1.0, "all ended")
    await herd.answers(names["alpha"], within=FAILOVER, via="beta")
