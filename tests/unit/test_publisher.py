"""Which states of a child are written to etcd, and when."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest

from node_agent.publisher import LASTS, Publisher
from registry.names import Names
from registry.ownership import (
    STATUS_LIMIT,
    Method,
    Status,
    WorkerState,
    cluster_prefix,
    decode_status,
    encode_owner,
    epoch_of,
)
from registry.store import KeyValue, Put
from tests.support.clocks import LoopClock
from tests.support.memory_store import MemoryStore

pytestmark = pytest.mark.looptime

PREFIX = cluster_prefix("test")
NAME = "sweeper"


class Node:
    """Owns NAME, and publishes what becomes of it."""

    def __init__(self, store: MemoryStore, lease: int, epoch: int) -> None:
        self._store, self._epoch = store, epoch
        self._publisher = Publisher(Names(store, PREFIX), lease)
        self._running = asyncio.create_task(self._publisher.run())

    def publish(self, state: WorkerState, start: int = 1, methods: tuple[Method, ...] = ()) -> None:
        self._publisher.publish(
            Status(name=NAME, epoch=self._epoch, start=start, state=state, pid=7, since=0.5, methods=methods)
        )

    async def written(self) -> tuple[int, WorkerState, int] | None:
        """Return how often the key was written, and the state and start it holds."""
        kv: KeyValue | None = await self._store.get(f"{PREFIX}status/{NAME}")
        if kv is None:
            return None
        status = decode_status(NAME, kv)
        return kv.version, status.state, status.start

    async def leave(self) -> None:
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    store = MemoryStore(clock=LoopClock())
    lease = (await store.grant(60.0)).id
    owner = encode_owner(node="alpha-1", host="alpha", claim=uuid.uuid4().hex, incarnation=0)
    result = await store.txn((), (Put(f"{PREFIX}names/{NAME}", owner, lease),))
    node = Node(store, lease, epoch_of(0, result.revision))
    yield node
    await node.leave()


async def test_ready_is_written_at_once(node: Node) -> None:
    node.publish(WorkerState.READY)
    await asyncio.sleep(LASTS / 10)
    assert await node.written() == (1, WorkerState.READY, 1)


async def test_a_restart_is_one_write(node: Node) -> None:
    node.publish(WorkerState.STARTING, start=0)
    await asyncio.sleep(LASTS / 3)
    node.publish(WorkerState.STARTING, start=2)
    await asyncio.sleep(LASTS / 3)
    node.publish(WorkerState.READY, start=2)
    await asyncio.sleep(LASTS * 3)
    assert await node.written() == (1, WorkerState.READY, 2)


async def test_a_start_that_lasts_is_written(node: Node) -> None:
    node.publish(WorkerState.STARTING, start=1)
    await asyncio.sleep(LASTS / 2)
    assert await node.written() is None
    node.publish(WorkerState.STARTING, start=2)
    await asyncio.sleep(LASTS)
    assert await node.written() == (1, WorkerState.STARTING, 2)


async def test_ready_is_not_written_after_it_was_over(node: Node) -> None:
    node.publish(WorkerState.READY, start=1)
    node.publish(WorkerState.STARTING, start=2)
    await asyncio.sleep(LASTS / 10)
    assert await node.written() == (1, WorkerState.STARTING, 2)


@pytest.mark.parametrize(
    "methods",
    [
        (Method("sweep", "call", "()", "x" * STATUS_LIMIT),),
        tuple(Method(f"method-{number}", "call", "()") for number in range(STATUS_LIMIT // 10)),
    ],
    ids=["long description", "many methods"],
)
async def test_a_daemon_that_offers_more_than_fits_is_published_as_ready(
    node: Node, methods: tuple[Method, ...]
) -> None:
    node.publish(WorkerState.READY, methods=methods)
    await asyncio.sleep(1)
    assert await node.written() == (1, WorkerState.READY, 1)
