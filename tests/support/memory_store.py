"""An in-memory :class:`registry.store.Store` that behaves like etcd, and can be made to misbehave.

It keeps revisions, versions, leases and the whole event history.  Both it and the real adapter pass
``tests/contract/test_store.py``.  It may be used from several threads, each with its own event loop.

Faults are switches: ``pause`` (a frozen member: calls hang to their timeout), ``go_away`` (calls fail at
once), ``lose_reply`` (a write happens, does not, or happens later, and its reply is lost), ``compact``,
``losing_events`` (watches miss what happens inside), ``mute_watches`` and ``break_watches``.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import assert_never

from registry.clock import SYSTEM_CLOCK, Boottime, Clock
from registry.errors import LeaseNotFound, StoreAmbiguous, StoreCompacted, StoreError, StoreUnavailable
from registry.store import (
    Changed,
    Compare,
    Delete,
    KeyValue,
    Lease,
    LeaseId,
    MemberStatus,
    Op,
    Put,
    Revision,
    Snapshot,
    Txn,
    TxnResult,
    WatchBatch,
)
from tests.support.keyspace import Event, Keyspace

HEARTBEAT = 0.5
"""Seconds between the empty batches of an idle watch."""


class LostReply(enum.Enum):
    """What became of a write whose reply was lost."""

    DONE = "done"
    NOT_DONE = "not done"
    LATER = "done by deliver_delayed()"


@dataclass(slots=True)
class _Lease:
    ttl: float
    expires: Boottime


class _Waiter:
    """Something waiting in an event loop that another thread may wake."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.event = asyncio.Event()

    def wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.event.set)


