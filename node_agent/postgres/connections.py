"""Open connections to one database, made when wanted and kept for the next one.

Not psycopg_pool: a fence needs the reason of a failed connect at once (the pool retries in the background and
reports only that time is up), and a set-up whose refusal reaches the caller.  Every wait here is bounded by
cutting the socket, because a server that is stopped or unreachable answers no cancel request either.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import psycopg
from psycopg.pq import TransactionStatus

from registry.clock import Boottime, Clock

Connection = psycopg.AsyncConnection[tuple[object, ...]]

_CLOSING_SECONDS = 1.0


@contextmanager
def cut_at(connection: Connection, deadline: Boottime, clock: Clock) -> Iterator[None]:
    """Shut the socket down at ``deadline``: whatever waits for the server fails as if that were gone."""
    loop = asyncio.get_running_loop()
    timer = loop.call_later(max(0.0, deadline - clock.now()), _cut, connection)
    try:
        yield
    finally:
        timer.cancel()


def _cut(connection: Connection) -> None:
    # Shut down, not closed: psycopg still watches the descriptor, whose number must not be reused meanwhile.
    with suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


class Connections:
    """Up to ``limit`` connections to one database; each new one goes through ``set_up``."""

    def __init__(
        self,
        conninfo: str,
        *,
        limit: int,
        application_name: str,
        set_up: Callable[[Connection], Awaitable[None]],
        clock: Clock,
    ) -> None:
        self._conninfo = conninfo
        self._application_name = application_name
        self._set_up = set_up
        self._clock = clock
        self._free = asyncio.Semaphore(limit)
        self._idle: list[Connection] = []
        self._closed = False

    async def acquire(self, deadline: Boottime) -> tuple[Connection, bool]:
        """Return a connection in autocommit mode, and whether it was used before (so it may be dead by now).

        It belongs to the caller until :meth:`release`.  Raises TimeoutError when none could be had before
        ``deadline``, what ``set_up`` raises, psycopg.OperationalError when the server cannot be reached.
        """
        async with asyncio.timeout(deadline - self._clock.now()):
            await self._free.acquire()
        try:
            if self._idle:
                return self._idle.pop(), True
            return await self._connect(deadline), False
        except BaseException:
            self._free.release()
            raise

    async def release(self, connection: Connection) -> None:
        """Take a connection back; it is kept if it is in no transaction."""
        try:
            idle = connection.info.transaction_status == TransactionStatus.IDLE
            if idle and not connection.closed and not self._closed:
                self._idle.append(connection)
            else:
                await self._close(connection)
        finally:
            self._free.release()

    @asynccontextmanager
    async def borrow(self, deadline: Boottime) -> AsyncIterator[Connection]:
        """Lend a connection for a block; raises what :meth:`acquire` raises."""
        connection, _ = await self.acquire(deadline)
        try:
            yield connection
        finally:
            await self.release(connection)

    async def forget_idle(self) -> None:
        """Close the idle connections: one that died does not die alone."""
        while self._idle:
            await self._close(self._idle.pop())

    async def close(self) -> None:
        """Close idle connections now and lent ones when they come back."""
        self._closed = True
        await self.forget_idle()

    async def _connect(self, deadline: Boottime) -> Connection:
        async with asyncio.timeout(deadline - self._clock.now()):
            connection = await psycopg.AsyncConnection.connect(
                self._conninfo,
                autocommit=True,
                application_name=self._application_name,
                prepare_threshold=None,
            )
        try:
            with cut_at(connection, deadline, self._clock):
                await self._set_up(connection)
        except BaseException:
            await self._close(connection)
            raise
        return connection

    async def _close(self, connection: Connection) -> None:
        with cut_at(connection, self._clock.now() + _CLOSING_SECONDS, self._clock):
            await connection.close()
