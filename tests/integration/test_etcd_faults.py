"""What becomes of requests and watches when members die, hang, lose their quorum or are restored."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator

import pytest

from registry.clock import SYSTEM_CLOCK
from registry.errors import (
    StoreAmbiguous,
    StoreCompacted,
    StoreError,
    StoreRestored,
    StoreUnavailable,
)
from registry.etcd import EtcdStore
from registry.store import Put, Revision, WatchBatch, absent
from tests.support.etcd import Etcd, Shared, free_port, running
from tests.support.watching import events, keys, sign_of_life, watching

pytestmark = pytest.mark.slow


@contextlib.asynccontextmanager
async def connected(*endpoints: str) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(endpoints)
    try:
        yield store
    finally:
        await store.close()


async def put(store: EtcdStore, key: str) -> Revision:
    """Write a key however often it takes: here it does no harm."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(StoreAmbiguous, StoreUnavailable):
                return (await store.txn([], [Put(key, b"")])).revision


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer."""
    start = SYSTEM_CLOCK.now()
    yield
    assert SYSTEM_CLOCK.now() - start < seconds


def followers_first(cluster: Etcd) -> tuple[str, ...]:
    leader = cluster.leader().endpoint
    return (*(endpoint for endpoint in cluster.endpoints if endpoint != leader), leader)


async def test_a_killed_member_is_left_for_the_next(etcd_cluster: Etcd) -> None:
    endpoints = followers_first(etcd_cluster)
    async with connected(*endpoints) as store:
        await put(store, "/a")
        etcd_cluster.member(endpoints[0]).kill()

        with within(2.0):
            assert await store.get("/a") is not None


async def test_a_hanging_member_is_left_after_one_attempt(etcd_cluster: Etcd) -> None:
    endpoints = followers_first(etcd_cluster)
    async with connected(*endpoints) as store:
        await put(store, "/a")
        etcd_cluster.member(endpoints[0]).pause()

        with within(3.0):  # asking it each time would take at least 10 x 0.6 s
            for _ in range(10):
                assert await store.get("/a") is not None


async def test_a_write_at_a_hanging_member_may_have_happened(etcd_cluster: Etcd) -> None:
    first, *others = followers_first(etcd_cluster)
    async with connected(first) as store, connected(*others) as witness:
        await put(store, "/a")
        etcd_cluster.member(first).pause()

        with pytest.raises(StoreAmbiguous):
            await store.txn([absent("/b")], [Put("/b", b"mine")])

        assert await witness.get("/b") is None


async def test_a_write_to_a_member_that_is_not_there_surely_did_not_happen(etcd: Shared) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    async with connected(nobody, *etcd.endpoints) as store:
        key = f"{etcd.prefix}a"
        result = await store.txn([absent(key)], [Put(key, b"")])

        assert result.succeeded
        assert [bool(member.error) for member in await store.members()] == [True, False]


async def test_nobody_there_is_unavailable_in_time(etcd: Shared) -> None:
    async with connected(f"http://127.0.0.1:{free_port()}") as store:
        with within(2.0), pytest.raises(StoreUnavailable):
            await store.txn([], [Put("/a", b"")], timeout=1.0)


async def test_the_leader_may_be_killed(etcd_cluster: Etcd) -> None:
    leader = etcd_cluster.leader()
    async with connected(leader.endpoint, *etcd_cluster.endpoints) as store:
        await put(store, "/a")
        leader.kill()

        with within(8.0):
            await put(store, "/b")


async def test_a_minority_refuses_and_recovers(etcd_cluster: Etcd) -> None:
    cut_off, *others = etcd_cluster.members
    async with connected(cut_off.endpoint) as store:
        await put(store, "/before")
        for member in others:
            member.pause()

        async def until_it_notices() -> None:
            while True:
                with within(2.5), contextlib.suppress(StoreAmbiguous):
                    await store.txn([absent("/during")], [Put("/during", b"")], timeout=1.0)

        async with asyncio.timeout(20):
            with pytest.raises(StoreUnavailable, match="no leader"):
                await until_it_notices()
        (status,) = await store.members()
        assert not status.has_leader

        for member in others:
            member.resume()
        await put(store, "/after")


async def test_a_minority_ends_the_watchs_signs_of_life(etcd_cluster: Etcd) -> None:
    cut_off, *others = etcd_cluster.members
    seen = asyncio.Queue[WatchBatch]()

    async def read(store: EtcdStore, start: Revision) -> None:
        async with watching(store, "/", start) as watch:
            async for batch in watch:
                seen.put_nowait(batch)

    async def until_silent(seconds: float) -> None:
        while True:
            async with asyncio.timeout(seconds):
                await seen.get()

    async with connected(cut_off.endpoint) as store:
        reading = asyncio.ensure_future(read(store, await put(store, "/a") + 1))
        assert (await seen.get()).events == ()
        for member in others:
            member.pause()

        with pytest.raises(TimeoutError):
            await until_silent(3.0)
        for member in others:
            member.resume()
        await put(store, "/b")

        async with asyncio.timeout(20):
            while not (batch := await seen.get()).events:
                pass
        assert keys(list(batch.events)) == ["/b"]
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading


async def test_no_event_is_lost_or_repeated_when_the_watched_member_dies_catching_up(
    etcd_cluster: Etcd,
) -> None:
    endpoints = followers_first(etcd_cluster)
    total = 4000
    async with connected(*endpoints) as store:
        start = await put(store, "/first")
        free = asyncio.Semaphore(64)

        async def write(number: int) -> None:
            async with free:
                await put(store, f"/{number}")

        async with asyncio.TaskGroup() as group:
            for number in range(total):
                group.create_task(write(number))

        async with watching(store, "/", start + 1) as watch:
            seen = await events(watch, 1)
            assert len(seen) < total, "the member must die before it has caught up"
            etcd_cluster.member(endpoints[0]).kill()
            seen += await events(watch, total - len(seen), seconds=30)

    assert sorted(keys(seen)) == sorted(f"/{number}" for number in range(total))


async def test_a_watch_leaves_a_member_that_hangs(etcd_cluster: Etcd) -> None:
    endpoints = followers_first(etcd_cluster)
    async with connected(*endpoints) as store, connected(*endpoints[1:]) as writer:
        start = await put(store, "/a")
        async with watching(store, "/", start + 1) as watch:
            await sign_of_life(watch)
            etcd_cluster.member(endpoints[0]).pause()
            await put(writer, "/b")

            with within(4.0):
                assert keys(await events(watch, 1)) == ["/b"]


async def test_a_watch_that_missed_a_compaction_says_so(etcd_cluster: Etcd) -> None:
    endpoints = followers_first(etcd_cluster)
    async with connected(*endpoints) as store, connected(*endpoints[1:]) as writer:
        start = await put(store, "/a")
        async with watching(store, "/", start + 1) as watch:
            await sign_of_life(watch)
            etcd_cluster.member(endpoints[0]).pause()
            await put(writer, "/b")
            newest = await put(writer, "/c")
            # Through the writer's members: etcdctl would wait for the one that hangs.
            await asyncio.to_thread(
                etcd_cluster.ctl, f"--endpoints={endpoints[1]}", "compaction", str(newest)
            )

            with pytest.raises(StoreCompacted):
                await events(watch, 1)


async def test_a_great_change_comes_in_batches_of_a_thousand(etcd: Shared) -> None:
    async with connected(*etcd.endpoints) as store:
        lease = await store.grant(60)
        names = [f"{etcd.prefix}{number:04}" for number in range(2500)]
        for first in range(0, len(names), 100):
            await store.txn([], [Put(name, b"", lease.id) for name in names[first : first + 100]])
        snapshot = await store.snapshot(etcd.prefix)
        assert [kv.key for kv in snapshot.kvs] == names

        async with watching(store, etcd.prefix, snapshot.revision + 1) as watch:
            await sign_of_life(watch)
            await store.revoke(lease.id)
            sizes: list[int] = []
            while sum(sizes) < len(names):
                if batch := (await anext(watch)).events:
                    sizes.append(len(batch))

    assert sizes == [1000, 1000, 500]


async def test_a_restored_etcd_is_noticed_by_every_call() -> None:
    with running() as etcd:
        async with connected(*etcd.endpoints) as store, connected(*etcd.endpoints) as watcher:
            lease = await store.grant(60)
            await put(store, "/a")
            file = await asyncio.to_thread(etcd.save)
            for _ in range(5):
                await put(store, "/a")
            newest = await put(store, "/a")
            async with watching(watcher, "/", newest + 1) as watch:
                await sign_of_life(watch)
                await asyncio.to_thread(etcd.restore, file)

                with pytest.raises(StoreRestored, match="revision"):
                    await store.keepalive(lease.id, timeout=5.0)
                with pytest.raises(StoreRestored):
                    await store.get("/a")
                with pytest.raises(StoreRestored):
                    await events(watch, 1)


async def test_another_cluster_at_the_same_endpoints_is_noticed() -> None:
    with running() as first, running() as second:
        async with connected(*first.endpoints, *second.endpoints) as store:
            await put(store, "/a")
            first.stop()

            with pytest.raises(StoreRestored, match="cluster id"):
                await store.get("/a")


async def test_a_member_that_lags_is_no_restore(etcd_cluster: Etcd) -> None:
    endpoints = followers_first(etcd_cluster)
    behind = etcd_cluster.member(endpoints[0])
    async with connected(*endpoints) as store:
        lease = await store.grant(60)
        behind.pause()
        for number in range(200):
            await put(store, f"/{number}")
        behind.resume()
        etcd_cluster.member(endpoints[1]).kill()

        assert await store.keepalive(lease.id, timeout=10.0) == 60
        assert await store.get("/0", timeout=10.0) is not None


async def test_requests_that_etcd_never_takes_are_not_repeated(etcd: Shared) -> None:
    async with connected(*etcd.endpoints) as store:
        twice = [Put(f"{etcd.prefix}a", b""), Put(f"{etcd.prefix}a", b"")]
        with within(4.0), pytest.raises(StoreError, match="duplicate key"):
            await store.txn([], twice)


async def test_closing_ends_running_calls_and_watches_without_noise(
    etcd_cluster: Etcd, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    store = EtcdStore(etcd_cluster.endpoints)
    start = await put(store, "/a")
    watch = store.watch("/", start + 1)
    await sign_of_life(watch)
    for member in etcd_cluster.members:
        member.pause()
    running_calls = [
        asyncio.ensure_future(store.get("/a", timeout=30)),
        asyncio.ensure_future(store.txn([], [Put("/b", b"")], timeout=30)),
        asyncio.ensure_future(anext(watch)),
    ]
    await asyncio.wait(running_calls, timeout=0.1)

    await store.close()
    ended = await asyncio.gather(*running_calls, return_exceptions=True)

    assert [type(error) for error in ended] == [StoreUnavailable, StoreAmbiguous, StoreUnavailable]
    assert caplog.records == []
