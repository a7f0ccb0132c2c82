"""One cluster of three hosts for each module of tests; whatever a test does to it is healed after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.cluster.herd import Herd
from tests.cluster.observer import Observer
from tests.support.hosts import Cluster, running


@pytest.fixture(scope="module")
def observer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observer]:
    """Who runs in this module's clusters."""
    observer = Observer(tmp_path_factory.mktemp("o") / "observer")
    observer.start()
    yield observer
    observer.stop()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three etcd members, PostgreSQL, and three hosts."""
    with running() as cluster:
        cluster.sql("create table ledger (op text, name text, epoch bigint, start integer)")
        yield cluster


@pytest.fixture
async def herd(cluster: Cluster, observer: Observer) -> AsyncIterator[Herd]:
    """The cluster with all hosts up; after the test it is healed, and the history is checked."""
    logged = {
        host.name: host.log.stat().st_size if host.log.exists() else 0 for host in cluster.hosts.values()
    }
    herd = Herd(cluster, observer)
    await herd.ready()
    try:
        try:
            yield herd
        finally:
            await herd.heal()
        violations = await asyncio.to_thread(herd.violations)
        assert not violations, "\n".join(map(str, violations))
    finally:
        await herd.close()
        observer.forget()
        for host in cluster.hosts.values():
            herd.print_log(host, logged[host.name])
