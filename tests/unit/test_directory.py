from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from registry import events
from registry.directory import CHECK_EVERY, RELIST_EVERY, SETTLE, SILENCE, Change, Directory
from registry.errors import StoreCompacted, StoreDenied
from registry.names import Incarnation, Owner, Status, WorkerState, epoch_of
from registry.nodes import HostRecord, NodeRecord, NodeState, encode_host, encode_node
from registry.ownership import (
    PlacementRecord,
    cluster_prefix,
    encode_owner,
    encode_placement,
    encode_status,
)
from registry.specs import Desired, SpecRecord, encode_spec
from registry.store import Delete, Put, Revision, Txn
from tests.support.clocks import LoopClock
from tests.support.memory_store import MemoryStore

pytestmark = pytest.mark.looptime

PREFIX = cluster_prefix("test")


class Scene:
    """A registry that is written behind the directory's back, and what the directory said about it."""

    def __init__(self) -> None:
        self.clock = LoopClock()
        self.store = MemoryStore(self.clock)
        self.said: list[events.Event] = []
        self.changes: list[Change] = []
        self.directory = Directory(self.store, PREFIX, self.clock, self.said.append, jitter=lambda: 0.5)
        self.directory.subscribe(self.changes.append)

    def own(self, name: str, node: str = "alpha-1", *, lease: int = 0, incarnation: int = 0) -> Revision:
        value = encode_owner(
            node=node, host=node.rpartition("-")[0], claim=f"c-{name}", incarnation=incarnation
        )
        return self.store.put(f"{PREFIX}names/{name}", value, lease)

    def status(self, name: str, epoch: int, state: WorkerState = WorkerState.READY) -> None:
        status = Status(name=name, epoch=epoch, start=1, state=state, pid=9, since=0.0)
        self.store.put(f"{PREFIX}status/{name}", encode_status(status))

    def node(self, node: str, lease: int = 0) -> NodeRecord:
        record = NodeRecord(
            node=node, host=node.rpartition("-")[0], address="h:1", version="0", protocol=1,
            containment="full", state=NodeState.READY,
        )  # fmt: skip
        self.store.put(f"{PREFIX}nodes/{node}", encode_node(record), lease)
        return record

    def told(self, kind: type[events.Event]) -> list[events.Event]:
        return [event for event in self.said if type(event) is kind]

    async def until(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        """Wait, in virtual time, until ``condition`` holds."""
        deadline = self.clock.now() + seconds
        while not condition():
            assert self.clock.now() < deadline, f"not within {seconds} s; said: {self.said}"
            await asyncio.sleep(max(0.01, seconds / 500))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Directory]:
        task = asyncio.create_task(self.directory.run())
        try:
            await asyncio.wait_for(self.directory.synced(), 30)
            yield self.directory
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def scene() -> Scene:
    return Scene()


class TestReading:
    async def test_before_the_first_snapshot_it_says_that_it_knows_nothing(self, scene: Scene) -> None:
        assert not scene.directory.in_sync
        assert "has not been read yet" in scene.directory.stale_since
        assert scene.directory.lookup("sweeper") is None

    async def test_every_section_is_decoded(self, scene: Scene) -> None:
        revision = scene.own("app/sweeper")
        scene.status("app/sweeper", revision)
        scene.node("alpha-1")
        spec = SpecRecord(name="app/sweeper", toml="t", desired=Desired.RUNNING, who="w", at=1.0, digest="d")
        scene.store.put(f"{PREFIX}specs/app/sweeper", encode_spec(spec))
        scene.store.put(f"{PREFIX}hosts/alpha", encode_host(HostRecord(host="alpha", node="alpha-1")))
        record = PlacementRecord(name="app/sweeper", last_epoch=3, penalties={"beta": 1})
        scene.store.put(f"{PREFIX}placement/app/sweeper", encode_placement(record))
        scene.store.put(f"{PREFIX}incarnation", b"4")
        scene.store.put(f"{PREFIX}control/pause", b"ana")
        scene.store.put(f"{PREFIX}something/newer", b"ignored")
        async with scene.running() as directory:
            owner = directory.lookup("app/sweeper")
            assert owner == Owner(
                name="app/sweeper", node="alpha-1", host="alpha", epoch=revision, claim="c-app/sweeper",
                lease=0, mod_revision=revision,
            )  # fmt: skip
            assert directory.nodes["alpha-1"].address == "h:1"
            assert directory.specs["app/sweeper"].toml == "t"
            assert directory.hosts["alpha"].node == "alpha-1"
            assert directory.placements["app/sweeper"].penalties == {"beta": 1}
            assert directory.incarnation.number == 4
            assert directory.pause_revision > directory.incarnation.mod_revision > 0
            assert directory.revision == scene.store.revision
            assert directory.in_sync
            assert directory.stale_since == ""

    async def test_the_first_snapshot_is_one_event_and_a_change_for_each_record(self, scene: Scene) -> None:
        scene.own("sweeper")
        scene.node("alpha-1")
        async with scene.running():
            assert [type(event) for event in scene.said] == [events.DirectorySynced]
            assert {change.section for change in scene.changes} == {"owners", "nodes"}
            assert all(change.before is None for change in scene.changes)

    async def test_lookup_is_the_dictionary_itself(self, scene: Scene) -> None:
        before = scene.directory.lookup
        async with scene.running() as directory:
            scene.own("sweeper")
            await scene.until(lambda: before("sweeper") is not None)
            assert directory.lookup is before

    async def test_the_epoch_of_an_owner_is_that_of_its_claim(self, scene: Scene) -> None:
        scene.store.put(f"{PREFIX}incarnation", b"9")
        revision = scene.own("sweeper", incarnation=2)
        async with scene.running() as directory:
            owner = directory.lookup("sweeper")
            assert owner is not None
            assert owner.epoch == epoch_of(2, revision)


