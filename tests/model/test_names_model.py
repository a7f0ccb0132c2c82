"""Random histories of claims, releases, expiries and lost replies against a plain model.

The model is a dictionary of owners.  Whatever happens, the store may move from one of its states to the next
only by a legal step: a free name gets an owner with a larger epoch than ever before, an owned name loses its
owner by its own release or the end of its lease, and a status is there only while its writer owns the name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from registry.errors import LeaseNotFound, StoreAmbiguous
from registry.names import (
    Bidder,
    Claimed,
    ClaimRequest,
    Incarnation,
    Names,
    NotOwner,
    Owner,
    Refusal,
    Released,
    Status,
    Taken,
    Why,
    WorkerState,
    Written,
)
from registry.ownership import (
    cluster_prefix,
    decode_incarnation,
    decode_owner,
    decode_placement,
    decode_status,
)
from tests.support.clocks import ManualClock
from tests.support.memory_store import LostReply, MemoryStore

pytestmark = pytest.mark.slow

T = TypeVar("T")

PREFIX = cluster_prefix("model")
NAMES = ("app/sweeper", "janitor", "pool@alpha")
HOSTS = ("alpha", "beta", "gamma")
TTL = 20.0

names = st.sampled_from(NAMES)
hosts = st.sampled_from(HOSTS)
mostly = st.sampled_from((True, True, False))


class Host:
    """A host of the model: its present node, the registry as it last saw it, and what it believes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.life = 0
        self.lease = 0
        self.by = Bidder(node="", host=name, lease=0, incarnation=Incarnation())
        self.seen: dict[str, tuple[int, int]] = {}
        self.unanswered: list[ClaimRequest] = []
        self.owns: dict[str, int] = {}
        self.epochs: list[tuple[str, int]] = []

    @property
    def node(self) -> str:
        return f"{self.name}-{self.life}"


class NamesMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = ManualClock()
        self.store = MemoryStore(self.clock)
        self.names = Names(self.store, PREFIX, wall=lambda: 0.0)
        self.hosts = {name: Host(name) for name in HOSTS}
        self.owners: dict[str, Owner] = {}
        self.highest = dict.fromkeys(NAMES, 0)
        self.released: set[int] = set()
        self.claims = 0

    def teardown(self) -> None:
        self.runner.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def alive(self, host: Host) -> bool:
        return self.store.is_alive(host.lease)

    def revision(self, key: str) -> int:
        kv = self.run(self.store.get(PREFIX + key))
        return kv.mod_revision if kv else 0

    @initialize()
    def begin(self) -> None:
        for host in self.hosts.values():
            self.join(host)
        for name, host in zip(NAMES, self.hosts.values(), strict=True):
            self.claim(host.name, {name}, True)

    # What happens around the names.

    @rule(host=hosts, what=st.sampled_from(("joins", "looks", "keeps alive", "loses its lease")))
    def host(self, host: str, what: str) -> None:
        each = self.hosts[host]
        match what:
            case "joins":
                self.join(each)
            case "looks":
                self.look(each)
            case "keeps alive" if self.alive(each):
                self.run(self.store.keepalive(each.lease, timeout=1.0))
            case "loses its lease":  # as a stale leader of etcd might end it
                self.store.end_lease(each.lease)
            case _:
                pass

    def join(self, each: Host) -> None:
        """A new life of the host: a new node under a new lease; what it believed is void."""
        each.life += 1
        each.lease = self.run(self.store.grant(TTL)).id
        each.owns, each.unanswered = {}, []
        self.store.put(f"{PREFIX}nodes/{each.node}", b"{}", each.lease)
        self.look(each)

    def look(self, each: Host) -> None:
        """The host's directory catches up."""
        each.seen = {
            name: (self.revision(f"specs/{name}"), self.revision(f"placement/{name}")) for name in NAMES
        }
        each.by = Bidder(
            node=each.node,
            host=each.name,
            lease=each.lease,
            incarnation=decode_incarnation(self.run(self.store.get(PREFIX + "incarnation"))),
            pause_revision=self.revision("control/pause"),
        )

    @rule(seconds=st.sampled_from((1.0, 7.0)))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.store.expire()

    @rule(what=st.sampled_from((*(f"specs/{name}" for name in NAMES), "control/pause", "incarnation")))
    def facts_change(self, what: str) -> None:
        kv = self.run(self.store.get(PREFIX + "incarnation"))
        self.store.put(PREFIX + what, str(decode_incarnation(kv).number + 1).encode())

    @rule(fate=st.sampled_from(LostReply))
    def the_next_reply_gets_lost(self, fate: LostReply) -> None:
        self.store.lose_reply(fate)

    # What the nodes do.

    @rule(host=hosts, wanted=st.sets(names, min_size=1), informed=mostly)
    def claim(self, host: str, wanted: set[str], informed: bool) -> None:
        each = self.hosts[host]
        self.claims += 1
        if informed:
            self.look(each)
        requests = [
            ClaimRequest(
                name=name,
                claim=f"{each.node}:{self.claims}",
                spec_revision=each.seen[name][0],
                placement_revision=each.seen[name][1],
            )
            for name in sorted(wanted)
        ]
        self._bid(each, requests)

    @precondition(lambda self: any(host.unanswered for host in self.hosts.values()))
    @rule(data=st.data())
    def claim_again(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from([host for host in self.hosts.values() if host.unanswered]))
        self._bid(each, each.unanswered)

    def _bid(self, each: Host, requests: list[ClaimRequest]) -> None:
        expected = [self._expected(each, request) for request in requests]
        try:
            results = self.run(self.names.claim_many(requests, each.by))
        except StoreAmbiguous:
            each.unanswered = requests
            return
        except LeaseNotFound:
            assert not self.alive(each)
            return
        each.unanswered = []
        for request, result, foreseen in zip(requests, results, expected, strict=True):
            if isinstance(result, Claimed):
                assert foreseen == "claimed"
                each.owns[request.name] = result.epoch
                each.epochs.append((request.name, result.epoch))
            elif isinstance(result, Taken):
                assert foreseen == result.owner
            else:
                assert isinstance(result, Refusal)
                assert foreseen is result.why

    def _expected(self, each: Host, request: ClaimRequest) -> str | Owner | Why:
        """Say what the model thinks of a claim that is answered."""
        if owner := self.owners.get(request.name):
            return "claimed" if owner.claim == request.claim else owner
        if not self.alive(each) or each.by.node != each.node:
            return Why.NODE_GONE
        if each.by.incarnation.mod_revision != self.revision("incarnation"):
            return Why.INCARNATION_CHANGED
        if each.by.pause_revision != self.revision("control/pause"):
            return Why.PAUSE_CHANGED
        if request.spec_revision != self.revision(f"specs/{request.name}"):
            return Why.SPEC_CHANGED
        if request.placement_revision != self.revision(f"placement/{request.name}"):
            return Why.PLACEMENT_CHANGED
        return "claimed"

    @precondition(lambda self: any(host.epochs for host in self.hosts.values()))
    @rule(data=st.data(), penalise=st.booleans())
    def release(self, data: st.DataObject, penalise: bool) -> None:
        """A host gives up what it owns, or what it owned once."""
        each = data.draw(st.sampled_from([host for host in self.hosts.values() if host.epochs]))
        name, epoch = data.draw(st.sampled_from(each.epochs))
        each.owns = {k: v for k, v in each.owns.items() if (k, v) != (name, epoch)}
        owner = self.owners.get(name)
        owns = owner is not None and owner.epoch == epoch
        if owns:
            self.released.add(epoch)
        try:
            result = self.run(
                self.names.release(name, epoch, "given up", penalise_host=each.name if penalise else None)
            )
        except StoreAmbiguous:
            return
        if owns:
            assert result == Released(name, epoch)
            kv = self.run(self.store.get(f"{PREFIX}placement/{name}"))
            assert kv is not None
            assert decode_placement(name, kv).last_epoch == epoch
        elif isinstance(result, NotOwner):
            assert result.owner == owner
        else:
            assert owner is None
            assert epoch in self.released

    @precondition(lambda self: any(host.epochs for host in self.hosts.values()))
    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        """A host reports on what it owns, or on what it owned once."""
        each = data.draw(st.sampled_from([host for host in self.hosts.values() if host.epochs]))
        name, epoch = data.draw(st.sampled_from(each.epochs))
        status = Status(name=name, epoch=epoch, start=1, state=WorkerState.READY, pid=1, since=0.0)
        try:
            result = self.run(self.names.put_status(status, each.lease))
        except StoreAmbiguous:
            return
        owner = self.owners.get(name)
        owns = owner is not None and owner.epoch == epoch and owner.lease == each.lease
        assert isinstance(result, Written if owns else NotOwner)

    @rule()
    def late_writes_arrive(self) -> None:
        try:
            self.store.deliver_delayed()
        except LeaseNotFound:
            return

    # What must hold.

    @invariant()
    def every_step_of_an_owner_key_is_legal(self) -> None:
        snapshot = self.run(self.store.snapshot(PREFIX + "names/"))
        present = {}
        for kv in snapshot.kvs:
            name = kv.key.removeprefix(PREFIX + "names/")
            present[name] = decode_owner(name, kv)
        for name, before in self.owners.items():
            after = present.get(name)
            if after is None or after.epoch != before.epoch:
                assert before.epoch in self.released or not self.store.is_alive(before.lease)
        for name, owner in present.items():
            assert self.store.is_alive(owner.lease)
            if owner != self.owners.get(name):
                assert owner.epoch > self.highest[name]
                self.highest[name] = owner.epoch
        self.owners = present

    @invariant()
    def nobody_else_believes_to_own_it(self) -> None:
        for name in NAMES:
            believers = [h for h in self.hosts.values() if self.alive(h) and name in h.owns]
            assert len(believers) <= 1
            for host in believers:
                assert self.owners[name].epoch == host.owns[name]
                assert self.owners[name].node == host.node

    @invariant()
    def a_status_is_its_owners(self) -> None:
        for kv in self.run(self.store.snapshot(PREFIX + "status/")).kvs:
            name = kv.key.removeprefix(PREFIX + "status/")
            assert decode_status(name, kv).epoch == self.owners[name].epoch
            assert kv.lease == self.owners[name].lease


TestNames = NamesMachine.TestCase
TestNames.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
