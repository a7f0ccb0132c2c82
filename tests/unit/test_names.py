from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import Invalid, LeaseNotFound, StoreAmbiguous, StoreUnavailable
from registry.names import (
    Bidder,
    Claimed,
    ClaimRequest,
    Incarnation,
    Method,
    Names,
    NotOwner,
    Owned,
    Refusal,
    Released,
    Status,
    Taken,
    Why,
    WorkerState,
    Written,
    did_you_mean,
    epoch_of,
    incarnation_of,
    revision_of,
    validate,
    validate_part,
)
from registry.ownership import (
    cluster_prefix,
    decode_incarnation,
    decode_placement,
    decode_status,
    encode_owner,
)
from registry.records import Malformed
from registry.store import KeyValue, Put, Txn
from tests.support.memory_store import LostReply, MemoryStore

PREFIX = cluster_prefix("test")

PART = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)


class TestGrammar:
    @pytest.mark.parametrize(
        "name", ["sweeper", "app/sweeper", "pgbouncer@alpha", "app/pgbouncer@alpha.internal", "0", "a" * 63]
    )
    def test_accepts(self, name: str) -> None:
        assert validate(name) == name

    @pytest.mark.parametrize(
        ("name", "problem"),
        [
            ("", "a part of it is empty"),
            ("/sweeper", "a part of it is empty"),
            ("app/", "a part of it is empty"),
            ("sweeper@", "a part of it is empty"),
            ("@alpha", "a part of it is empty"),
            ("a/b/c", "more than one '/'"),
            ("sweeper@a/b", "'/' is not allowed"),
            ("sweeper@a@b", "'@' is not allowed"),
            ("Sweeper", "'S' cannot begin a part"),
            ("-x", "'-' cannot begin a part"),
            ("app/.x", "'.' cannot begin a part"),
            ("sweepEr", "'E' is not allowed"),
            ("swe eper", "' ' is not allowed"),
            ("sweepér", "'é' is not allowed"),
            ("sweeper\n", r"'\\n' is not allowed"),
            ("a" * 64, "has 64 characters, at most 63"),
            ("app/" + "a" * 64, "has 64 characters, at most 63"),
        ],
    )
    def test_refuses_and_says_why(self, name: str, problem: str) -> None:
        with pytest.raises(Invalid, match=problem) as caught:
            validate(name)
        assert repr(name) in caught.value.message
        assert "[scope/]name" in caught.value.hint
        assert caught.value.details["name"] == name

    def test_a_huge_name_is_shown_cut(self) -> None:
        with pytest.raises(Invalid) as caught:
            validate("x" * 100_000)
        assert len(caught.value.message) < 400

    @given(scope=st.none() | PART, name=PART, host=st.none() | PART)
    def test_accepts_every_combination_of_parts(self, scope: str | None, name: str, host: str | None) -> None:
        whole = (f"{scope}/" if scope else "") + name + (f"@{host}" if host else "")
        assert validate(whole) == whole

    @given(st.text(max_size=80))
    def test_never_accepts_what_would_change_a_key(self, text: str) -> None:
        try:
            validate(text)
        except Invalid:
            return
        assert text.isascii()
        assert text == text.strip().lower()
        assert text.count("/") <= 1
        assert ".." not in text.split("/")

    def test_a_part_has_no_scope(self) -> None:
        assert validate_part("alpha") == "alpha"
        with pytest.raises(Invalid, match="'/' is not allowed"):
            validate_part("app/alpha")

    def test_a_typo_gets_the_nearest_name(self) -> None:
        assert did_you_mean("sweper", ["sweeper", "janitor"]) == "did you mean 'sweeper'?"
        assert did_you_mean("jd@alpha", ["jd", "jda-lpha"]) == "did you mean 'jd'?"
        assert did_you_mean("zzz", ["sweeper", "janitor"]) == ""
        assert did_you_mean("sweeper", []) == ""


