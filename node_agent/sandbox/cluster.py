"""A whole cluster on loopback: etcd, PostgreSQL, and some hosts, each a real `pgherd run`.

Everything lives in one temporary directory, dies with the process that started it, and is reached by the
commands typed in ``workplace``: its ``.pgherd/agent`` names an agent that is up.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

from node_agent.daemons import sweeper_schema
from node_agent.postgres.install import install
from node_agent.sandbox.process import Process, ServerFailed, free_ports
from node_agent.sandbox.servers import EtcdServers, PostgresServer
from registry import security
from registry.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    names_pb2,
    names_pb2_grpc,
    supervision_pb2,
    supervision_pb2_grpc,
)

HOSTS = ("alpha", "beta", "gamma")
CLUSTER = "sandbox"
DATABASE = "app"
TTL = 5
START_TIMEOUT = 30.0

_CONFIG = """\
schema = 1
cluster = "{cluster}"
host = "{host}"
run_dir = "{run_dir}"

[etcd]
endpoints = [{endpoints}]

[lease]
ttl = "{ttl}s"

[listen]
grpc = "127.0.0.1:{port}"

[postgres.main]

[database.app]
postgres = "main"
conninfo = "{conninfo}"
"""

SWEEPER = """\
schema = 1

[[child]]
id = "sweeper"
name = "sweeper"
fence = ["app"]
run.behaviour = "node_agent.daemons.sweeper:Sweeper"
run.args = { database = "app", every = 0.5 }
"""


@dataclass(slots=True)
class Host:
    """One host of the sandbox: its launcher is ``process``, everything else of it are descendants."""

    name: str
    directory: Path
    port: int
    process: Process | None = None

    @property
    def target(self) -> str:
        """Where its agent listens."""
        return str(self.directory / "agent.sock")

    @property
    def log(self) -> Path:
        """What launcher, warden and agent wrote."""
        return self.directory / "pgherd.log"

    @property
    def pid(self) -> int:
        """The launcher's process id: killing it is killing the host."""
        return self.process.pid if self.process is not None and self.process.running else 0


