"""Fixtures: etcd and PostgreSQL as real processes, one set per test session."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from node_agent.sandbox.servers import EtcdServers, PostgresServer

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def server_directory() -> Iterator[Path]:
    """A directory that PostgreSQL's user can enter too; pytest's own are closed to it."""
    directory = Path(tempfile.mkdtemp(prefix="pgherd-tests-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def etcd_server(server_directory: Path) -> Iterator[EtcdServers]:
    """One etcd member for the session: use keys of your own."""
    servers = EtcdServers(server_directory / "etcd")
    asyncio.run(servers.start())
    yield servers
    asyncio.run(servers.stop())


@pytest.fixture(scope="session")
def postgres_server(server_directory: Path) -> Iterator[PostgresServer]:
    """One PostgreSQL server for the session: use a database of your own."""
    server = PostgresServer(server_directory / "postgres")
    asyncio.run(server.start())
    yield server
    asyncio.run(server.stop())


@pytest.fixture
async def database(postgres_server: PostgresServer) -> str:
    """The conninfo of a new, empty database of the session's server."""
    name = f"test{next(_numbers)}"
    await postgres_server.run("createdb", name)
    return postgres_server.conninfo(name)