class TestEpochs:
    @given(st.integers(0, (1 << 15) - 1), st.integers(1, (1 << 48) - 1))
    def test_an_epoch_is_its_parts_and_fits_a_bigint(self, incarnation: int, revision: int) -> None:
        epoch = epoch_of(incarnation, revision)
        assert (incarnation_of(epoch), revision_of(epoch)) == (incarnation, revision)
        assert 0 < epoch < 1 << 63

    @given(
        st.tuples(st.integers(0, (1 << 15) - 1), st.integers(1, (1 << 48) - 1)),
        st.tuples(st.integers(0, (1 << 15) - 1), st.integers(1, (1 << 48) - 1)),
    )
    def test_epochs_are_ordered_by_incarnation_then_revision(
        self, one: tuple[int, int], other: tuple[int, int]
    ) -> None:
        assert (epoch_of(*one) < epoch_of(*other)) == (one < other)

    @pytest.mark.parametrize(("incarnation", "revision"), [(-1, 1), (1 << 15, 1), (0, 0), (0, 1 << 48)])
    def test_what_does_not_fit_is_an_error(self, incarnation: int, revision: int) -> None:
        with pytest.raises(ValueError, match="is not between"):
            epoch_of(incarnation, revision)

    def test_the_incarnation_key_is_decimal_text_and_absent_is_zero(self) -> None:
        assert decode_incarnation(None) == Incarnation(0, 0)
        assert decode_incarnation(_kv(b" 12\n", 7)) == Incarnation(12, 7)

    @pytest.mark.parametrize("value", [b"", b"-1", b"1.0", b"99999", "²".encode(), b"\xff"])
    def test_an_unreadable_incarnation_is_malformed(self, value: bytes) -> None:
        with pytest.raises(Malformed):
            decode_incarnation(_kv(value, 7))


def _kv(value: bytes, revision: int) -> KeyValue:
    return KeyValue("k", value, revision, revision, 1, 0)


class Node:
    """A node of the test's cluster that claims with the registry as it is now."""

    def __init__(self, store: MemoryStore, host: str, lease: int) -> None:
        self.store, self.host, self.node, self.lease = store, host, f"{host}-1", lease
        self.names = Names(store, PREFIX, wall=lambda: 1234.5)

    @classmethod
    async def join(cls, store: MemoryStore, host: str) -> Node:
        node = cls(store, host, (await store.grant(10.0)).id)
        store.put(f"{PREFIX}nodes/{node.node}", b"{}", node.lease)
        return node

    async def revision(self, key: str) -> int:
        kv = await self.store.get(PREFIX + key)
        return kv.mod_revision if kv else 0

    async def bidder(self) -> Bidder:
        kv = await self.store.get(PREFIX + "incarnation")
        return Bidder(
            node=self.node,
            host=self.host,
            lease=self.lease,
            incarnation=decode_incarnation(kv),
            pause_revision=await self.revision("control/pause"),
        )

    async def request(self, name: str, claim: str = "") -> ClaimRequest:
        return ClaimRequest(
            name=name,
            claim=claim or f"{self.node}-{name}",
            spec_revision=await self.revision(f"specs/{name}"),
            placement_revision=await self.revision(f"placement/{name}"),
        )

    async def claimed(self, name: str, claim: str = "") -> Claimed:
        result = await self.names.claim(await self.request(name, claim), await self.bidder())
        assert isinstance(result, Claimed)
        return result

    def status(self, name: str, epoch: int, state: WorkerState = WorkerState.READY) -> Status:
        return Status(name=name, epoch=epoch, start=1, state=state, pid=7, since=0.5)


@pytest.fixture
async def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
async def alpha(store: MemoryStore) -> Node:
    return await Node.join(store, "alpha")


@pytest.fixture
async def beta(store: MemoryStore) -> Node:
    return await Node.join(store, "beta")


