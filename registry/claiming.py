"""The claim: one transaction that decides who owns names, and how its result is read.  Pure.

A name is claimed only on the facts the claimant decided by (spec, placement record, incarnation, pause as it
saw them) and only while its own node key is alive under its lease; else the result is a value that says why.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from registry.ownership import (
    INCARNATION,
    NODES,
    OWNERS,
    PAUSE,
    PLACEMENTS,
    SPECS,
    Incarnation,
    Owner,
    decode_owner,
    encode_owner,
    epoch_of,
)
from registry.records import Malformed
from registry.store import Compare, Get, KeyValue, LeaseId, Put, Revision, Txn, TxnResult, absent, unchanged

CLAIMS_PER_TXN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Bidder:
    """The node that claims, and the cluster-wide facts it decided on, as it saw them."""

    node: str
    host: str
    lease: LeaseId
    incarnation: Incarnation
    pause_revision: Revision = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimRequest:
    """A wish to own ``name``.

    ``claim`` is a fresh uuid for each wish and the same one for each repetition of it.  The revisions are
    those of the spec and placement keys the decision was made on; 0 says that there was none.
    """

    name: str
    claim: str
    spec_revision: Revision
    placement_revision: Revision


class Why(enum.StrEnum):
    """Why a claim was refused although the name may be free; the value is for people."""

    NODE_GONE = "the node key of the claimant is gone"
    INCARNATION_CHANGED = "the incarnation has changed"
    PAUSE_CHANGED = "claims were paused or resumed"
    SPEC_CHANGED = "the spec has changed"
    PLACEMENT_CHANGED = "the placement record has changed"
    OWNER_UNREADABLE = "the owner key holds something else than an owner"


@dataclass(frozen=True, slots=True)
class Claimed:
    """The name is ours."""

    name: str
    epoch: int
    claim: str
    mod_revision: Revision


@dataclass(frozen=True, slots=True)
class Taken:
    """Somebody owns the name already."""

    name: str
    owner: Owner


@dataclass(frozen=True, slots=True)
class Refusal:
    """The claim was decided on facts that are not true any more: look again."""

    name: str
    why: Why


ClaimResult: TypeAlias = Claimed | Taken | Refusal


def claim_txn(prefix: str, by: Bidder, requests: Sequence[ClaimRequest]) -> Txn:
    """Return the transaction that claims each requested name on its own, all at one revision.

    etcd decides every comparison, nested ones too, before it writes anything.
    """
    return Txn(
        compare=(
            Compare(prefix + NODES + by.node, "lease", "=", by.lease),
            unchanged(prefix + INCARNATION, by.incarnation.mod_revision),
            unchanged(prefix + PAUSE, by.pause_revision),
        ),
        then=tuple(_claim_one(prefix, by, request) for request in requests),
        otherwise=(
            Get(prefix + NODES + by.node),
            Get(prefix + INCARNATION),
            *(Get(prefix + OWNERS + request.name) for request in requests),
        ),
    )


def _claim_one(prefix: str, by: Bidder, request: ClaimRequest) -> Txn:
    owner, spec, placement = (prefix + section + request.name for section in (OWNERS, SPECS, PLACEMENTS))
    value = encode_owner(node=by.node, host=by.host, claim=request.claim, incarnation=by.incarnation.number)
    return Txn(
        compare=(
            absent(owner),
            unchanged(spec, request.spec_revision),
            unchanged(placement, request.placement_revision),
        ),
        then=(Put(owner, value, by.lease),),
        otherwise=(Get(owner), Get(spec)),
    )


def claim_results(by: Bidder, requests: Sequence[ClaimRequest], result: TxnResult) -> list[ClaimResult]:
    """Return what the transaction of :func:`claim_txn` did for each request."""
    if not result.succeeded:
        why = _cluster_obstacle(by, single(result.kvs(0)), single(result.kvs(1)))
        return [
            _held(by, request, single(result.kvs(i))) or Refusal(request.name, why)
            for i, request in enumerate(requests, start=2)
        ]
    return [
        _claim_result(by, request, result.nested(i), result.revision) for i, request in enumerate(requests)
    ]


def _claim_result(by: Bidder, request: ClaimRequest, result: TxnResult, revision: Revision) -> ClaimResult:
    if result.succeeded:
        return Claimed(request.name, epoch_of(by.incarnation.number, revision), request.claim, revision)
    if held := _held(by, request, single(result.kvs(0))):
        return held
    spec = single(result.kvs(1))
    spec_revision = spec.mod_revision if spec else 0
    spec_changed = spec_revision != request.spec_revision
    return Refusal(request.name, Why.SPEC_CHANGED if spec_changed else Why.PLACEMENT_CHANGED)


def _held(by: Bidder, request: ClaimRequest, kv: KeyValue | None) -> ClaimResult | None:
    if kv is None:
        return None
    try:
        owner = decode_owner(request.name, kv)
    except Malformed:
        return Refusal(request.name, Why.OWNER_UNREADABLE)
    if (owner.claim, owner.node, owner.lease) == (request.claim, by.node, by.lease):
        return Claimed(request.name, owner.epoch, owner.claim, owner.mod_revision)
    return Taken(request.name, owner)


def _cluster_obstacle(by: Bidder, node: KeyValue | None, incarnation: KeyValue | None) -> Why:
    if node is None or node.lease != by.lease:
        return Why.NODE_GONE
    if (incarnation.mod_revision if incarnation else 0) != by.incarnation.mod_revision:
        return Why.INCARNATION_CHANGED
    return Why.PAUSE_CHANGED


def single(kvs: tuple[KeyValue, ...]) -> KeyValue | None:
    """Return the key a ``Get`` without prefix found."""
    return kvs[0] if kvs else None
