"""Which names this node should take, and when: decided from the directory, carried out in etcd.

Every agent computes the same order of hosts for an ownerless name (:mod:`registry.placement`); the first
claims at once, the others a little later each, and the claim's transaction decides.  An owner that vanished
without a release may still be alive (a stale etcd leader can revoke live leases, etcd issue 15247), so before
such a name is claimed its last owner's agent is asked, and silence counts only after that node's own lease
must have ended.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

from node_agent.states import Ownership
from node_agent.wishes import Wish, Wishes
from registry import events
from registry.clock import Boottime, Clock
from registry.directory import Change, Directory
from registry.errors import StoreAmbiguous, StoreError
from registry.names import Bidder, Claimed, ClaimRequest, ClaimResult, Names, Refusal, Taken
from registry.ownership import PAUSE, Owner, PlacementRecord
from registry.placement import Candidate, explain, rank
from registry.specs import SpecRecord

STAGGER = 0.3
"""Seconds by which each further host of the order waits longer."""
RETRY = 0.25
"""Seconds after a claim that etcd did not answer or that was refused as out of date."""
RESCHEDULE_BASE = 30.0
RESCHEDULE_CAP = 3600.0
"""When every host has given a name up it waits 30 s, doubled with each further round up to 1 h."""


@dataclass(frozen=True, slots=True)
class Loss:
    """An owner that disappeared, and when this agent saw it."""

    owner: Owner
    at: Boottime
    clean: bool


@dataclass(frozen=True, slots=True)
class Due:
    """This node may claim ``name`` at ``at``; ``why`` is for people."""

    name: str
    at: Boottime
    why: str


@dataclass(frozen=True, slots=True)
class NotHere:
    """This node is not to claim ``name``, and why."""

    name: str
    why: str


def decide(
    wish: Wish,
    host: str,
    candidates: Collection[Candidate],
    penalties: Mapping[str, int],
    since: Boottime,
    loss: Loss | None,
) -> Due | NotHere:
    """Decide when this host may claim an ownerless name that was first seen so at ``since``."""
    name = wish.name
    if not wish.running:
        return NotHere(name, f"stopped by {wish.record.who}")
    if wish.spec is None or wish.problem:
        return NotHere(name, wish.problem)
    order = rank(name, wish.spec.constraints, candidates, penalties)
    if host not in order:
        verdicts = explain(name, wish.spec.constraints, candidates, penalties)
        return NotHere(name, next((v.why for v in verdicts if v.host == host), "this host is not ready"))
    place = order.index(host)
    at = since + place * STAGGER
    why = (
        "first choice"
        if place == 0
        else f"choice {place + 1} of {len(order)}, after {', '.join(order[:place])}"
    )
    if loss is not None and not loss.clean and wish.spec.lock_delay:
        at += wish.spec.lock_delay
        why += f", lock_delay {wish.spec.lock_delay:g} s"
    if penalty := penalties.get(order[0], 0):
        # The least penalised has one: no host is left on which it was not given up.
        wait = min(RESCHEDULE_BASE * 2 ** (penalty - 1), RESCHEDULE_CAP)
        at += wait
        why += f", was given up on every host, on {order[0]} {penalty} times: {wait:g} s"
    return Due(name, at, why)


class Claims:
    """Claims names for one node, for as long as its session lives.

    ``granted(wish, ownership)`` is called for each name won.  ``confirm(owner)`` asks the last owner's agent
    to make sure that it does not run the name any more; False means that it could not be asked.
    """

    def __init__(
        self,
        *,
        host: str,
        node: str,
        lease: int,
        directory: Directory,
        names: Names,
        wishes: Wishes,
        clock: Clock,
        emit: Callable[[events.Event], None],
        held: Callable[[str], bool],
        granted: Callable[[Wish, Ownership], None],
        confirm: Callable[[Owner], Awaitable[bool]],
        silent_until: Callable[[Owner], Boottime],
    ) -> None:
        self._host, self._node, self._lease = host, node, lease
        self._directory, self._names, self._wishes = directory, names, wishes
        self._clock, self._emit = clock, emit
        self._held, self._granted = held, granted
        self._confirm, self._silent_until = confirm, silent_until
        self._since: dict[str, Boottime] = {}
        self._losses: dict[str, Loss] = {}
        self._not_before: dict[str, Boottime] = {}
        self._wake = asyncio.Event()
        self.pending: set[str] = set()
        self._answered = asyncio.Event()
        self.verdicts: dict[str, Due | NotHere] = {}

    async def run(self) -> None:
        """Claim what is due, until cancelled."""
        unsubscribe = self._directory.subscribe(self._changed)
        try:
            while True:
                while not self._directory.in_sync:
                    # What it has told meanwhile is looked at then: that it is in sync again is no change.
                    await self._directory.synced()
                self._wake.clear()
                now = self._clock.now()
                self.verdicts = self._verdicts(now)
                due = [v for v in self.verdicts.values() if isinstance(v, Due) and v.at <= now]
                if due:
                    await self._claim(due)
                    continue
                later = [v.at for v in self.verdicts.values() if isinstance(v, Due)]
                await self._sleep(min(later, default=None))
        finally:
            unsubscribe()

    def look_again(self) -> None:
        """A name that was held here is not any more."""
        self._wake.set()

    async def answered(self, name: str) -> None:
        """Return when no claim of that name is under way, and what was won has been granted."""
        while name in self.pending:
            await self._answered.wait()

    def _changed(self, change: Change) -> None:
        if change.section == "owners" and change.before is not None and change.after is None:
            owner = change.before
            assert isinstance(owner, Owner)
            record = self._directory.placements.get(owner.name)
            clean = record is not None and record.last_epoch == owner.epoch
            self._losses[owner.name] = Loss(owner, self._clock.now(), clean)
        if change.section != "statuses":
            self._wake.set()

    async def _sleep(self, until: Boottime | None) -> None:
        if until is None:
            await self._wake.wait()
            return
        try:
            async with asyncio.timeout(max(until - self._clock.now(), 0.0)):
                await self._wake.wait()
        except TimeoutError:
            return

    def _verdicts(self, now: Boottime) -> dict[str, Due | NotHere]:
        directory = self._directory
        self._wishes.settle(directory.specs)
        unowned = [n for n in directory.specs if directory.lookup(n) is None and not self._held(n)]
        for name in [name for name in self._since if directory.lookup(name) is not None]:
            del self._since[name]
            self._losses.pop(name, None)
        candidates = candidates_of(directory) if unowned else ()
        verdicts: dict[str, Due | NotHere] = {}
        for name in unowned:
            if directory.pause_revision:
                verdicts[name] = NotHere(name, f"claims are paused: etcd has the key {PAUSE}")
                continue
            record = directory.placements.get(name)
            verdict = decide(
                self._wishes.read(directory.specs[name]),
                self._host,
                candidates,
                penalties_of(record, directory.specs[name]),
                self._since.setdefault(name, now),
                self._losses.get(name),
            )
            if isinstance(verdict, Due) and verdict.at < (hold := self._not_before.get(name, 0.0)):
                verdict = Due(name, hold, verdict.why)
            verdicts[name] = verdict
        return verdicts

    async def _claim(self, due: list[Due]) -> None:
        # Wish and placement as the decision was made on: asking about the last owner takes a moment, in
        # which they may change, and etcd refuses the claim then.
        wanted = {item.name: self._directory.specs[item.name] for item in due}
        requests = [self._request(wanted[item.name]) for item in due]
        sure = await asyncio.gather(*(self._is_gone(item.name) for item in due))
        batch = [both for both, gone in zip(zip(due, requests, strict=True), sure, strict=True) if gone]
        if not batch:
            return
        names = {item.name for item, _ in batch}
        self.pending |= names
        self._answered.clear()
        try:
            answers = await self._ask([request for _, request in batch])
        except StoreError as error:
            for name in names:
                self._hold(name, f"etcd did not answer: {error}")
            return
        finally:
            self.pending -= names
            # Whoever waits goes on in the loop's next turn; what was won is granted in this one.
            self._answered.set()
        unwanted: list[Claimed] = []
        for (item, _), answer in zip(batch, answers, strict=True):
            match answer:
                case Claimed() if self._held(item.name):
                    unwanted.append(answer)
                case Claimed():
                    self._emit(
                        events.NameClaimed(name=item.name, node=self._node, epoch=answer.epoch, why=item.why)
                    )
                    ownership = Ownership(item.name, answer.epoch, answer.claim, self._node, self._lease)
                    self._granted(self._wishes.read(wanted[item.name]), ownership)
                case Taken():
                    self._emit(events.ClaimLost(name=item.name, why=f"{answer.owner.host} was quicker"))
                    self._hold(item.name, "")
                case Refusal():
                    self._hold(item.name, answer.why.value)
        for claimed in unwanted:
            # This host began to leave while it claimed.  If the release fails, the end of the lease does it.
            with suppress(StoreError):
                await self._names.release(claimed.name, claimed.epoch, f"{self._host} does not take it")

    async def _ask(self, requests: list[ClaimRequest]) -> list[ClaimResult]:
        """Claim; a claim that may have been committed is repeated once, for a repetition tells which."""
        bidder = self._bidder()
        try:
            return await self._names.claim_many(requests, bidder)
        except StoreAmbiguous:
            return await self._names.claim_many(requests, bidder)

    def _request(self, wish: SpecRecord) -> ClaimRequest:
        placement = self._directory.placements.get(wish.name)
        return ClaimRequest(
            name=wish.name,
            claim=uuid.uuid4().hex,
            spec_revision=wish.mod_revision,
            placement_revision=placement.mod_revision if placement else 0,
        )

    def _bidder(self) -> Bidder:
        return Bidder(
            node=self._node,
            host=self._host,
            lease=self._lease,
            incarnation=self._directory.incarnation,
            pause_revision=self._directory.pause_revision,
        )

    def _hold(self, name: str, why: str) -> None:
        self._not_before[name] = self._clock.now() + RETRY
        if why:
            self._emit(events.ClaimLost(name=name, why=why))

    async def _is_gone(self, name: str) -> bool:
        """Make sure that an owner which vanished without a release is not alive."""
        loss = self._losses.get(name)
        if loss is None or loss.clean or loss.owner.node == self._node:
            return True
        if await self._confirm(loss.owner):
            return True
        until = self._silent_until(loss.owner)
        if until <= self._clock.now():
            return True
        self._not_before[name] = until
        self._emit(
            events.ClaimLost(
                name=name,
                why=f"waiting {until - self._clock.now():.1f} s for {loss.owner.host} to fall silent",
            )
        )
        return False


def penalties_of(placed: PlacementRecord | None, wish: SpecRecord) -> Mapping[str, int]:
    """Return how often each host gave the name up; none when the wish has changed since the last release."""
    return {} if placed is None or placed.mod_revision < wish.mod_revision else placed.penalties


def candidates_of(directory: Directory) -> tuple[Candidate, ...]:
    """Return the hosts that are up and ready, with their present load."""
    load: dict[str, int] = {}
    for owner in directory.owners.values():
        load[owner.node] = load.get(owner.node, 0) + 1
    return tuple(
        Candidate(
            host=node.host,
            node=node.node,
            labels=node.labels,
            databases=frozenset(node.databases),
            draining=bool((found := directory.hosts.get(node.host)) and found.drain),
            names=load.get(node.node, 0),
        )
        for node in directory.nodes.values()
        if node.state == "ready"
    )
