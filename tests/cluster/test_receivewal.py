"""deploy/specs/receivewal.toml in a cluster: one archive without a gap, whichever host or process dies."""

from __future__ import annotations

import asyncio
import filecmp
import os
import re
import secrets
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from node_agent.sandbox.process import Process
from node_agent.sandbox.servers import PostgresServer
from tests.cluster.checker import check
from tests.cluster.herd import FAILOVER, RESTART, Herd
from tests.cluster.history import History, Token
from tests.cluster.watcher import Watcher
from tests.support.hosts import Cluster, eventually

pytestmark = pytest.mark.slow

SPEC = Path(__file__).parents[2] / "deploy" / "specs" / "receivewal.toml"
SEGMENT = re.compile(r"[0-9A-F]{24}")
RECORD = re.compile(
    r"len \(rec/tot\): +\d+/ *(\d+),.* lsn: ([0-9A-F]+/[0-9A-F]+), prev ([0-9A-F]+/[0-9A-F]+)"
)
# A transaction that is long enough to be cut by a kill, and no two are alike.
TRANSACTION = "insert into history select gen_random_uuid() from generate_series(1, 20);\n"
HOSTS = ("alpha", "beta")
"""They have the directory."""


@pytest.fixture(scope="module")
def cluster(cluster: Cluster) -> Cluster:
    """A server that keeps all WAL for comparison, a role as the README wants it, and two hosts of three."""
    for name in HOSTS:
        config = cluster.hosts[name].config
        text, labelled = re.subn(r"(?m)^(labels = \{)", r'\1 wal_archive = "yes",', config.read_text())
        assert labelled == 1
        config.write_text(text)
    cluster.sql("create table history (id uuid)")
    cluster.sql("alter system set wal_keep_size = '8GB'")
    cluster.sql("select pg_reload_conf()")
    return cluster


@pytest.fixture
def service(cluster: Cluster) -> Iterator[Path]:
    """The service file, with a passfile beside it."""
    assert cluster.postgres is not None
    directory = cluster.directory / "etc"
    directory.mkdir()
    password = secrets.token_hex(8)
    cluster.sql(f"create role archiver login replication password '{password}'")
    passfile = directory / "passfile"
    passfile.touch(mode=0o600)
    passfile.write_text(f"*:*:*:archiver:{password}\n")
    file = directory / "pg_service.conf"
    where = f"host=127.0.0.1\nport={cluster.postgres.port}\n"
    file.write_text(f"[receivewal]\n{where}user=archiver\npassfile={passfile}\n")
    yield file
    shutil.rmtree(directory)
    cluster.sql("drop role archiver")


