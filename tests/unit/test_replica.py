from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from registry.ownership import Owner, cluster_prefix, encode_owner
from registry.replica import Change, Replica, Unreadable
from registry.store import Changed, Deleted, KeyValue, Snapshot

PREFIX = cluster_prefix("test")

VALUE = encode_owner(node="alpha-1", host="alpha", claim="c", incarnation=0)


def written(name: str, revision: int, value: bytes = VALUE) -> Changed:
    return Changed(KeyValue(f"{PREFIX}names/{name}", value, revision, revision, 1, 0))


def test_a_change_that_is_known_already_means_nothing() -> None:
    replica = Replica(PREFIX)
    assert isinstance(replica.apply(written("a", 5)), Change)
    assert replica.apply(written("a", 5)) is None


def test_a_key_that_was_not_there_cannot_go() -> None:
    replica = Replica(PREFIX)
    assert replica.apply(Deleted(f"{PREFIX}names/a", 9)) is None
    assert replica.revision == 9


def test_keys_of_a_newer_version_mean_nothing_and_can_go() -> None:
    replica = Replica(PREFIX)
    key = f"{PREFIX}handoff/a"
    assert replica.apply(Changed(KeyValue(key, b"", 5, 5, 1, 0))) is None
    assert replica.apply(Deleted(key, 6)) is None
    assert replica.fingerprint() == (0, 0)


def test_an_owner_key_that_was_never_readable_ends_nothing() -> None:
    replica = Replica(PREFIX)
    meaning = replica.apply(written("a", 5, b"?"))
    assert isinstance(meaning, Unreadable)
    assert (meaning.key, meaning.change) == (f"{PREFIX}names/a", None)
    assert replica.fingerprint() == (1, 5)


def test_a_snapshot_that_is_known_differs_in_nothing() -> None:
    replica = Replica(PREFIX)
    replica.apply(written("a", 5))
    kv = written("a", 5).kv
    assert replica.differences(Snapshot(7, (kv,))) == []


def test_owners_come_last_in_a_snapshot() -> None:
    placement = KeyValue(f"{PREFIX}placement/a", b"{}", 6, 6, 1, 0)
    owner = written("a", 5).kv
    changes = Replica(PREFIX).differences(Snapshot(7, (owner, placement)))
    assert changes == [Changed(placement), Changed(owner)]


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.booleans()), max_size=200),
    st.integers(0, 200),
)
def test_following_and_reading_again_give_the_same_copy(steps: list[tuple[str, bool]], followed: int) -> None:
    """One replica sees every event, another some and then a snapshot: records and fingerprints agree."""
    truth: dict[str, KeyValue] = {}
    whole, part = Replica(PREFIX), Replica(PREFIX)
    for revision, (name, put) in enumerate(steps, start=2):
        event = written(name, revision) if put else Deleted(f"{PREFIX}names/{name}", revision)
        whole.apply(event)
        if revision - 2 < followed:
            part.apply(event)
        if isinstance(event, Changed):
            truth[name] = event.kv
        else:
            truth.pop(name, None)
        highest = max((kv.mod_revision for kv in truth.values()), default=0)
        assert whole.fingerprint() == (len(truth), highest)
    for change in part.differences(Snapshot(len(steps) + 2, tuple(truth.values()))):
        part.apply(change)
    assert part.owners == whole.owners
    assert part.fingerprint() == whole.fingerprint()


def test_ten_thousand_rewrites_of_one_key_keep_the_tally_small() -> None:
    replica = Replica(PREFIX)
    for revision in range(2, 10_002):
        replica.apply(written("a", revision))
    assert replica.fingerprint() == (1, 10_001)
    owner = replica.owners["a"]
    assert isinstance(owner, Owner)
    assert owner.epoch == 10_001
