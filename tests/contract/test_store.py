"""What every Store does: etcd, and the fake that stands for it in other tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal

import pytest

from registry.errors import LeaseNotFound, StoreCompacted, StoreUnavailable
from registry.etcd import EtcdStore
from registry.store import (
    Changed,
    Compare,
    Delete,
    Deleted,
    Get,
    Put,
    Revision,
    Store,
    Txn,
    absent,
    exists,
    unchanged,
)
from tests.support.etcd import Shared
from tests.support.memory_store import MemoryStore
from tests.support.watching import events, keys, sign_of_life, watching


@dataclass(frozen=True, slots=True)
class Place:
    """A store, a prefix in it that is empty, and how to compact it."""

    store: Store
    prefix: str
    compact: Callable[[Revision], object]

    def key(self, name: str) -> str:
        return self.prefix + name

    async def put(self, name: str, value: bytes = b"", lease: int = 0) -> Revision:
        return (await self.store.txn([], [Put(self.key(name), value, lease)])).revision


@pytest.fixture(params=["etcd", "memory"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    if request.param == "memory":
        memory = MemoryStore()
        yield Place(memory, "/test/", memory.compact)
        await memory.close()
        return
    shared: Shared = request.getfixturevalue("etcd")
    store = EtcdStore(shared.endpoints)
    yield Place(store, shared.prefix, lambda revision: shared.server.ctl("compaction", str(revision)))
    await store.close()


async def test_a_key_that_was_never_written_is_none(place: Place) -> None:
    assert await place.store.get(place.key("a")) is None


async def test_a_key_tells_when_it_was_made_and_last_written(place: Place) -> None:
    first = await place.put("a", b"1")
    second = await place.put("a", b"2")

    kv = await place.store.get(place.key("a"))

    assert kv is not None
    assert (kv.key, kv.value, kv.lease) == (place.key("a"), b"2", 0)
    assert (kv.create_revision, kv.mod_revision, kv.version) == (first, second, 2)


async def test_a_key_made_again_starts_at_version_one(place: Place) -> None:
    await place.put("a")
    await place.store.txn([], [Delete(place.key("a"))])
    revision = await place.put("a")

    kv = await place.store.get(place.key("a"))

    assert kv is not None
    assert (kv.create_revision, kv.mod_revision, kv.version) == (revision, revision, 1)


async def test_a_transaction_takes_the_branch_its_compares_choose(place: Place) -> None:
    key = place.key("a")
    won = await place.store.txn([absent(key)], [Put(key, b"mine")], [Get(key)])
    lost = await place.store.txn([absent(key)], [Put(key, b"yours")], [Get(key)])

    assert won.succeeded
    assert won.results == (None,)
    assert not lost.succeeded
    assert [kv.value for kv in lost.kvs(0)] == [b"mine"]


async def test_of_many_who_create_a_key_at_once_one_wins(place: Place) -> None:
    key = place.key("a")
    async with asyncio.TaskGroup() as group:
        tries = [group.create_task(place.store.txn([absent(key)], [Put(key, b"%d" % n)])) for n in range(16)]

    assert sum(task.result().succeeded for task in tries) == 1


async def test_what_one_transaction_writes_has_one_revision(place: Place) -> None:
    result = await place.store.txn([], [Put(place.key("a"), b""), Put(place.key("b"), b"")])
    snapshot = await place.store.snapshot(place.prefix)

    assert {kv.mod_revision for kv in snapshot.kvs} == {result.revision}
    assert snapshot.revision == result.revision


async def test_a_transaction_that_writes_nothing_makes_no_revision(place: Place) -> None:
    revision = await place.put("a")
    result = await place.store.txn(
        [exists(place.key("b"))], [Put(place.key("c"), b"")], [Get(place.prefix, True)]
    )

    assert result.revision == revision
    assert [kv.key for kv in result.kvs(0)] == [place.key("a")]


async def test_reads_in_a_transaction_see_its_writes_and_prefixes_are_in_order(place: Place) -> None:
    await place.put("b")
    result = await place.store.txn([], [Put(place.key("a"), b""), Get(place.prefix, prefix=True)])

    assert [kv.key for kv in result.kvs(1)] == [place.key("a"), place.key("b")]


async def test_a_prefix_does_not_reach_into_its_neighbours(place: Place) -> None:
    for name in ("a", "a/1", "a/2", "a0", "b"):
        await place.put(name)

    deleted = await place.store.txn([], [Delete(place.key("a/"), prefix=True)])
    left = await place.store.snapshot(place.prefix)

    assert deleted.results == (2,)
    assert [kv.key for kv in left.kvs] == [place.key("a"), place.key("a0"), place.key("b")]


async def test_keys_need_not_be_ascii(place: Place) -> None:
    await place.put("zürich/ÿ")
    snapshot = await place.store.snapshot(place.key("zürich/"))

    assert [kv.key for kv in snapshot.kvs] == [place.key("zürich/ÿ")]


async def test_nested_transactions_choose_their_own_branch(place: Place) -> None:
    await place.put("taken", b"other")
    wanted = [place.key("free"), place.key("taken")]

    result = await place.store.txn(
        [], [Txn([absent(key)], [Put(key, b"mine")], [Get(key)]) for key in wanted]
    )

    assert result.nested(0).succeeded
    assert not result.nested(1).succeeded
    assert [kv.value for kv in result.nested(1).kvs(0)] == [b"other"]
    assert result.nested(0).revision == result.revision


async def test_nested_compares_look_at_the_state_before_the_whole_transaction(place: Place) -> None:
    key = place.key("a")
    result = await place.store.txn([], [Put(key, b""), Txn([exists(key)], [Get(key)])])

    assert not result.nested(1).succeeded


@pytest.mark.parametrize("target", ["create", "mod", "version"])
async def test_numbers_are_compared(place: Place, target: Literal["create", "mod", "version"]) -> None:
    key = place.key("a")
    await place.put("a")
    await place.put("a")
    kv = await place.store.get(key)
    assert kv is not None
    number = {"create": kv.create_revision, "mod": kv.mod_revision, "version": kv.version}[target]

    async def holds(op: Literal["=", "!=", "<", ">"], operand: int) -> bool:
        return (await place.store.txn([Compare(key, target, op, operand)], [])).succeeded

    assert [await holds("=", number), await holds("=", number + 1)] == [True, False]
    assert [await holds("!=", number), await holds("!=", number + 1)] == [False, True]
    assert [await holds("<", number), await holds("<", number + 1)] == [False, True]
    assert [await holds(">", number), await holds(">", number - 1)] == [False, True]


async def test_values_are_compared_and_an_absent_key_has_none(place: Place) -> None:
    await place.put("a", b"m")
    compares = {
        Compare(place.key("a"), "value", "=", b"m"): True,
        Compare(place.key("a"), "value", "!=", b"m"): False,
        Compare(place.key("a"), "value", "<", b"n"): True,
        Compare(place.key("a"), "value", ">", b"l"): True,
        Compare(place.key("nothing"), "value", "=", b""): False,
        Compare(place.key("nothing"), "value", "!=", b"m"): False,
    }

    assert {compare: (await place.store.txn([compare], [])).succeeded for compare in compares} == compares


async def test_an_absent_key_compares_as_zero(place: Place) -> None:
    key = place.key("a")
    compares = [
        absent(key),
        unchanged(key, 0),
        Compare(key, "version", "=", 0),
        Compare(key, "lease", "=", 0),
    ]

    assert (await place.store.txn(compares, [])).succeeded
    assert not (await place.store.txn([exists(key)], [])).succeeded


async def test_the_lease_of_a_key_is_compared(place: Place) -> None:
    lease = await place.store.grant(60)
    await place.put("a", lease=lease.id)
    mine = Compare(place.key("a"), "lease", "=", lease.id)

    assert (await place.store.txn([mine], [])).succeeded
    await place.put("a")
    assert not (await place.store.txn([mine], [])).succeeded
    await place.store.revoke(lease.id)


async def test_a_snapshot_of_nothing_has_a_revision_to_watch_from(place: Place) -> None:
    revision = await place.put("elsewhere")
    snapshot = await place.store.snapshot(place.key("nothing/"))

    assert snapshot.kvs == ()
    assert snapshot.revision == revision


async def test_a_fingerprint_is_the_count_and_the_newest_revision(place: Place) -> None:
    assert await place.store.fingerprint(place.prefix) == (0, 0)
    await place.put("a")
    newest = await place.put("b")
    await place.put("c")
    await place.store.txn([], [Delete(place.key("c"))])

    assert await place.store.fingerprint(place.prefix) == (2, newest)


async def test_a_lease_is_at_least_as_long_as_asked(place: Place) -> None:
    lease = await place.store.grant(7)

    assert lease.ttl >= 7
    assert await place.store.keepalive(lease.id, timeout=2) == lease.ttl
    await place.store.revoke(lease.id)


async def test_a_revoked_lease_takes_its_keys_along(place: Place) -> None:
    lease = await place.store.grant(60)
    await place.put("leased", lease=lease.id)
    await place.put("kept")

    await place.store.revoke(lease.id)

    assert await place.store.get(place.key("leased")) is None
    assert await place.store.get(place.key("kept")) is not None


async def test_revoking_twice_is_fine(place: Place) -> None:
    lease = await place.store.grant(60)
    await place.store.revoke(lease.id)
    await place.store.revoke(lease.id)


async def test_a_revoked_lease_is_not_kept_alive(place: Place) -> None:
    lease = await place.store.grant(60)
    await place.store.revoke(lease.id)

    with pytest.raises(LeaseNotFound):
        await place.store.keepalive(lease.id, timeout=2)


async def test_a_key_under_a_dead_lease_is_not_written_nor_anything_with_it(place: Place) -> None:
    lease = await place.store.grant(60)
    await place.store.revoke(lease.id)

    with pytest.raises(LeaseNotFound):
        await place.store.txn([], [Put(place.key("a"), b""), Put(place.key("b"), b"", lease.id)])
    assert await place.store.snapshot(place.prefix) == await place.store.snapshot(place.prefix)
    assert await place.store.get(place.key("a")) is None


@pytest.mark.slow
async def test_a_lease_that_is_not_kept_alive_ends(place: Place) -> None:
    lease = await place.store.grant(1)
    start = await place.put("a", lease=lease.id)
    async with watching(place.store, place.prefix, start + 1) as watch:
        (gone,) = await events(watch, 1)

    assert isinstance(gone, Deleted)
    with pytest.raises(LeaseNotFound):
        await place.store.keepalive(lease.id, timeout=2)


async def test_a_watch_shows_each_change_once_and_in_order(place: Place) -> None:
    start = await place.put("old")
    async with watching(place.store, place.prefix, start + 1) as watch:
        await sign_of_life(watch)
        await place.put("a", b"1")
        await place.put("a", b"2")
        revision = (await place.store.txn([], [Delete(place.key("a"))])).revision
        seen = await events(watch, 3)

    assert [event.kv.value for event in seen if isinstance(event, Changed)] == [b"1", b"2"]
    assert seen[2:] == [Deleted(place.key("a"), revision)]


async def test_a_watch_shows_what_happened_before_it_began(place: Place) -> None:
    start = await place.put("a")
    await place.put("b")
    await place.put("c")
    async with watching(place.store, place.prefix, start + 1) as watch:
        assert keys(await events(watch, 2)) == [place.key("b"), place.key("c")]


async def test_a_watch_sees_only_its_prefix(place: Place) -> None:
    start = await place.put("in/1")
    async with watching(place.store, place.key("in/"), start) as watch:
        await place.put("in")
        await place.put("in0")
        await place.put("in/2")
        assert keys(await events(watch, 2)) == [place.key("in/1"), place.key("in/2")]


async def test_all_that_one_transaction_changed_is_seen(place: Place) -> None:
    start = await place.put("a")
    async with watching(place.store, place.prefix, start + 1) as watch:
        await sign_of_life(watch)
        result = await place.store.txn(
            [], [Delete(place.key("a")), Put(place.key("b"), b""), Put(place.key("c"), b"")]
        )
        seen = await events(watch, 3)

    assert sorted(keys(seen)) == [place.key("a"), place.key("b"), place.key("c")]
    revisions = {e.kv.mod_revision if isinstance(e, Changed) else e.mod_revision for e in seen}
    assert revisions == {result.revision}


@pytest.mark.slow
async def test_an_idle_watch_gives_a_sign_of_life_every_second(place: Place) -> None:
    start = await place.put("a")
    async with watching(place.store, place.prefix, start + 1) as watch:
        for _ in range(3):
            await sign_of_life(watch, seconds=1.5)


async def test_a_watch_from_a_compacted_revision_says_so(place: Place) -> None:
    start = await place.put("a")
    await place.put("a")
    newest = await place.put("a")
    await asyncio.to_thread(place.compact, newest)

    async with watching(place.store, place.prefix, start) as watch:
        with pytest.raises(StoreCompacted) as raised:
            await events(watch, 1)
    assert raised.value.revision == newest


async def test_a_snapshot_and_a_watch_work_after_a_compaction(place: Place) -> None:
    await place.put("a")
    newest = await place.put("a")
    await asyncio.to_thread(place.compact, newest)

    snapshot = await place.store.snapshot(place.prefix)
    async with watching(place.store, place.prefix, snapshot.revision + 1) as watch:
        await place.put("b")
        assert keys(await events(watch, 1)) == [place.key("b")]


async def test_members_tell_how_they_are(place: Place) -> None:
    (member,) = await place.store.members()

    assert member.leader
    assert member.has_leader
    assert member.version.startswith("3.")
    assert member.error == ""


async def test_a_closed_store_fails_calls(place: Place) -> None:
    await place.store.close()

    with pytest.raises(StoreUnavailable):
        await place.store.get(place.key("a"))
