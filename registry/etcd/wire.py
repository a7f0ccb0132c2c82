"""Plain values to and from etcd's messages, and the stubs of one channel.

The only module that imports ``etcd3``, for its generated code alone (``etcd3.etcdrpc``).  Nothing here does
I/O.  Keys are text outside and bytes on the wire; bytes that are no UTF-8 survive the round trip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import grpc
from etcd3 import etcdrpc as rpc

from registry.store import (
    Changed,
    Compare,
    Delete,
    Deleted,
    Get,
    KeyValue,
    Op,
    OpResult,
    Put,
    Revision,
    Txn,
    TxnResult,
)

Message: TypeAlias = Any
"""A message of etcd's API; its generated classes carry no types."""

_RESULT = {
    "=": rpc.Compare.EQUAL,
    "!=": rpc.Compare.NOT_EQUAL,
    "<": rpc.Compare.LESS,
    ">": rpc.Compare.GREATER,
}
_TARGET = {
    "create": (rpc.Compare.CREATE, "create_revision"),
    "mod": (rpc.Compare.MOD, "mod_revision"),
    "version": (rpc.Compare.VERSION, "version"),
    "lease": (rpc.Compare.LEASE, "lease"),
    "value": (rpc.Compare.VALUE, "value"),
}
_DELETE_EVENT = 1


class Stubs:
    """Etcd's services on one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.kv: Any = rpc.KVStub(channel)
        self.lease: Any = rpc.LeaseStub(channel)
        self.watch: Any = rpc.WatchStub(channel)
        self.auth: Any = rpc.AuthStub(channel)
        self.maintenance: Any = rpc.MaintenanceStub(channel)


def encode(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def decode(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def prefix_end(prefix: bytes) -> bytes:
    """Return the first key after all that start with ``prefix``; ``b"\\0"`` (no end) if there is none."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else b"\0"


def _range(key: str, prefix: bool) -> dict[str, bytes]:
    """Return key and range_end of one key, or of a prefix; etcd names all keys by ``\\0`` to ``\\0``."""
    first = encode(key)
    return {"key": first or b"\0", "range_end": prefix_end(first)} if prefix else {"key": first}


def get(key: str) -> Message:
    return rpc.RangeRequest(key=encode(key))


def page(prefix: str, after: str | None, revision: Revision, limit: int) -> Message:
    """One page of a prefix: the keys behind ``after`` (None: from the start) as of ``revision`` (0: now)."""
    request = rpc.RangeRequest(**_range(prefix, prefix=True), revision=revision, limit=limit)
    if after is not None:
        request.key = encode(after) + b"\0"
    return request


def newest(prefix: str) -> Message:
    """The key of a prefix that was written last, and how many there are."""
    return rpc.RangeRequest(
        **_range(prefix, prefix=True),
        limit=1,
        keys_only=True,
        sort_target=rpc.RangeRequest.MOD,
        sort_order=rpc.RangeRequest.DESCEND,
    )


def count(key: str) -> Message:
    return rpc.RangeRequest(key=encode(key), count_only=True)


def grant(ttl: float) -> Message:
    return rpc.LeaseGrantRequest(TTL=math.ceil(ttl))


def keepalive(lease: int) -> Message:
    return rpc.LeaseKeepAliveRequest(ID=lease)


def revoke(lease: int) -> Message:
    return rpc.LeaseRevokeRequest(ID=lease)


def status() -> Message:
    return rpc.StatusRequest()


def login(user: str, password: str) -> Message:
    return rpc.AuthenticateRequest(name=user, password=password)


def watch(prefix: str, start: Revision) -> Message:
    """Open a watch.  Old values are not asked for: they would double a mass expiry's one large response."""
    create = rpc.WatchCreateRequest(**_range(prefix, prefix=True), start_revision=start)
    return rpc.WatchRequest(create_request=create)


def progress() -> Message:
    return rpc.WatchRequest(progress_request=rpc.WatchProgressRequest())


def key_value(kv: Message) -> KeyValue:
    return KeyValue(decode(kv.key), kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)


def event(message: Message) -> Changed | Deleted:
    kv = message.kv
    return (
        Deleted(decode(kv.key), kv.mod_revision) if message.type == _DELETE_EVENT else Changed(key_value(kv))
    )


def txn(compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op]) -> Message:
    return rpc.TxnRequest(
        compare=[_compare(condition) for condition in compare],
        success=[_op(op) for op in then],
        failure=[_op(op) for op in otherwise],
    )


def _compare(condition: Compare) -> Message:
    target, field = _TARGET[condition.target]
    return rpc.Compare(
        key=encode(condition.key),
        target=target,
        result=_RESULT[condition.op],
        **{field: condition.operand},
    )


def _op(op: Op) -> Message:
    match op:
        case Get(key, prefix):
            return rpc.RequestOp(request_range=rpc.RangeRequest(**_range(key, prefix)))
        case Put(key, value, lease):
            return rpc.RequestOp(request_put=rpc.PutRequest(key=encode(key), value=value, lease=lease))
        case Delete(key, prefix):
            return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(**_range(key, prefix)))
        case Txn(compare, then, otherwise):
            return rpc.RequestOp(request_txn=txn(compare, then, otherwise))


def txn_result(response: Message, revision: Revision) -> TxnResult:
    """Translate a response; ``revision`` is the whole transaction's, a nested one's header may lack it."""
    return TxnResult(
        response.succeeded, revision, tuple(_op_result(result, revision) for result in response.responses)
    )


def _op_result(result: Message, revision: Revision) -> OpResult:
    match result.WhichOneof("response"):
        case "response_range":
            return tuple(key_value(kv) for kv in result.response_range.kvs)
        case "response_delete_range":
            return int(result.response_delete_range.deleted)
        case "response_txn":
            return txn_result(result.response_txn, revision)
        case _:
            return None


def writes(ops: Sequence[Op]) -> bool:
    """Return whether any of ``ops``, however deeply nested, changes something."""
    return any(
        isinstance(op, Put | Delete) or (isinstance(op, Txn) and (writes(op.then) or writes(op.otherwise)))
        for op in ops
    )
