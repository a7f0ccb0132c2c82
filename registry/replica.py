"""The registry as typed records in memory: what a stream of key changes makes of it.  Pure.

It is told every change of the cluster's prefix once and in order, and says what each one means.  A value that
cannot be read changes nothing, except that an unreadable owner key still ends the ownership before it: any
write of that key is a new epoch.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from registry.nodes import HostRecord, NodeRecord, decode_host, decode_node
from registry.ownership import (
    HOSTS,
    INCARNATION,
    NODES,
    OWNERS,
    PAUSE,
    PLACEMENTS,
    SPECS,
    STATUSES,
    Incarnation,
    Owner,
    PlacementRecord,
    Status,
    decode_incarnation,
    decode_owner,
    decode_placement,
    decode_status,
)
from registry.records import Malformed
from registry.specs import SpecRecord, decode_spec
from registry.store import Changed, Deleted, KeyValue, Revision, Snapshot

Record: TypeAlias = (
    Owner | Status | SpecRecord | NodeRecord | HostRecord | PlacementRecord | Incarnation | KeyValue
)


@dataclass(frozen=True, slots=True)
class Change:
    """A record came, changed or went.

    ``section`` is "owners", "statuses", "specs", "nodes", "hosts", "placements", "incarnation" or "pause";
    ``key`` is the name, node or host, and empty in the last two.
    """

    section: str
    key: str
    before: Record | None
    after: Record | None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The value of ``key`` (as in etcd) cannot be read; ``change`` is what its being written means anyway."""

    key: str
    why: str
    change: Change | None


class Replica:
    """The records of one cluster.  The dictionaries are never replaced, so a bound ``get`` stays good."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.revision: Revision = 0
        self.owners: dict[str, Owner] = {}
        self.statuses: dict[str, Status] = {}
        self.specs: dict[str, SpecRecord] = {}
        self.nodes: dict[str, NodeRecord] = {}
        self.hosts: dict[str, HostRecord] = {}
        self.placements: dict[str, PlacementRecord] = {}
        self.incarnation = Incarnation()
        self.pause: KeyValue | None = None
        self._revisions: dict[str, Revision] = {}
        self._owner_keys = _Tally()
        self._sections: dict[str, tuple[str, dict[str, Any], Callable[[str, KeyValue], Record]]] = {
            OWNERS: ("owners", self.owners, decode_owner),
            STATUSES: ("statuses", self.statuses, decode_status),
            SPECS: ("specs", self.specs, decode_spec),
            NODES: ("nodes", self.nodes, decode_node),
            HOSTS: ("hosts", self.hosts, decode_host),
            PLACEMENTS: ("placements", self.placements, decode_placement),
        }

    def fingerprint(self) -> tuple[int, Revision]:
        """Return (number, highest mod_revision) of the owner keys, as Store.fingerprint does."""
        return self._owner_keys.value()

    def differences(self, snapshot: Snapshot) -> list[Changed | Deleted]:
        """Return the changes that turn this replica into ``snapshot``.

        Owner keys come last: who sees an owner go finds the placement record that says why.
        """
        there = {kv.key for kv in snapshot.kvs}
        written = [kv for kv in snapshot.kvs if self._revisions.get(kv.key) != kv.mod_revision]
        gone = [key for key in self._revisions if key not in there]
        return [
            *(Changed(kv) for kv in sorted(written, key=lambda kv: self._is_owner(kv.key))),
            *(Deleted(key, snapshot.revision) for key in sorted(gone, key=self._is_owner)),
        ]

    def apply(self, event: Changed | Deleted) -> Change | Unreadable | None:
        """Take a change in; return what it means, or None when it means nothing."""
        match event:
            case Changed(kv):
                if self._revisions.get(kv.key) == kv.mod_revision:
                    return None
                self._note(kv.key, kv.mod_revision)
                return self._put(kv)
            case Deleted(key, revision):
                self.revision = max(self.revision, revision)
                if self._revisions.pop(key, None) is None:
                    return None
                if self._is_owner(key):
                    self._owner_keys.discard(key)
                return self._delete(key)

    def _is_owner(self, key: str) -> bool:
        return key.startswith(OWNERS, len(self.prefix))

    def _note(self, key: str, revision: Revision) -> None:
        self.revision = max(self.revision, revision)
        self._revisions[key] = revision
        if self._is_owner(key):
            self._owner_keys.put(key, revision)

    def _put(self, kv: KeyValue) -> Change | Unreadable | None:
        path = kv.key[len(self.prefix) :]
        try:
            if path == INCARNATION:
                return self._set_incarnation(decode_incarnation(kv))
            if path == PAUSE:
                return self._set_pause(kv)
            kind, _, key = path.partition("/")
            if (section := self._sections.get(kind + "/")) is None:
                return None
            name, records, decode = section
            after = decode(key, kv)
        except Malformed as error:
            return Unreadable(kv.key, str(error), self._delete(kv.key) if self._is_owner(kv.key) else None)
        before = records.get(key)
        records[key] = after
        return Change(name, key, before, after)

    def _delete(self, whole: str) -> Change | None:
        path = whole[len(self.prefix) :]
        if path == INCARNATION:
            return self._set_incarnation(Incarnation())
        if path == PAUSE:
            return self._set_pause(None)
        kind, _, key = path.partition("/")
        if (section := self._sections.get(kind + "/")) is None:
            return None
        name, records, _ = section
        before = records.pop(key, None)
        return None if before is None else Change(name, key, before, None)

    def _set_incarnation(self, after: Incarnation) -> Change:
        before, self.incarnation = self.incarnation, after
        return Change("incarnation", "", before, after)

    def _set_pause(self, after: KeyValue | None) -> Change:
        before, self.pause = self.pause, after
        return Change("pause", "", before, after)


class _Tally:
    """Number and highest revision of a set of keys; outdated heap entries are dropped when they surface."""

    def __init__(self) -> None:
        self._revisions: dict[str, Revision] = {}
        self._heap: list[tuple[int, str]] = []

    def put(self, key: str, revision: Revision) -> None:
        self._revisions[key] = revision
        if len(self._heap) > 2 * len(self._revisions) + 1000:
            self._heap = [(-known, each) for each, known in self._revisions.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (-revision, key))

    def discard(self, key: str) -> None:
        self._revisions.pop(key, None)

    def value(self) -> tuple[int, Revision]:
        while self._heap and self._revisions.get(self._heap[0][1]) != -self._heap[0][0]:
            heapq.heappop(self._heap)
        return len(self._revisions), -self._heap[0][0] if self._heap else 0
