"""How soon a daemon answers elsewhere after its whole host was killed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

import uvloop

from registry.client import Client
from registry.etcd import EtcdStore
from registry.store import Deleted, Put, Revision, WatchBatch
from tests.bench.hosts import TTL, Herd, answered, echo, herd
from tests.bench.row import at_most

METRICS = ("host_failover_over_ttl_s",)

FAILOVERS = 5
BAR = 1.0


def run() -> list[dict[str, Any]]:
    """Measure; takes about a minute."""
    return uvloop.run(_measure())


async def _measure() -> list[dict[str, Any]]:
    async with herd("alpha", "beta", members=3) as running:
        return [await _host_failover(running)]


async def _host_failover(running: Herd) -> dict[str, Any]:
    """Kill the host of a daemon, again and again; a call through the other one waits for the next owner."""
    ours: list[float] = []
    theirs: list[float] = []
    store = EtcdStore(running.etcd.endpoints)
    try:
        async with Client(running.hosts["alpha"].address) as client:
            await running.apply(client, {"echo": echo()})
        for number in range(FAILOVERS):
            async with Client(running.hosts["alpha"].address) as client:
                owner = (await client.whereis("echo")).host
            (home,) = (host for name, host in running.hosts.items() if name != owner)
            async with Client(home.address) as client:
                before = await client.ask("echo", "echo", b"before")
                renewed, revision = await _lease_kept_once(store, key := f"/reference/{number}")
                began = time.perf_counter()
                await running.hosts[owner].kill()
                served, expired = await asyncio.gather(
                    answered(client, "echo", (before.epoch, before.start)), _deleted(store, key, revision)
                )
            ours.append(served - began - TTL)
            theirs.append(expired - renewed - TTL)
            await running.hosts[owner].start()
    finally:
        await store.close()
    reference = "a bare lease: last keepalive to DELETE event, minus its TTL"
    return at_most("host_failover_over_ttl_s", ours, "s", BAR, reference, theirs)


async def _lease_kept_once(store: EtcdStore, key: str) -> tuple[float, Revision]:
    """Give a key a lease and renew that once; return when this was sent, and the key's revision."""
    lease = await store.grant(TTL)
    written = await store.txn((), (Put(key, b"", lease.id),))
    sent = time.perf_counter()
    await store.keepalive(lease.id, timeout=TTL)
    return sent, written.revision


async def _deleted(store: EtcdStore, key: str, revision: Revision) -> float:
    """Return when etcd tells that ``key`` is gone."""
    changes = cast(AsyncGenerator[WatchBatch, None], store.watch(key, revision + 1))
    async with aclosing(changes) as watch:
        async for batch in watch:
            if any(isinstance(event, Deleted) for event in batch.events):
                return time.perf_counter()
    raise AssertionError("a watch never ends")