class TestFollowing:
    async def test_owners_come_change_and_go(self, scene: Scene) -> None:
        async with scene.running() as directory:
            first = scene.own("sweeper")
            await scene.until(lambda: directory.lookup("sweeper") is not None)
            second = scene.own("sweeper", "beta-1")
            await scene.until(lambda: directory.owners["sweeper"].node == "beta-1")
            scene.store.delete(f"{PREFIX}names/sweeper")
            await scene.until(lambda: directory.lookup("sweeper") is None)
        assert scene.said[1:] == [
            events.OwnerChanged(name="sweeper", node="alpha-1", epoch=first),
            events.OwnerChanged(name="sweeper", node="beta-1", epoch=second),
            events.OwnerGone(name="sweeper", node="beta-1", epoch=second),
        ]

    @pytest.mark.slow
    async def test_nodes_join_and_leave_and_the_departed_are_remembered(self, scene: Scene) -> None:
        async with scene.running() as directory:
            lease = (await scene.store.grant(5.0)).id
            record = scene.node("alpha-1", lease)
            await scene.until(lambda: "alpha-1" in directory.nodes)
            await scene.until(lambda: "alpha-1" not in directory.nodes)
            assert directory.departed["alpha-1"].address == record.address
            assert scene.said[1:] == [events.NodeJoined(node="alpha-1"), events.NodeLeft(node="alpha-1")]
            await scene.until(lambda: "alpha-1" not in directory.departed, 700)

    async def test_a_node_that_returns_is_not_departed(self, scene: Scene) -> None:
        async with scene.running() as directory:
            scene.node("alpha-1")
            scene.store.delete(f"{PREFIX}nodes/alpha-1")
            await scene.until(lambda: "alpha-1" in directory.departed)
            scene.node("alpha-1")
            await scene.until(lambda: "alpha-1" in directory.nodes)
            assert directory.departed == {}

    async def test_a_release_is_known_when_the_owner_is_seen_to_go(self, scene: Scene) -> None:
        epoch = scene.own("sweeper")
        record = PlacementRecord(name="sweeper", last_epoch=epoch)
        known: list[int] = []
        async with scene.running() as directory:

            def look(change: Change) -> None:
                if change.section == "owners" and change.after is None:
                    known.append(directory.placements["sweeper"].last_epoch)

            directory.subscribe(look)
            scene.store.apply(
                Txn(
                    then=(
                        Put(f"{PREFIX}placement/sweeper", encode_placement(record)),
                        Delete(f"{PREFIX}names/sweeper"),
                    )
                )
            )
            await scene.until(lambda: known != [])
        assert known == [epoch]

    async def test_only_the_present_owners_status_counts(self, scene: Scene) -> None:
        first = scene.own("sweeper")
        scene.status("sweeper", first)
        async with scene.running() as directory:
            status = directory.status("sweeper")
            assert status is not None
            assert status.state == "ready"
            scene.own("sweeper", "beta-1")
            await scene.until(lambda: directory.owners["sweeper"].node == "beta-1")
            assert directory.status("sweeper") is None
            assert directory.statuses["sweeper"].epoch == first
            assert directory.status("janitor") is None

    async def test_waiting_for_a_change_of_a_name(self, scene: Scene) -> None:
        async with scene.running() as directory:
            other, ours = directory.changed("janitor"), directory.changed("sweeper")
            again = directory.changed("sweeper")
            epoch = scene.own("sweeper")
            await asyncio.wait_for(ours, 5)
            await asyncio.wait_for(again, 5)
            assert directory.lookup("sweeper") is not None
            assert not other.done()
            ready = directory.changed("sweeper")
            scene.status("sweeper", epoch)
            await asyncio.wait_for(ready, 5)
            assert directory.status("sweeper") is not None
            other.cancel()

    async def test_a_waiter_that_gave_up_is_forgotten(self, scene: Scene) -> None:
        async with scene.running() as directory:
            waiter = directory.changed("sweeper")
            waiter.cancel()
            await asyncio.sleep(0)
            scene.own("sweeper")
            await asyncio.wait_for(directory.changed("sweeper"), 5)

    async def test_a_subscriber_that_left_hears_nothing(self, scene: Scene) -> None:
        heard: list[Change] = []
        async with scene.running() as directory:
            leave = directory.subscribe(heard.append)
            leave()
            scene.own("sweeper")
            await scene.until(lambda: directory.lookup("sweeper") is not None)
        assert heard == []

    @pytest.mark.slow
    async def test_ten_thousand_changes_at_once_leave_the_loop_running(self, scene: Scene) -> None:
        async with scene.running() as directory:
            lease = (await scene.store.grant(60.0)).id
            for number in range(10_000):
                scene.own(f"n{number}", lease=lease)
            await scene.until(lambda: len(directory.owners) == 10_000)
            scene.changes.clear()
            turns = 0
            scene.store.end_lease(lease)
            while len(directory.owners) > 0:
                await asyncio.sleep(0)
                turns += 1
            assert turns >= 10
            assert len(scene.changes) == 10_000


