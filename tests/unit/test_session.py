from __future__ import annotations

import asyncio
import threading

import pytest

from registry.clock import SYSTEM_CLOCK, Boottime, SystemClock
from registry.errors import StoreUnavailable
from registry.session import Session, Trust
from registry.store import Get, LeaseId, Txn
from registry.timing import Timing
from tests.support.etcd import eventually
from tests.support.memory_store import MemoryStore

QUICK = Timing(2, election=0.1)
PATIENT = Timing(60)


class Sleeper(SystemClock):
    """A clock that can be moved on, as by a suspend of the machine."""

    skipped = 0.0

    def now(self) -> Boottime:
        return super().now() + self.skipped


class Renewals:
    """Remembers what the warden would be told."""

    def __init__(self) -> None:
        self.seen: list[tuple[LeaseId, Boottime]] = []
        self.threads: set[str] = set()
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()

    def __call__(self, lease: LeaseId, hard: Boottime) -> None:
        self.seen.append((lease, hard))
        self.threads.add(threading.current_thread().name)
        self._loop.call_soon_threadsafe(self._changed.set)

    async def reach(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.seen) < count:
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def keys(store: MemoryStore) -> list[str]:
    """Look past the connection, which a session closes when it ends."""
    return [kv.key for kv in store.apply(Txn(then=(Get("", prefix=True),))).kvs(0)]


async def lost(session: Session) -> str:
    async with asyncio.timeout(10):
        return await session.lost


def test_trust_counts_from_the_moment_the_keepalive_was_sent() -> None:
    trust = Trust(soft=103.0, hard=104.0)

    assert trust.renewed(Timing(5), sent=102.0, now=102.9) == Trust(
        102 + Timing(5).soft, 102 + Timing(5).hard
    )


def test_trust_only_grows() -> None:
    trust = Trust(soft=103.0, hard=104.0)

    assert trust.renewed(Timing(5), sent=90.0, now=102.0) == trust


def test_trust_that_ended_is_not_regained() -> None:
    assert Trust(soft=103.0, hard=104.0).renewed(Timing(5), sent=102.9, now=103.0) is None


async def test_a_session_holds_a_lease_and_is_trusted(store: MemoryStore) -> None:
    before = SYSTEM_CLOCK.now()
    renewals = Renewals()
    session = await Session.open(lambda: store, PATIENT, SYSTEM_CLOCK, renewals)

    assert await store.keepalive(session.lease, timeout=1) == 60
    assert session.trusted()
    assert before + PATIENT.soft <= session.soft_deadline <= SYSTEM_CLOCK.now() + PATIENT.soft
    assert before + PATIENT.hard <= session.hard_deadline <= SYSTEM_CLOCK.now() + PATIENT.hard
    assert 0 < session.slack() <= PATIENT.soft
    assert renewals.seen == [(session.lease, session.hard_deadline)]
    await session.close()


async def test_the_store_may_be_made_by_a_coroutine(store: MemoryStore) -> None:
    async def make() -> MemoryStore:
        return store

    session = await Session.open(make, PATIENT)

    assert session.trusted()
    await session.close()


async def test_the_deadlines_follow_the_ttl_that_was_granted() -> None:
    store = MemoryStore(minimum_ttl=90)
    session = await Session.open(lambda: store, PATIENT)

    assert session.ttl == 90
    assert session.timing == Timing(90)
    assert session.slack() > PATIENT.soft
    await session.close()


@pytest.mark.slow
async def test_renewals_raise_the_deadline_in_the_sessions_own_thread(store: MemoryStore) -> None:
    renewals = Renewals()
    session = await Session.open(lambda: store, QUICK, SYSTEM_CLOCK, renewals)
    await renewals.reach(4)

    deadlines = [hard for _, hard in renewals.seen]
    assert deadlines == sorted(set(deadlines))
    assert renewals.threads == {"pgherd-session"}
    assert session.trusted()
    await session.close()


@pytest.mark.slow
async def test_a_session_survives_what_is_shorter_than_its_trust(store: MemoryStore) -> None:
    renewals = Renewals()
    session = await Session.open(lambda: store, QUICK, SYSTEM_CLOCK, renewals)
    await renewals.reach(2)
    store.go_away()
    await SYSTEM_CLOCK.sleep_until(session.soft_deadline - QUICK.attempt)
    store.resume()
    await renewals.reach(4)

    assert session.trusted()
    assert not session.lost.done()
    await session.close()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["pause", "go_away"])
async def test_a_session_that_cannot_be_renewed_is_lost_at_its_soft_deadline(
    store: MemoryStore, fault: str
) -> None:
    session = await Session.open(lambda: store, QUICK)
    getattr(store, fault)()
    soft, hard = session.soft_deadline, session.hard_deadline

    reason = await lost(session)

    assert "not renewed in time" in reason
    assert SYSTEM_CLOCK.now() >= soft
    assert not session.trusted()
    assert session.slack() < 0
    assert session.hard_deadline == hard
    store.resume()
    await session.close()


@pytest.mark.slow
async def test_a_lease_that_etcd_ended_is_lost_at_the_next_renewal(store: MemoryStore) -> None:
    session = await Session.open(lambda: store, QUICK)
    store.end_lease(session.lease)

    assert "gone" in await lost(session)
    assert not session.trusted()
    await session.close()


@pytest.mark.slow
async def test_a_lost_session_is_not_revived_when_etcd_answers_again(store: MemoryStore) -> None:
    clock = Sleeper()
    session = await Session.open(lambda: store, QUICK, clock)
    clock.skipped = QUICK.soft

    assert not session.trusted()
    await lost(session)
    assert await store.keepalive(session.lease, timeout=1) == 2
    assert not session.trusted()
    await session.close()


