"""Fixtures: real PostgreSQL servers, of every major version that this machine has.

``postgres`` is one shared server with a fresh database per test; ``pg_cluster`` makes servers of a test's
own, with standbys.  A test that takes one of them runs once per version: embedded PostgreSQL always, Debian's
where it is installed.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from node_agent.sandbox.servers import PostgresServer

EMBEDDED = "embedded"
_DEBIAN = Path("/usr/lib/postgresql")
_numbers = itertools.count(1)


def _versions() -> list[str]:
    debian = [path.parent.parent.name for path in sorted(_DEBIAN.glob("*/bin/postgres"))]
    return [EMBEDDED, *debian]


@dataclass(frozen=True, slots=True)
class Binaries:
    """Programs of one PostgreSQL version, and a data directory freshly made by its initdb."""

    version: str
    bindir: Path | None
    template: Path


@dataclass(frozen=True, slots=True)
class TestDatabase:
    """One empty database of a running server.  ``conninfo`` connects as superuser."""

    __test__ = False

    server: PostgresServer
    name: str

    @property
    def conninfo(self) -> str:
        return self.server.conninfo(self.name)

    def as_role(self, role: str) -> str:
        """Return how to connect as another role."""
        return f"{self.conninfo} user={role}"

    def connect(self, role: str = "") -> psycopg.Connection[tuple[object, ...]]:
        """Return a new connection in autocommit mode."""
        return psycopg.connect(self.as_role(role) if role else self.conninfo, autocommit=True)

    def execute(self, query: str, *parameters: object) -> list[tuple[object, ...]]:
        """Run one statement as superuser, return its rows."""
        with closing(self.connect()) as connection:
            cursor = connection.execute(query.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []


@dataclass(slots=True)
class Clusters:
    """Makes servers from a template, and streaming standbys of them; stops them all at the end."""

    binaries: Binaries
    directory: Path
    servers: list[PostgresServer] = field(default_factory=list)

    async def primary(self, **settings: str) -> PostgresServer:
        """Start a new server that standbys can follow."""
        server = self._server(settings)
        await asyncio.to_thread(_copy, self.binaries.template, server)
        await server.start()
        return server

    async def standby(self, of: PostgresServer, **settings: str) -> PostgresServer:
        """Start a streaming standby of ``of``; returns when it streams."""
        standby = self._server({"hot_standby": "on", **settings})
        standby.directory.mkdir(mode=0o755)
        await of.run("pg_basebackup", f"--pgdata={standby.data}", "--write-recovery-conf", "--no-sync",
                     "--checkpoint=fast", "--wal-method=stream")  # fmt: skip
        _own(standby.data, like=of.data)
        await standby.start()
        with closing(psycopg.connect(of.conninfo(), autocommit=True)) as primary:
            await eventually(
                lambda: (
                    primary.execute("select from pg_stat_replication where state = 'streaming'").rowcount == 1
                )
            )
        return standby

    def _server(self, settings: dict[str, str]) -> PostgresServer:
        directory = self.directory / f"pg{next(_numbers)}"
        server = PostgresServer(directory, bindir=self.binaries.bindir, settings=settings)
        self.servers.append(server)
        return server

    async def stop(self) -> None:
        for server in self.servers:
            if server.running:
                server.send(signal.SIGCONT)
                await server.kill()


async def promote(standby: PostgresServer) -> None:
    """Promote a standby; returns when it accepts writes."""

    def run() -> None:
        with closing(psycopg.connect(standby.conninfo(), autocommit=True)) as connection:
            connection.execute("select pg_promote()")

    await asyncio.to_thread(run)


async def eventually(condition: Callable[[], bool | Awaitable[bool]], seconds: float = 15.0) -> None:
    """Return once ``condition()`` holds; fail the test when it does not within ``seconds``."""
    give_up = time.monotonic() + seconds
    while True:
        result = condition()
        if await result if isinstance(result, Awaitable) else result:
            return
        assert time.monotonic() < give_up, f"still not so after {seconds:g} s"
        await asyncio.sleep(0.005)


def _copy(template: Path, server: PostgresServer) -> None:
    server.directory.mkdir(mode=0o755)
    shutil.copytree(template, server.data)
    server.data.chmod(0o700)
    _own(server.data, like=template)


def _own(tree: Path, like: Path) -> None:
    status = like.stat()
    for path in (tree, *tree.rglob("*")):
        os.chown(path, status.st_uid, status.st_gid)


@pytest.fixture(scope="session")
def _templates(server_directory: Path) -> dict[str, Binaries]:
    return {}


def _binaries(version: str, directory: Path, made: dict[str, Binaries]) -> Binaries:
    if version not in made:
        bindir = None if version == EMBEDDED else _DEBIAN / version / "bin"
        server = PostgresServer(directory / f"template-{version}", bindir=bindir)
        asyncio.run(_initdb(server))
        made[version] = Binaries(version, bindir, server.data)
    return made[version]


async def _initdb(server: PostgresServer) -> None:
    await server.start()
    await server.stop()


@pytest.fixture(scope="session", params=_versions())
def binaries(
    request: pytest.FixtureRequest, server_directory: Path, _templates: dict[str, Binaries]
) -> Binaries:
    """Each PostgreSQL version of this machine."""
    return _binaries(request.param, server_directory, _templates)


@pytest.fixture(scope="session")
def shared_server(binaries: Binaries, server_directory: Path) -> Iterator[PostgresServer]:
    """One server per version for the session; prepared transactions are possible on it."""
    server = PostgresServer(
        server_directory / f"shared-{binaries.version}",
        bindir=binaries.bindir,
        settings={"max_prepared_transactions": "10", "wal_level": "logical"},
    )
    _copy(binaries.template, server)
    asyncio.run(server.start())
    yield server
    asyncio.run(server.stop())


@pytest.fixture
def postgres(shared_server: PostgresServer) -> Iterator[TestDatabase]:
    """An empty database of the shared server; dropped, with whoever is connected, at the end."""
    name = f"postgres{next(_numbers)}"
    server = TestDatabase(shared_server, "postgres")
    server.execute(f"create database {name}")
    yield TestDatabase(shared_server, name)
    with closing(server.connect()) as connection:
        for (gid,) in connection.execute("select gid from pg_prepared_xacts where database = %s", [name]):
            with closing(TestDatabase(shared_server, name).connect()) as inside:
                inside.execute(sql.SQL("rollback prepared {}").format(sql.Literal(gid)))
        connection.execute(f"drop database {name} with (force)".encode())


@pytest.fixture
def role(postgres: TestDatabase) -> Iterator[str]:
    """A role without any privilege that may log in; what it owns goes at the end."""
    name = f"role{next(_numbers)}"
    postgres.execute(f"create role {name} login")
    yield name
    postgres.execute(f"drop owned by {name} cascade")
    postgres.execute(f"drop role {name}")


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory of the test's own that PostgreSQL's user can enter."""
    directory = Path(tempfile.mkdtemp(prefix="pgherd-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
async def pg_cluster(binaries: Binaries, open_directory: Path) -> AsyncIterator[Clusters]:
    """Servers of the test's own."""
    clusters = Clusters(binaries, open_directory)
    yield clusters
    await clusters.stop()
