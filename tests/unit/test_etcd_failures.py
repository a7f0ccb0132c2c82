from __future__ import annotations

import pytest
from grpc import StatusCode

from registry.errors import LeaseNotFound, StoreCompacted, StoreDenied, StoreError
from registry.etcd.failures import Failure, Kind, error, judge, judge_cancel


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (StatusCode.UNAVAILABLE, "etcdserver: no leader", Kind.NOT_DONE),
        (StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: x", Kind.NOT_DONE),
        (StatusCode.UNAVAILABLE, "DNS resolution failed for etcd1:2379", Kind.NOT_DONE),
        (StatusCode.RESOURCE_EXHAUSTED, "etcdserver: too many requests", Kind.NOT_DONE),
        (StatusCode.OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision", Kind.NOT_DONE),
        (StatusCode.UNAVAILABLE, "etcdserver: request timed out", Kind.UNCLEAR),
        (StatusCode.UNAVAILABLE, "etcdserver: leader changed", Kind.UNCLEAR),
        (StatusCode.UNAVAILABLE, "Socket closed", Kind.UNCLEAR),
        (StatusCode.UNAVAILABLE, "recvmsg:Connection reset by peer", Kind.UNCLEAR),
        (StatusCode.UNAVAILABLE, "", Kind.UNCLEAR),
        (StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", Kind.UNCLEAR),
        (StatusCode.UNKNOWN, "context deadline exceeded", Kind.UNCLEAR),
        (StatusCode.CANCELLED, "context canceled", Kind.UNCLEAR),
        (StatusCode.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", Kind.UNCLEAR),
        (StatusCode.INTERNAL, "something new", Kind.UNCLEAR),
        (StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token", Kind.TOKEN),
        (StatusCode.INVALID_ARGUMENT, "etcdserver: user name is empty", Kind.TOKEN),
        (StatusCode.INVALID_ARGUMENT, "etcdserver: revision of auth store is old", Kind.TOKEN),
        (
            StatusCode.INVALID_ARGUMENT,
            "etcdserver: authentication failed, invalid user ID or password",
            Kind.DENIED,
        ),
        (StatusCode.PERMISSION_DENIED, "etcdserver: permission denied", Kind.DENIED),
        (StatusCode.INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request", Kind.REJECTED),
        (StatusCode.NOT_FOUND, "etcdserver: requested lease not found", Kind.LEASE_GONE),
        (
            StatusCode.OUT_OF_RANGE,
            "etcdserver: mvcc: required revision has been compacted",
            Kind.COMPACTED,
        ),
    ],
)
def test_an_error_tells_whether_the_request_was_executed(code: StatusCode, details: str, kind: Kind) -> None:
    assert judge(code, details).kind is kind


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("etcdserver: permission denied", Kind.TOKEN),
        ("etcdserver: invalid auth token", Kind.TOKEN),
        ("etcdserver: mvcc: required revision has been compacted", Kind.COMPACTED),
        ("etcdserver: no leader", Kind.NOT_DONE),
        ("", Kind.NOT_DONE),
    ],
)
def test_a_cancelled_watch_tells_what_may_be_done(reason: str, kind: Kind) -> None:
    assert judge_cancel(reason).kind is kind


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        (Kind.DENIED, StoreDenied),
        (Kind.TOKEN, StoreDenied),
        (Kind.LEASE_GONE, LeaseNotFound),
        (Kind.COMPACTED, StoreCompacted),
        (Kind.REJECTED, StoreError),
    ],
)
def test_each_final_failure_has_its_exception(kind: Kind, raised: type[StoreError]) -> None:
    made = error(Failure(kind, "etcd's words"))

    assert type(made) is raised
    assert str(made) == "etcd's words"
