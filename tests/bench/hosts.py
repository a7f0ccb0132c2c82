"""Real hosts (launcher, warden, agent) with etcd, and a daemon named "echo"."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from node_agent.sandbox.process import Process, free_ports
from node_agent.sandbox.servers import EtcdServers
from registry.client import Client
from registry.errors import HerdError
from registry.v1 import supervision_pb2, supervision_pb2_grpc

START_TIMEOUT = 30.0
TTL = 5
"""Seconds of the hosts' leases; etcd's election timeout in the benchmarks allows no less."""
SETTLE = 5.0
"""Seconds from a start until nothing happens any more because of it."""
DAEMONS = Path(__file__).with_name("daemons")

_CONFIG = """\
schema = 1
cluster = "bench"
host = "{host}"
run_dir = "{directory}"
[etcd]
endpoints = [{endpoints}]
[lease]
ttl = "{ttl}s"
[listen]
grpc = "127.0.0.1:{port}"
"""


def echo(name: str = "echo", *, prefer: Sequence[str] = ()) -> str:
    """Return a ``[[child]]`` with the echoing daemon."""
    hosts = ", ".join(f'"{host}"' for host in prefer)
    return f"""\
[[child]]
id = "{name}"
name = "{name}"
run.behaviour = "bench_echo:Echo"
run.path = ["{DAEMONS}"]
placement.prefer = [{hosts}]
"""


class Host:
    """One host; its directory and port outlive its processes."""

    def __init__(self, name: str, directory: Path, port: int, endpoints: Sequence[str]) -> None:
        self.name = name
        self.address = f"127.0.0.1:{port}"
        self._directory = directory
        self._process: Process | None = None
        directory.mkdir()
        config = _CONFIG.format(
            host=name,
            directory=directory,
            endpoints=", ".join(f'"{endpoint}"' for endpoint in endpoints),
            ttl=TTL,
            port=port,
        )
        (directory / "agent.toml").write_text(config)

    @property
    def launcher(self) -> int:
        """Return the launcher's process id."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it and wait until its agent says that it may serve."""
        self.spawn()
        await self.joined()

    def spawn(self) -> None:
        """Start its launcher."""
        self._process = Process.spawn(
            [sys.executable, "-P", "-m", "node_agent.launcher", "-c", self._directory / "agent.toml"],
            log=self._directory / "pgherd.log",
            directory=self._directory,
            environment=dict(os.environ),
        )

    async def joined(self) -> None:
        """Wait until its agent answers and says that it may serve."""
        async with asyncio.timeout(START_TIMEOUT):
            while not await _is_ready(self.address):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)

    async def kill(self) -> None:
        """SIGKILL the launcher, and with it everything below."""
        if self._process is not None:
            await self._process.stop(())

    def tail(self) -> str:
        """Return the end of the log."""
        return self._process.tail() if self._process else ""


@dataclass(frozen=True, slots=True)
class Herd:
    """A cluster that runs."""

    hosts: dict[str, Host]
    etcd: EtcdServers

    async def apply(self, client: Client, children: dict[str, str]) -> None:
        """Put specs by name into the cluster and wait until all of them serve."""
        stub = supervision_pb2_grpc.SupervisionStub(client.channel)
        toml = "schema = 1\n" + "".join(children.values())
        request = supervision_pb2.ApplyRequest(toml=toml, source="bench", who="bench")
        await client.rpc(stub.Apply, request, read_only=False)
        for name in children:
            await client.wait(name, timeout=START_TIMEOUT)


@asynccontextmanager
async def herd(*names: str, members: int = 1) -> AsyncIterator[Herd]:
    """Start etcd and hosts of these names."""
    directory = Path(tempfile.mkdtemp(prefix="pgherd-bench-"))
    etcd = EtcdServers(directory / "etcd", members)
    await etcd.start()
    hosts: dict[str, Host] = {}
    try:
        for name, port in zip(names, free_ports(len(names)), strict=True):
            hosts[name] = Host(name, directory / name, port, etcd.endpoints)
            hosts[name].spawn()
        for host in hosts.values():
            await host.joined()
        yield Herd(hosts, etcd)
    except BaseException:
        for host in hosts.values():
            print(host.tail(), file=sys.stderr)
        raise
    finally:
        for host in hosts.values():
            await host.kill()
        await etcd.stop()
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Hosts:
    """``home`` is the address of the agent that clients are told, ``owner`` that of the daemon's."""

    home: str
    owner: str


@asynccontextmanager
async def two_hosts() -> AsyncIterator[Hosts]:
    """Start alpha and beta, and have beta serve "echo"."""
    async with herd("alpha", "beta") as running:
        hosts = Hosts(running.hosts["alpha"].address, running.hosts["beta"].address)
        async with Client(hosts.home) as client:
            await running.apply(client, {"echo": echo(prefer=["beta"])})
        yield hosts


async def answered(client: Client, name: str, former: tuple[int, int]) -> float:
    """Call until a later process than ``former``, its epoch and start, answers; return when it did."""
    while True:
        with contextlib.suppress(HerdError):
            answer = await client.ask(name, "echo", b"anybody there?")
            if (answer.epoch, answer.start) > former:
                return time.perf_counter()


async def _is_ready(address: str) -> bool:
    with contextlib.suppress(HerdError):
        async with Client(address) as client:
            stub: Any = health_pb2_grpc.HealthStub(client.channel)
            answer = await client.rpc(stub.Check, health_pb2.HealthCheckRequest(service="ready"))
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
    return False