class MemoryStore:
    """One store for any number of clients; leases live by ``clock``, see :meth:`expire`."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK, *, minimum_ttl: float = 0.0) -> None:
        self.clock = clock
        self.calls = 0
        self._minimum_ttl = minimum_ttl
        self._space = Keyspace()
        self._leases: dict[LeaseId, _Lease] = {}
        self._lease_ids = itertools.count(0x7000_0001)
        self._history: list[Event] = []
        self._compacted: Revision = 0
        self._paused = False
        self._unavailable = False
        self._closed = False
        self._losing_events = False
        self._muted: set[_Waiter] = set()
        self._lost_replies: deque[LostReply] = deque()
        self._delayed: list[Txn] = []
        self._watch_errors: dict[_Waiter, StoreError] = {}
        self._waiters: set[_Waiter] = set()
        self._lock = threading.RLock()

    @property
    def revision(self) -> Revision:
        """The present revision."""
        return self._space.revision

    # The port.

    async def get(self, key: str, *, timeout: float = 5.0) -> KeyValue | None:
        await self._reach(timeout)
        return self._space.keys.get(key)

    async def snapshot(self, prefix: str, *, timeout: float = 30.0) -> Snapshot:
        await self._reach(timeout)
        with self._lock:
            return Snapshot(self.revision, self._space.range(prefix))

    async def fingerprint(self, prefix: str, *, timeout: float = 5.0) -> tuple[int, Revision]:
        await self._reach(timeout)
        with self._lock:
            kvs = self._space.range(prefix)
        return len(kvs), max((kv.mod_revision for kv in kvs), default=0)

    async def txn(
        self,
        compare: Sequence[Compare],
        then: Sequence[Op],
        otherwise: Sequence[Op] = (),
        *,
        timeout: float = 5.0,
    ) -> TxnResult:
        txn = Txn(tuple(compare), tuple(then), tuple(otherwise))
        await self._reach(timeout, StoreAmbiguous if _writes(txn) else StoreUnavailable)
        if not self._lost_replies or not _writes(txn):
            return self.apply(txn)
        match self._lost_replies.popleft():
            case LostReply.DONE:
                self.apply(txn)
            case LostReply.NOT_DONE:
                pass
            case LostReply.LATER:
                self._delayed.append(txn)
            case fate:
                assert_never(fate)
        raise StoreAmbiguous("the reply was lost")

    async def grant(self, ttl: float, *, timeout: float = 5.0) -> Lease:
        await self._reach(timeout)
        granted = max(ttl, self._minimum_ttl)
        lease = next(self._lease_ids)
        self._leases[lease] = _Lease(granted, self.clock.now() + granted)
        self._wake()
        return Lease(lease, granted)

    async def keepalive(self, lease: LeaseId, *, timeout: float) -> float:
        await self._reach(timeout)
        held = self._leases.get(lease)
        if held is None:
            raise LeaseNotFound(f"lease {lease:x} is gone")
        held.expires = self.clock.now() + held.ttl
        return held.ttl

    async def revoke(self, lease: LeaseId, *, timeout: float = 5.0) -> None:
        await self._reach(timeout)
        self.end_lease(lease)

    async def watch(self, prefix: str, start: Revision) -> AsyncIterator[WatchBatch]:
        with self._waiting() as waiter:
            while True:
                waiter.event.clear()
                if (error := self._watch_errors.pop(waiter, None)) is not None:
                    raise error
                self.expire()
                if not (self._paused or self._unavailable or self._closed or waiter in self._muted):
                    with self._lock:
                        if start < self._compacted:
                            raise StoreCompacted(f"revision {start} is compacted", self._compacted)
                        batch = self._since(prefix, start)
                        start = max(start, self.revision + 1)
                    yield batch
                if not waiter.event.is_set():
                    await self._wait(waiter, self._next_tick())

    async def members(self, *, timeout: float = 1.0) -> tuple[MemberStatus, ...]:
        if self._paused or self._unavailable:
            return (MemberStatus("memory", "", False, False, 0, "no answer"),)
        return (MemberStatus("memory", "3.6.0", True, True, self.revision, ""),)

    async def close(self) -> None:
        self._closed = True
        self._wake()

    # What tests do to it.

    def apply(self, txn: Txn) -> TxnResult:
        """Run a transaction at once, whatever faults are switched on.  Raises LeaseNotFound."""
        with self._lock:
            self.expire()
            result, events = self._space.apply(txn, self._leases)
            self._publish(events)
            return result

    def put(self, key: str, value: bytes, lease: LeaseId = 0) -> Revision:
        """Write a key as an operator might; return the revision."""
        return self.apply(Txn(then=(Put(key, value, lease),))).revision

    def delete(self, key: str) -> Revision:
        """Delete a key behind everybody's back; return the revision."""
        return self.apply(Txn(then=(Delete(key),))).revision

    def expire(self) -> None:
        """End every lease whose time has passed on the clock; every call and watch looks by itself."""
        now = self.clock.now()
        for lease in [lease for lease, held in tuple(self._leases.items()) if held.expires <= now]:
            self.end_lease(lease)

    def end_lease(self, lease: LeaseId) -> None:
        """Delete a lease and its keys at once, as an operator or a stale leader of etcd might."""
        with self._lock:
            if self._leases.pop(lease, None) is None:
                return
            self._publish(self._space.delete_keys_of(lease))

    def pause(self) -> None:
        """Freeze: calls hang until :meth:`resume` or their timeout, watches are silent, leases run on."""
        self._paused = True

    def resume(self) -> None:
        """Answer again."""
        self._paused = self._unavailable = False
        self._wake()

    def go_away(self) -> None:
        """Refuse every call at once until :meth:`resume`; watches are silent."""
        self._unavailable = True
        self._wake()

    def lose_reply(self, *fates: LostReply) -> None:
        """Let the next writing transactions end in StoreAmbiguous, one for each fate."""
        self._lost_replies.extend(fates)

    def is_alive(self, lease: LeaseId) -> bool:
        """Return whether a lease has been granted and has not ended."""
        return lease in self._leases

    def deliver_delayed(self) -> list[TxnResult]:
        """Run the transactions that were to be done later, in order; return what they did."""
        delayed, self._delayed = self._delayed, []
        return [self.apply(txn) for txn in delayed]

    @contextmanager
    def losing_events(self) -> Iterator[None]:
        """No watch ever sees what changes inside (etcd issue 18089 and its kin)."""
        self._losing_events = True
        try:
            yield
        finally:
            self._losing_events = False

    def compact(self, revision: Revision | None = None) -> None:
        """Forget the history below ``revision``, by default the present one."""
        with self._lock:
            self._compacted = self.revision if revision is None else revision
            self._history = [event for event in self._history if _revision(event) >= self._compacted]

    def mute_watches(self) -> None:
        """Let every running watch fall silent for ever, without an error."""
        self._muted |= self._waiters

    def break_watches(self, error: StoreError) -> None:
        """Let every running watch raise ``error``."""
        with self._lock:
            self._watch_errors.update(dict.fromkeys(self._waiters, error))
        self._wake()

    # How it works.

    async def _reach(self, timeout: float, too_late: type[StoreError] = StoreUnavailable) -> None:
        self.calls += 1
        if self._paused:
            deadline = self.clock.now() + timeout
            with self._waiting() as waiter:
                while self._paused and not self._closed and self.clock.now() < deadline:
                    waiter.event.clear()
                    await self._wait(waiter, deadline)
            if self._paused:
                raise too_late(f"no answer within {timeout:g} s")
        else:
            await asyncio.sleep(0)
        if self._unavailable or self._closed:
            raise StoreUnavailable("closed" if self._closed else "no member can be reached")
        self.expire()

    @contextmanager
    def _waiting(self) -> Iterator[_Waiter]:
        waiter = _Waiter()
        self._waiters.add(waiter)
        try:
            yield waiter
        finally:
            self._waiters.discard(waiter)
            self._watch_errors.pop(waiter, None)

    def _wake(self) -> None:
        for waiter in tuple(self._waiters):
            waiter.wake()

    def _next_tick(self) -> Boottime:
        expiries = (held.expires for held in tuple(self._leases.values()))
        return min(self.clock.now() + HEARTBEAT, min(expiries, default=float("inf")))

    async def _wait(self, waiter: _Waiter, until: Boottime) -> None:
        tasks = (
            asyncio.ensure_future(waiter.event.wait()),
            asyncio.ensure_future(self.clock.sleep_until(until)),
        )
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _since(self, prefix: str, start: Revision) -> WatchBatch:
        return WatchBatch(
            tuple(
                event
                for event in self._history
                if _revision(event) >= start and _key(event).startswith(prefix)
            )
        )

    def _publish(self, events: list[Event]) -> None:
        if not self._losing_events:
            self._history += events
        self._wake()


def _key(event: Event) -> str:
    return event.kv.key if isinstance(event, Changed) else event.key


def _revision(event: Event) -> Revision:
    return event.kv.mod_revision if isinstance(event, Changed) else event.mod_revision


def _writes(txn: Txn) -> bool:
    return any(
        isinstance(op, Put | Delete) or (isinstance(op, Txn) and _writes(op))
        for op in (*txn.then, *txn.otherwise)
    )
