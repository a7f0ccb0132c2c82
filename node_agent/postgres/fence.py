"""Raising a fence: after it, no transaction of a lower token can commit in that database.

Two commits.  The first announces the token, and ``herd.fence`` refuses lower ones from then on: otherwise
their share locks overtake the waiting update for ever (PostgreSQL does not queue share locks behind it).  The
second updates the fence row and so waits for transactions that hold it; their sessions are ended meanwhile,
and so are all other sessions of lower tokens, since a plain command takes no fence that could refuse it.

A raise may be repeated: an equal token succeeds, so an attempt with an unknown end is simply made again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import psycopg
from psycopg import errors

from node_agent.postgres.connections import Connection, Connections, cut_at
from node_agent.postgres.queries import QUERIES
from node_agent.postgres.refusals import FenceUnavailable, check_version, lost, translate
from registry.clock import SYSTEM_CLOCK, Boottime, Clock

__all__ = ["FenceRaiser", "FenceUnavailable", "Raised", "application_name", "raise_fence"]

RAISER = "pgherd fence"
"""application_name of raising sessions, which are never ended: they only wait for each other's statements."""
_AT_ONCE = 8
"""Raises at a time in one database; each may need a second connection that looks for what blocks it."""
_ATTEMPT = 0.5
"""Seconds a raising statement waits in the server until it is sent again: it must not outlive us long."""
_PATIENCE = 0.005
"""Seconds until somebody looks why a statement does not return."""
_LOOK_EVERY = 0.02
"""Seconds between two looks."""
_AGAIN = (errors.QueryCanceled, errors.LockNotAvailable, errors.SerializationFailure, errors.DeadlockDetected)


