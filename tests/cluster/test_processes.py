"""Processes of a host are killed, stopped and replaced, and each name goes on as it should."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter

import pytest

from registry.v1 import cluster_pb2, cluster_pb2_grpc
from tests.cluster.herd import FAILOVER, RESTART, Herd
from tests.support.hosts import TTL, eventually

pytestmark = pytest.mark.slow


async def test_a_killed_worker_is_back_on_its_host_at_the_same_epoch(herd: Herd) -> None:
    name, command = herd.name("ledger"), herd.name("command")
    first, plain = await herd.up(herd.ledger(name), herd.command(command), names=[name, command])
    async with herd.traffic([name]):
        await herd.answers(name, within=RESTART)
        herd.nemesis.kill(first.pid, plain.pid)
        second = await herd.answers(name, within=RESTART, above=first.token)
    again = await herd.runs(command, above=plain.token)
    for before, after in ((first, second), (plain, again)):
        assert (after.host, after.token) == (before.host, (before.token.epoch, before.token.start + 1))


async def test_a_crashing_handler_leaves_its_caller_uncertain_and_the_name_alive(herd: Herd) -> None:
    name = herd.name("ledger")
    (first,) = await herd.up(herd.ledger(name), names=[name])
    await herd.answers(name, within=RESTART)
    assert (await herd.call(name, "crash")).outcome == "unknown"
    await herd.answers(name, within=RESTART, above=first.token)


async def test_a_killed_agent_costs_its_workers_nothing(herd: Herd) -> None:
    name, command = herd.name("ledger"), herd.name("command")
    first, plain = await herd.up(
        herd.ledger(name, prefer=["alpha"]), herd.command(command, prefer=["alpha"]), names=[name, command]
    )
    await herd.answers(name, within=RESTART)
    before = await herd.pids(herd.hosts["alpha"])
    async with herd.traffic([name], vias=["beta"]):
        herd.nemesis.kill(before["agent"])
        await herd.hosts["alpha"].wait_status(
            lambda s: s.state == "ready" and s.pids["agent"] != before["agent"]
        )
        again = await herd.answers(name, within=RESTART, via="beta")
    assert again == first
    assert herd.observer.alive(command) == (plain,)
    assert {child.name: (child.pid, child.start) for child in await herd.children("alpha")} == {
        name: (first.pid, 1),
        command: (plain.pid, 1),
    }


async def test_restart_agent_keeps_workers_and_node(herd: Herd) -> None:
    name = herd.name("ledger")
    (first,) = await herd.up(herd.ledger(name, prefer=["beta"]), names=[name])
    host = herd.hosts["beta"]
    before = await host.ready()
    async with herd.traffic([name], vias=["alpha", "gamma"]):
        client = await herd.client("beta")
        await client.rpc(
            cluster_pb2_grpc.ClusterStub(client.channel).RestartAgent, cluster_pb2.RestartAgentRequest()
        )
        after = await host.wait_status(lambda s: s.state == "ready" and s.generation > before.generation)
        assert await herd.answers(name, within=RESTART, via="alpha") == first
        assert await herd.answers(name, within=RESTART, via="beta") == first
    assert (after.node, after.pids["warden"]) == (before.node, before.pids["warden"])


async def test_worker_and_agent_killed_together_restart_once(herd: Herd) -> None:
    name = herd.name("ledger")
    (first,) = await herd.up(herd.ledger(name, prefer=["alpha"]), names=[name])
    pids = await herd.pids(herd.hosts["alpha"])
    herd.nemesis.kill(pids["agent"], first.pid)
    second = await herd.answers(name, within=FAILOVER, above=first.token, via="beta")
    assert (second.host, second.token) == ("alpha", (first.token.epoch, 2))


async def test_a_killed_warden_takes_its_host_down_and_the_names_move(herd: Herd) -> None:
    name, command = herd.name("ledger"), herd.name("command")
    first, plain = await herd.up(
        herd.ledger(name, prefer=["alpha"]),
        herd.command(command, "--orphan", prefer=["alpha"]),
        names=[name, command],
    )
    orphan = await herd.runs(f"{command}.orphan")
    host = herd.hosts["alpha"]
    before = await host.ready()
    async with herd.traffic([name], vias=["beta", "gamma"]):
        herd.nemesis.kill(before.pids["warden"])
        for life in (first, plain, orphan):
            await herd.ended(life, 2.0)
        await herd.answers(name, within=FAILOVER, above=first.token, via="beta")
        await herd.runs(command, above=plain.token)
    after = await host.ready()
    assert after.node != before.node
    assert after.pids["launcher"] == before.pids["launcher"]


async def test_a_killed_launcher_takes_everything_along(herd: Herd) -> None:
    name, command = herd.name("ledger"), herd.name("command")
    first, plain = await herd.up(
        herd.ledger(name, prefer=["gamma"]),
        herd.command(command, "--orphan", prefer=["gamma"]),
        names=[name, command],
    )
    orphan = await herd.runs(f"{command}.orphan")
    async with herd.traffic([name], vias=["alpha", "beta"]):
        herd.nemesis.kill(herd.hosts["gamma"].process.pid)  # type: ignore[union-attr]
        for life in (first, plain, orphan):
            await herd.ended(life, 2.0)
        await herd.answers(name, within=FAILOVER, above=first.token, via="alpha")
        await herd.runs(command, above=plain.token)


async def test_a_stopped_worker_is_no_reason_to_move(herd: Herd) -> None:
    name = herd.name("ledger")
    (first,) = await herd.up(herd.ledger(name), names=[name])
    await herd.answers(name, within=RESTART)
    await herd.nemesis.stop(first.pid)
    assert (await herd.call(name, timeout=0.5)).outcome == "unknown"
    herd.nemesis.resume(first.pid)
    assert await herd.answers(name, within=RESTART) == first


async def test_an_agent_that_hangs_is_replaced_and_its_worker_is_not_interrupted(herd: Herd) -> None:
    name = herd.name("ledger")
    (first,) = await herd.up(herd.ledger(name, prefer=["alpha"]), names=[name])
    await herd.answers(name, within=RESTART)
    host = herd.hosts["alpha"]
    before = await host.ready()
    async with herd.traffic([name], vias=["beta", "gamma"]):
        await herd.nemesis.stop(before.pids["agent"])
        assert await herd.answers(name, within=FAILOVER, via="beta") == first
        after = await host.ready()
    assert after.pids["agent"] != before.pids["agent"]
    assert after.pids["warden"] == before.pids["warden"]


async def test_an_agent_stopped_for_a_moment_goes_on_where_it_was(herd: Herd) -> None:
    name = herd.name("ledger")
    (first,) = await herd.up(herd.ledger(name, prefer=["alpha"]), names=[name])
    await herd.answers(name, within=RESTART)
    before = await herd.hosts["alpha"].ready()
    await herd.nemesis.stop(before.pids["agent"])
    assert (await herd.call(name, via="beta", timeout=0.3)).outcome != "reply"
    herd.nemesis.resume(before.pids["agent"])
    assert await herd.answers(name, within=RESTART, via="beta") == first
    assert (await herd.hosts["alpha"].ready()).node == before.node


@pytest.mark.parametrize("frozen", [("warden",), ("launcher", "warden", "agent")], ids=["warden", "host"])
async def test_workers_of_a_frozen_host_are_dead_before_others_start(
    herd: Herd, frozen: tuple[str, ...]
) -> None:
    name, command = herd.name("ledger"), herd.name("command")
    first, plain = await herd.up(
        herd.ledger(name, prefer=["alpha"], fence=True),
        herd.command(command, "--orphan", prefer=["alpha"]),
        names=[name, command],
    )
    orphan = await herd.runs(f"{command}.orphan")
    await herd.answers(name, within=RESTART, method="write")
    pids = await herd.pids(herd.hosts["alpha"])
    stopped = [pids[each] for each in frozen]
    async with herd.traffic([name], methods=("add", "write"), vias=["beta", "gamma"]):
        await herd.nemesis.stop(*stopped)
        if frozen != ("warden",):
            for life in (first, plain, orphan):
                await herd.ended(life, TTL)
            await herd.answers(name, within=FAILOVER, above=first.token, via="beta", method="write")
        else:
            # The agent renews the lease on: nothing moves, nothing can be started, and nothing is lost.
            assert await herd.answers(name, within=RESTART, via="beta") == first
        herd.nemesis.resume(*stopped)
        await herd.answers(name, within=FAILOVER, via="beta", method="write")


async def test_a_wholly_frozen_host_with_its_workers_is_dead_when_it_thaws(herd: Herd) -> None:
    name, command = herd.name("ledger"), herd.name("command")
    first, plain = await herd.up(
        herd.ledger(name, prefer=["beta"], fence=True),
        herd.command(command, prefer=["beta"]),
        names=[name, command],
    )
    await herd.answers(name, within=RESTART, method="write")
    pids = await herd.pids(herd.hosts["beta"])
    stopped = [pids["launcher"], pids["warden"], pids["agent"], first.pid, plain.pid]
    async with herd.traffic([name], methods=("write",), vias=["alpha", "gamma"]):
        await herd.nemesis.stop(*stopped)
        await herd.answers(name, within=FAILOVER, above=first.token, via="alpha", method="write")
        herd.nemesis.resume(*stopped)
        await eventually(
            lambda: not {first.pid, plain.pid} & {life.pid for life in herd.observer.alive()}, 2.0, "dead"
        )


@pytest.mark.parametrize(
    "how", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT], ids=["smart", "fast", "immediate"]
)
async def test_an_orderly_stop_hands_the_names_over_at_once(herd: Herd, how: signal.Signals) -> None:
    name, command = herd.name("ledger"), herd.name("command")
    first, plain = await herd.up(
        herd.ledger(name, prefer=["alpha"]), herd.command(command, prefer=["alpha"]), names=[name, command]
    )
    await herd.answers(name, within=RESTART)
    host = herd.hosts["alpha"]
    assert host.process is not None
    async with herd.traffic([name], vias=["beta", "gamma"]):
        host.process.send(how)
        within = FAILOVER if how is signal.SIGQUIT else 2.5
        await herd.answers(name, within=within, above=first.token, via="beta")
        await herd.runs(command, above=plain.token, within=within)
        assert await asyncio.wait_for(host.process.wait(), 5.0) == 0
    if how is signal.SIGTERM:
        assert (await herd.whereis(name, via="beta")).host != "alpha"


async def test_a_double_forking_command_leaves_no_orphan(herd: Herd) -> None:
    command = herd.name("command")
    (first,) = await herd.up(herd.command(command, "--orphan"), names=[command])
    orphan = await herd.runs(f"{command}.orphan")
    herd.nemesis.kill(first.pid)
    second = await herd.runs(command, above=first.token)
    assert (await herd.ended(orphan, 1.0)).ended < second.began  # type: ignore[operator]
    await herd.wish("Stop", command)
    await eventually(lambda: not herd.observer.alive(), 5.0, "command and orphan are dead")


async def test_hosts_that_are_restarted_one_by_one_answer_every_call(herd: Herd) -> None:
    names = [herd.name(f"ledger{number}") for number in range(6)]
    await herd.up(*(herd.ledger(name) for name in names), names=names)
    for name in names:
        await herd.answers(name, within=RESTART)
    before = len(herd.calls)
    for host in herd.hosts.values():
        assert host.process is not None
        others = herd.others(host)
        async with herd.traffic(names, methods=("add",), vias=others, timeout=8.0):
            host.process.send(signal.SIGTERM)
            assert await host.process.wait() == 0
            for name in names:
                await herd.answers(name, within=RESTART, via=others[0])
        host.start()
        await host.ready()
    endings = Counter((call.outcome, call.error) for call in herd.calls[before:] if call.finished)
    assert set(endings) == {("reply", "")}, endings