class Sandbox:
    """Starts and stops the cluster.  ``conninfo`` is that of an existing server; empty: one of our own."""

    def __init__(
        self, workplace: Path, *, hosts: Sequence[str] = HOSTS, members: int = 3, conninfo: str = ""
    ) -> None:
        self.workplace = workplace
        # Short, because of unix sockets; enterable, because PostgreSQL does not run as root.
        self.directory = Path(tempfile.mkdtemp(prefix="pgherd-"))
        self.directory.chmod(0o755)
        self.etcd = EtcdServers(self.directory / "etcd", members)
        self.postgres = None if conninfo else PostgresServer(self.directory / "pg")
        self._conninfo = conninfo
        ports = free_ports(len(hosts))
        self.hosts = {
            name: Host(name, self.directory / name, port) for name, port in zip(hosts, ports, strict=True)
        }

    @property
    def conninfo(self) -> str:
        """How to reach the database of the sandbox."""
        return self._conninfo or (self.postgres.conninfo(DATABASE) if self.postgres else "")

    async def start(self) -> None:
        """Start everything; return when every host is a member.  Raises ServerFailed."""
        await asyncio.gather(self.etcd.start(), self._start_postgres())
        for host in self.hosts.values():
            self._write_config(host)
            self.start_host(host)
        await asyncio.gather(*(self.joined(host) for host in self.hosts.values()))
        self.point_at_a_living_host()

    async def _start_postgres(self) -> None:
        if self.postgres is not None:
            await self.postgres.start()
            await self.postgres.run("createdb", DATABASE)
        await install(self.conninfo, CLUSTER)
        await sweeper_schema.install(self.conninfo)

    def _write_config(self, host: Host) -> None:
        host.directory.mkdir()
        (host.directory / "agent.toml").write_text(
            _CONFIG.format(
                cluster=CLUSTER,
                host=host.name,
                run_dir=host.directory,
                endpoints=", ".join(f'"{endpoint}"' for endpoint in self.etcd.endpoints),
                ttl=TTL,
                port=host.port,
                conninfo=self.conninfo.replace("\\", "\\\\").replace('"', '\\"'),
            )
        )

    def start_host(self, host: Host) -> None:
        """Start the launcher of a host, again if it was killed."""
        argv = [sys.executable, "-P", "-m", "node_agent.launcher", "-c", str(host.directory / "agent.toml")]
        host.process = Process.spawn(
            argv, log=host.log, directory=host.directory, environment={**os.environ, "PYTHONUNBUFFERED": "1"}
        )

    async def joined(self, host: Host) -> None:
        """Wait until a host's agent is a member of the cluster."""
        try:
            async with asyncio.timeout(START_TIMEOUT):
                while (await self.state(host)) != "ready":
                    if host.process is None or not host.process.running:
                        raise self._failure(host, "ended before it had joined")
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise self._failure(host, f"did not join within {START_TIMEOUT:g} s") from None

    def _failure(self, host: Host, what: str) -> ServerFailed:
        tail = host.process.tail() if host.process is not None else ""
        return ServerFailed(f"host {host.name} {what}; log: {host.log}\n{tail}")

    async def state(self, host: Host) -> str:
        """Return how far a host is, empty when its agent does not answer."""
        async with security.channel(host.target) as channel:
            with suppress(grpc.aio.AioRpcError):
                stub = cluster_pb2_grpc.ClusterStub(channel)
                return (await stub.Status(cluster_pb2.StatusRequest(), timeout=2.0)).state
        return ""

    async def apply(self, toml: str, source: str) -> None:
        """Put specs into the cluster."""
        async with security.channel(self.a_living_host().target) as channel:
            stub = supervision_pb2_grpc.SupervisionStub(channel)
            request = supervision_pb2.ApplyRequest(toml=toml, source=source, who="sandbox")
            await stub.Apply(request, timeout=10.0)

    async def apply_sweeper(self) -> None:
        """Put the spec of the sweeper into the cluster, at a pace that can be watched."""
        await self.apply(SWEEPER, "sweeper.toml")

    async def sql(self, statement: str) -> str:
        """Run a statement with psql; return its output, unaligned."""
        return (await self.run("psql", "-XAtq", "-d", self.conninfo, "-c", statement)).strip()

    async def run(self, program: str, *arguments: str) -> str:
        """Run one of PostgreSQL's programs against the sandbox's server.  Raises ServerFailed."""
        if self.postgres is None:
            raise ServerFailed("PostgreSQL's programs are run against the embedded server only")
        return await self.postgres.run(program, *arguments)

    async def pgherd(self, *arguments: str) -> str:
        """Run a command of pgherd as somebody in the workplace would; return its output."""
        process = await asyncio.create_subprocess_exec(
            Path(sys.executable).parent / "pgherd",
            *arguments,
            cwd=self.workplace,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={key: value for key, value in os.environ.items() if not key.startswith("PGHERD_")},
        )
        output, errors = await process.communicate()
        if process.returncode != 0:
            raise ServerFailed(f"pgherd {' '.join(arguments)}: {errors.decode(errors='replace').strip()}")
        return output.decode()

    def last_words(self) -> str:
        """Return the end of every host's log."""
        tails = [
            f"-- {host.log}\n{host.process.tail(10)}"
            for host in self.hosts.values()
            if host.process is not None and host.log.exists()
        ]
        return "\n".join(tails)

    def a_living_host(self) -> Host:
        """Return the first host whose launcher runs.  Raises ServerFailed when none does."""
        for host in self.hosts.values():
            if host.pid:
                return host
        raise ServerFailed("no host of the sandbox is up")

    def refuse_a_second(self) -> None:
        """Raise ServerFailed when commands typed in the workplace find another sandbox that is up."""
        pointer = self._pointer / "agent"
        if pointer.exists() and _listens(Path(pointer.read_text().strip())):
            raise ServerFailed(
                f"another sandbox is up in {self.workplace}: stop it, or start this one in another directory"
            )

    def point_at_a_living_host(self) -> None:
        """Let commands typed in the workplace find an agent that is up, its configuration, and psql."""
        host = self.a_living_host()
        self._pointer.mkdir(exist_ok=True)
        (self._pointer / "agent").write_text(f"{host.target}\n")
        config = self._pointer / "agent.toml"
        config.unlink(missing_ok=True)
        config.symlink_to(host.directory / "agent.toml")
        if self.postgres is not None:
            psql = self._pointer / "psql"
            command = shlex.join([str(self.postgres.bindir / "psql"), self.conninfo])
            psql.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            psql.chmod(0o755)

    @property
    def _pointer(self) -> Path:
        return self.workplace / ".pgherd"

    async def note_owner(self, name: str) -> None:
        """Keep the launcher's pid of the owner's host in ``owner.pid``, for a kill that can be pasted."""
        async with security.channel(self.a_living_host().target) as channel:
            with suppress(grpc.aio.AioRpcError):
                stub = names_pb2_grpc.NamesStub(channel)
                found = await stub.Resolve(names_pb2.ResolveRequest(name=name), timeout=1.0)
                owner = self.hosts.get(found.name.host)
                if owner is not None:
                    (self.directory / "owner.pid").write_text(f"{owner.pid}\n")

    async def kill_host(self, host: Host) -> None:
        """SIGKILL a whole host; return when its launcher is gone."""
        assert host.process is not None
        await host.process.stop(())

    async def stop(self, *, keep: bool = False) -> None:
        """Stop every server; remove all files unless ``keep``."""
        await asyncio.gather(
            *(host.process.stop(()) for host in self.hosts.values() if host.process is not None),
            self.etcd.stop(),
            *((self.postgres.stop(),) if self.postgres is not None else ()),
        )
        if not keep:
            shutil.rmtree(self._pointer, ignore_errors=True)
            shutil.rmtree(self.directory, ignore_errors=True)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
        probe.connect(str(path))
        return True
    return False
