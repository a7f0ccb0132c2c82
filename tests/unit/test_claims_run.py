"""Claims at work: a name must be taken whatever order the news about it come in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from node_agent.claims import Claims
from node_agent.spec.child import parse
from node_agent.states import Ownership
from node_agent.wishes import Wish, Wishes
from registry import events
from registry.directory import SILENCE, Directory
from registry.names import Bidder, ClaimRequest, ClaimResult, Names
from registry.nodes import NodeRecord, NodeState, encode_node
from registry.ownership import Owner, cluster_prefix, encode_owner
from registry.specs import Desired, SpecRecord, encode_spec
from tests.support.clocks import LoopClock
from tests.support.memory_store import MemoryStore

pytestmark = pytest.mark.looptime

PREFIX = cluster_prefix("test")
NODE, LEASE_TTL = "alpha-1", 1000.0


class Scene:
    """One node's claims on a registry that is written behind its back."""

    def __init__(self) -> None:
        self.clock = LoopClock()
        self.store = MemoryStore(self.clock)
        self.directory = Directory(self.store, PREFIX, self.clock, lambda event: None, jitter=lambda: 0.5)
        self.granted: list[str] = []
        self.held: set[str] = set()
        self.said: list[events.Event] = []
        self.leaves_when_it_claims = False
        self.known_gone = True
        self.silent_until = 0.0
        self.answers = asyncio.Event()
        self.answers.set()

    def wish(self, name: str) -> None:
        text = f'schema = 1\n[[child]]\nid = "t"\nname = "{name}"\nrun.command = ["true"]\n'
        (spec,) = parse(text, "x.toml")
        record = SpecRecord(
            name=name, toml=text, desired=Desired.RUNNING, who="anna", at=0.0, digest=spec.digest
        )
        self.store.put(f"{PREFIX}specs/{name}", encode_spec(record))

    def owned_elsewhere(self, name: str) -> None:
        value = encode_owner(node="beta-1", host="beta", claim="c", incarnation=0)
        self.store.put(f"{PREFIX}names/{name}", value)

    @asynccontextmanager
    async def claiming(self) -> AsyncIterator[Claims]:
        lease = await self.store.grant(LEASE_TTL)
        record = NodeRecord(
            node=NODE, host="alpha", address="h:1", version="0", protocol=1, containment="full",
            state=NodeState.READY,
        )  # fmt: skip
        self.store.put(f"{PREFIX}nodes/{NODE}", encode_node(record), lease.id)
        claims = Claims(
            host="alpha", node=NODE, lease=lease.id, directory=self.directory,
            names=_Names(self), wishes=Wishes(()), clock=self.clock, emit=self.said.append,
            held=self.held.__contains__, granted=self._granted, confirm=self._gone,
            silent_until=lambda owner: self.silent_until,
        )  # fmt: skip
        tasks = [asyncio.create_task(self.directory.run()), asyncio.create_task(claims.run())]
        try:
            await asyncio.wait_for(self.directory.synced(), 30)
            yield claims
            assert not any(task.done() for task in tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _granted(self, wish: Wish, ownership: Ownership) -> None:
        self.granted.append(ownership.name)
        self.held.add(ownership.name)

    async def _gone(self, owner: Owner) -> bool:
        return self.known_gone


class _Names(Names):
    def __init__(self, scene: Scene) -> None:
        super().__init__(scene.store, PREFIX)
        self._scene = scene

    async def claim_many(
        self, requests: Sequence[ClaimRequest], by: Bidder, *, timeout: float = 5.0
    ) -> list[ClaimResult]:
        results = await super().claim_many(requests, by, timeout=timeout)
        if self._scene.leaves_when_it_claims:
            self._scene.held |= {request.name for request in requests}
        await self._scene.answers.wait()
        return results


@pytest.fixture
async def scene() -> Scene:
    return Scene()


async def test_a_name_that_was_freed_while_etcd_was_silent_is_claimed(scene: Scene) -> None:
    """The news come before the copy counts as in sync again, and nothing else may ever happen."""
    scene.wish("ticker")
    scene.owned_elsewhere("ticker")
    async with scene.claiming():
        await asyncio.sleep(1)
        scene.store.pause()
        await asyncio.sleep(SILENCE + 1)
        assert not scene.directory.in_sync
        scene.store.delete(f"{PREFIX}names/ticker")
        scene.store.resume()
        await asyncio.sleep(5)
        assert scene.directory.in_sync
        assert scene.granted == ["ticker"]


async def test_an_owner_that_nobody_can_confirm_gone_is_waited_for_until_it_must_be_silent(
    scene: Scene,
) -> None:
    scene.known_gone = False
    scene.wish("ticker")
    scene.owned_elsewhere("ticker")
    async with scene.claiming():
        await asyncio.sleep(1)
        scene.silent_until = scene.clock.now() + 10
        scene.store.delete(f"{PREFIX}names/ticker")
        await asyncio.sleep(9)
        assert scene.granted == []
        assert [event.why for event in scene.said if isinstance(event, events.ClaimLost)] == [
            "waiting 10.0 s for beta to fall silent"
        ]
        await asyncio.sleep(3)
        assert scene.granted == ["ticker"]


async def test_a_name_that_is_due_does_not_keep_the_loop_busy_while_etcd_is_silent(scene: Scene) -> None:
    async with scene.claiming() as claims:
        scene.held.add("ticker")
        scene.wish("ticker")
        await asyncio.sleep(1)
        claims._not_before["ticker"] = scene.clock.now() + 10
        scene.held.clear()
        claims.look_again()
        await asyncio.sleep(1)
        scene.store.pause()
        began, sleeps = scene.clock.now(), 0
        sleep = claims._sleep

        async def counted(until: float | None) -> None:
            nonlocal sleeps
            sleeps += 1
            assert sleeps < 100, "virtual time stands still"
            await sleep(until)

        claims._sleep = counted  # type: ignore[method-assign]
        await asyncio.sleep(30)
        assert not scene.directory.in_sync
        assert scene.clock.now() >= began + 30


async def test_a_name_that_comes_free_here_is_claimed_again(scene: Scene) -> None:
    """Its release is seen in the directory before this host is done with it."""
    scene.wish("ticker")
    async with scene.claiming() as claims:
        await asyncio.sleep(1)
        assert scene.granted == ["ticker"]
        scene.store.delete(f"{PREFIX}names/ticker")
        await asyncio.sleep(1)
        assert scene.granted == ["ticker"]
        scene.held.clear()
        claims.look_again()
        await asyncio.sleep(1)
        assert scene.granted == ["ticker", "ticker"]


async def test_a_name_won_by_a_host_that_has_begun_to_leave_is_released(scene: Scene) -> None:
    """A process started then would be forgotten by the stop that is under way."""
    scene.wish("ticker")
    scene.leaves_when_it_claims = True
    async with scene.claiming():
        await asyncio.sleep(1)
        assert not scene.granted
        assert scene.directory.lookup("ticker") is None
        assert scene.directory.placements["ticker"].last_epoch


async def test_who_asks_whether_a_name_runs_here_waits_for_the_answer_to_a_claim_of_it(scene: Scene) -> None:
    """It is won in etcd already, and its process starts when that is heard."""
    scene.wish("ticker")
    scene.answers.clear()
    async with scene.claiming() as claims:
        await asyncio.sleep(1)
        assert scene.directory.lookup("ticker") is not None
        asked = asyncio.create_task(claims.answered("ticker"))
        await asyncio.sleep(1)
        assert not asked.done()
        await asyncio.wait_for(claims.answered("other"), 1)
        scene.answers.set()
        await asked
        assert scene.granted == ["ticker"]


async def test_a_claim_that_is_given_up_keeps_nobody_waiting(scene: Scene) -> None:
    scene.wish("ticker")
    scene.answers.clear()
    async with scene.claiming() as claims:
        await asyncio.sleep(1)
        asked = asyncio.create_task(claims.answered("ticker"))
        await asyncio.sleep(1)
    await asyncio.wait_for(asked, 1)
    assert not scene.granted