class TestMalformedValues:
    async def test_are_reported_and_do_not_stop_the_directory(self, scene: Scene) -> None:
        scene.store.put(f"{PREFIX}specs/sweeper", b"{")
        scene.store.put(f"{PREFIX}incarnation", b"one")
        async with scene.running() as directory:
            assert [type(event) for event in scene.said[:2]] == [events.RecordMalformed] * 2
            scene.own("sweeper")
            await scene.until(lambda: directory.lookup("sweeper") is not None)
            assert directory.specs == {}
            assert directory.incarnation.number == 0

    async def test_an_unreadable_owner_key_ends_the_ownership_before(self, scene: Scene) -> None:
        epoch = scene.own("sweeper")
        async with scene.running() as directory:
            scene.store.put(f"{PREFIX}names/sweeper", b"garbage")
            await scene.until(lambda: directory.lookup("sweeper") is None)
            assert events.OwnerGone(name="sweeper", node="alpha-1", epoch=epoch) in scene.said
            await asyncio.sleep(CHECK_EVERY * 3)
            assert scene.told(events.DirectoryLost) == []

    async def test_an_unreadable_spec_leaves_the_one_before(self, scene: Scene) -> None:
        spec = SpecRecord(name="sweeper", toml="t", desired=Desired.RUNNING, who="w", at=1.0, digest="d")
        scene.store.put(f"{PREFIX}specs/sweeper", encode_spec(spec))
        async with scene.running() as directory:
            scene.store.put(f"{PREFIX}specs/sweeper", b"{}")
            await scene.until(lambda: scene.told(events.RecordMalformed) != [])
            assert directory.specs["sweeper"].toml == "t"