Confirm = Callable[[], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Raised:
    """A fence stands.  ``ended`` describes each session that was ended for it."""

    milliseconds: float
    ended: tuple[str, ...]


def application_name(name: str, epoch: int, start: int) -> str:
    """Return what sessions of this token call themselves: PostgreSQL keeps 63 bytes, so numbers first."""
    return f"herd:{epoch}.{start}:{name}"[:63]


@dataclass(slots=True)
class _Raise:
    """One raise under way: what is wanted, what was ended for it, and what is in its way."""

    name: str
    epoch: int
    start: int
    node: str
    deadline: Boottime
    confirm: Confirm | None
    ended: dict[int, str] = field(default_factory=dict)
    obstacle: str = "the server did not answer in time"
    hint: str = ""

    @property
    def token(self) -> dict[str, str | int]:
        return {"name": self.name, "epoch": self.epoch, "start": self.start}

    def failed(self, database: str) -> FenceUnavailable:
        return FenceUnavailable(f"database {database}: {self.obstacle}", hint=self.hint)


class FenceRaiser:
    """Raises fences in the databases of ``conninfos`` (by name) and keeps connections for the next time.

    ``cluster``, if given, must be the one that schema herd was installed for.  The role needs herd_admin, and
    for ending sessions of other roles membership in those, or in pg_signal_backend and pg_read_all_stats.
    """

    def __init__(
        self, conninfos: Mapping[str, str], *, cluster: str = "", clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._cluster = cluster
        self._clock = clock
        self._raisers = {database: self._connections(database, info) for database, info in conninfos.items()}
        self._watchers = {database: self._connections(database, info) for database, info in conninfos.items()}

    async def raise_fence(
        self,
        database: str,
        name: str,
        epoch: int,
        start: int,
        *,
        node: str,
        timeout: float,
        confirm: Confirm | None = None,
    ) -> Raised:
        """Raise the fence of ``name`` to (``epoch``, ``start``) within ``timeout`` seconds.

        Returns when it is durable and every session of a lower token is gone.  ``confirm`` is asked whether
        the token is still the owner's when the server was promoted since the last raise: an asynchronous
        standby may have missed a later one.  Raises Fenced when a greater token was there before,
        FenceUnavailable (which says what helps) when it could not be done in time.
        """
        began = self._clock.now()
        if database not in self._raisers:
            raise FenceUnavailable(
                f"database {database} is not configured on this host",
                hint=f"add [database.{database}] to agent.toml",
            )
        wanted = _Raise(name, epoch, start, node, began + timeout, confirm)
        while not await self._try(database, wanted):
            await self._raisers[database].forget_idle()
        return Raised((self._clock.now() - began) * 1000, tuple(wanted.ended.values()))

    async def close(self) -> None:
        """Close the kept connections."""
        for connections in (*self._raisers.values(), *self._watchers.values()):
            await connections.close()

    def _connections(self, database: str, conninfo: str) -> Connections:
        async def set_up(connection: Connection) -> None:
            attempt = f"{_ATTEMPT * 1000:.0f}"
            row = await (await connection.execute(QUERIES["raiser_setup"], {"attempt": attempt})).fetchone()
            check_version(row and row[0], database)

        return Connections(
            conninfo, limit=_AT_ONCE, application_name=RAISER, set_up=set_up, clock=self._clock
        )

    async def _try(self, database: str, wanted: _Raise) -> bool:
        """Raise on one connection; False means that it was a kept one and dead."""
        raisers = self._raisers[database]
        try:
            connection, reused = await raisers.acquire(wanted.deadline)
        except TimeoutError as error:
            raise wanted.failed(database) from error
        except psycopg.Error as error:
            raise translate(error, database) from error
        try:
            with cut_at(connection, wanted.deadline, self._clock):
                await self._raise(connection, database, wanted)
        except psycopg.Error as error:
            if self._clock.now() >= wanted.deadline:
                raise wanted.failed(database) from error
            if not reused or not lost(connection, error):
                raise translate(error, database) from error
            return False
        finally:
            await raisers.release(connection)
        return True

    async def _raise(self, connection: Connection, database: str, wanted: _Raise) -> None:
        values = {**wanted.token, "node": wanted.node, "cluster": self._cluster}
        await self._confirm(connection, database, wanted)
        for step in ("raise_intent", "raise_fence"):
            while (error := await self._watched(connection, database, wanted, step, values)) is not None:
                if not isinstance(error, _AGAIN) or lost(connection, error):
                    raise error
                if self._clock.now() >= wanted.deadline:
                    raise wanted.failed(database)
        while await self._end_superseded(connection, connection.info.backend_pid, wanted):
            await self._pause(wanted, database)

    async def _confirm(self, connection: Connection, database: str, wanted: _Raise) -> None:
        if wanted.confirm is None:
            return
        row = await (await connection.execute(QUERIES["other_history"], {"name": wanted.name})).fetchone()
        if row is not None and row[0] and not await wanted.confirm():
            raise FenceUnavailable(
                f"database {database}: the server was promoted since the fence was raised, and etcd does not "
                f"confirm that epoch {wanted.epoch} still owns {wanted.name}",
                hint=f"pgherd whereis {wanted.name}",
            )

    async def _watched(
        self, connection: Connection, database: str, wanted: _Raise, step: str, values: Mapping[str, object]
    ) -> psycopg.Error | None:
        """Run one statement, and end what blocks it while it waits; the statement's error is the result."""
        done = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch(database, connection.info.backend_pid, wanted, done))
            try:
                await connection.execute(QUERIES[step], values)
            except psycopg.Error as error:
                return error
            finally:
                done.set()
        return None

    async def _watch(self, database: str, raiser: int, wanted: _Raise, done: asyncio.Event) -> None:
        if await _happens(done, _PATIENCE):
            return
        try:
            async with self._watchers[database].borrow(wanted.deadline) as connection:
                with cut_at(connection, wanted.deadline, self._clock):
                    await self._look(connection, raiser, wanted)
                    while not await _happens(done, _LOOK_EVERY):
                        await self._look(connection, raiser, wanted)
        except (psycopg.Error, TimeoutError) as error:
            if self._clock.now() < wanted.deadline:
                wanted.obstacle = f"what blocks the raise cannot be seen: {str(error).strip()}"
            await self._watchers[database].forget_idle()

    async def _look(self, connection: Connection, raiser: int, wanted: _Raise) -> None:
        await self._end_superseded(connection, raiser, wanted)
        row = await (await connection.execute(QUERIES["raiser_waits"], {"raiser": raiser})).fetchone()
        match row:
            case (_, str(gid), str(owner)) if gid:
                wanted.obstacle = f"prepared transaction {gid!r} of role {owner} holds the fence"
                wanted.hint = f"as {owner}: ROLLBACK PREPARED '{gid}'"
            case ("SyncRep", _, _):
                wanted.obstacle = "the commit waits for a synchronous standby that does not answer"
                wanted.hint = "bring a standby back, or change synchronous_standby_names"
            case _:
                pass

    async def _end_superseded(self, connection: Connection, raiser: int, wanted: _Raise) -> bool:
        """Ask every session that is to go to end; tell whether there is one."""
        cursor = await connection.execute(
            QUERIES["superseded"], {**wanted.token, "raiser": raiser, "raisers": RAISER}
        )
        sessions = await cursor.fetchall()
        for pid, backend_start, user, application, state in sessions:
            who = ", ".join(str(part) for part in (application or user, state) if part)
            description = f"pid {pid} ({who})"
            wanted.obstacle = f"session {description} has not ended yet"
            try:
                await connection.execute(QUERIES["terminate"], {"pid": pid, "backend_start": backend_start})
            except errors.InsufficientPrivilege:
                mine = connection.info.user
                wanted.obstacle = f"session {description} of role {user} may not be ended by {mine}"
                wanted.hint = f"grant pg_signal_backend, pg_read_all_stats to {mine}"
            else:
                wanted.ended[int(str(pid))] = description
        return bool(sessions)

    async def _pause(self, wanted: _Raise, database: str) -> None:
        if self._clock.now() >= wanted.deadline:
            raise wanted.failed(database)
        await self._clock.sleep_until(min(wanted.deadline, self._clock.now() + _PATIENCE))


async def _happens(event: asyncio.Event, within: float) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(within):
            await event.wait()
    return event.is_set()


async def raise_fence(
    conninfo: str, name: str, epoch: int, start: int, *, node: str, timeout: float, cluster: str = ""
) -> Raised:
    """Raise one fence over a connection of its own; see :meth:`FenceRaiser.raise_fence`."""
    database = psycopg.conninfo.conninfo_to_dict(conninfo).get("dbname") or "default"
    raiser = FenceRaiser({str(database): conninfo}, cluster=cluster)
    try:
        return await raiser.raise_fence(str(database), name, epoch, start, node=node, timeout=timeout)
    finally:
        await raiser.close()
