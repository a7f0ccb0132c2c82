"""Hosts and nodes: the machine that stays, and one life of its session.

``nodes/<node>`` exists while the node's lease does.  ``hosts/<host>`` survives reboots and names the present
node, which makes it the place where a second agent with the same host name is noticed.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from registry.claiming import single
from registry.errors import Denied, StoreUnavailable
from registry.ownership import HOSTS, NODES
from registry.records import Codec, Malformed
from registry.store import Compare, Get, KeyValue, LeaseId, Put, Revision, Store, unchanged

_ATTEMPTS = 16


def new_node(host: str) -> str:
    """Return the id of a new life of ``host``."""
    return f"{host}-{secrets.token_hex(4)}"


class NodeState(enum.StrEnum):
    """What a node is doing; a host whose node key is gone is down."""

    RECOVERING = "recovering"
    READY = "ready"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """A living node.  ``address`` is host:port of its gRPC service, ``protocol`` that between agents."""

    node: str
    host: str
    address: str
    version: str
    protocol: int
    containment: str
    state: NodeState
    labels: Mapping[str, str] = field(default_factory=dict)
    databases: tuple[str, ...] = ()
    lease: LeaseId = 0
    mod_revision: Revision = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRecord:
    """A host, for ever: its labels, whether it is being drained, and its present or last node."""

    host: str
    node: str
    labels: Mapping[str, str] = field(default_factory=dict)
    drain: bool = False
    mod_revision: Revision = 0


_NODE = Codec(NodeRecord, outside=("node", "lease", "mod_revision"))
_HOST = Codec(HostRecord, outside=("host", "mod_revision"))


def encode_node(record: NodeRecord) -> bytes:
    """Return the value of a node key."""
    return _NODE.encode(record)


def decode_node(node: str, kv: KeyValue) -> NodeRecord:
    """Read a node key.  Raises Malformed."""
    return _NODE.decode(kv.value, node=node, lease=kv.lease, mod_revision=kv.mod_revision)


def encode_host(record: HostRecord) -> bytes:
    """Return the value of a host key."""
    return _HOST.encode(record)


def decode_host(host: str, kv: KeyValue) -> HostRecord:
    """Read a host key.  Raises Malformed."""
    return _HOST.decode(kv.value, host=host, mod_revision=kv.mod_revision)


def check_host_is_ours(ours: NodeRecord, holder: NodeRecord | None, former: str) -> None:
    """Raise Denied when ``holder``, the living node of our host's key, is somebody else's.

    Ours are this node, ``former`` (the life before, if known), and a node at the same address: two agents
    cannot listen there, so it is a life of this host that ended without revoking its lease.
    """
    if holder is None or holder.node in (ours.node, former) or holder.address == ours.address:
        return
    raise Denied(
        f"two agents with one node name: host {ours.host} is in use by node {holder.node} "
        f"at {holder.address}, and this agent is at {ours.address}",
        hint="give one of them another `host`; if this host has changed its address, wait for the lease of "
        "its former node to end",
        details={"host": ours.host, "node": holder.node, "address": holder.address, "ours": ours.address},
    )


class Nodes:
    """The node and host keys of one cluster; ``timeout`` bounds each transaction."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    async def register(
        self, record: NodeRecord, lease: LeaseId, *, former: str = "", timeout: float = 5.0
    ) -> NodeRecord:
        """Write the node key under ``lease`` and make it its host's present node; safe to repeat.

        ``former`` is the node this host was before, if known.  Labels are replaced by ours, drain is kept.
        Raises Denied (the host name is in use by another living node), LeaseNotFound, StoreError.
        """
        node_key, host_key = self._prefix + NODES + record.node, self._prefix + HOSTS + record.host
        for _ in range(_ATTEMPTS):
            seen = await self._store.get(host_key, timeout=timeout)
            host = _host(record.host, seen)
            holder_key = self._prefix + NODES + (host.node if host else record.node)
            holder = await self._store.get(holder_key, timeout=timeout)
            check_host_is_ours(record, _living(host, holder), former)
            present = HostRecord(
                host=record.host, node=record.node, labels=record.labels, drain=host.drain if host else False
            )
            result = await self._store.txn(
                (unchanged(host_key, seen.mod_revision if seen else 0),),
                (Put(node_key, encode_node(record), lease), Put(host_key, encode_host(present))),
                timeout=timeout,
            )
            if result.succeeded:
                return replace(record, lease=lease, mod_revision=result.revision)
        raise StoreUnavailable(f"host key of {record.host} changed {_ATTEMPTS} times during registration")

    async def update(self, record: NodeRecord, lease: LeaseId, *, timeout: float = 5.0) -> NodeRecord | None:
        """Rewrite our own node key; None when it is gone or not under ``lease``.  Raises StoreError."""
        key = self._prefix + NODES + record.node
        kv = await self._store.get(key, timeout=timeout)
        for _ in range(_ATTEMPTS):
            if kv is None or kv.lease != lease:
                return None
            result = await self._store.txn(
                (unchanged(key, kv.mod_revision), Compare(key, "lease", "=", lease)),
                (Put(key, encode_node(record), lease),),
                (Get(key),),
                timeout=timeout,
            )
            if result.succeeded:
                return replace(record, lease=lease, mod_revision=result.revision)
            kv = single(result.kvs(0))
        raise StoreUnavailable(f"node key of {record.node} changed {_ATTEMPTS} times while it was written")


def _host(host: str, kv: KeyValue | None) -> HostRecord | None:
    try:
        return None if kv is None else decode_host(host, kv)
    except Malformed:
        return None


def _living(host: HostRecord | None, holder: KeyValue | None) -> NodeRecord | None:
    if host is None or holder is None:
        return None
    try:
        return decode_node(host.node, holder)
    except Malformed:
        return None