def adapted(server: PostgresServer, service: Path, directory: Path) -> str:
    """Return the shipped spec with the paths of this machine, and nothing else of it changed."""
    text = SPEC.read_text()
    for old, new in (
        ('"/var/lib/pgherd/wal"', f'"{directory}"'),
        ('"/etc/pgherd/pg_service.conf"', f'"{service}"'),
        ("env          = { ", f'env          = {{ PATH = "{server.bindir}:{os.defpath}", '),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text.replace("schema = 1\n", "")


class Archive:
    """The directory, and the server that it is of."""

    def __init__(self, cluster: Cluster, service: Path, directory: Path) -> None:
        assert cluster.postgres is not None
        self.server = cluster.postgres
        self.directory = directory
        self.spec = adapted(self.server, service, directory)
        self._cluster = cluster

    @property
    def segments(self) -> list[str]:
        """The complete ones."""
        return sorted(path.name for path in self.directory.iterdir() if SEGMENT.fullmatch(path.name))

    @asynccontextmanager
    async def written(self) -> AsyncIterator[None]:
        """Have pgbench write all the time."""
        script = self._cluster.directory / "history.sql"
        script.write_text(TRANSACTION)
        argv = ["pgbench", "--no-vacuum", "--client=2", "--rate=200", "--time=600", f"--file={script}", "app"]
        pgbench = Process.spawn(
            [self.server.bindir / argv[0], *argv[1:]],
            log=self._cluster.directory / "pgbench.log",
            directory=self._cluster.directory,
            environment=self.server.environment,
        )
        try:
            yield
            assert pgbench.running, pgbench.failure("pgbench has ended")
        finally:
            await pgbench.stop(())

    def switch(self) -> tuple[str, str]:
        """Begin a new segment; return the name of the old one, and where its last record ended."""
        ((lsn, segment),) = self._cluster.sql(
            "select lsn, pg_walfile_name(lsn - 1) from pg_switch_wal() as lsn"
        )
        return str(segment), str(lsn)

    async def grow(self, segments: int = 2) -> str:
        """Complete so many segments and wait until they have arrived; return where the last one ends."""
        await eventually(lambda: any(self.directory.iterdir()), RESTART, "the first segment is begun")
        end = ""
        for _ in range(segments):
            segment, end = self.switch()
            await eventually(
                lambda segment=segment: segment in self.segments,  # type: ignore[misc]
                15.0,
                f"{segment} is archived",
            )
        return end

    async def gaps(self, end: str) -> list[str]:
        """Return what is missing or wrong between the first segment and ``end``."""
        segments = self.segments
        found = [
            f"{segment} differs from the server's"
            for segment in segments
            if not filecmp.cmp(self.directory / segment, self.server.data / "pg_wal" / segment, shallow=False)
        ]
        text = await self.server.run("pg_waldump", f"--path={self.directory}", segments[0], segments[-1])
        records = [RECORD.search(line) for line in text.splitlines()]
        assert all(records), "every line is a record"
        chain = [(int(m[1]), _position(m[2]), _position(m[3])) for m in records if m]
        found += [
            f"{there:X} is followed by {lsn:X}, which is behind {prev:X}"
            for (_, there, _), (_, lsn, prev) in pairwise(chain)
            if prev != there
        ]
        length, last, _ = chain[-1]
        if (stops := last + -(-length // 8) * 8) != _position(end):
            found.append(f"ends at {stops:X} and not at {end}")
        return found


def _position(lsn: str) -> int:
    high, low = lsn.split("/")
    return int(high, 16) << 32 | int(low, 16)


@pytest.fixture
async def archive(cluster: Cluster, service: Path) -> AsyncIterator[Archive]:
    """An empty directory and a slot, made as the README says."""
    directory = cluster.directory / "wal"
    directory.mkdir()
    archive = Archive(cluster, service, directory)
    await archive.server.run("pg_receivewal", "--slot=receivewal", "--create-slot", "--if-not-exists")
    yield archive
    cluster.sql("select pg_drop_replication_slot('receivewal')")
    shutil.rmtree(directory)


@pytest.fixture
async def processes(archive: Archive, herd: Herd) -> AsyncIterator[Watcher]:
    """Every pg_receivewal that writes to the archive; in the end all are gone, and never were there two."""
    watcher = Watcher(archive.server.bindir / "pg_receivewal", f"--directory={archive.directory}")
    refused = archive.server.log.read_text().count('slot "receivewal" is active')
    watcher.start()
    try:
        yield watcher
        await herd.wish("Delete", "receivewal")
        await eventually(lambda: not watcher.alive, 10.0, "pg_receivewal ends with its spec")
    finally:
        watcher.stop()
    violations = check(History(lives=watcher.lives))
    assert not violations, "\n".join(map(str, violations))
    assert archive.server.log.read_text().count('slot "receivewal" is active') == refused, "two wanted it"


async def test_the_archive_has_no_gap_when_the_process_and_then_its_host_is_killed(
    herd: Herd, archive: Archive, processes: Watcher
) -> None:
    async with archive.written():
        await herd.apply(archive.spec)
        first = await processes.runs()
        await archive.grow()

        herd.nemesis.kill(first.pid)
        archive.switch()
        second = await processes.runs(above=first.token, within=RESTART)
        assert (second.host, second.token) == (first.host, Token(first.token.epoch, first.token.start + 1))
        await archive.grow()

        await herd.owner(second).kill()
        for _ in range(2):
            archive.switch()
        third = await processes.runs(above=second.token, within=FAILOVER)
        assert [second.host, third.host] in (list(HOSTS), list(reversed(HOSTS)))
        assert third.token.epoch > second.token.epoch
        await archive.grow()
    assert await archive.gaps(await archive.grow(1)) == []
    assert [life.token for life in processes.lives] == [first.token, second.token, third.token]


async def test_the_archive_has_no_gap_when_it_is_killed_whenever_it_begins(
    herd: Herd, archive: Archive, processes: Watcher
) -> None:
    async with archive.written():
        await herd.apply(archive.spec)
        life = await processes.runs()
        await archive.grow(1)
        for _ in range(3):
            archive.switch()
            herd.nemesis.kill(life.pid)
            life = await processes.runs(above=life.token)
        await archive.grow()
    assert await archive.gaps(await archive.grow(1)) == []


async def test_a_host_that_is_stopped_hands_the_archive_over(
    herd: Herd, archive: Archive, processes: Watcher
) -> None:
    async with archive.written():
        await herd.apply(archive.spec)
        first = await processes.runs()
        await archive.grow()
        process = herd.owner(first).process
        assert process is not None
        process.send(signal.SIGTERM)
        second = await processes.runs(above=first.token, within=RESTART)
        assert second.host in HOSTS
        assert second.host != first.host
        assert second.token.epoch > first.token.epoch
        assert await asyncio.wait_for(process.wait(), 5.0) == 0
        await archive.grow()
    assert await archive.gaps(await archive.grow(1)) == []
    assert [life.token for life in processes.lives] == [first.token, second.token]
