"""The embedded servers: they start, stop, die with their parent, and say what stands in the way."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from node_agent.sandbox.process import Process, ServerFailed, User, free_ports, until
from node_agent.sandbox.servers import EtcdServers, PostgresServer

pytestmark = pytest.mark.slow


@pytest.fixture
def directory(server_directory: Path, request: pytest.FixtureRequest) -> Path:
    path = server_directory / str(request.node.name)
    path.mkdir()
    return path


async def test_three_etcd_members_serve_and_one_may_be_lost(directory: Path) -> None:
    servers = EtcdServers(directory, 3)
    await servers.start()
    try:
        assert set(servers.running) == {0, 1, 2}
        await servers.kill_member(1)
        assert set(servers.running) == {0, 2}
        await servers.start_member(1)
        assert set(servers.running) == {0, 1, 2}
    finally:
        await servers.stop()
    assert not servers.running


async def test_etcd_that_cannot_start_is_reported_with_its_log(directory: Path) -> None:
    servers = EtcdServers(directory)
    occupied = EtcdServers(directory / "other")
    occupied._clients = servers._clients
    await servers.start()
    try:
        with pytest.raises(ServerFailed, match="address already in use") as failure:
            await occupied.start()
        assert str(occupied.log(0)) in str(failure.value)
    finally:
        await servers.stop()


async def test_postgres_answers_on_socket_and_tcp_and_keeps_its_data(directory: Path) -> None:
    server = PostgresServer(directory)
    await server.start()
    try:
        await server.run("createdb", "app")
        for conninfo in (server.conninfo("app"), server.conninfo("app", tcp=True)):
            async with await psycopg.AsyncConnection.connect(conninfo) as connection:
                await connection.execute("create table if not exists kept (at timestamptz)")
        await server.stop()
        assert not server.running
        await server.start()
        assert "kept" in await server.run("psql", "-d", "app", "-Atc", "table pg_tables")
    finally:
        await server.stop()


async def test_postgres_asks_for_a_password_over_tcp(postgres_server: PostgresServer) -> None:
    conninfo = postgres_server.conninfo(tcp=True).replace(str(postgres_server.passfile), "/dev/null")
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        await psycopg.AsyncConnection.connect(conninfo)


async def test_a_failing_program_says_why(postgres_server: PostgresServer) -> None:
    with pytest.raises(ServerFailed, match='database "postgres" already exists'):
        await postgres_server.run("createdb", "postgres")


async def test_a_long_directory_is_no_obstacle_to_the_socket(directory: Path) -> None:
    server = PostgresServer(directory / ("long" * 20))
    await server.start()
    try:
        assert (await server.run("psql", "-d", "postgres", "-Atc", "select 1")).strip() == "1"
    finally:
        await server.stop()


@pytest.mark.root
async def test_root_hears_which_directory_postgres_cannot_enter(directory: Path) -> None:
    closed = directory / "closed"
    closed.mkdir()
    closed.chmod(0o700)
    with pytest.raises(ServerFailed, match=f"cannot enter {closed}"):
        await PostgresServer(directory / "closed" / "server").start()


@pytest.mark.root
async def test_programs_that_postgres_cannot_reach_are_copied(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = PostgresServer(directory)
    wheel = server.bindir
    monkeypatch.setattr(User, "barrier", lambda _, path: path if path == wheel else None)
    await server.start()
    try:
        assert os.readlink(f"/proc/{server.pid}/exe").startswith(str(directory))
    finally:
        await server.stop()


async def test_a_process_is_killed_when_it_ignores_its_stages(directory: Path) -> None:
    log = directory / "log"
    script = "import signal, sys; signal.signal(15, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    process = Process.spawn([sys.executable, "-c", script], log=log, directory=directory, environment={})
    await until(lambda: "up" in process.tail(), process, "the script", 10)
    assert await process.stop([(signal.SIGTERM, 0.05)]) == -signal.SIGKILL


def test_servers_die_with_the_process_that_started_them(directory: Path) -> None:
    script = (
        "import asyncio, os, sys, signal; from pathlib import Path;"
        "from node_agent.sandbox.servers import EtcdServers, PostgresServer\n"
        "async def main():\n"
        "  e, p = EtcdServers(Path(sys.argv[1], 'e')), PostgresServer(Path(sys.argv[1], 'p'))\n"
        "  await asyncio.gather(e.start(), p.start())\n"
        "  print(e.pid(0), p.pid, flush=True)\n"
        "  await asyncio.Event().wait()\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(directory)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        children = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(children) == 2
    for child in children:
        _await_end(child)


def _await_end(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(10_000), "still running 10 s after its parent's death"
    os.close(descriptor)


def test_free_ports_differ_and_leave_the_ephemeral_range_alone() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert max(ports) < 32000
