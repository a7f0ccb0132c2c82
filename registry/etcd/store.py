"""The operations of the port, each a request or two.

Reads, grants and revocations are repeated until the caller's timeout: a lease granted twice ends by itself.
A transaction that writes is repeated only while it surely was not executed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

import grpc

from registry.clock import SYSTEM_CLOCK, Clock
from registry.errors import LeaseNotFound, StoreCompacted, StoreError, StoreUnavailable
from registry.etcd import wire
from registry.etcd.members import Member, Members, Metadata, exchange, judge, unary
from registry.etcd.watch import watch
from registry.etcd.wire import Message, Stubs
from registry.store import (
    Compare,
    KeyValue,
    Lease,
    LeaseId,
    MemberStatus,
    Op,
    Revision,
    Snapshot,
    TxnResult,
    WatchBatch,
)

if TYPE_CHECKING:
    from registry.config import Tls

_PAGE = 1000


class EtcdStore:
    """etcd as a :class:`registry.store.Store`; made and used in one event loop.

    ``endpoints`` are URLs, ``http://`` or ``https://``.  ``attempt`` is the longest wait for one member's
    answer, in seconds.  ``canary`` is a key this etcd user may read, whether or not it exists: it is read
    when a revision went backwards, to tell a member that lags from a restore.  After StoreRestored a store
    is of no use any more: every call raises it.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: Tls | None = None,
        user: str = "",
        password: str = "",
        canary: str = "/pgherd/",
        attempt: float = 0.6,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._clock = clock
        self._members = Members(
            endpoints, tls=tls, user=user, password=password, canary=canary, attempt=attempt, clock=clock
        )

    async def get(self, key: str, *, timeout: float = 5.0) -> KeyValue | None:
        response = await self._range(wire.get(key), timeout)
        return wire.key_value(response.kvs[0]) if response.kvs else None

    async def snapshot(self, prefix: str, *, timeout: float = 30.0) -> Snapshot:
        deadline = self._clock.now() + timeout
        while True:
            try:
                return await self._pages(prefix, deadline)
            except StoreCompacted as error:  # between two pages
                if self._clock.now() >= deadline:
                    raise StoreUnavailable(f"{prefix} is compacted faster than it is read") from error

    async def _pages(self, prefix: str, deadline: float) -> Snapshot:
        kvs: list[KeyValue] = []
        revision: Revision = 0
        last: str | None = None
        while True:
            left = max(deadline - self._clock.now(), 0.0)
            response = await self._range(wire.page(prefix, last, revision, _PAGE), left)
            revision = revision or response.header.revision
            kvs.extend(wire.key_value(kv) for kv in response.kvs)
            if not response.more:
                return Snapshot(revision, tuple(kvs))
            last = kvs[-1].key

    async def fingerprint(self, prefix: str, *, timeout: float = 5.0) -> tuple[int, Revision]:
        response = await self._range(wire.newest(prefix), timeout)
        return response.count, response.kvs[0].mod_revision if response.kvs else 0

    async def txn(
        self,
        compare: Sequence[Compare],
        then: Sequence[Op],
        otherwise: Sequence[Op] = (),
        *,
        timeout: float = 5.0,
    ) -> TxnResult:
        request = wire.txn(compare, then, otherwise)
        writes = wire.writes(then) or wire.writes(otherwise)
        response = await self._members.call(
            unary(lambda stubs: stubs.kv.Txn, request), timeout=timeout, once=writes
        )
        return wire.txn_result(response, response.header.revision)

    async def grant(self, ttl: float, *, timeout: float = 5.0) -> Lease:
        attempt = unary(lambda stubs: stubs.lease.LeaseGrant, wire.grant(ttl))
        response = await self._members.call(attempt, timeout=timeout)
        return Lease(response.ID, float(response.TTL))

    async def keepalive(self, lease: LeaseId, *, timeout: float) -> float:
        async def attempt(stubs: Stubs, metadata: Metadata, seconds: float) -> Message:
            # A stream for one message: an answer that comes late must not be taken for that to a later one.
            call = stubs.lease.LeaseKeepAlive(metadata=metadata, timeout=seconds)
            try:
                return await exchange(call, wire.keepalive(lease))
            finally:
                call.cancel()

        response = await self._members.call(attempt, timeout=timeout)
        if response.TTL <= 0:
            raise LeaseNotFound(f"lease {lease:x} has expired or was revoked")
        return float(response.TTL)

    async def revoke(self, lease: LeaseId, *, timeout: float = 5.0) -> None:
        attempt = unary(lambda stubs: stubs.lease.LeaseRevoke, wire.revoke(lease))
        try:
            await self._members.call(attempt, timeout=timeout)
        except LeaseNotFound:
            return

    def watch(self, prefix: str, start: Revision) -> AsyncIterator[WatchBatch]:
        return watch(self._members, prefix, start)

    async def members(self, *, timeout: float = 1.0) -> tuple[MemberStatus, ...]:
        try:
            token = await self._members.token(self._clock.now() + timeout)
        except StoreError as error:
            why = str(error)
            return tuple(_silent(member, why) for member in self._members.all)
        metadata = self._members.metadata(token)
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(_status(member, metadata, timeout)) for member in self._members.all]
        return tuple(task.result() for task in asked)

    async def close(self) -> None:
        await self._members.close()

    async def _range(self, request: Message, timeout: float) -> Message:
        return await self._members.call(unary(lambda stubs: stubs.kv.Range, request), timeout=timeout)


async def _status(member: Member, metadata: Metadata, timeout: float) -> MemberStatus:
    try:
        response = await member.stubs.maintenance.Status(wire.status(), metadata=metadata, timeout=timeout)
    except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
        return _silent(member, judge(error).text)
    return MemberStatus(
        endpoint=member.endpoint,
        version=response.version,
        leader=response.leader == response.header.member_id,
        has_leader=response.leader != 0,
        revision=response.header.revision,
        error="",
    )


def _silent(member: Member, why: str) -> MemberStatus:
    return MemberStatus(member.endpoint, version="", leader=False, has_leader=False, revision=0, error=why)
