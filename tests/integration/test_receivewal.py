"""deploy/specs/receivewal.toml on a real server: an archive without a gap, whoever is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from node_agent.postgres.fence import FenceRaiser, application_name
from node_agent.postgres.install import install
from node_agent.sandbox.servers import PostgresServer
from node_agent.spec.child import ChildSpec, Command, parse, substitute
from tests.support.postgres import Clusters, TestDatabase, eventually

pytestmark = pytest.mark.slow

SPECS = Path(__file__).parents[2] / "deploy" / "specs"
SEGMENT = re.compile(r"[0-9A-F]{24}")


@pytest.fixture
def spec() -> ChildSpec:
    file = SPECS / "receivewal.toml"
    (child,) = parse(file.read_text(), str(file))
    return child


@pytest.fixture
async def server(pg_cluster: Clusters) -> PostgresServer:
    """A server with the slot, made as the README says."""
    server = await pg_cluster.primary()
    await install(server.conninfo(), "test")
    for _ in range(2):
        await server.run("pg_receivewal", "--slot=receivewal", "--create-slot", "--if-not-exists")
    return server


class Archive:
    """Starts the spec's command as the warden would, writing to a directory of the test."""

    def __init__(self, server: PostgresServer, spec: ChildSpec, directory: Path) -> None:
        filled = substitute(spec, node="alpha-1", host="alpha", name=spec.name, epoch=10)
        assert isinstance(filled.run, Command)
        self.directory = directory
        self.database = TestDatabase(server, "postgres")
        self._server = server
        self._argv = [self._here(argument) for argument in filled.run.argv]
        self._environment = {**filled.env, "PATH": f"{server.bindir}:{os.environ['PATH']}"}
        self._written = 0

    def _here(self, argument: str) -> str:
        argument = argument.replace("/var/lib/pgherd/wal", str(self.directory))
        return argument.replace("service=receivewal", self._server.conninfo())

    @contextmanager
    def receiving(self, epoch: int, start: int) -> Iterator[subprocess.Popen[bytes]]:
        """Run it as the process of this token; the test ends it."""
        with (self.directory.parent / "receivewal.log").open("ab") as log:
            process = subprocess.Popen(
                self._argv,
                stdout=log,
                stderr=log,
                env={**self._environment, "PGAPPNAME": application_name("receivewal", epoch, start)},
            )
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    async def write(self, segments: int = 2) -> None:
        """Write messages into each of some segments, and let the server drop what nobody needs."""
        for _ in range(segments):
            for _ in range(20):
                self._written += 1
                self.database.execute("select pg_logical_emit_message(true, 'n', %s)", f"{self._written:06}")
            self.database.execute("select pg_switch_wal()")
        self.database.execute("checkpoint")

    @property
    def segments(self) -> list[str]:
        """The complete ones."""
        return sorted(path.name for path in self.directory.iterdir() if SEGMENT.fullmatch(path.name))

    async def complete(self) -> None:
        """Wait until everything that was written has arrived in complete segments."""
        ((last,),) = self.database.execute(
            "select pg_walfile_name(pg_current_wal_lsn() - 1) from pg_switch_wal()"
        )
        await eventually(lambda: self.segments[-1:] >= [str(last)], 30)

    async def dump(self) -> str:
        """Read the whole archive with pg_waldump, which stops at the first gap."""
        first, last = self.segments[0], self.segments[-1]
        return await self._server.run("pg_waldump", f"--path={self.directory}", first, last)

    async def messages(self) -> list[int]:
        """The messages in the archive, in order."""
        found = re.findall(r"payload \(6 bytes\): ((?:[0-9A-F]{2} ?){6})", await self.dump())
        return [int(bytes.fromhex(payload.replace(" ", ""))) for payload in found]

    @property
    def written(self) -> list[int]:
        return list(range(1, self._written + 1))


