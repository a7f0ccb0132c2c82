"""Names: how quickly an owner is found, and how quickly many names are claimed."""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from node_agent.sandbox.servers import EtcdServers
from registry.clock import SYSTEM_CLOCK
from registry.directory import Directory
from registry.etcd import EtcdStore
from registry.names import Bidder, Claimed, ClaimRequest, Incarnation, Names, Owner
from registry.ownership import cluster_prefix, encode_owner
from registry.store import Put
from tests.support.memory_store import MemoryStore

METRICS = ("whereis", "register_10k_s")

RUNS = 5
NAMES = 10_000
LOOKUPS = 1_000_000
WANTED_LOOKUPS = 1_000_000
WANTED_SECONDS = 8.0
IN_FLIGHT = 64


def run() -> list[dict[str, Any]]:
    """Measure both; takes about half a minute."""
    return [asyncio.run(whereis()), asyncio.run(register())]


async def whereis() -> dict[str, Any]:
    """Lookups a second in a directory of 10,000 names, beside those in a bare dictionary."""
    store, prefix = MemoryStore(), cluster_prefix("bench")
    names = [f"app/daemon-{number}" for number in range(NAMES)]
    for name in names:
        owner = encode_owner(node="alpha-1", host="alpha", claim=uuid.uuid4().hex, incarnation=0)
        store.put(f"{prefix}names/{name}", owner)
    directory = Directory(store, prefix, SYSTEM_CLOCK, lambda event: None)
    following = asyncio.create_task(directory.run())
    await asyncio.wait_for(directory.synced(), 60)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)

    bare: dict[str, Owner] = dict(directory.owners)
    asked = random.Random(1).choices(names, k=LOOKUPS)
    ours, reference = [], []
    for _ in range(2 * RUNS):
        reference.append(_per_second(lambda: _ask(bare.get, asked)))
        ours.append(_per_second(lambda: _ask(directory.lookup, asked)))
    value, its = statistics.median(ours), statistics.median(reference)
    return {
        "metric": "whereis",
        "value": value,
        "unit": "lookups/s",
        "reference": "get of a bare dictionary",
        "reference_value": its,
        "ratio": value / its,
        "bar": f">= {WANTED_LOOKUPS:,}",
        "ok": value >= WANTED_LOOKUPS,
    }


def _ask(lookup: Callable[[str], Owner | None], asked: list[str]) -> None:
    for name in asked:
        if lookup(name) is None:
            raise AssertionError(name)


def _per_second(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return LOOKUPS / (time.perf_counter() - began)


async def register() -> dict[str, Any]:
    """Seconds until 10,000 names are claimed on one etcd member, beside 10,000 plain puts, 64 in flight."""
    with tempfile.TemporaryDirectory(prefix="pgherd-bench-") as directory:
        servers = EtcdServers(Path(directory))
        await servers.start()
        store = EtcdStore(servers.endpoints)
        try:
            ours, reference = [], []
            for number in range(RUNS):
                reference.append(await _put_all(store, cluster_prefix(f"put{number}")))
                ours.append(await _claim_all(store, cluster_prefix(f"claim{number}")))
        finally:
            await store.close()
            await servers.stop()
    value, its = statistics.median(ours), statistics.median(reference)
    return {
        "metric": "register_10k_s",
        "value": value,
        "unit": "s",
        "reference": f"{NAMES:,} plain puts, {IN_FLIGHT} in flight",
        "reference_value": its,
        "ratio": value / its,
        "bar": f"<= {WANTED_SECONDS:g}",
        "ok": value <= WANTED_SECONDS,
    }


async def _claim_all(store: EtcdStore, prefix: str) -> float:
    lease = (await store.grant(60.0)).id
    await store.txn((), (Put(f"{prefix}nodes/alpha-1", b"{}", lease),))
    by = Bidder(node="alpha-1", host="alpha", lease=lease, incarnation=Incarnation())
    requests = [
        ClaimRequest(name=f"daemon-{number}", claim=uuid.uuid4().hex, spec_revision=0, placement_revision=0)
        for number in range(NAMES)
    ]
    began = time.perf_counter()
    results = await Names(store, prefix).claim_many(requests, by)
    seconds = time.perf_counter() - began
    if not all(isinstance(result, Claimed) for result in results):
        raise AssertionError("a name was not claimed")
    await store.revoke(lease, timeout=30.0)
    return seconds


async def _put_all(store: EtcdStore, prefix: str) -> float:
    numbers = iter(range(NAMES))
    value = encode_owner(node="alpha-1", host="alpha", claim=uuid.uuid4().hex, incarnation=0)

    async def put() -> None:
        for number in numbers:
            await store.txn((), (Put(f"{prefix}names/daemon-{number}", value),), timeout=30.0)

    began = time.perf_counter()
    await asyncio.gather(*(put() for _ in range(IN_FLIGHT)))
    return time.perf_counter() - began
