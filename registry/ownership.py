"""Who owns a name: the records, their keys, and the arithmetic of epochs.  Pure.

The epoch of an ownership is one integer, ``incarnation << 48 | mod_revision`` of the owner key.  etcd's
revisions only grow, so the low part grows within one history of the store; the incarnation is raised by an
operator when that history was lost (a restore), so the whole number grows for ever.  The owner key is written
only when ownership changes; everything that changes while somebody owns the name lives in ``status/``.

The owner record keeps the incarnation it was claimed under: raising it must not change the epoch of a living
owner, and keys that came back with an old backup must not look like new ownerships.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from registry.errors import Invalid
from registry.records import Codec, Malformed
from registry.store import KeyValue, LeaseId, Revision

EPOCH_BITS = 48
_LOW = (1 << EPOCH_BITS) - 1
MAX_INCARNATION = (1 << 15) - 1
STATUS_LIMIT = 16 * 1024

OWNERS = "names/"
STATUSES = "status/"
PLACEMENTS = "placement/"
SPECS = "specs/"
NODES = "nodes/"
HOSTS = "hosts/"
INCARNATION = "incarnation"
PAUSE = "control/pause"


def cluster_prefix(cluster: str) -> str:
    """Return what every key of a cluster starts with."""
    return f"/pgherd/{cluster}/"


def epoch_of(incarnation: int, mod_revision: Revision) -> int:
    """Return the epoch; raises ValueError where the parts would not fit a positive 64-bit integer."""
    if not 0 <= incarnation <= MAX_INCARNATION:
        raise ValueError(f"incarnation {incarnation} is not between 0 and {MAX_INCARNATION}")
    if not 0 < mod_revision <= _LOW:
        raise ValueError(f"revision {mod_revision} is not between 1 and {_LOW}")
    return incarnation << EPOCH_BITS | mod_revision


def incarnation_of(epoch: int) -> int:
    """Return the incarnation an epoch was made under."""
    return epoch >> EPOCH_BITS


def revision_of(epoch: int) -> Revision:
    """Return the owner key's mod_revision an epoch was made from."""
    return epoch & _LOW


@dataclass(frozen=True, slots=True)
class Incarnation:
    """The counter of etcd histories as it was read; an absent key is number 0."""

    number: int = 0
    mod_revision: Revision = 0


def decode_incarnation(kv: KeyValue | None) -> Incarnation:
    """Read the incarnation key.  Raises Malformed."""
    if kv is None:
        return Incarnation()
    text = kv.value.decode(errors="replace").strip()
    if not (text.isascii() and text.isdigit() and int(text) <= MAX_INCARNATION):
        raise Malformed(f"not a number between 0 and {MAX_INCARNATION}: {text[:80]!r}")
    return Incarnation(int(text), kv.mod_revision)


@dataclass(frozen=True, slots=True)
class Owner:
    """Who owns ``name``.  ``claim`` identifies this ownership: a repeated claim recognises itself by it."""

    name: str
    node: str
    host: str
    epoch: int
    claim: str
    lease: LeaseId
    mod_revision: Revision


@dataclass(frozen=True, slots=True)
class _OwnerValue:
    node: str
    host: str
    claim: str
    incarnation: int = 0


_OWNER = Codec(_OwnerValue)


def encode_owner(*, node: str, host: str, claim: str, incarnation: int) -> bytes:
    """Return the value of an owner key."""
    return _OWNER.encode(_OwnerValue(node, host, claim, incarnation))


def decode_owner(name: str, kv: KeyValue) -> Owner:
    """Read an owner key.  Raises Malformed."""
    value = _OWNER.decode(kv.value)
    if not 0 <= value.incarnation <= MAX_INCARNATION:
        raise Malformed(f"incarnation: {value.incarnation} is not between 0 and {MAX_INCARNATION}")
    epoch = epoch_of(value.incarnation, kv.mod_revision)
    return Owner(name, value.node, value.host, epoch, value.claim, kv.lease, kv.mod_revision)


class WorkerState(enum.StrEnum):
    """How far the owner's process is; a name without a status is owned and not started yet."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Method:
    """A method a daemon offers; ``kind`` is "call" or "cast", the other two are for people."""

    name: str
    kind: str
    signature: str = ""
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the owner says of its process; ``since`` is in Unix seconds of the owner's clock, for people."""

    name: str
    epoch: int
    start: int
    state: WorkerState
    pid: int
    since: float
    methods: tuple[Method, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    mod_revision: Revision = 0


_STATUS = Codec(Status, outside=("name", "mod_revision"))


def encode_status(status: Status) -> bytes:
    """Return the value of a status key.  Raises Invalid when it is larger than 16 KiB."""
    value = _STATUS.encode(status)
    if len(value) > STATUS_LIMIT:
        raise Invalid(
            f"methods and metadata of {status.name} take {len(value)} bytes, at most {STATUS_LIMIT} are kept",
            details={"name": status.name, "bytes": str(len(value)), "limit": str(STATUS_LIMIT)},
        )
    return value


def decode_status(name: str, kv: KeyValue) -> Status:
    """Read a status key.  Raises Malformed."""
    return _STATUS.decode(kv.value, name=name, mod_revision=kv.mod_revision)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRecord:
    """What outlives an owner: that it released the name, why, and which hosts it did not work on.

    ``last_epoch`` tells a clean release from a disappearance: an owner key that went away and is not named
    here was not given up by its owner.  ``failures`` counts releases that penalised a host since the last one
    that did not; ``penalties`` are counts per host; ``at`` is in Unix seconds, for people.
    """

    name: str
    last_epoch: int = 0
    last_node: str = ""
    reason: str = ""
    failures: int = 0
    penalties: Mapping[str, int] = field(default_factory=dict)
    at: float = 0.0
    mod_revision: Revision = 0


_PLACEMENT = Codec(PlacementRecord, outside=("name", "mod_revision"))


def encode_placement(record: PlacementRecord) -> bytes:
    """Return the value of a placement key."""
    return _PLACEMENT.encode(record)


def decode_placement(name: str, kv: KeyValue) -> PlacementRecord:
    """Read a placement key.  Raises Malformed."""
    return _PLACEMENT.decode(kv.value, name=name, mod_revision=kv.mod_revision)


def after_release(
    before: PlacementRecord, owner: Owner, reason: str, penalise_host: str | None, at: float
) -> PlacementRecord:
    """Return the placement record to write with the release of ``owner``."""
    penalties = dict(before.penalties)
    if penalise_host is not None:
        penalties[penalise_host] = penalties.get(penalise_host, 0) + 1
    return PlacementRecord(
        name=owner.name,
        last_epoch=owner.epoch,
        last_node=owner.node,
        reason=reason,
        failures=0 if penalise_host is None else before.failures + 1,
        penalties=penalties,
        at=at,
    )
