"""Fenced transactions for workers: what one of them commits, it commits as the owner of its name.

    async with databases.backend("app") as tx:
        gone = await tx.execute("delete from history where at < now() - interval '30 days'")

The fence is taken first, at top level, and asserted once more together with COMMIT.  The sessions are direct
ones: limits and the registration by which a takeover ends them do not survive a transaction pooler.

Ends: committed; Fenced (nothing committed, somebody else is the owner); FenceClosed (nothing committed, and
nothing can be until the agent has raised the fence again: end the process); FenceUnavailable (no transaction
was opened); any other error (nothing committed); UnknownOutcome (the connection broke during COMMIT: look at
what the transaction would have written, to decide).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Any, Literal
from weakref import WeakSet

import psycopg
from psycopg import errors, sql
from psycopg.abc import QueryNoTemplate
from psycopg.pq import TransactionStatus

from node_agent.postgres.connections import Connection, Connections, cut_at
from node_agent.postgres.fence import application_name
from node_agent.postgres.queries import QUERIES, compose
from node_agent.postgres.refusals import (
    FenceClosed,
    FenceUnavailable,
    check_version,
    is_conflict,
    is_loss,
    lost,
    refusal,
    translate,
)
from registry.clock import SYSTEM_CLOCK, Boottime, Clock
from registry.errors import Fenced, UnknownOutcome

__all__ = ["Databases", "FenceClosed", "FenceUnavailable", "Isolation", "StatementError", "Transaction"]

StatementError = psycopg.Error
"""What a statement raises that PostgreSQL does not accept, or whose connection breaks."""

Isolation = Literal["read committed", "repeatable read", "serializable"]
Parameters = Sequence[Any] | Mapping[str, Any] | None

_SHORTEST_TTL = 5.0
_LIMIT = 4
"""Transactions at a time in one database."""
_ROLLBACK_SECONDS = 1.0
_SECOND_LOOK_SECONDS = 1.0
_NETWORK_SECONDS = 1.0
"""What an answer may take beyond the server's own limit before the connection counts as broken."""

_open_in: ContextVar[Mapping[str, Transaction]] = ContextVar("pgherd_fenced_transactions")


class Transaction:
    """An open transaction; made by :meth:`Databases.backend` and usable inside its block only."""

    def __init__(self, connection: Connection, limit: float, clock: Clock) -> None:
        self._connection = connection
        self._limit = limit
        self._clock = clock
        self.ended = False

    async def execute(
        self, query: QueryNoTemplate, parameters: Parameters = None
    ) -> psycopg.AsyncCursor[tuple[Any, ...]]:
        """Run a statement; the cursor has ``rowcount`` and the rows.

        Raises Fenced or FenceClosed when PostgreSQL says PH001 (a table under ``herd.protect``, for example),
        RuntimeError after the end of the transaction, else what psycopg raises.
        """
        self._require_open()
        deadline = self._clock.now() + self._limit + _NETWORK_SECONDS
        with cut_at(self._connection, deadline, self._clock):
            try:
                cursor = await self._connection.execute(query, parameters)
            except psycopg.Error as error:
                if error.sqlstate == "PH001":
                    raise refusal(error) from error
                raise
        self._require_open()
        return cursor

    async def fetch_one(
        self, query: QueryNoTemplate, parameters: Parameters = None
    ) -> tuple[Any, ...] | None:
        """Run a query and return its first row, or None."""
        return await (await self.execute(query, parameters)).fetchone()

    async def fetch_all(self, query: QueryNoTemplate, parameters: Parameters = None) -> list[tuple[Any, ...]]:
        """Run a query and return its rows."""
        return await (await self.execute(query, parameters)).fetchall()

    def _require_open(self) -> None:
        if self.ended or self._connection.info.transaction_status == TransactionStatus.IDLE:
            raise RuntimeError(
                "the fenced transaction has ended: only leaving its block ends it, not COMMIT or ROLLBACK"
            )


