"""Ownership on a real etcd: what the fake may only imitate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from registry import events
from registry.clock import SYSTEM_CLOCK
from registry.directory import Directory
from registry.etcd import EtcdStore
from registry.names import (
    Bidder,
    Claimed,
    ClaimRequest,
    Incarnation,
    Names,
    NotOwner,
    Refusal,
    Released,
    Status,
    Taken,
    Why,
    WorkerState,
    Written,
)
from registry.nodes import NodeRecord, Nodes, NodeState
from registry.specs import Specs
from registry.store import Put
from tests.support.etcd import Shared


class Agent:
    """What one agent has of the registry, with a store of its own."""

    def __init__(self, shared: Shared, host: str) -> None:
        self.store = EtcdStore(shared.endpoints)
        self.host, self.node, self.lease = host, f"{host}-1", 0
        self.said: list[events.Event] = []
        self.names, self.nodes = Names(self.store, shared.prefix), Nodes(self.store, shared.prefix)
        self.specs = Specs(self.store, shared.prefix)
        self.directory = Directory(self.store, shared.prefix, SYSTEM_CLOCK, self.said.append)

    async def join(self, ttl: float = 60.0) -> None:
        self.lease = (await self.store.grant(ttl)).id
        record = NodeRecord(
            node=self.node, host=self.host, address=f"{self.host}:7430", version="0", protocol=1,
            containment="full", state=NodeState.READY,
        )  # fmt: skip
        await self.nodes.register(record, self.lease)

    def bidder(self) -> Bidder:
        return Bidder(node=self.node, host=self.host, lease=self.lease, incarnation=Incarnation())

    def request(self, name: str) -> ClaimRequest:
        return ClaimRequest(name=name, claim=f"{self.node}/{name}", spec_revision=0, placement_revision=0)

    @asynccontextmanager
    async def following(self) -> AsyncIterator[Directory]:
        task = asyncio.create_task(self.directory.run())
        try:
            await asyncio.wait_for(self.directory.synced(), 10)
            yield self.directory
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until(directory: Directory, condition: Callable[[], bool], seconds: float = 15.0) -> None:
    """Wait until ``condition`` holds after some change of the directory."""
    changed = asyncio.Event()
    unsubscribe = directory.subscribe(lambda _: changed.set())
    try:
        async with asyncio.timeout(seconds):
            while not condition():
                await changed.wait()
                changed.clear()
    finally:
        unsubscribe()


@pytest.fixture
async def agents(etcd: Shared) -> AsyncIterator[tuple[Agent, Agent]]:
    alpha, beta = Agent(etcd, "alpha"), Agent(etcd, "beta")
    await alpha.join()
    await beta.join()
    yield alpha, beta
    for agent in (alpha, beta):
        await agent.store.revoke(agent.lease)
        await agent.store.close()


async def test_of_two_nodes_that_race_for_many_names_each_name_gets_one(
    agents: tuple[Agent, Agent],
) -> None:
    wanted = [f"n{number}" for number in range(200)]
    results = await asyncio.gather(
        *(
            agent.names.claim_many([agent.request(name) for name in wanted], agent.bidder())
            for agent in agents
        )
    )
    for one, other in zip(*results, strict=True):
        winner, loser = (one, other) if isinstance(one, Claimed) else (other, one)
        assert isinstance(winner, Claimed)
        assert isinstance(loser, Taken)
        assert loser.owner.epoch == winner.epoch
        assert loser.owner.claim == winner.claim
    owned = [await agent.names.owned_by(agent.node) for agent in agents]
    assert sorted(each.name for owner in owned for each in owner) == sorted(wanted)


async def test_a_name_goes_from_owner_to_owner_with_growing_epochs(agents: tuple[Agent, Agent]) -> None:
    alpha, beta = agents
    first = await alpha.names.claim(alpha.request("sweeper"), alpha.bidder())
    assert isinstance(first, Claimed)
    status = Status(name="sweeper", epoch=first.epoch, start=1, state=WorkerState.READY, pid=1, since=0.0)
    assert isinstance(await alpha.names.put_status(status, alpha.lease), Written)
    assert await alpha.names.release("sweeper", first.epoch, "drained") == Released("sweeper", first.epoch)
    assert isinstance(await alpha.names.put_status(status, alpha.lease), NotOwner)

    stale = await beta.names.claim(beta.request("sweeper"), beta.bidder())
    assert stale == Refusal("sweeper", Why.PLACEMENT_CHANGED)
    async with beta.following() as directory:
        assert directory.placements["sweeper"].last_epoch == first.epoch
        request = ClaimRequest(
            name="sweeper", claim="b", spec_revision=0,
            placement_revision=directory.placements["sweeper"].mod_revision,
        )  # fmt: skip
    second = await beta.names.claim(request, beta.bidder())
    assert isinstance(second, Claimed)
    assert second.epoch > first.epoch
    assert isinstance(await alpha.names.release("sweeper", first.epoch, "late"), NotOwner)


async def test_when_a_lease_ends_its_names_are_free_and_everybody_sees_it(
    agents: tuple[Agent, Agent],
) -> None:
    alpha, beta = agents
    async with beta.following() as directory:
        claimed = await alpha.names.claim(alpha.request("sweeper"), alpha.bidder())
        assert isinstance(claimed, Claimed)
        await until(directory, lambda: directory.lookup("sweeper") is not None)
        owner = directory.lookup("sweeper")
        assert owner is not None
        assert owner == await beta.names.read_owner("sweeper")
        assert owner.epoch == claimed.epoch

        await alpha.store.revoke(alpha.lease)
        await until(directory, lambda: alpha.node not in directory.nodes)
        await until(directory, lambda: directory.lookup("sweeper") is None)
        assert directory.departed[alpha.node].address == "alpha:7430"
        refused = await alpha.names.claim(alpha.request("janitor"), alpha.bidder())
        assert refused == Refusal("janitor", Why.NODE_GONE)
        assert isinstance(await beta.names.claim(beta.request("sweeper"), beta.bidder()), Claimed)
    assert events.OwnerGone(name="sweeper", node=alpha.node, epoch=claimed.epoch) in beta.said
    assert events.NodeLeft(node=alpha.node) in beta.said


async def test_a_copy_that_missed_a_compaction_is_right_again(
    agents: tuple[Agent, Agent], etcd: Shared
) -> None:
    alpha, beta = agents
    async with beta.following() as directory:
        revision = directory.revision
        await alpha.names.claim_many([alpha.request(f"n{i}") for i in range(100)], alpha.bidder())
        await until(directory, lambda: len(directory.owners) == 100)
    etcd.server.ctl("compaction", str(directory.revision))
    assert directory.revision > revision
    await alpha.names.release("n7", directory.owners["n7"].epoch, "while nobody looked")
    async with beta.following() as directory:
        await until(directory, lambda: len(directory.owners) == 99)
        assert directory.placements["n7"].reason == "while nobody looked"
        assert directory.in_sync


async def test_the_owner_keys_of_a_healthy_copy_agree_with_etcd(
    agents: tuple[Agent, Agent], etcd: Shared
) -> None:
    alpha, beta = agents
    async with beta.following() as directory:
        await alpha.names.claim_many([alpha.request(f"n{i}") for i in range(10)], alpha.bidder())
        await until(directory, lambda: len(directory.owners) == 10)
        await beta.store.txn((), (Put(f"{etcd.prefix}names/garbage", b"?"),))
        await alpha.names.release("n3", directory.owners["n3"].epoch, "x")
        await until(directory, lambda: "n3" not in directory.owners)
        owned = await alpha.names.owned_by(alpha.node)
        assert {each.name: each.epoch for each in owned} == {
            name: owner.epoch for name, owner in directory.owners.items()
        }
        count, highest = await beta.store.fingerprint(f"{etcd.prefix}names/")
        assert count == 10
        assert highest <= directory.revision