class TestClaims:
    async def test_the_epoch_is_the_revision_of_the_owner_key(self, alpha: Node) -> None:
        claimed = await alpha.claimed("sweeper")
        owner = await alpha.names.read_owner("sweeper")
        assert owner is not None
        assert claimed.epoch == owner.epoch == epoch_of(0, alpha.store.revision)
        assert (owner.node, owner.host, owner.lease) == ("alpha-1", "alpha", alpha.lease)
        assert owner.claim == claimed.claim

    async def test_a_name_that_is_owned_is_taken(self, alpha: Node, beta: Node) -> None:
        first = await alpha.claimed("sweeper")
        result = await beta.names.claim(await beta.request("sweeper"), await beta.bidder())
        assert isinstance(result, Taken)
        assert result.owner.epoch == first.epoch
        assert await alpha.names.owned_by("beta-1") == []

    async def test_of_many_each_is_decided_on_its_own(self, alpha: Node, beta: Node) -> None:
        await alpha.claimed("b")
        requests = [await beta.request(name) for name in "abc"]
        results = await beta.names.claim_many(requests, await beta.bidder())
        assert [type(result) for result in results] == [Claimed, Taken, Claimed]
        assert [result.name for result in results] == ["a", "b", "c"]

    async def test_more_names_than_a_transaction_takes_are_claimed(self, alpha: Node) -> None:
        requests = [await alpha.request(f"n{i}") for i in range(150)]
        before = alpha.store.calls
        results = await alpha.names.claim_many(requests, await alpha.bidder())
        assert all(isinstance(result, Claimed) for result in results)
        assert alpha.store.calls - before <= 5
        owned = await alpha.names.owned_by("alpha-1")
        assert sorted(o.name for o in owned) == sorted(request.name for request in requests)
        assert isinstance(owned[0], Owned)

    async def test_an_incarnation_raises_every_epoch(self, alpha: Node, store: MemoryStore) -> None:
        store.put(PREFIX + "incarnation", b"3")
        claimed = await alpha.claimed("sweeper")
        assert incarnation_of(claimed.epoch) == 3

    async def test_raising_the_incarnation_leaves_living_owners_their_epoch(
        self, alpha: Node, store: MemoryStore
    ) -> None:
        claimed = await alpha.claimed("sweeper")
        store.put(PREFIX + "incarnation", b"1")
        owner = await alpha.names.read_owner("sweeper")
        assert owner is not None
        assert owner.epoch == claimed.epoch

    @pytest.mark.parametrize(
        ("key", "why"),
        [
            ("specs/sweeper", Why.SPEC_CHANGED),
            ("placement/sweeper", Why.PLACEMENT_CHANGED),
            ("control/pause", Why.PAUSE_CHANGED),
            ("incarnation", Why.INCARNATION_CHANGED),
        ],
    )
    async def test_a_fact_that_changed_refuses_the_claim(
        self, alpha: Node, store: MemoryStore, key: str, why: Why
    ) -> None:
        request, by = await alpha.request("sweeper"), await alpha.bidder()
        store.put(PREFIX + key, b"1")
        assert await alpha.names.claim(request, by) == Refusal("sweeper", why)
        assert await alpha.names.read_owner("sweeper") is None

    async def test_a_spec_that_was_deleted_refuses_the_claim(self, alpha: Node, store: MemoryStore) -> None:
        store.put(PREFIX + "specs/sweeper", b"{}")
        request, by = await alpha.request("sweeper"), await alpha.bidder()
        store.delete(PREFIX + "specs/sweeper")
        assert await alpha.names.claim(request, by) == Refusal("sweeper", Why.SPEC_CHANGED)

    async def test_a_pause_that_was_seen_does_not_refuse(self, alpha: Node, store: MemoryStore) -> None:
        store.put(PREFIX + "control/pause", b"")
        assert (await alpha.claimed("sweeper")).name == "sweeper"

    async def test_without_its_node_key_a_node_claims_nothing(self, alpha: Node, store: MemoryStore) -> None:
        request, by = await alpha.request("sweeper"), await alpha.bidder()
        store.delete(f"{PREFIX}nodes/{alpha.node}")
        assert await alpha.names.claim(request, by) == Refusal("sweeper", Why.NODE_GONE)

    async def test_under_a_lease_that_ended_a_node_claims_nothing(
        self, alpha: Node, store: MemoryStore
    ) -> None:
        request, by = await alpha.request("sweeper"), await alpha.bidder()
        store.end_lease(alpha.lease)
        assert await alpha.names.claim(request, by) == Refusal("sweeper", Why.NODE_GONE)
        store.put(f"{PREFIX}nodes/{alpha.node}", b"{}")
        assert await alpha.names.claim(request, by) == Refusal("sweeper", Why.NODE_GONE)

    async def test_an_owner_key_with_garbage_is_not_overwritten(
        self, alpha: Node, store: MemoryStore
    ) -> None:
        store.put(PREFIX + "names/sweeper", b"garbage")
        result = await alpha.names.claim(await alpha.request("sweeper"), await alpha.bidder())
        assert result == Refusal("sweeper", Why.OWNER_UNREADABLE)

    async def test_a_name_requested_twice_is_a_mistake(self, alpha: Node) -> None:
        request = await alpha.request("sweeper")
        with pytest.raises(ValueError, match="twice"):
            await alpha.names.claim_many([request, request], await alpha.bidder())

    async def test_a_store_that_is_away_is_an_error(self, alpha: Node, store: MemoryStore) -> None:
        request, by = await alpha.request("sweeper"), await alpha.bidder()
        store.go_away()
        with pytest.raises(StoreUnavailable):
            await alpha.names.claim(request, by)


