"""A cluster of real hosts: three etcd members, PostgreSQL, and launchers with all that lives below them.

Every host reaches each etcd member through a proxy of its own, so that one host can be cut off.  A host runs
as ``pgherd run`` does; what it prints is in ``pgherd.log`` in its directory.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psycopg

from node_agent.postgres.install import install
from node_agent.sandbox.process import Process, free_ports
from node_agent.sandbox.servers import PostgresServer
from registry import security
from registry.clock import SYSTEM_CLOCK
from registry.v1 import cluster_pb2, cluster_pb2_grpc
from tests.support.etcd import Etcd
from tests.support.proxy import Mode, Proxies, Proxy

TTL = 5.0
NAMES = ("alpha", "beta", "gamma")
START_WITHIN = 40.0
_RPC_TIMEOUT = 2.0

_CONFIG = """\
schema = 1
cluster = "{cluster}"
host = "{host}"
run_dir = "{run_dir}"
labels = {{ only = "{host}" }}

[etcd]
endpoints = {endpoints}

[lease]
ttl = "{ttl:g}s"

[listen]
grpc = "127.0.0.1:{port}"
"""

_DATABASE = """
[postgres.main]

[database.app]
postgres = "main"
conninfo = "{conninfo}"
"""


async def eventually(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait until ``condition`` holds and return the seconds it took; fail when that takes too long."""
    begin = SYSTEM_CLOCK.now()
    while not condition():
        assert SYSTEM_CLOCK.now() < begin + seconds, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.005)
    return SYSTEM_CLOCK.now() - begin


@dataclass(slots=True)
class Host:
    """One host; its directory and port outlive its processes."""

    name: str
    directory: Path
    port: int
    proxies: list[Proxy] = field(default_factory=list)
    options: tuple[str, ...] = ()
    process: Process | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.directory / "pgherd.log"

    @property
    def config(self) -> Path:
        return self.directory / "agent.toml"

    @property
    def running(self) -> bool:
        """Whether the launcher runs (or is stopped by a signal)."""
        return self.process is not None and self.process.running

    def start(self) -> None:
        """Start the launcher; :meth:`ready` tells when the host is a member."""
        assert not self.running, f"host {self.name} runs"
        argv = [sys.executable, "-P", "-m", "node_agent.launcher", *self.options, "-c", str(self.config)]
        self.process = Process.spawn(
            argv, log=self.log, directory=self.directory, environment={**os.environ, "PYTHONUNBUFFERED": "1"}
        )

    async def status(self) -> cluster_pb2.StatusResponse | None:
        """What its agent says of itself, None if it does not answer."""
        async with security.channel(self.address) as channel:
            try:
                stub = cluster_pb2_grpc.ClusterStub(channel)
                return await stub.Status(cluster_pb2.StatusRequest(), timeout=_RPC_TIMEOUT)
            except grpc.aio.AioRpcError:
                return None

    async def wait_status(
        self, wanted: Callable[[cluster_pb2.StatusResponse], bool], seconds: float = START_WITHIN
    ) -> cluster_pb2.StatusResponse:
        """Wait until its agent says of itself what is wanted."""
        status = None
        try:
            async with asyncio.timeout(seconds):
                while (status := await self.status()) is None or not wanted(status):
                    assert self.running, f"{self.name} has ended: {self.tail()}"
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{self.name} after {seconds:g} s: {status}\n{self.tail()}") from None
        return status

    async def ready(self, seconds: float = START_WITHIN) -> cluster_pb2.StatusResponse:
        """Wait until it is a member of the cluster."""
        return await self.wait_status(lambda status: status.state == "ready" and status.in_sync, seconds)

    def tail(self, lines: int = 20) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    async def kill(self) -> None:
        """SIGKILL the launcher; everything below it dies with it."""
        if self.process is not None:
            await self.process.stop(())


class Cluster:
    """See the module; made by :func:`running`."""

    def __init__(self, directory: Path, hosts: Sequence[str], members: int, *, postgres: bool) -> None:
        self.directory = directory
        (directory / "etcd").mkdir()
        self.etcd = Etcd(directory / "etcd", members)
        self.postgres = PostgresServer(directory / "pg", settings=_POSTGRES) if postgres else None
        self.proxies = Proxies()
        self.hosts = {name: self.add_host(name, name) for name in hosts}

    def add_host(self, name: str, directory: str, *, options: tuple[str, ...] = ()) -> Host:
        """Make a host and its configuration, and do not start it."""
        (port,) = free_ports(1)
        host = Host(name, self.directory / directory, port, options=options)
        host.directory.mkdir()
        for member, proxy_port in zip(self.etcd.members, free_ports(len(self.etcd.members)), strict=True):
            host.proxies.append(self.proxies.add(("127.0.0.1", member.client_port), proxy_port))
        text = _CONFIG.format(
            cluster="test",
            host=name,
            run_dir=host.directory,
            endpoints=json.dumps([f"http://{proxy.address}" for proxy in host.proxies]),
            ttl=TTL,
            port=port,
        )
        if self.postgres is not None:
            conninfo = self.conninfo.replace("\\", "\\\\").replace('"', '\\"')
            text += _DATABASE.format(conninfo=conninfo)
        host.config.write_text(text)
        return host

    @property
    def conninfo(self) -> str:
        assert self.postgres is not None
        return self.postgres.conninfo("app")

    def sql(self, statement: str) -> list[tuple[object, ...]]:
        """Run one statement in the database, return its rows."""
        with closing(psycopg.connect(self.conninfo, autocommit=True)) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    async def start_servers(self) -> None:
        """Start etcd and PostgreSQL."""
        self.etcd.start()
        if self.postgres is not None:
            await self.postgres.start()
            await self.postgres.run("createdb", "app")
            await install(self.conninfo, "test")

    def network(self, host: Host, mode: Mode = Mode.PASS, delay: float = 0.0) -> None:
        """Change what lies between a host and etcd."""
        self.proxies.set(host.proxies, mode, delay)

    async def stop(self) -> None:
        for host in self.hosts.values():
            await host.kill()
        self.etcd.stop()
        if self.postgres is not None:
            await self.postgres.stop()
        self.proxies.stop()


# Commits are put in order by their time, which is taken before locks are released.
_POSTGRES = {"track_commit_timestamp": "on", "max_connections": "300"}


@contextmanager
def running(hosts: Sequence[str] = NAMES, members: int = 3, *, postgres: bool = True) -> Iterator[Cluster]:
    """Run a fresh cluster; its servers are up, its hosts are not."""
    directory = Path(tempfile.mkdtemp(prefix="pgherd-c-"))
    # PostgreSQL does not run as root, and must get in.
    directory.chmod(0o755)
    cluster = Cluster(directory, hosts, members, postgres=postgres)
    try:
        asyncio.run(cluster.start_servers())
        yield cluster
    finally:
        asyncio.run(cluster.stop())
        shutil.rmtree(directory, ignore_errors=True)
