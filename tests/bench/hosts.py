"""Two real hosts (launcher, warden, agent) with etcd, and a daemon named "echo" on the second."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
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
DAEMONS = Path(__file__).with_name("daemons")

_CONFIG = """\
schema = 1
cluster = "bench"
host = "{host}"
run_dir = "{directory}"
[etcd]
endpoints = ["{endpoint}"]
[listen]
grpc = "127.0.0.1:{port}"
"""

ECHO = f"""\
schema = 1
[[child]]
id = "echo"
name = "echo"
run.behaviour = "bench_echo:Echo"
run.path = ["{DAEMONS}"]
[child.placement]
prefer = ["beta"]
"""


@dataclass(frozen=True, slots=True)
class Hosts:
    """``home`` is the address of the agent that clients are told, ``owner`` that of the daemon's."""

    home: str
    owner: str


@asynccontextmanager
async def two_hosts(spec: str = ECHO, name: str = "echo") -> AsyncIterator[Hosts]:
    """Start alpha and beta, apply ``spec``, and wait until beta serves ``name``."""
    directory = Path(tempfile.mkdtemp(prefix="pgherd-bench-"))
    etcd = EtcdServers(directory / "etcd")
    await etcd.start()
    addresses: list[str] = []
    processes: list[Process] = []
    try:
        for host, port in zip(("alpha", "beta"), free_ports(2), strict=True):
            processes.append(_start(directory / host, host, port, etcd.endpoints[0]))
            addresses.append(f"127.0.0.1:{port}")
        hosts = Hosts(*addresses)
        for address in addresses:
            await _joined(address)
        async with Client(hosts.home) as client:
            stub = supervision_pb2_grpc.SupervisionStub(client.channel)
            request = supervision_pb2.ApplyRequest(toml=spec, source="bench", who="bench")
            await client.rpc(stub.Apply, request, read_only=False)
            await client.wait(name, timeout=START_TIMEOUT)
        yield hosts
    except BaseException:
        for process in processes:
            print(process.tail(), file=sys.stderr)
        raise
    finally:
        for process in processes:
            await process.stop(())
        await etcd.stop()
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


def _start(directory: Path, host: str, port: int, endpoint: str) -> Process:
    directory.mkdir()
    config = directory / "agent.toml"
    config.write_text(_CONFIG.format(host=host, directory=directory, endpoint=endpoint, port=port))
    argv = [sys.executable, "-P", "-m", "node_agent.launcher", "-c", str(config)]
    return Process.spawn(
        argv, log=directory / "pgherd.log", directory=directory, environment=dict(os.environ)
    )


async def _joined(address: str) -> None:
    """Wait until the agent answers and says that it may serve."""
    async with asyncio.timeout(START_TIMEOUT):
        while not await _is_ready(address):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)


async def _is_ready(address: str) -> bool:
    with contextlib.suppress(HerdError):
        async with Client(address) as client:
            stub: Any = health_pb2_grpc.HealthStub(client.channel)
            answer = await client.rpc(stub.Check, health_pb2.HealthCheckRequest(service="ready"))
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
    return False
