"""A watch that survives its member: it resumes behind the last event it has seen, at another one.

The resume point moves with events only.  The header's revision runs ahead of events still to come while etcd
catches up (clients that resumed from it lost thousands), and so do progress notifications before etcd 3.5.8
(etcd #15220): those are a heartbeat here, nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import TypeAlias

import grpc

from registry.errors import StoreCompacted, StoreUnavailable
from registry.etcd import failures, wire
from registry.etcd.failures import Failure, Kind
from registry.etcd.members import Failed, Member, Members, exchange, following, judge, pause
from registry.etcd.wire import Message
from registry.store import Revision, WatchBatch

_Call: TypeAlias = grpc.aio.StreamStreamCall[Message, Message]

HEARTBEAT = 0.75
"""Seconds without a message after which the member is asked for a sign of life."""
PATIENCE = 1.25
"""Seconds it may take to give one; together 2 s until a member that hangs is left."""
CHUNK = 1000
"""Most events in a batch: the end of a lease with 100,000 keys is one response, and the loop must breathe."""
_LOGINS = 2


async def watch(members: Members, prefix: str, start: Revision) -> AsyncGenerator[WatchBatch, None]:
    """Yield the changes of a prefix from a revision on; see :meth:`registry.store.Store.watch`."""
    stream = _Stream(members, prefix, start)
    try:
        while True:
            yield await stream.next()
    finally:
        await stream.close()


class _Stream:
    """One stream at a time, at the member that is current when it is opened."""

    def __init__(self, members: Members, prefix: str, start: Revision) -> None:
        self._members = members
        self._prefix = prefix
        self._next = start
        self._events: Sequence[Message] = ()
        self._given = 0
        self._member: Member = members.current
        self._call: _Call | None = None
        self._reading: asyncio.Task[Message] | None = None
        self._token = ""
        self._floor: Revision = 0
        self._failed = 0
        self._logins = 0

    async def next(self) -> WatchBatch:
        """Return the next batch, however many members it takes."""
        while self._given == len(self._events):
            try:
                self._take(await self._open() if self._call is None else await self._receive(self._call))
            except Failed as ended:
                await self._recover(ended.failure)
            else:
                self._failed = self._logins = 0
                break
        return self._batch()

    async def close(self) -> None:
        reading = self._reading
        self._drop()
        if reading is not None:
            await asyncio.wait([reading])

    def _take(self, response: Message) -> None:
        """Keep the events of a response, without what was seen before (etcd before 3.5.8 repeats some)."""
        events = response.events
        if events and events[0].kv.mod_revision < self._next:
            events = [event for event in events if event.kv.mod_revision >= self._next]
        if events:
            self._next = events[-1].kv.mod_revision + 1
        self._events, self._given = events, 0

    def _batch(self) -> WatchBatch:
        first, self._given = self._given, min(self._given + CHUNK, len(self._events))
        return WatchBatch(tuple(wire.event(event) for event in self._events[first : self._given]))

    async def _open(self) -> Message:
        """Open a stream at the current member and return its first response.  Raises Failed."""
        members = self._members
        members.usable()
        self._member = members.current
        try:
            self._token = await members.token(members.clock.now() + members.attempt)
        except StoreUnavailable as error:
            raise Failed(Failure(Kind.NOT_DONE, str(error))) from error
        self._floor = members.history.highest
        self._call = self._member.stubs.watch.Watch(metadata=members.metadata(self._token))
        self._read(exchange(self._call, wire.watch(self._prefix, self._next)))
        return await self._answer(self._call, members.attempt)

    async def _receive(self, call: _Call) -> Message:
        """Return the next response; after a silence ask for one.  Raises Failed."""
        if (response := await self._response(call, HEARTBEAT)) is not None:
            return response
        self._floor = self._members.history.highest
        try:
            async with asyncio.timeout(PATIENCE):
                await call.write(wire.progress())
        except (TimeoutError, asyncio.InvalidStateError):
            pass  # the stream says why
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            raise Failed(judge(error)) from error
        return await self._answer(call, PATIENCE)

    async def _answer(self, call: _Call, seconds: float) -> Message:
        if (response := await self._response(call, seconds)) is None:
            raise Failed(Failure(Kind.UNCLEAR, f"no sign of life within {seconds:g} s"))
        return response

    async def _response(self, call: _Call, seconds: float) -> Message | None:
        """Return the response being read, or None if none comes in time.  Raises Failed, StoreCompacted."""
        assert self._reading is not None
        if not (await asyncio.wait([self._reading], timeout=seconds))[0]:
            return None
        try:
            response = self._reading.result()
        except (grpc.aio.AioRpcError, asyncio.CancelledError, Failed) as error:
            raise Failed(judge(error)) from error
        if response.compact_revision:
            raise StoreCompacted(f"revision {self._next} is gone", response.compact_revision)
        if response.canceled:  # `created` as well, if the token was refused
            raise Failed(failures.judge_cancel(response.cancel_reason))
        members = self._members
        try:
            await members.admit(response.header, self._floor, members.clock.now() + members.attempt)
        except StoreUnavailable as error:
            raise Failed(Failure(Kind.NOT_DONE, str(error))) from error
        self._read(following(call))
        return response

    def _read(self, reading: Coroutine[None, None, Message]) -> None:
        self._reading = self._members.own(asyncio.ensure_future(reading))

    async def _recover(self, failure: Failure) -> None:
        """Prepare for another try, or raise what ends the watch."""
        self._drop()
        match failure.kind:
            case Kind.NOT_DONE | Kind.UNCLEAR:
                self._members.failed(self._member)
                await self._member.reload()
                self._failed += 1
                await asyncio.sleep(pause(self._failed, len(self._members.all)))
            case Kind.TOKEN if self._logins < _LOGINS and self._members.forget(self._token):
                self._logins += 1
            case _:
                raise failures.error(failure)

    def _drop(self) -> None:
        if self._call is not None:
            self._call.cancel()
        if self._reading is not None:
            self._reading.cancel()
        self._call = self._reading = None