@pytest.fixture
def archive(server: PostgresServer, spec: ChildSpec, tmp_path: Path) -> Archive:
    directory = tmp_path / "wal"
    directory.mkdir()
    return Archive(server, spec, directory)


async def streaming(archive: Archive, epoch: int, start: int) -> None:
    tag = application_name("receivewal", epoch, start)
    query = "select 1 from pg_stat_replication where application_name = %s and state = 'streaming'"
    await eventually(lambda: archive.database.execute(query, tag) == [(1,)])


async def test_killed_and_restarted_it_leaves_no_gap(archive: Archive) -> None:
    with archive.receiving(10, 1) as first:
        await streaming(archive, 10, 1)
        await archive.write()
        await eventually(lambda: len(archive.segments) > 0)
        archive.database.execute("select pg_logical_emit_message(true, 'n', 'in the open segment')")
        first.send_signal(signal.SIGKILL)
    await archive.write(3)

    with archive.receiving(10, 2) as second:
        await streaming(archive, 10, 2)
        await archive.write()
        await archive.complete()
        second.send_signal(signal.SIGINT)
        assert second.wait(10) == 0, "SIGINT is its orderly end"

    numbers = [int(segment[-2:], 16) + (int(segment[8:16], 16) << 8) for segment in archive.segments]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert await archive.messages() == archive.written


async def test_a_segment_that_was_cut_short_while_it_was_made_does_not_stop_it(archive: Archive) -> None:
    with archive.receiving(10, 1):
        await streaming(archive, 10, 1)
        await archive.write()
        await eventually(lambda: any(archive.directory.glob("*.partial")))
    for partial in archive.directory.glob("*.partial"):
        os.truncate(partial, 3 << 20)
    await archive.write()

    with archive.receiving(10, 2):
        await streaming(archive, 10, 2)
        await archive.complete()
    assert await archive.messages() == archive.written


async def test_an_owner_that_thaws_while_it_makes_a_segment_spoils_nothing(archive: Archive) -> None:
    with archive.receiving(10, 1):
        await streaming(archive, 10, 1)
        await eventually(lambda: any(archive.directory.glob("*.partial")))
    (partial,) = archive.directory.glob("*.partial")
    os.truncate(partial, 0)
    # Frozen with a virtual machine, it writes its zeros when somebody else has long filled the segment.
    with partial.open("r+b") as frozen, archive.receiving(11, 1):
        await streaming(archive, 11, 1)
        await archive.write()
        await archive.complete()
        frozen.write(bytes(16 << 20))
        frozen.flush()
    assert await archive.messages() == archive.written


async def test_two_of_them_never_stream(archive: Archive) -> None:
    with ExitStack() as stack:
        stack.enter_context(archive.receiving(10, 1))
        await streaming(archive, 10, 1)
        second = stack.enter_context(archive.receiving(9, 1))
        assert second.wait(10) == 1
        assert "is active" in (archive.directory.parent / "receivewal.log").read_text()


async def test_a_takeover_ends_the_stream_of_the_earlier_owner(
    archive: Archive, server: PostgresServer
) -> None:
    raiser = FenceRaiser({"app": server.conninfo()})
    await raiser.raise_fence("app", "receivewal", 10, 1, node="alpha", timeout=10)
    with archive.receiving(10, 1) as old:
        await streaming(archive, 10, 1)
        # Frozen with its host: it cannot stop by itself, and its slot stays active.
        old.send_signal(signal.SIGSTOP)
        await archive.write()

        raised = await raiser.raise_fence("app", "receivewal", 11, 1, node="beta", timeout=10)

        assert [text.split("(")[1].split(",")[0] for text in raised.ended] == ["herd:10.1:receivewal"]
        with archive.receiving(11, 1):
            await streaming(archive, 11, 1)
            await archive.write()
            await archive.complete()
            old.send_signal(signal.SIGCONT)
            assert old.wait(10) != 0, "--no-loop: a lost connection is the supervisor's business"
        assert await archive.messages() == archive.written
    await raiser.close()
