from __future__ import annotations

import dataclasses
import re

import pytest

from registry.errors import Denied, LeaseNotFound, StoreAmbiguous
from registry.nodes import (
    HostRecord,
    NodeRecord,
    Nodes,
    NodeState,
    decode_host,
    decode_node,
    encode_host,
    new_node,
)
from registry.ownership import cluster_prefix
from registry.store import Delete, Txn
from tests.support.memory_store import LostReply, MemoryStore

PREFIX = cluster_prefix("test")


def record(node: str = "alpha-1", address: str = "10.0.0.1:7430") -> NodeRecord:
    return NodeRecord(
        node=node,
        host="alpha",
        address=address,
        version="0.1.0",
        protocol=1,
        containment="full",
        state=NodeState.RECOVERING,
        labels={"zone": "eu-1"},
        databases=("app", "audit"),
    )


@pytest.fixture
async def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def nodes(store: MemoryStore) -> Nodes:
    return Nodes(store, PREFIX)


async def stored_node(store: MemoryStore, node: str) -> NodeRecord | None:
    kv = await store.get(f"{PREFIX}nodes/{node}")
    return decode_node(node, kv) if kv else None


async def stored_host(store: MemoryStore) -> HostRecord | None:
    kv = await store.get(f"{PREFIX}hosts/alpha")
    return decode_host("alpha", kv) if kv else None


def test_a_node_is_its_host_and_a_fresh_suffix() -> None:
    first, second = new_node("alpha"), new_node("alpha")
    assert re.fullmatch(r"alpha-[0-9a-f]{8}", first)
    assert first != second


async def test_registering_writes_node_and_host(nodes: Nodes, store: MemoryStore) -> None:
    lease = (await store.grant(10)).id
    registered = await nodes.register(record(), lease)
    assert registered == dataclasses.replace(record(), lease=lease, mod_revision=store.revision)
    assert await stored_node(store, "alpha-1") == registered
    host = await stored_host(store)
    assert host is not None
    assert (host.node, host.labels, host.drain) == ("alpha-1", {"zone": "eu-1"}, False)


async def test_the_node_goes_with_its_lease_and_the_host_stays(nodes: Nodes, store: MemoryStore) -> None:
    lease = (await store.grant(10)).id
    await nodes.register(record(), lease)
    await store.revoke(lease)
    assert await stored_node(store, "alpha-1") is None
    assert await stored_host(store) is not None


async def test_a_second_agent_with_the_same_host_name_is_refused(nodes: Nodes, store: MemoryStore) -> None:
    await nodes.register(record("alpha-1", "10.0.0.1:7430"), (await store.grant(10)).id)
    lease = (await store.grant(10)).id
    with pytest.raises(Denied, match="two agents with one node name") as caught:
        await nodes.register(record("alpha-2", "10.0.0.2:7430"), lease)
    assert "10.0.0.1:7430" in caught.value.message
    assert "10.0.0.2:7430" in caught.value.message
    assert await stored_node(store, "alpha-2") is None
    host = await stored_host(store)
    assert host is not None
    assert host.node == "alpha-1"


async def test_a_dead_node_of_that_host_is_no_obstacle(nodes: Nodes, store: MemoryStore) -> None:
    first = (await store.grant(10)).id
    await nodes.register(record("alpha-1", "10.0.0.1:7430"), first)
    store.end_lease(first)
    await nodes.register(record("alpha-2", "10.0.0.2:7430"), (await store.grant(10)).id)
    assert await stored_node(store, "alpha-2") is not None


async def test_our_own_former_node_is_no_obstacle(nodes: Nodes, store: MemoryStore) -> None:
    await nodes.register(record("alpha-1", "10.0.0.1:7430"), (await store.grant(10)).id)
    lease = (await store.grant(10)).id
    await nodes.register(record("alpha-2", "10.0.0.2:7430"), lease, former="alpha-1")
    assert await stored_node(store, "alpha-2") is not None


async def test_a_node_at_our_own_address_must_be_a_former_life(nodes: Nodes, store: MemoryStore) -> None:
    await nodes.register(record("alpha-1"), (await store.grant(10)).id)
    await nodes.register(record("alpha-2"), (await store.grant(10)).id)
    assert await stored_node(store, "alpha-2") is not None


@pytest.mark.parametrize("fate", [LostReply.DONE, LostReply.NOT_DONE])
async def test_registering_may_be_repeated(nodes: Nodes, store: MemoryStore, fate: LostReply) -> None:
    lease = (await store.grant(10)).id
    store.lose_reply(fate)
    with pytest.raises(StoreAmbiguous):
        await nodes.register(record(), lease)
    await nodes.register(record(), lease)
    assert await stored_node(store, "alpha-1") is not None


async def test_drain_outlives_the_node_and_labels_are_replaced(nodes: Nodes, store: MemoryStore) -> None:
    drained = HostRecord(host="alpha", node="alpha-0", labels={"zone": "old"}, drain=True)
    store.put(f"{PREFIX}hosts/alpha", encode_host(drained))
    await nodes.register(record(), (await store.grant(10)).id)
    host = await stored_host(store)
    assert host is not None
    assert (host.drain, host.labels, host.node) == (True, {"zone": "eu-1"}, "alpha-1")


async def test_unreadable_keys_do_not_keep_a_host_out(nodes: Nodes, store: MemoryStore) -> None:
    store.put(f"{PREFIX}hosts/alpha", b"?")
    await nodes.register(record(), (await store.grant(10)).id)
    store.put(f"{PREFIX}nodes/alpha-1", b"?")
    await nodes.register(record("alpha-2", "10.0.0.2:7430"), (await store.grant(10)).id)
    assert await stored_node(store, "alpha-2") is not None


async def test_a_dead_lease_registers_nothing(nodes: Nodes, store: MemoryStore) -> None:
    lease = (await store.grant(10)).id
    store.end_lease(lease)
    with pytest.raises(LeaseNotFound):
        await nodes.register(record(), lease)
    assert await stored_host(store) is None


async def test_an_update_keeps_the_lease(nodes: Nodes, store: MemoryStore) -> None:
    lease = (await store.grant(10)).id
    await nodes.register(record(), lease)
    updated = await nodes.update(dataclasses.replace(record(), state=NodeState.READY), lease)
    assert updated == await stored_node(store, "alpha-1")
    assert updated is not None
    assert updated.state == "ready"
    store.end_lease(lease)
    assert await stored_node(store, "alpha-1") is None


async def test_an_update_never_brings_a_node_back(nodes: Nodes, store: MemoryStore) -> None:
    lease = (await store.grant(10)).id
    await nodes.register(record(), lease)
    store.apply(Txn(then=(Delete(f"{PREFIX}nodes/alpha-1"),)))
    assert await nodes.update(record(), lease) is None
    assert await stored_node(store, "alpha-1") is None


async def test_an_update_under_another_lease_does_nothing(nodes: Nodes, store: MemoryStore) -> None:
    await nodes.register(record(), (await store.grant(10)).id)
    revision = store.revision
    assert await nodes.update(record(), (await store.grant(10)).id) is None
    assert store.revision == revision