class TestLostReplies:
    async def test_a_repeated_claim_recognises_its_own_success(self, alpha: Node, store: MemoryStore) -> None:
        request, by = await alpha.request("sweeper"), await alpha.bidder()
        store.lose_reply(LostReply.DONE)
        with pytest.raises(StoreAmbiguous):
            await alpha.names.claim(request, by)
        repeated = await alpha.names.claim(request, by)
        owner = await alpha.names.read_owner("sweeper")
        assert owner is not None
        assert repeated == Claimed("sweeper", owner.epoch, request.claim, owner.mod_revision)

    async def test_even_when_claims_were_paused_in_between(self, alpha: Node, store: MemoryStore) -> None:
        request, by = await alpha.request("sweeper"), await alpha.bidder()
        other = await alpha.request("janitor")
        store.lose_reply(LostReply.DONE)
        with pytest.raises(StoreAmbiguous):
            await alpha.names.claim(request, by)
        store.put(PREFIX + "control/pause", b"")
        results = await alpha.names.claim_many([request, other], by)
        assert isinstance(results[0], Claimed)
        assert results[1] == Refusal("janitor", Why.PAUSE_CHANGED)

    async def test_another_claim_of_the_same_node_is_not_taken_for_its_own(self, alpha: Node) -> None:
        await alpha.claimed("sweeper", claim="one")
        result = await alpha.names.claim(await alpha.request("sweeper", claim="two"), await alpha.bidder())
        assert isinstance(result, Taken)

    async def test_a_claim_that_arrives_after_its_release_does_nothing(
        self, alpha: Node, store: MemoryStore
    ) -> None:
        request, by = await alpha.request("sweeper"), await alpha.bidder()
        store.lose_reply(LostReply.LATER)
        with pytest.raises(StoreAmbiguous):
            await alpha.names.claim(request, by)
        claimed = await alpha.names.claim(request, by)
        assert isinstance(claimed, Claimed)
        await alpha.names.release("sweeper", claimed.epoch, "done")
        store.deliver_delayed()
        assert await alpha.names.read_owner("sweeper") is None

    @pytest.mark.parametrize("fate", [LostReply.DONE, LostReply.NOT_DONE])
    async def test_a_repeated_release_ends_released_once(
        self, alpha: Node, store: MemoryStore, fate: LostReply
    ) -> None:
        claimed = await alpha.claimed("sweeper")
        store.lose_reply(fate)
        with pytest.raises(StoreAmbiguous):
            await alpha.names.release("sweeper", claimed.epoch, "gave up", penalise_host="alpha")
        again = await alpha.names.release("sweeper", claimed.epoch, "gave up", penalise_host="alpha")
        assert again == Released("sweeper", claimed.epoch)
        kv = await store.get(PREFIX + "placement/sweeper")
        assert kv is not None
        assert decode_placement("sweeper", kv).penalties == {"alpha": 1}

    async def test_a_status_that_arrives_late_does_not_replace_a_newer_one(
        self, alpha: Node, store: MemoryStore
    ) -> None:
        claimed = await alpha.claimed("sweeper")
        store.lose_reply(LostReply.LATER)
        with pytest.raises(StoreAmbiguous):
            await alpha.names.put_status(
                alpha.status("sweeper", claimed.epoch, WorkerState.STARTING), alpha.lease
            )
        await alpha.names.put_status(alpha.status("sweeper", claimed.epoch), alpha.lease)
        store.deliver_delayed()
        kv = await store.get(PREFIX + "status/sweeper")
        assert kv is not None
        assert decode_status("sweeper", kv).state is WorkerState.READY

    async def test_a_release_that_arrives_late_spares_the_next_owner(
        self, alpha: Node, beta: Node, store: MemoryStore
    ) -> None:
        first = await alpha.claimed("sweeper")
        store.lose_reply(LostReply.LATER)
        with pytest.raises(StoreAmbiguous):
            await alpha.names.release("sweeper", first.epoch, "gave up")
        store.end_lease(alpha.lease)
        second = await beta.claimed("sweeper")
        store.deliver_delayed()
        owner = await beta.names.read_owner("sweeper")
        assert owner is not None
        assert owner.epoch == second.epoch


