from __future__ import annotations

import pytest
from etcd3 import etcdrpc
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import StoreRestored
from registry.etcd import wire
from registry.etcd.history import History
from registry.etcd.members import pause
from registry.store import Delete, Get, Put, Txn

NUMBERS = {
    "ResponseHeader": {"cluster_id": 1, "member_id": 2, "revision": 3},
    "RangeRequest": {
        "key": 1,
        "range_end": 2,
        "limit": 3,
        "revision": 4,
        "sort_order": 5,
        "sort_target": 6,
        "keys_only": 8,
        "count_only": 9,
    },
    "RangeResponse": {"header": 1, "kvs": 2, "more": 3, "count": 4},
    "PutRequest": {"key": 1, "value": 2, "lease": 3},
    "DeleteRangeRequest": {"key": 1, "range_end": 2},
    "DeleteRangeResponse": {"header": 1, "deleted": 2},
    "Compare": {
        "result": 1,
        "target": 2,
        "key": 3,
        "version": 4,
        "create_revision": 5,
        "mod_revision": 6,
        "value": 7,
        "lease": 8,
    },
    "TxnRequest": {"compare": 1, "success": 2, "failure": 3},
    "TxnResponse": {"header": 1, "succeeded": 2, "responses": 3},
    "WatchCreateRequest": {"key": 1, "range_end": 2, "start_revision": 3},
    "WatchRequest": {"create_request": 1, "progress_request": 3},
    "WatchResponse": {
        "header": 1,
        "created": 3,
        "canceled": 4,
        "compact_revision": 5,
        "cancel_reason": 6,
        "events": 11,
    },
    "LeaseGrantRequest": {"TTL": 1, "ID": 2},
    "LeaseGrantResponse": {"header": 1, "ID": 2, "TTL": 3},
    "LeaseKeepAliveRequest": {"ID": 1},
    "LeaseKeepAliveResponse": {"header": 1, "ID": 2, "TTL": 3},
    "LeaseRevokeRequest": {"ID": 1},
    "AuthenticateRequest": {"name": 1, "password": 2},
    "AuthenticateResponse": {"header": 1, "token": 2},
    "StatusResponse": {"header": 1, "version": 2, "leader": 4},
}


@pytest.mark.parametrize("message", NUMBERS)
def test_the_generated_messages_have_the_field_numbers_of_etcds_api(message: str) -> None:
    fields = getattr(etcdrpc, message).DESCRIPTOR.fields_by_name

    assert {name: fields[name].number for name in NUMBERS[message]} == NUMBERS[message]


@given(st.binary(max_size=4), st.binary(max_size=4))
def test_a_prefix_ends_where_the_first_other_key_may_stand(prefix: bytes, rest: bytes) -> None:
    end = wire.prefix_end(prefix)
    inside = prefix + rest

    assert end == b"\0" or inside < end
    assert end == b"\0" or not end.startswith(prefix)


@given(st.binary(max_size=8))
def test_any_key_survives_the_round_trip(key: bytes) -> None:
    assert wire.encode(wire.decode(key)) == key


def test_a_transaction_writes_if_any_branch_at_any_depth_does() -> None:
    read = Get("a")

    assert not wire.writes([read, Txn((), [read], [Txn((), [read])])])
    assert wire.writes([read, Txn((), [read], [Txn((), [Delete("a")])])])
    assert wire.writes([Put("a", b"")])


def test_the_next_member_is_asked_at_once_and_a_round_is_followed_by_a_pause() -> None:
    assert [pause(failed, 3) for failed in range(1, 7)] == [0, 0, 0.05, 0, 0, 0.1]
    assert pause(3000, 3) == 0.5


def header(cluster: int, revision: int) -> wire.Message:
    return etcdrpc.ResponseHeader(cluster_id=cluster, revision=revision)


def test_revisions_that_grow_are_one_history() -> None:
    history = History()

    assert history.admit(header(7, 10), floor=0)
    assert history.admit(header(7, 10), floor=history.highest)
    assert history.admit(header(7, 12), floor=history.highest)
    assert history.highest == 12


def test_an_answer_that_was_overtaken_is_no_restore() -> None:
    history = History()
    history.admit(header(7, 12), floor=0)

    assert history.admit(header(7, 11), floor=10)
    assert history.highest == 12


def test_an_old_revision_is_a_suspicion_and_a_linearizable_one_is_proof() -> None:
    history = History()
    history.admit(header(7, 12), floor=0)

    assert not history.admit(header(7, 11), floor=12)
    history.confirm(header(7, 12), floor=12)
    with pytest.raises(StoreRestored, match="revision is 11, 12 was seen"):
        history.confirm(header(7, 11), floor=12)


def test_another_cluster_is_noticed_and_never_forgiven() -> None:
    history = History()
    history.admit(header(7, 12), floor=0)

    with pytest.raises(StoreRestored, match="cluster id is 8, it was 7"):
        history.admit(header(8, 13), floor=12)
    with pytest.raises(StoreRestored):
        history.admit(header(7, 13), floor=12)