async def test_a_machine_that_was_suspended_is_not_trusted_on_waking(store: MemoryStore) -> None:
    clock = Sleeper()
    session = await Session.open(lambda: store, PATIENT, clock)
    assert session.trusted()

    clock.skipped = PATIENT.soft

    assert not session.trusted()
    await session.close()


async def test_closing_ends_trust_and_revokes_the_lease(store: MemoryStore) -> None:
    session = await Session.open(lambda: store, PATIENT)
    store.put("owner", b"", session.lease)

    await session.close()

    assert not session.trusted()
    assert keys(store) == []
    assert not session.lost.done()


async def test_closing_for_a_successor_leaves_the_lease(store: MemoryStore) -> None:
    session = await Session.open(lambda: store, PATIENT)
    store.put("owner", b"", session.lease)

    await session.close(revoke=False)
    await session.close(revoke=True)

    assert not session.trusted()
    assert keys(store) == ["owner"]


async def test_a_lease_that_cannot_be_revoked_is_left_to_its_ttl(store: MemoryStore) -> None:
    session = await Session.open(lambda: store, PATIENT)
    store.go_away()

    await session.close()

    assert not session.trusted()


async def test_opening_without_etcd_fails(store: MemoryStore) -> None:
    store.go_away()

    with pytest.raises(StoreUnavailable):
        await Session.open(lambda: store, PATIENT)


async def test_a_lease_nobody_waits_for_any_more_is_revoked(store: MemoryStore) -> None:
    started, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hold(lease: LeaseId, hard: Boottime) -> None:
        store.put("owner", b"", lease)
        loop.call_soon_threadsafe(started.set)
        go_on.wait(10)

    opening = asyncio.ensure_future(Session.open(lambda: store, PATIENT, SYSTEM_CLOCK, hold))
    await started.wait()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    go_on.set()

    await asyncio.to_thread(eventually, lambda: keys(store) == [], 10, "the lease was revoked")


async def test_an_adopted_session_is_trusted_no_longer_than_the_warden_says(store: MemoryStore) -> None:
    lease = await store.grant(60)
    hard = SYSTEM_CLOCK.now() + 20
    store.go_away()

    session = await Session.adopt(
        lambda: store, PATIENT, SYSTEM_CLOCK, Renewals(), lease=lease.id, hard_deadline=hard
    )

    assert session is not None
    assert session.lease == lease.id
    assert session.trusted()
    assert session.hard_deadline == hard
    assert session.soft_deadline == pytest.approx(hard - PATIENT.keepalive_every)
    await session.close(revoke=False)


async def test_an_adopted_session_is_renewed_at_once(store: MemoryStore) -> None:
    lease = await store.grant(60)
    renewals = Renewals()

    session = await Session.adopt(
        lambda: store,
        PATIENT,
        SYSTEM_CLOCK,
        renewals,
        lease=lease.id,
        hard_deadline=SYSTEM_CLOCK.now() + 20,
    )
    assert session is not None
    await renewals.reach(1)
    await asyncio.to_thread(eventually, lambda: session.slack() > 20, 10, "trust beyond the warden's")

    assert renewals.seen[0][1] > SYSTEM_CLOCK.now() + 20
    await session.close()


async def test_an_adopted_lease_keeps_its_ttl_when_the_configuration_has_changed(store: MemoryStore) -> None:
    lease = await store.grant(5)
    renewals = Renewals()

    session = await Session.adopt(
        lambda: store,
        Timing(8, election=1.0),
        SYSTEM_CLOCK,
        renewals,
        lease=lease.id,
        hard_deadline=SYSTEM_CLOCK.now() + Timing(5).hard - 1,
    )
    await renewals.reach(1)

    assert session is not None
    assert session.ttl == 5
    assert renewals.seen[0][1] <= SYSTEM_CLOCK.now() + Timing(5).hard
    await session.close()


async def test_a_lease_whose_trust_has_ended_is_not_adopted(store: MemoryStore) -> None:
    lease = await store.grant(60)
    soft_passed = SYSTEM_CLOCK.now() + PATIENT.keepalive_every - 0.001

    session = await Session.adopt(
        lambda: store, PATIENT, SYSTEM_CLOCK, Renewals(), lease=lease.id, hard_deadline=soft_passed
    )

    assert session is None


async def test_an_adopted_lease_that_is_gone_is_lost(store: MemoryStore) -> None:
    session = await Session.adopt(
        lambda: store,
        PATIENT,
        SYSTEM_CLOCK,
        Renewals(),
        lease=1,
        hard_deadline=SYSTEM_CLOCK.now() + 20,
    )

    assert session is not None
    assert "gone" in await lost(session)
    await session.close()


async def test_trust_is_not_extended_when_the_warden_cannot_be_told(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashes: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: crashes.append(str(args.exc_value)))
    lease = await store.grant(60)

    def broken(lease: LeaseId, hard: Boottime) -> None:
        raise BrokenPipeError("the warden is gone")

    session = await Session.adopt(
        lambda: store,
        PATIENT,
        SYSTEM_CLOCK,
        broken,
        lease=lease.id,
        hard_deadline=SYSTEM_CLOCK.now() + 20,
    )

    assert session is not None
    assert "the warden is gone" in await lost(session)
    assert not session.trusted()
    await session.close(revoke=False)
    assert crashes == ["the warden is gone"]
