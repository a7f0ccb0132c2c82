from __future__ import annotations

from collections.abc import Sequence

import pytest

from registry import specs as module
from registry.errors import Invalid, StoreAmbiguous
from registry.ownership import cluster_prefix
from registry.records import Malformed
from registry.specs import SPECS_PER_TXN, Desired, SpecRecord, Specs, Wanted, What, decode_spec, encode_spec
from registry.store import Compare, KeyValue, Op, TxnResult
from tests.support.memory_store import LostReply, MemoryStore

PREFIX = cluster_prefix("test")
KEY = PREFIX + "specs/sweeper"


@pytest.fixture
async def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def specs(store: MemoryStore) -> Specs:
    return Specs(store, PREFIX, wall=lambda: 7.5)


async def test_the_first_apply_creates_and_wishes_running(specs: Specs) -> None:
    result = await specs.apply("sweeper", "toml 1", "d1", "ana")
    assert result.what is What.CREATED
    assert result.spec is not None
    assert result.spec == await specs.read("sweeper")
    assert result.spec == SpecRecord(
        name="sweeper", toml="toml 1", desired=Desired.RUNNING, who="ana", at=7.5, digest="d1",
        mod_revision=result.spec.mod_revision,
    )  # fmt: skip


async def test_applying_the_same_again_writes_nothing(specs: Specs, store: MemoryStore) -> None:
    first = await specs.apply("sweeper", "toml 1", "d1", "ana")
    revision = store.revision
    again = await specs.apply("sweeper", "toml 1  # a comment", "d1", "bob")
    assert again.what is What.UNCHANGED
    assert again.spec == first.spec
    assert store.revision == revision


async def test_a_stopped_daemon_stays_stopped_when_its_spec_changes(specs: Specs) -> None:
    await specs.apply("sweeper", "toml 1", "d1", "ana")
    stopped = await specs.set_desired("sweeper", Desired.STOPPED, "bob")
    assert stopped.what is What.CHANGED
    changed = await specs.apply("sweeper", "toml 2", "d2", "ana")
    assert changed.what is What.CHANGED
    assert changed.spec is not None
    assert changed.spec.desired == "stopped"
    assert (changed.spec.toml, changed.spec.who) == ("toml 2", "ana")


async def test_wishing_what_is_wished_already_changes_nothing(specs: Specs, store: MemoryStore) -> None:
    await specs.apply("sweeper", "toml 1", "d1", "ana")
    revision = store.revision
    assert (await specs.set_desired("sweeper", Desired.RUNNING, "bob")).what is What.UNCHANGED
    assert store.revision == revision


async def test_wishing_for_an_unknown_name_says_absent(specs: Specs) -> None:
    result = await specs.set_desired("sweeper", Desired.STOPPED, "bob")
    assert (result.what, result.spec) == (What.ABSENT, None)


async def test_delete_returns_what_was_there_and_then_absent(specs: Specs) -> None:
    created = await specs.apply("sweeper", "toml 1", "d1", "ana")
    deleted = await specs.delete("sweeper")
    assert (deleted.what, deleted.spec) == (What.DELETED, created.spec)
    assert (await specs.delete("sweeper")).what is What.ABSENT
    assert await specs.read("sweeper") is None


async def test_an_offer_never_replaces_a_spec_that_differs(specs: Specs) -> None:
    assert (await specs.offer("sweeper", "toml 1", "d1", "children.d on alpha")).what is What.CREATED
    assert (await specs.offer("sweeper", "toml 1", "d1", "children.d on beta")).what is What.UNCHANGED
    conflict = await specs.offer("sweeper", "toml 2", "d2", "children.d on gamma")
    assert conflict.what is What.CONFLICT
    assert conflict.spec is not None
    assert conflict.spec.digest == "d1"
    assert await specs.read("sweeper") == conflict.spec