class TestReleases:
    async def test_a_release_frees_the_name_and_says_why(self, alpha: Node, store: MemoryStore) -> None:
        claimed = await alpha.claimed("sweeper")
        await alpha.names.put_status(alpha.status("sweeper", claimed.epoch), alpha.lease)
        released = await alpha.names.release("sweeper", claimed.epoch, "host drained")
        assert released == Released("sweeper", claimed.epoch)
        assert await alpha.names.read_owner("sweeper") is None
        assert await store.get(PREFIX + "status/sweeper") is None
        kv = await store.get(PREFIX + "placement/sweeper")
        assert kv is not None
        record = decode_placement("sweeper", kv)
        assert (record.last_epoch, record.last_node, record.reason) == (
            claimed.epoch,
            "alpha-1",
            "host drained",
        )
        assert (record.failures, record.penalties, record.at) == (0, {}, 1234.5)

    async def test_penalties_are_counted_per_host_and_failures_in_a_row(
        self, alpha: Node, beta: Node, store: MemoryStore
    ) -> None:
        async def give_up(node: Node, penalise: str | None) -> tuple[int, dict[str, int]]:
            claimed = await node.claimed("sweeper")
            await node.names.release("sweeper", claimed.epoch, "x", penalise_host=penalise)
            kv = await store.get(PREFIX + "placement/sweeper")
            assert kv is not None
            record = decode_placement("sweeper", kv)
            return record.failures, dict(record.penalties)

        assert await give_up(alpha, "alpha") == (1, {"alpha": 1})
        assert await give_up(beta, "beta") == (2, {"alpha": 1, "beta": 1})
        assert await give_up(alpha, "alpha") == (3, {"alpha": 2, "beta": 1})
        assert await give_up(beta, None) == (0, {"alpha": 2, "beta": 1})

    async def test_the_next_owner_has_a_larger_epoch(self, alpha: Node, beta: Node) -> None:
        first = await alpha.claimed("sweeper")
        await alpha.names.release("sweeper", first.epoch, "moved")
        second = await beta.claimed("sweeper")
        assert second.epoch > first.epoch

    async def test_an_ex_owner_cannot_release_its_successor(self, alpha: Node, beta: Node) -> None:
        first = await alpha.claimed("sweeper")
        await alpha.names.release("sweeper", first.epoch, "moved")
        second = await beta.claimed("sweeper")
        result = await alpha.names.release("sweeper", first.epoch, "again")
        assert isinstance(result, NotOwner)
        assert result.owner is not None
        assert result.owner.epoch == second.epoch
        assert await beta.names.read_owner("sweeper") == result.owner

    async def test_the_same_revision_of_another_history_is_not_the_same_epoch(
        self, alpha: Node, store: MemoryStore
    ) -> None:
        store.put(PREFIX + "incarnation", b"1")
        claimed = await alpha.claimed("sweeper")
        result = await alpha.names.release("sweeper", revision_of(claimed.epoch), "from before the restore")
        assert isinstance(result, NotOwner)

    async def test_a_name_that_disappeared_cannot_be_released(self, alpha: Node, store: MemoryStore) -> None:
        claimed = await alpha.claimed("sweeper")
        store.delete(PREFIX + "names/sweeper")
        assert await alpha.names.release("sweeper", claimed.epoch, "x") == NotOwner("sweeper", None)
        assert await store.get(PREFIX + "placement/sweeper") is None

    async def test_a_placement_record_that_changes_meanwhile_is_kept(
        self, alpha: Node, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        claimed = await alpha.claimed("sweeper")
        plain, meddled = store.apply, iter([True])

        def meddle(txn: Txn) -> object:
            if any(isinstance(op, Put) for op in txn.then) and next(meddled, False):
                store.put(PREFIX + "placement/sweeper", b'{"penalties": {"beta": 5}}')
            return plain(txn)

        monkeypatch.setattr(store, "apply", lambda txn: plain(txn) if _is_meddling(txn) else meddle(txn))
        await alpha.names.release("sweeper", claimed.epoch, "x", penalise_host="alpha")
        kv = await store.get(PREFIX + "placement/sweeper")
        assert kv is not None
        assert decode_placement("sweeper", kv).penalties == {"alpha": 1, "beta": 5}

    async def test_a_record_that_never_stops_changing_is_given_up(
        self, alpha: Node, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        claimed = await alpha.claimed("sweeper")
        plain = store.apply

        def meddle(txn: Txn) -> object:
            if txn.compare:
                plain(Txn(then=(Put(PREFIX + "placement/sweeper", b"{}"),)))
                plain(Txn(then=(Put(PREFIX + "status/sweeper", b"{}"),)))
            return plain(txn)

        monkeypatch.setattr(store, "apply", meddle)
        with pytest.raises(StoreUnavailable, match="changed 16 times"):
            await alpha.names.release("sweeper", claimed.epoch, "x")
        with pytest.raises(StoreUnavailable, match="changed 16 times"):
            await alpha.names.put_status(alpha.status("sweeper", claimed.epoch), alpha.lease)

    async def test_an_owner_key_of_an_impossible_incarnation_is_unreadable(
        self, alpha: Node, store: MemoryStore
    ) -> None:
        value = encode_owner(node="alpha-1", host="alpha", claim="c", incarnation=1 << 15)
        store.put(PREFIX + "names/sweeper", value, alpha.lease)
        assert await alpha.names.read_owner("sweeper") is None
        assert await alpha.names.owned_by("alpha-1") == []

    async def test_an_unreadable_placement_record_is_replaced(self, alpha: Node, store: MemoryStore) -> None:
        store.put(PREFIX + "placement/sweeper", b"[]")
        claimed = await alpha.claimed("sweeper")
        await alpha.names.release("sweeper", claimed.epoch, "x")
        kv = await store.get(PREFIX + "placement/sweeper")
        assert kv is not None
        assert decode_placement("sweeper", kv).last_epoch == claimed.epoch


def _is_meddling(txn: Txn) -> bool:
    return not txn.compare and len(txn.then) == 1


class TestStatuses:
    async def test_a_status_comes_back_as_it_was_written(self, alpha: Node, store: MemoryStore) -> None:
        claimed = await alpha.claimed("sweeper")
        status = Status(
            name="sweeper",
            epoch=claimed.epoch,
            start=2,
            state=WorkerState.READY,
            pid=4711,
            since=99.5,
            methods=(Method("sweep", "call", "sweep(table: str) -> int", "Sweep a table."),),
            metadata={"tables": 3, "deep": {"x": [1, None]}},
        )
        written = await alpha.names.put_status(status, alpha.lease)
        kv = await store.get(PREFIX + "status/sweeper")
        assert kv is not None
        assert isinstance(written, Written)
        assert kv.mod_revision == written.mod_revision
        assert kv.lease == alpha.lease
        decoded = decode_status("sweeper", kv)
        assert decoded.methods == status.methods
        assert decoded.metadata == status.metadata
        assert (decoded.start, decoded.pid, decoded.since) == (2, 4711, 99.5)

    async def test_knowing_the_revision_saves_a_round_trip(self, alpha: Node, store: MemoryStore) -> None:
        claimed = await alpha.claimed("sweeper")
        first = await alpha.names.put_status(alpha.status("sweeper", claimed.epoch), alpha.lease)
        assert isinstance(first, Written)
        before = store.calls
        await alpha.names.put_status(
            alpha.status("sweeper", claimed.epoch), alpha.lease, seen=first.mod_revision
        )
        assert store.calls == before + 1

    async def test_not_knowing_the_revision_costs_one(self, alpha: Node, store: MemoryStore) -> None:
        claimed = await alpha.claimed("sweeper")
        await alpha.names.put_status(
            alpha.status("sweeper", claimed.epoch, WorkerState.STARTING), alpha.lease
        )
        before = store.calls
        written = await alpha.names.put_status(alpha.status("sweeper", claimed.epoch), alpha.lease)
        assert written == Written(store.revision)
        assert store.calls == before + 2

    async def test_an_ex_owner_writes_no_status(self, alpha: Node, beta: Node, store: MemoryStore) -> None:
        first = await alpha.claimed("sweeper")
        await alpha.names.release("sweeper", first.epoch, "moved")
        alone = await alpha.names.put_status(alpha.status("sweeper", first.epoch), alpha.lease)
        assert alone == NotOwner("sweeper", None)
        await beta.claimed("sweeper")
        result = await alpha.names.put_status(alpha.status("sweeper", first.epoch), alpha.lease)
        assert isinstance(result, NotOwner)
        assert await store.get(PREFIX + "status/sweeper") is None

    async def test_an_earlier_epoch_of_the_same_node_is_not_the_owner(self, alpha: Node) -> None:
        first = await alpha.claimed("sweeper", claim="one")
        await alpha.names.release("sweeper", first.epoch, "x")
        second = await alpha.claimed("sweeper", claim="two")
        result = await alpha.names.put_status(alpha.status("sweeper", first.epoch), alpha.lease)
        assert isinstance(result, NotOwner)
        assert result.owner is not None
        assert result.owner.epoch == second.epoch

    async def test_the_right_epoch_under_another_lease_is_not_the_owner(
        self, alpha: Node, beta: Node
    ) -> None:
        claimed = await alpha.claimed("sweeper")
        result = await beta.names.put_status(beta.status("sweeper", claimed.epoch), beta.lease)
        assert isinstance(result, NotOwner)

    async def test_a_dead_lease_is_said_to_be_dead(self, alpha: Node, store: MemoryStore) -> None:
        claimed = await alpha.claimed("sweeper")
        store.end_lease(alpha.lease)
        store.put(PREFIX + "names/other", b"")
        with pytest.raises(LeaseNotFound):
            store.apply(Txn(then=(Put("x", b"", alpha.lease),)))
        result = await alpha.names.put_status(alpha.status("sweeper", claimed.epoch), alpha.lease)
        assert result == NotOwner("sweeper", None)

    async def test_too_much_metadata_is_refused_with_the_limit(self, alpha: Node) -> None:
        claimed = await alpha.claimed("sweeper")
        status = Status(
            name="sweeper", epoch=claimed.epoch, start=1, state=WorkerState.READY, pid=1, since=0.0,
            metadata={"x": "y" * 20_000},
        )  # fmt: skip
        with pytest.raises(Invalid, match="at most 16384 are kept"):
            await alpha.names.put_status(status, alpha.lease)
