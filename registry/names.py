"""Global names: how they are written, and how one is claimed, released and reported on.

Ownership is decided by one etcd transaction, never by who asked first or who has the better clock.  The texts
of transactions and the reading of their results are pure functions; :class:`Names` only sends them.

A write that raised StoreAmbiguous may be repeated with the same arguments: a claim recognises its earlier
success by the claim id in the owner key, a release by the epoch in the placement record, and a status that
was overtaken cannot land late because it compares the status it replaces.
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from registry.claiming import (
    CLAIMS_PER_TXN,
    Bidder,
    Claimed,
    ClaimRequest,
    ClaimResult,
    Refusal,
    Taken,
    Why,
    claim_results,
    claim_txn,
    single,
)
from registry.errors import Invalid, StoreUnavailable
from registry.ownership import (
    OWNERS,
    PLACEMENTS,
    STATUSES,
    Incarnation,
    Method,
    Owner,
    PlacementRecord,
    Status,
    WorkerState,
    after_release,
    decode_owner,
    decode_placement,
    encode_placement,
    encode_status,
    epoch_of,
    incarnation_of,
    revision_of,
)
from registry.records import Malformed
from registry.store import (
    Compare,
    Delete,
    Get,
    KeyValue,
    LeaseId,
    Op,
    Put,
    Revision,
    Store,
    unchanged,
)

__all__ = [
    "Bidder",
    "ClaimRequest",
    "ClaimResult",
    "Claimed",
    "Incarnation",
    "Method",
    "Names",
    "NotOwner",
    "Owned",
    "Owner",
    "PlacementRecord",
    "Refusal",
    "Released",
    "Status",
    "Taken",
    "Why",
    "WorkerState",
    "Written",
    "did_you_mean",
    "epoch_of",
    "incarnation_of",
    "revision_of",
    "validate",
    "validate_part",
]

PART_LIMIT = 63
_FIRST = re.compile(r"[a-z0-9]")
_REST = re.compile(r"[a-z0-9._-]")
_RULE = "a name is [scope/]name or name@host, each part of a-z 0-9 . _ - starting with a letter or digit"

_ATTEMPTS = 16


def validate(name: str) -> str:
    """Return ``name`` if it is one: ``[scope/]name``, or ``[scope/]name@host`` for one instance of many.

    Raises Invalid, naming the value, what is wrong with it and the rule.
    """
    scoped, at, host = name.partition("@")
    parts = scoped.split("/")
    if len(parts) > 2:
        raise _invalid(name, "it has more than one '/'")
    for part in (*parts, host) if at else parts:
        _check_part(name, part)
    return name


def validate_part(part: str) -> str:
    """Return ``part`` if it can be one part of a name (a scope, a bare name, a host); raises Invalid."""
    _check_part(part, part)
    return part


def _check_part(name: str, part: str) -> None:
    if not part:
        raise _invalid(name, "a part of it is empty")
    if not _FIRST.match(part):
        raise _invalid(name, f"{part[0]!r} cannot begin a part")
    for character in part:
        if not _REST.match(character):
            raise _invalid(name, f"{character!r} is not allowed")
    if len(part) > PART_LIMIT:
        raise _invalid(name, f"{part[:12]}… has {len(part)} characters, at most {PART_LIMIT} are allowed")


def _invalid(name: str, problem: str) -> Invalid:
    shown = name if len(name) <= 200 else name[:200] + "…"
    return Invalid(f"not a name: {shown!r}: {problem}", hint=_RULE, details={"name": shown})


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for the candidate that looks most like ``name``, or nothing."""
    known = list(candidates)
    bare = name.partition("@")[0]
    close = [bare] if bare in known else difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True, slots=True)
class Released:
    """The name has no owner any more, by this release or an earlier attempt of it."""

    name: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Written:
    """The status is written; ``mod_revision`` is what the next one replaces."""

    mod_revision: Revision


class Owned(NamedTuple):
    """A name a node owns."""

    name: str
    epoch: int
    claim: str


@dataclass(frozen=True, slots=True)
class NotOwner:
    """Nothing was written: the name belongs to ``owner``, or to nobody."""

    name: str
    owner: Owner | None


