"""Hosts that come when etcd is away, under a name that is in use, or without a PID namespace."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from registry.client import Client
from registry.v1 import cluster_pb2, cluster_pb2_grpc
from tests.cluster.herd import FAILOVER, RESTART, Herd
from tests.cluster.history import NOBODY
from tests.support.hosts import TTL, Cluster, Host, eventually, running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One etcd member and one host, without a database."""
    with running(("alpha",), members=1, postgres=False) as cluster:
        yield cluster


@pytest.fixture
async def other(herd: Herd, request: pytest.FixtureRequest) -> AsyncIterator[Host]:
    """One more host for this test, not started."""
    name, *options = getattr(request, "param", ("beta",))
    host = herd.cluster.add_host(name, f"other{herd.name(name)}", options=tuple(options))
    try:
        yield host
    finally:
        if host.process is not None:
            # Killed, one without a namespace would leave processes behind.
            await host.process.stop(((signal.SIGTERM, 10.0),))
        herd.print_log(host)


async def said_by(host: Host, name: str = "") -> str:
    async with Client(host.address) as client:
        stub = cluster_pb2_grpc.ClusterStub(client.channel)
        answer = await client.rpc(stub.Why, cluster_pb2.WhyRequest(name=name))
        return "\n".join([answer.caveat, *(line.what for line in answer.lines)])


async def test_an_agent_answers_without_etcd_and_joins_when_it_comes(herd: Herd, other: Host) -> None:
    (member,) = herd.cluster.etcd.members
    child = herd.name("local")
    specs = other.directory / "children.d"
    specs.mkdir()
    named = herd.name("named")
    (specs / "own.toml").write_text(
        "schema = 1\n"
        + herd.command(child).replace(f'name = "{child}"\n', "")
        + herd.command(named, placement={"require": {"only": "beta"}})
    )
    member.kill()
    other.start()
    status = await other.wait_status(lambda status: status.state == "joining")
    assert any("etcd" in problem for problem in status.problems)
    assert "etcd" in await said_by(other)
    # What has no global name needs no etcd.
    first = await herd.runs(child)
    assert not herd.observer.alive(named)
    await herd.start_members(member)
    await other.ready(15.0)
    await herd.runs(named)
    assert herd.observer.alive(child) == (first,)


@pytest.mark.parametrize("other", [("alpha",)], indirect=True)
async def test_the_second_agent_of_a_host_name_waits_until_the_first_is_gone(herd: Herd, other: Host) -> None:
    name = herd.name("ledger")
    (first,) = await herd.up(herd.ledger(name), names=[name])
    before = await herd.hosts["alpha"].ready()
    other.start()
    await other.wait_status(lambda status: any("two agents" in problem for problem in status.problems))
    assert await herd.answers(name, within=RESTART) == first
    after = await herd.hosts["alpha"].ready()
    assert (after.node, after.pids["agent"]) == (before.node, before.pids["agent"])
    await herd.hosts["alpha"].kill()
    await other.ready(FAILOVER)
    await herd.runs(name, above=first.token, within=FAILOVER)


@pytest.mark.parametrize("other", [("beta", "--partial")], indirect=True)
async def test_without_a_namespace_a_new_warden_begins_with_killing_what_is_left(
    herd: Herd, other: Host
) -> None:
    command = herd.name("command")
    other.start()
    status = await other.ready()
    assert status.containment == "partial"
    (first,) = await herd.up(
        herd.command(command, "--orphan", placement={"require": {"only": "beta"}}), names=[command]
    )
    orphan = await herd.runs(f"{command}.orphan")
    herd.nemesis.kill(status.pids["warden"])
    await herd.ended(first, 2.0)
    second = await herd.runs(command, above=first.token, within=FAILOVER)
    assert (await herd.ended(orphan, 1.0)).ended < second.began  # type: ignore[operator]
    again = await herd.runs(f"{command}.orphan", above=orphan.token)
    # The launcher itself: nobody is left to clear away until the next one comes.
    await other.kill()
    await herd.ended(second, 2.0)
    other.start()
    third = await herd.runs(command, above=second.token, within=2 * FAILOVER)
    assert (await herd.ended(again, 1.0)).ended < third.began  # type: ignore[operator]


async def test_a_restarted_host_joins_at_once_and_takes_its_names_when_the_old_lease_ends(herd: Herd) -> None:
    name = herd.name("ledger")
    (first,) = await herd.up(herd.ledger(name), names=[name])
    host = herd.hosts["alpha"]
    await host.kill()
    host.start()
    await host.ready(TTL)
    await herd.answers(name, within=FAILOVER, above=first.token)


async def test_a_host_that_stops_alone_leaves_its_names_free_for_its_next_life(herd: Herd) -> None:
    name = herd.name("ledger")
    (first,) = await herd.up(herd.ledger(name), names=[name])
    host = herd.hosts["alpha"]
    assert host.process is not None
    herd.nemesis.signal(host.process.pid, signal.SIGTERM)
    assert await asyncio.wait_for(host.process.wait(), 5.0) == 0
    await eventually(lambda: not herd.observer.alive(), 1.0, "all ended")
    host.start()
    await herd.answers(name, within=TTL, above=first.token)


async def test_workers_of_a_history_that_etcd_has_lost_are_killed(herd: Herd) -> None:
    """A restored etcd may give their names to others; their epochs may be given a second time, too."""
    kept, lost = herd.name("kept"), herd.name("lost")
    (first,) = await herd.up(herd.command(kept, "--deaf"), names=[kept])
    snapshot = await asyncio.to_thread(herd.cluster.etcd.save)
    (second,) = await herd.up(herd.command(lost, "--deaf"), names=[lost])
    before = await herd.hosts["alpha"].ready()
    herd.cluster.etcd.restore(snapshot)
    for life in (first, second):
        await herd.ended(life, TTL)
    await herd.hosts["alpha"].wait_status(lambda s: s.state == "ready" and s.node != before.node)
    herd.not_judged = {"P1"}
    await herd.runs(kept, above=NOBODY, within=FAILOVER)