async def test_an_apply_that_was_overtaken_looks_again(
    specs: Specs, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = encode_spec(
        SpecRecord(name="sweeper", toml="t", desired=Desired.STOPPED, who="bob", at=1.0, digest="d0")
    )
    plain = store.txn

    async def overtaken(
        compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = (), *, timeout: float = 5.0
    ) -> TxnResult:
        seen = await plain(compare, then, otherwise, timeout=timeout)
        monkeypatch.undo()
        store.put(KEY, stopped)
        return seen

    monkeypatch.setattr(store, "txn", overtaken)
    result = await specs.apply("sweeper", "toml 1", "d1", "ana")
    assert result.what is What.CHANGED
    assert result.spec is not None
    assert result.spec.desired is Desired.STOPPED


def wanted(count: int, *, size: int = 10) -> list[Wanted]:
    return [Wanted(f"w{number}", "#" * size, "d1") for number in range(count)]


async def test_the_specs_of_a_file_appear_at_one_moment(specs: Specs, store: MemoryStore) -> None:
    await specs.apply("w1", "toml 1", "d1", "ana")
    await specs.set_desired("w2", Desired.STOPPED, "ana")
    results = await specs.apply_many(wanted(SPECS_PER_TXN), "bob")
    assert [result.name for result in results] == [each.name for each in wanted(SPECS_PER_TXN)]
    assert [result.what for result in results] == [
        What.UNCHANGED if result.name == "w1" else What.CREATED for result in results
    ]
    revisions = {result.spec.mod_revision for result in results if result.spec and result.name != "w1"}
    assert revisions == {store.revision}


async def test_a_file_whose_specs_somebody_else_changes_meanwhile_is_decided_again_as_a_whole(
    specs: Specs, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = store.txn

    async def overtaken(
        compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = (), *, timeout: float = 5.0
    ) -> TxnResult:
        seen = await plain(compare, then, otherwise, timeout=timeout)
        monkeypatch.undo()
        await specs.apply("w1", "toml 2", "d2", "bob")
        return seen

    monkeypatch.setattr(store, "txn", overtaken)
    results = await specs.apply_many(wanted(3), "ana")
    assert [result.what for result in results] == [What.CREATED, What.CHANGED, What.CREATED]
    assert {result.spec.mod_revision for result in results if result.spec} == {store.revision}


@pytest.mark.parametrize(
    ("count", "size", "transactions"),
    [(SPECS_PER_TXN, 10, 1), (SPECS_PER_TXN + 1, 10, 2), (4, 300_000, 2), (2, 1_200_000, 2)],
)
async def test_more_than_one_transaction_can_hold_takes_several(
    specs: Specs, store: MemoryStore, count: int, size: int, transactions: int
) -> None:
    before = store.revision
    results = await specs.apply_many(wanted(count, size=size), "ana")
    assert len(results) == count
    assert store.revision == before + transactions


async def test_a_spec_too_large_for_etcd_is_named_and_nothing_is_written(
    specs: Specs, store: MemoryStore
) -> None:
    before = store.revision
    huge = Wanted("huge", "#" * module.LARGEST_SPEC, "d1")
    with pytest.raises(Invalid, match=r"huge: its spec is 1\.50 MiB, and etcd takes 1\.5 MiB"):
        await specs.apply_many([*wanted(2), huge], "ana")
    assert store.revision == before


@pytest.mark.parametrize("fate", list(LostReply))
async def test_repeating_after_a_lost_reply_ends_in_the_same_spec(
    specs: Specs, store: MemoryStore, fate: LostReply
) -> None:
    store.lose_reply(fate)
    with pytest.raises(StoreAmbiguous):
        await specs.apply("sweeper", "toml 1", "d1", "ana")
    again = await specs.apply("sweeper", "toml 1", "d1", "ana")
    store.deliver_delayed()
    assert await specs.read("sweeper") == again.spec


async def test_an_unreadable_spec_counts_as_absent_and_is_replaced(specs: Specs, store: MemoryStore) -> None:
    store.put(KEY, b'{"toml": 3}')
    assert await specs.read("sweeper") is None
    assert (await specs.apply("sweeper", "toml 1", "d1", "ana")).what is What.CREATED


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "toml: Field required"),
        (b'{"toml":"","desired":"maybe","who":"","at":0,"digest":""}', "desired: Input should be 'running'"),
    ],
)
def test_what_is_wrong_with_a_value_is_said(value: bytes, problem: str) -> None:
    with pytest.raises(Malformed, match=problem):
        decode_spec("sweeper", KeyValue(KEY, value, 1, 1, 1, 0))


def test_members_of_a_newer_version_are_ignored() -> None:
    value = b'{"toml":"t","desired":"running","who":"w","at":0,"digest":"d","color":"blue"}'
    assert decode_spec("sweeper", KeyValue(KEY, value, 1, 9, 1, 0)).mod_revision == 9


def test_text_survives_as_it_is() -> None:
    record = SpecRecord(
        name="sweeper", toml="# \u2603 'quotes' \"too\"\n\t\\", desired=Desired.RUNNING, who="jos\u00e9",
        at=0.25, digest="d",
    )  # fmt: skip
    assert decode_spec("sweeper", KeyValue(KEY, encode_spec(record), 1, 0, 1, 0)) == record