class Names:
    """The owner keys of one cluster.  ``prefix`` is :func:`registry.ownership.cluster_prefix`.

    ``wall`` gives Unix seconds for people to read; nothing is decided by it.
    """

    def __init__(self, store: Store, prefix: str, *, wall: Callable[[], float] = time.time) -> None:
        self._store = store
        self._prefix = prefix
        self._wall = wall

    async def claim_many(
        self, requests: Sequence[ClaimRequest], by: Bidder, *, timeout: float = 5.0
    ) -> list[ClaimResult]:
        """Claim each name that is free, up to 64 in one transaction; one result for each request, in order.

        ``timeout`` bounds each transaction.  Raises LeaseNotFound, StoreUnavailable, StoreAmbiguous: some of
        the names may be claimed then, and repeating the same requests tells which.
        """
        if len({request.name for request in requests}) != len(requests):
            raise ValueError("a name is requested twice")
        results: list[ClaimResult] = []
        for first in range(0, len(requests), CLAIMS_PER_TXN):
            chunk = requests[first : first + CLAIMS_PER_TXN]
            txn = claim_txn(self._prefix, by, chunk)
            result = await self._store.txn(txn.compare, txn.then, txn.otherwise, timeout=timeout)
            results += claim_results(by, chunk, result)
        return results

    async def claim(self, request: ClaimRequest, by: Bidder, *, timeout: float = 5.0) -> ClaimResult:
        """Claim one name; see :meth:`claim_many`."""
        return (await self.claim_many((request,), by, timeout=timeout))[0]

    async def release(
        self, name: str, epoch: int, reason: str, *, penalise_host: str | None = None, timeout: float = 5.0
    ) -> Released | NotOwner:
        """Give up ``name`` if it is owned at ``epoch``, leaving in its placement record that this was meant.

        Call it when the process is gone.  ``penalise_host`` says that it did not work there.  ``timeout``
        bounds each transaction.  Raises StoreUnavailable, StoreAmbiguous.
        """
        for _ in range(_ATTEMPTS):
            owner, placement = await self._owner_and_placement(name, timeout)
            if owner is None and placement.last_epoch == epoch:
                return Released(name, epoch)
            if owner is None or owner.epoch != epoch:
                return NotOwner(name, owner)
            record = after_release(placement, owner, reason, penalise_host, self._wall())
            result = await self._store.txn(
                (
                    unchanged(self._prefix + OWNERS + name, owner.mod_revision),
                    unchanged(self._prefix + PLACEMENTS + name, placement.mod_revision),
                ),
                # In the order watchers see it: who sees the owner go knows already that it was meant.
                (
                    Put(self._prefix + PLACEMENTS + name, encode_placement(record)),
                    Delete(self._prefix + STATUSES + name),
                    Delete(self._prefix + OWNERS + name),
                ),
                timeout=timeout,
            )
            if result.succeeded:
                return Released(name, epoch)
        raise StoreUnavailable(f"placement of {name} changed {_ATTEMPTS} times while it was being released")

    async def put_status(
        self, status: Status, lease: LeaseId, *, seen: Revision = 0, timeout: float = 5.0
    ) -> Written | NotOwner:
        """Write what the owner at ``status.epoch``, under ``lease``, says about its process.

        ``seen`` is the revision of the status it replaces, if known; a wrong one costs a round trip.
        ``timeout`` bounds each transaction.  Raises Invalid (too large), LeaseNotFound, StoreUnavailable,
        StoreAmbiguous.
        """
        owner_key, key = self._prefix + OWNERS + status.name, self._prefix + STATUSES + status.name
        then: tuple[Op, ...] = (Put(key, encode_status(status), lease),)
        for _ in range(_ATTEMPTS):
            result = await self._store.txn(
                (
                    unchanged(owner_key, revision_of(status.epoch)),
                    Compare(owner_key, "lease", "=", lease),
                    unchanged(key, seen),
                ),
                then,
                (Get(owner_key), Get(key)),
                timeout=timeout,
            )
            if result.succeeded:
                return Written(result.revision)
            owner = self._read(status.name, single(result.kvs(0)))
            if owner is None or owner.epoch != status.epoch or owner.lease != lease:
                return NotOwner(status.name, owner)
            current = single(result.kvs(1))
            seen = current.mod_revision if current else 0
        raise StoreUnavailable(
            f"status of {status.name} changed {_ATTEMPTS} times while it was being written"
        )

    async def owned_by(self, node: str, *, timeout: float = 30.0) -> list[Owned]:
        """Read, linearizably, every name ``node`` owns.  Raises StoreUnavailable."""
        snapshot = await self._store.snapshot(self._prefix + OWNERS, timeout=timeout)
        owners = (self._read(kv.key.removeprefix(self._prefix + OWNERS), kv) for kv in snapshot.kvs)
        return [Owned(o.name, o.epoch, o.claim) for o in owners if o is not None and o.node == node]

    async def read_owner(self, name: str, *, timeout: float = 5.0) -> Owner | None:
        """Read the owner of ``name``, linearizably.  Raises StoreUnavailable."""
        return self._read(name, await self._store.get(self._prefix + OWNERS + name, timeout=timeout))

    async def _owner_and_placement(self, name: str, timeout: float) -> tuple[Owner | None, PlacementRecord]:
        gets = (Get(self._prefix + OWNERS + name), Get(self._prefix + PLACEMENTS + name))
        result = await self._store.txn((), gets, timeout=timeout)
        owner = self._read(name, single(result.kvs(0)))
        kv = single(result.kvs(1))
        if kv is None:
            return owner, PlacementRecord(name=name)
        try:
            return owner, decode_placement(name, kv)
        except Malformed:
            return owner, PlacementRecord(name=name, mod_revision=kv.mod_revision)

    @staticmethod
    def _read(name: str, kv: KeyValue | None) -> Owner | None:
        try:
            return None if kv is None else decode_owner(name, kv)
        except Malformed:
            return None