class Databases:
    """A worker's databases (``conninfos`` by name), entered with its token.

    ``ttl`` is the lease's, in seconds: by default no statement and no pause inside a transaction may last
    longer than 4/5 of it, so that a takeover need not end this session by force.  ``statement_timeout`` and
    ``idle_timeout``, in seconds, replace these limits.
    """

    def __init__(
        self,
        conninfos: Mapping[str, str],
        name: str,
        epoch: int,
        start: int,
        *,
        ttl: float = _SHORTEST_TTL,
        statement_timeout: float | None = None,
        idle_timeout: float | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._token: dict[str, Any] = {"name": name, "epoch": epoch, "start": start}
        self._statement_timeout = ttl * 0.8 if statement_timeout is None else statement_timeout
        self._idle_timeout = ttl * 0.8 if idle_timeout is None else idle_timeout
        self._clock = clock
        calls_itself = application_name(name, epoch, start)
        self._connections = {
            database: Connections(
                conninfo,
                limit=_LIMIT,
                application_name=calls_itself,
                set_up=self._set_up(database),
                clock=clock,
            )
            for database, conninfo in conninfos.items()
        }
        self._registered: WeakSet[Connection] = WeakSet()

    @asynccontextmanager
    async def backend(
        self,
        database: str,
        *,
        read_only: bool = False,
        isolation: Isolation = "read committed",
        timeout: float = 5.0,
    ) -> AsyncIterator[Transaction]:
        """Open a transaction that commits only while this process is the owner of its name.

        ``timeout``, in seconds, bounds getting a connection and passing the fence, and once more the commit.
        With ``read_only`` nothing can be written: the token is checked at the start and no lock is taken, so
        it works on a standby, too.  Raises LookupError for an unknown database, RuntimeError inside another
        transaction of the same database; see the module's documentation for how it may end.
        """
        if database not in self._connections:
            raise LookupError(f"no database {database!r} here, only {', '.join(self._connections) or 'none'}")
        outer = _open_in.get({})
        self._refuse_nesting(database, outer)
        kind = "_read_only" if read_only else ""
        values = {**self._token, "isolation": sql.SQL(isolation)}
        try:
            connection = await self._begin(database, f"begin{kind}", values, self._clock.now() + timeout)
            transaction = Transaction(connection, self._statement_timeout, self._clock)
            variable = _open_in.set({**outer, self._key(database): transaction})
            try:
                yield transaction
            except BaseException:
                await self._roll_back(connection)
                raise
            else:
                await self._commit(connection, database, read_only, timeout)
            finally:
                transaction.ended = True
                _open_in.reset(variable)
                await self._connections[database].release(connection)
        except psycopg.Error as error:
            if (refused := await self._taken_over(database, error)) is not None:
                raise refused from error
            raise

    async def close(self) -> None:
        """Close all connections."""
        for connections in self._connections.values():
            await connections.close()

    def _key(self, database: str) -> str:
        return f"{id(self)}/{database}"

    def _refuse_nesting(self, database: str, outer: Mapping[str, Transaction]) -> None:
        around = outer.get(self._key(database))
        if around is not None and not around.ended:
            raise RuntimeError(
                f"fenced transactions do not nest: one in {database!r} is open, and another would not commit "
                "together with it; as a savepoint its rollback would release the fence's lock.  Use the one "
                "that is open"
            )

    def _set_up(self, database: str) -> Callable[[Connection], Awaitable[None]]:
        limits = {
            "statement": f"{self._statement_timeout * 1000:.0f}",
            "idle": f"{self._idle_timeout * 1000:.0f}",
        }

        async def set_up(connection: Connection) -> None:
            row = await (await connection.execute(QUERIES["worker_setup"], limits)).fetchone()
            check_version(row and row[0], database)

        return set_up

    async def _begin(
        self, database: str, begin: str, values: Mapping[str, object], deadline: Boottime
    ) -> Connection:
        """Return a connection inside a transaction that has passed the fence."""
        connections = self._connections[database]
        while True:
            try:
                connection, reused = await connections.acquire(deadline)
            except TimeoutError as error:
                raise FenceUnavailable(f"database {database}: no connection in time") from error
            except psycopg.Error as error:
                raise translate(error, database) from error
            try:
                with cut_at(connection, deadline, self._clock):
                    if begin == "begin":
                        await self._register(connection)
                    await connection.execute(compose(QUERIES[begin], **values))
            except psycopg.Error as error:
                await self._roll_back(connection)
                await connections.release(connection)
                if reused and lost(connection, error):
                    await connections.forget_idle()
                elif isinstance(error, errors.SerializationFailure):
                    raise
                else:
                    raise translate(error, database) from error
            except BaseException:
                await self._roll_back(connection)
                await connections.release(connection)
                raise
            else:
                return connection

    async def _register(self, connection: Connection) -> None:
        if connection not in self._registered:
            await connection.execute(QUERIES["register_session"], self._token)
            self._registered.add(connection)

    async def _commit(self, connection: Connection, database: str, read_only: bool, timeout: float) -> None:
        with cut_at(connection, self._clock.now() + timeout, self._clock):
            try:
                if not read_only:
                    await connection.execute(QUERIES["assert_fence"], self._token)
            except psycopg.Error:
                await self._roll_back(connection)
                raise
            # A message of its own: a connection that broke before it was sent has certainly not committed.
            try:
                await connection.execute(QUERIES["commit"])
            except psycopg.Error as error:
                if read_only or not lost(connection, error):
                    raise
                raise UnknownOutcome(
                    f"the connection to database {database} broke during COMMIT: it may have been committed",
                    hint="open another transaction, and look for what this one would have written",
                    details={"database": database, **{key: str(value) for key, value in self._token.items()}},
                ) from error

    async def _taken_over(self, database: str, error: psycopg.Error) -> Fenced | FenceClosed | None:
        """Return the refusal behind an error that a takeover may have caused: ask again whether we may act.

        A takeover ends our sessions; and a fence row that changed after a transaction's snapshot is reported
        as a write conflict, for which whoever repeats such transactions would repeat this one for ever.
        """
        if error.sqlstate == "PH001":
            return refusal(error)
        if not (is_conflict(error) or is_loss(error)):
            return None
        deadline = self._clock.now() + _SECOND_LOOK_SECONDS
        try:
            async with self._connections[database].borrow(deadline) as connection:
                with cut_at(connection, deadline, self._clock):
                    await connection.execute(QUERIES["check_fence"], self._token)
        except psycopg.Error as answer:
            return refusal(answer) if answer.sqlstate == "PH001" else None
        except (TimeoutError, FenceUnavailable):
            return None
        return None

    async def _roll_back(self, connection: Connection) -> None:
        """End the transaction; a connection that does not let us is closed when it is released."""
        if connection.info.transaction_status not in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
            return
        with (
            suppress(psycopg.Error),
            cut_at(connection, self._clock.now() + _ROLLBACK_SECONDS, self._clock),
        ):
            await connection.execute(QUERIES["rollback"])
