"""What a failed attempt says about whether the request was executed.

One table, read from the top; what no row knows is :attr:`Kind.UNCLEAR`.  Sources: etcd's
``api/v3rpc/rpctypes/error.go`` and ``server/etcdserver/v3_server.go``, gRPC core's pick and transport errors.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from grpc import StatusCode

from registry.errors import LeaseNotFound, StoreCompacted, StoreDenied, StoreError
from registry.grpc_words import plain


class Kind(enum.Enum):
    """What may be done after a failed attempt."""

    NOT_DONE = "not executed: ask the next member"
    UNCLEAR = "perhaps executed: only a read may be asked again"
    TOKEN = "not executed: log in again"
    DENIED = "not executed: etcd refuses the credentials"
    LEASE_GONE = "not executed: there is no such lease"
    COMPACTED = "a read of a revision that is gone"
    REJECTED = "not executed: etcd will never take this request"


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed attempt: what may be done, and etcd's words."""

    kind: Kind
    text: str


_TABLE: tuple[tuple[StatusCode, str, Kind], ...] = (
    # The member checks for a leader before it looks at the request (interceptor.go).
    (StatusCode.UNAVAILABLE, "etcdserver: no leader", Kind.NOT_DONE),
    (StatusCode.UNAVAILABLE, "not capable", Kind.NOT_DONE),
    # The picker found no connection, so no byte was written.
    (StatusCode.UNAVAILABLE, "failed to connect to all addresses", Kind.NOT_DONE),
    (StatusCode.UNAVAILABLE, "connections to all backends failing", Kind.NOT_DONE),
    (StatusCode.UNAVAILABLE, "resolution", Kind.NOT_DONE),
    (StatusCode.UNAVAILABLE, "empty address list", Kind.NOT_DONE),
    # Asked before the proposal.  "database space exceeded" is not here: the applier writes, then says so.
    (StatusCode.RESOURCE_EXHAUSTED, "too many requests", Kind.NOT_DONE),
    (StatusCode.RESOURCE_EXHAUSTED, "message larger than max", Kind.REJECTED),
    (StatusCode.UNAUTHENTICATED, "", Kind.TOKEN),
    (StatusCode.INVALID_ARGUMENT, "revision of auth store is old", Kind.TOKEN),
    (StatusCode.INVALID_ARGUMENT, "user name is empty", Kind.TOKEN),
    (StatusCode.INVALID_ARGUMENT, "authentication failed", Kind.DENIED),
    (StatusCode.INVALID_ARGUMENT, "", Kind.REJECTED),
    (StatusCode.PERMISSION_DENIED, "", Kind.DENIED),
    (StatusCode.NOT_FOUND, "requested lease not found", Kind.LEASE_GONE),
    (StatusCode.OUT_OF_RANGE, "compacted", Kind.COMPACTED),
    # The member has not applied that revision yet; another has.
    (StatusCode.OUT_OF_RANGE, "future revision", Kind.NOT_DONE),
    (StatusCode.FAILED_PRECONDITION, "", Kind.REJECTED),
    (StatusCode.UNIMPLEMENTED, "", Kind.REJECTED),
)


AUTH_NOT_ENABLED = "authentication is not enabled"
"""What a login is answered by an etcd without users: requests need no token."""


def judge(code: StatusCode, details: str) -> Failure:
    """Return what a gRPC status means for the request it answers."""
    said = plain(details)
    text = said if said != details else f"{code.name}: {details}"
    for row_code, fragment, kind in _TABLE:
        if code is row_code and fragment.lower() in details.lower():
            return Failure(kind, text)
    return Failure(Kind.UNCLEAR, text)


def judge_cancel(reason: str) -> Failure:
    """Return what the reason of a cancelled watch means.

    etcd up to 3.5 names every refusal "permission denied", a token that has expired included: worth a login.
    """
    words = reason.lower()
    if "compacted" in words:
        return Failure(Kind.COMPACTED, reason)
    if any(word in words for word in ("permission denied", "auth", "user name is empty")):
        return Failure(Kind.TOKEN, reason)
    return Failure(Kind.NOT_DONE, reason)


def error(failure: Failure) -> StoreError:
    """Return the exception for a failure that trying again does not mend."""
    match failure.kind:
        case Kind.DENIED | Kind.TOKEN:
            return StoreDenied(failure.text)
        case Kind.LEASE_GONE:
            return LeaseNotFound(failure.text)
        case Kind.COMPACTED:
            return StoreCompacted(failure.text)
        case _:
            return StoreError(failure.text)
