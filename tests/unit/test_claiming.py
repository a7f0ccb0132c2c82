"""Claims against a registry that changes while they are made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from node_agent.claims import Claims
from node_agent.states import Ownership
from node_agent.wishes import Wish, Wishes
from registry.clock import SYSTEM_CLOCK
from registry.directory import Directory
from registry.names import Bidder, ClaimRequest, ClaimResult, Names
from registry.nodes import NodeRecord, Nodes, NodeState
from registry.ownership import Owner, cluster_prefix
from registry.specs import Desired, Specs
from tests.support.agents import until
from tests.support.memory_store import MemoryStore

PREFIX = cluster_prefix("test")
NODE = "alpha-12345678"
TOML = 'schema = 1\n[[child]]\nid = "t"\nname = "t"\nrun.command = ["true"]\n'


class Interrupted(Names):
    """Names whose claims are answered only after something else has happened, and is known."""

    def __init__(self, store: MemoryStore, prefix: str) -> None:
        super().__init__(store, prefix)
        self.then: Callable[[], object] | None = None

    async def claim_many(
        self, requests: Sequence[ClaimRequest], by: Bidder, *, timeout: float = 5.0
    ) -> list[ClaimResult]:
        results = await super().claim_many(requests, by, timeout=timeout)
        if self.then is not None:
            await self.then()  # type: ignore[misc]
        return results


class Node:
    """One node that claims, without anything that would run."""

    def __init__(self, confirm: Callable[[], object] | None = None) -> None:
        self.store = MemoryStore()
        self.specs = Specs(self.store, PREFIX)
        self.names = Interrupted(self.store, PREFIX)
        self.directory = Directory(self.store, PREFIX, SYSTEM_CLOCK, lambda event: None)
        self.granted: list[tuple[Wish, Ownership]] = []
        self.on_confirm = confirm

    async def seen(self) -> None:
        await until(lambda: self.directory.revision >= self.store.revision)

    async def confirm(self, owner: Owner) -> bool:
        if self.on_confirm is not None:
            await self.on_confirm()  # type: ignore[misc]
        return True

    @asynccontextmanager
    async def claiming(self) -> AsyncIterator[asyncio.Task[None]]:
        lease = (await self.store.grant(5.0)).id
        record = NodeRecord(
            node=NODE, host="alpha", address="a:1", version="1", protocol=1, containment="full",
            state=NodeState.READY,
        )  # fmt: skip
        await Nodes(self.store, PREFIX).register(record, lease)
        following = asyncio.create_task(self.directory.run())
        await self.directory.synced()
        claims = Claims(
            host="alpha",
            node=NODE,
            lease=lease,
            directory=self.directory,
            names=self.names,
            wishes=Wishes(()),
            clock=SYSTEM_CLOCK,
            emit=lambda event: None,
            held=lambda name: any(wish.name == name for wish, _ in self.granted),
            granted=lambda wish, ownership: self.granted.append((wish, ownership)),
            confirm=self.confirm,
            silent_until=lambda owner: 0.0,
        )
        running = asyncio.create_task(claims.run())
        try:
            yield running
        finally:
            for task in (running, following):
                task.cancel()
            await asyncio.gather(running, following, return_exceptions=True)
            await self.store.close()


async def test_a_wish_deleted_while_its_claim_was_under_way_is_granted_as_it_was_claimed() -> None:
    node = Node()

    async def delete() -> None:
        await node.specs.delete("t")
        await node.seen()

    node.names.then = delete
    async with node.claiming() as running:
        await node.specs.apply("t", TOML, "d", "anna")
        await until(lambda: bool(node.granted) or running.done())
        assert not running.done()
        ((wish, ownership),) = node.granted
        assert (wish.running, ownership.name) == (True, "t")


@pytest.mark.parametrize("change", ["delete", "stop"])
async def test_nothing_is_claimed_for_a_wish_that_ended_while_the_last_owner_was_asked(change: str) -> None:
    node = Node()

    async def meanwhile() -> None:
        if change == "delete":
            await node.specs.delete("t")
        else:
            await node.specs.set_desired("t", Desired.STOPPED, "anna")
        await node.seen()

    node.on_confirm = meanwhile
    other = (await node.store.grant(5.0)).id
    async with node.claiming() as running:
        node.store.put(f"{PREFIX}names/t", b'{"node": "beta-1", "host": "beta", "claim": "c"}', other)
        await node.specs.apply("t", TOML, "d", "anna")
        await node.seen()
        node.store.delete(f"{PREFIX}names/t")
        await node.seen()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(running), 0.1)
        assert not node.granted
        assert await node.names.read_owner("t") is None