class TestTrouble:
    async def test_silence_makes_it_old_and_a_sign_of_life_new(self, scene: Scene) -> None:
        scene.own("sweeper")
        async with scene.running() as directory:
            scene.store.pause()
            await scene.until(lambda: not directory.in_sync, SILENCE + 1)
            assert "nothing heard from etcd" in directory.stale_since
            assert directory.lookup("sweeper") is not None
            scene.own("janitor")
            scene.store.resume()
            await scene.until(lambda: directory.in_sync, 5)
            assert directory.lookup("janitor") is not None
            assert len(scene.told(events.DirectoryLost)) == 1
            assert len(scene.told(events.DirectorySynced)) == 2

    async def test_it_waits_for_ever_for_a_store_that_is_away(self, scene: Scene) -> None:
        scene.store.go_away()
        task = asyncio.create_task(scene.directory.run())
        await asyncio.sleep(300)
        assert not task.done()
        assert not scene.directory.in_sync
        assert "no member can be reached" in scene.directory.stale_since
        assert scene.store.calls < 300
        scene.store.resume()
        await asyncio.wait_for(scene.directory.synced(), 10)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def test_after_a_compaction_it_finds_what_it_missed(self, scene: Scene) -> None:
        scene.own("stays")
        gone = scene.own("goes")
        scene.own("moves")
        async with scene.running() as directory:
            scene.store.pause()
            await asyncio.sleep(1)
            scene.store.delete(f"{PREFIX}names/goes")
            moved = scene.own("moves", "beta-1")
            came = scene.own("comes")
            scene.own("unseen")
            scene.store.delete(f"{PREFIX}names/unseen")
            scene.store.compact()
            scene.changes.clear()
            scene.store.resume()
            await scene.until(lambda: directory.lookup("comes") is not None)
            await scene.until(lambda: directory.in_sync)
            assert sorted(directory.owners) == ["comes", "moves", "stays"]
        assert {(change.key, change.after is not None) for change in scene.changes} == {
            ("goes", False),
            ("moves", True),
            ("comes", True),
        }
        assert events.OwnerGone(name="goes", node="alpha-1", epoch=gone) in scene.said
        assert events.OwnerChanged(name="moves", node="beta-1", epoch=moved) in scene.said
        assert events.OwnerChanged(name="comes", node="alpha-1", epoch=came) in scene.said

    @pytest.mark.parametrize("error", [StoreCompacted("compacted", 3), StoreDenied("bad password")])
    async def test_a_watch_that_breaks_is_told_and_begun_again(
        self, scene: Scene, error: StoreCompacted | StoreDenied
    ) -> None:
        async with scene.running() as directory:
            scene.store.break_watches(error)
            await scene.until(lambda: scene.told(events.DirectoryLost) != [])
            assert scene.told(events.DirectoryLost) == [events.DirectoryLost(reason=str(error))]
            await scene.until(lambda: directory.in_sync)
            scene.own("sweeper")
            await scene.until(lambda: directory.lookup("sweeper") is not None)

    async def test_a_lost_event_is_noticed_by_the_fingerprint(self, scene: Scene) -> None:
        scene.own("sweeper")
        async with scene.running() as directory:
            with scene.store.losing_events():
                scene.store.delete(f"{PREFIX}names/sweeper")
            await scene.until(
                lambda: directory.lookup("sweeper") is None and directory.in_sync, CHECK_EVERY + SETTLE + 2
            )
            assert "an event was lost" in scene.told(events.DirectoryLost)[0].describe()

    async def test_a_watch_that_is_silent_although_etcd_answers_is_begun_again(self, scene: Scene) -> None:
        async with scene.running() as directory:
            scene.store.mute_watches()
            await scene.until(lambda: not directory.in_sync)
            await scene.until(lambda: directory.in_sync, 2 * CHECK_EVERY)
            scene.own("sweeper")
            await scene.until(lambda: directory.lookup("sweeper") is not None, 1)

    async def test_pause_and_incarnation_come_and_go(self, scene: Scene) -> None:
        async with scene.running() as directory:
            incarnation = scene.store.put(f"{PREFIX}incarnation", b"2")
            pause = scene.store.put(f"{PREFIX}control/pause", b"")
            await scene.until(lambda: directory.pause_revision == pause)
            assert directory.incarnation == Incarnation(2, incarnation)
            scene.store.delete(f"{PREFIX}incarnation")
            scene.store.delete(f"{PREFIX}control/pause")
            await scene.until(lambda: directory.pause_revision == 0)
            assert directory.incarnation == Incarnation()
        assert [change.section for change in scene.changes] == ["incarnation", "pause"] * 2

    async def test_a_lost_event_outside_the_owners_is_found_by_reading_again(self, scene: Scene) -> None:
        async with scene.running() as directory:
            with scene.store.losing_events():
                scene.node("alpha-1")
            await scene.until(lambda: "alpha-1" in directory.nodes, RELIST_EVERY * 1.2)
            assert scene.told(events.DirectoryLost) == []

    @pytest.mark.slow
    async def test_steady_change_is_not_mistaken_for_a_lost_event(self, scene: Scene) -> None:
        async with scene.running() as directory:
            for number in range(700):
                scene.own(f"n{number % 50}")
                if number % 3 == 0:
                    scene.store.delete(f"{PREFIX}names/n{(number * 7) % 50}")
                await asyncio.sleep(0.04)
            assert directory.in_sync
            assert scene.told(events.DirectoryLost) == []

    async def test_a_history_that_went_backwards_is_taken_as_it_is(self, scene: Scene) -> None:
        for number in range(20):
            scene.own(f"n{number}")
        older = MemoryStore(scene.clock)
        async with scene.running() as directory:
            older.put(f"{PREFIX}names/n3", encode_owner(node="old-1", host="old", claim="c", incarnation=0))
            scene.directory._store = older
            scene.store.break_watches(StoreCompacted("restored"))
            await scene.until(lambda: len(directory.owners) == 1)
            await scene.until(lambda: directory.in_sync)
            assert directory.owners["n3"].node == "old-1"
            assert directory.revision == older.revision
            await asyncio.sleep(CHECK_EVERY * 2)
            assert directory.in_sync

    async def test_a_failing_subscriber_ends_it_loudly(self, scene: Scene) -> None:
        def fail(change: Change) -> None:
            raise ZeroDivisionError(change.key)

        scene.directory.subscribe(fail)
        scene.own("sweeper")
        with pytest.raises(ExceptionGroup) as caught:
            await scene.directory.run()
        assert caught.group_contains(ZeroDivisionError)
