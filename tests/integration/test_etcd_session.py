"""The session against real etcd: what it must survive and what it must not."""

from __future__ import annotations

import asyncio

import pytest

from registry.clock import SYSTEM_CLOCK, Boottime
from registry.errors import LeaseNotFound
from registry.etcd import EtcdStore
from registry.session import Session
from registry.store import LeaseId, Put
from registry.timing import Timing
from tests.support.etcd import Etcd, Shared, running

pytestmark = pytest.mark.slow

QUICK = Timing(2, election=0.1)
REAL = Timing(5)


class Renewals:
    """Counts renewals in the opener's loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._told = asyncio.Queue[Boottime]()

    def __call__(self, lease: LeaseId, hard: Boottime) -> None:
        self._loop.call_soon_threadsafe(self._told.put_nowait, hard)

    async def next(self, count: int, seconds: float = 20.0) -> None:
        async with asyncio.timeout(seconds):
            for _ in range(count):
                await self._told.get()


async def lost(session: Session, seconds: float = 20.0) -> str:
    async with asyncio.timeout(seconds):
        return await session.lost


async def test_a_session_outlives_its_ttl_and_ends_when_closed(etcd: Shared) -> None:
    renewals = Renewals()
    session = await Session.open(lambda: EtcdStore(etcd.endpoints), QUICK, SYSTEM_CLOCK, renewals)
    store = EtcdStore(etcd.endpoints)
    await store.txn([], [Put(f"{etcd.prefix}node", b"", session.lease)])
    opened = SYSTEM_CLOCK.now()

    while SYSTEM_CLOCK.now() < opened + session.ttl + 0.5:
        await renewals.next(1)
        assert session.trusted()
    assert await store.get(f"{etcd.prefix}node") is not None

    await session.close()
    assert await store.get(f"{etcd.prefix}node") is None
    await store.close()


async def test_a_session_is_untrusted_before_etcd_can_end_its_lease(etcd_cluster: Etcd) -> None:
    session = await Session.open(lambda: EtcdStore(etcd_cluster.endpoints), QUICK)
    for member in etcd_cluster.members:
        member.pause()
    soft = session.soft_deadline

    assert "not renewed in time" in await lost(session)

    assert not session.trusted()
    assert soft <= SYSTEM_CLOCK.now() < session.hard_deadline + 0.5  # etcd's own count ends 0.7 s after it
    for member in etcd_cluster.members:
        member.resume()
    etcd_cluster.wait_healthy()
    assert not session.trusted()
    await session.close()


async def test_a_session_survives_the_death_of_etcds_leader(etcd_cluster: Etcd) -> None:
    renewals = Renewals()
    leader = etcd_cluster.leader()
    endpoints = (leader.endpoint, *etcd_cluster.endpoints)
    session = await Session.open(lambda: EtcdStore(endpoints), REAL, SYSTEM_CLOCK, renewals)
    await renewals.next(2)

    leader.kill()
    await renewals.next(4)

    assert session.trusted()
    await session.close()


async def test_a_session_survives_the_hanging_of_the_member_it_uses(etcd_cluster: Etcd) -> None:
    renewals = Renewals()
    leader = etcd_cluster.leader().endpoint
    endpoints = (*(e for e in etcd_cluster.endpoints if e != leader), leader)
    session = await Session.open(lambda: EtcdStore(endpoints), QUICK, SYSTEM_CLOCK, renewals)
    await renewals.next(2)

    etcd_cluster.member(endpoints[0]).pause()
    await renewals.next(4)

    assert session.trusted()
    await session.close()


async def test_a_session_is_lost_when_somebody_revokes_its_lease(etcd: Shared) -> None:
    session = await Session.open(lambda: EtcdStore(etcd.endpoints), QUICK)
    store = EtcdStore(etcd.endpoints)
    await store.revoke(session.lease)

    assert "has expired or was revoked" in await lost(session)
    assert not session.trusted()
    await session.close()
    await store.close()


async def test_a_session_is_lost_when_etcd_is_restored() -> None:
    with running() as etcd:
        renewals = Renewals()
        session = await Session.open(lambda: EtcdStore(etcd.endpoints), REAL, SYSTEM_CLOCK, renewals)
        file = await asyncio.to_thread(etcd.save)
        store = EtcdStore(etcd.endpoints)
        for _ in range(5):
            await store.txn([], [Put("/a", b"")])
        await store.close()
        await renewals.next(2)
        await asyncio.to_thread(etcd.restore, file)

        assert "restored" in await lost(session)
        await session.close(revoke=False)


async def test_a_successor_goes_on_with_the_lease(etcd: Shared) -> None:
    first = await Session.open(lambda: EtcdStore(etcd.endpoints), REAL)
    hard = first.hard_deadline
    await first.close(revoke=False)
    renewals = Renewals()

    second = await Session.adopt(
        lambda: EtcdStore(etcd.endpoints),
        REAL,
        SYSTEM_CLOCK,
        renewals,
        lease=first.lease,
        hard_deadline=hard,
    )
    await renewals.next(2)

    assert second is not None
    assert second.trusted()
    assert second.hard_deadline > hard
    await second.close()
    store = EtcdStore(etcd.endpoints)
    with pytest.raises(LeaseNotFound):
        await store.keepalive(first.lease, timeout=2)
    await store.close()


async def test_a_blocked_event_loop_does_not_starve_the_lease(etcd: Shared) -> None:
    session = await Session.open(lambda: EtcdStore(etcd.endpoints), QUICK)
    until = SYSTEM_CLOCK.now() + QUICK.ttl
    spun = 0
    while SYSTEM_CLOCK.now() < until:
        spun += 1

    assert session.trusted()
    await session.close()
