"""Installing schema ``herd`` into a database, and telling how it stands there.

Installing is idempotent: an installed schema stays as it is, only the identity of the database is written
again, which is what makes a restored copy usable on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import errors

from node_agent.postgres.connections import Connection
from node_agent.postgres.queries import HERE, QUERIES
from node_agent.postgres.refusals import SCHEMA_VERSION

_CONNECT_SECONDS = 5


class InstallFailed(Exception):
    """The schema cannot be installed or read; ``hint`` is what helps."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class DatabaseUnreachable(InstallFailed):
    """No connection to the database."""


@dataclass(frozen=True, slots=True)
class Installed:
    """What installing did: ``schema`` was created now or not; ``identity`` is new, same or copy."""

    created: bool
    identity: str
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceRow:
    """One fence.  ``open``: a transaction with its token would pass on this server."""

    name: str
    epoch: int
    start: int
    node: str
    raised_at: datetime
    open: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How schema herd stands in a database; ``version`` is None where there is none."""

    database: str
    server_version: str
    standby: bool
    version: int | None = None
    cluster: str = ""
    incarnation: int = 0
    installed_at: datetime | None = None
    problems: tuple[str, ...] = ()
    fences: tuple[FenceRow, ...] = ()


async def install(conninfo: str, cluster: str) -> Installed:
    """Install schema herd for ``cluster``, in one transaction.

    Raises InstallFailed when a schema of that name is there already and is not ours or of another version,
    or when the role may not create it; DatabaseUnreachable when there is no connection.
    """
    async with await _connect(conninfo) as connection:
        try:
            async with connection.transaction():
                await connection.execute(QUERIES["install_lock"])
                created = await _create_missing(connection)
                ((identity,),) = await _rows(connection, "identify", {"cluster": cluster})
                missing = await _rows(connection, "grant_roles")
                published = await _rows(connection, "all_tables_publications")
        except psycopg.Error as error:
            raise InstallFailed(_primary(error), hint=_install_hint(error, connection)) from error
    notices = [str(text) for (text,) in missing]
    notices += [
        f"publication {name} is FOR ALL TABLES and would copy the fences of this database to its subscribers"
        for (name,) in published
    ]
    return Installed(created, str(identity), tuple(notices))


async def status(conninfo: str) -> Status:
    """Look at schema herd; raises DatabaseUnreachable, and InstallFailed when the role may not see it."""
    async with await _connect(conninfo) as connection:
        ((database, standby, server),) = await _rows(connection, "server")
        found = {"database": database, "standby": standby, "server_version": server}
        try:
            version = await _version(connection)
            if version != SCHEMA_VERSION:
                problem = "no schema herd" if version is None else f"version {version}, not {SCHEMA_VERSION}"
                return Status(**found, version=version, problems=(problem,))
            return await _describe(connection, found)
        except errors.InsufficientPrivilege as error:
            raise InstallFailed(
                _primary(error), hint=f"grant herd_admin to {connection.info.user}"
            ) from error


async def _describe(connection: Connection, found: dict[str, Any]) -> Status:
    problems = []
    try:
        await connection.execute(QUERIES["check_installation"])
    except errors.ObjectNotInPrerequisiteState as error:
        problems.append(_primary(error))
    installation = await _rows(connection, "installation")
    cluster, incarnation, installed_at = installation[0] if installation else ("", 0, None)
    fences = tuple(
        FenceRow(name=row[0], epoch=row[1], start=row[2], node=row[3], raised_at=row[4], open=row[5])
        for row in await _rows(connection, "fences")
    )
    return Status(
        **found,
        version=SCHEMA_VERSION,
        cluster=cluster,
        incarnation=incarnation,
        installed_at=installed_at,
        problems=tuple(problems),
        fences=fences,
    )


async def _create_missing(connection: Connection) -> bool:
    version = await _version(connection)
    if version is None:
        await connection.execute((HERE / "schema.sql").read_bytes())
        return True
    if version != SCHEMA_VERSION:
        raise InstallFailed(
            f"schema herd has version {version}, this pgherd works with {SCHEMA_VERSION}",
            hint="use the pgherd that matches",
        )
    return False


async def _version(connection: Connection) -> int | None:
    ((exists, ours),) = await _rows(connection, "installed_schema")
    if not exists:
        return None
    if not ours:
        raise InstallFailed(
            "there is a schema herd that is not pgherd's", hint="rename it: alter schema herd rename to ..."
        )
    ((version,),) = await _rows(connection, "version")
    return int(str(version))


async def _rows(
    connection: Connection, query: str, values: dict[str, object] | None = None
) -> list[tuple[Any, ...]]:
    return await (await connection.execute(QUERIES[query], values)).fetchall()


async def _connect(conninfo: str) -> Connection:
    try:
        return await psycopg.AsyncConnection.connect(
            conninfo, autocommit=True, connect_timeout=_CONNECT_SECONDS, application_name="pgherd sql"
        )
    except psycopg.Error as error:
        raise DatabaseUnreachable(str(error).strip()) from error


def _install_hint(error: psycopg.Error, connection: Connection) -> str:
    if isinstance(error, errors.InsufficientPrivilege):
        may_create = f"grant create on database {connection.info.dbname} to {connection.info.user}"
        return f"run it as the owner of schema herd, or: {may_create}"
    return error.diag.message_hint or ""


def _primary(error: psycopg.Error) -> str:
    return error.diag.message_primary or str(error).strip()
