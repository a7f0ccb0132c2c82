"""The port to the coordination store: plain values in, plain values out.

Everything pgherd keeps in etcd goes through this protocol; :mod:`registry.etcd` is the real one and
``tests/support/memory_store.py`` the in-memory one.  Both pass ``tests/contract/test_store.py``.

Rules for users: every write or delete is a transaction that compares a revision, and a write that raised
:class:`~registry.errors.StoreAmbiguous` may have happened.  Keys are text, values bytes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

LeaseId: TypeAlias = int
Revision: TypeAlias = int


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as of the revision it was read at."""

    key: str
    value: bytes
    create_revision: Revision
    mod_revision: Revision
    version: int
    lease: LeaseId


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition of a transaction: ``target`` of ``key`` stands in relation ``op`` to ``operand``."""

    key: str
    target: Literal["create", "mod", "version", "lease", "value"]
    op: Literal["=", "!=", "<", ">"]
    operand: int | bytes


def absent(key: str) -> Compare:
    """The key does not exist."""
    return Compare(key, "create", "=", 0)


def exists(key: str) -> Compare:
    """The key exists."""
    return Compare(key, "create", ">", 0)


def unchanged(key: str, mod_revision: Revision) -> Compare:
    """The key was last written at ``mod_revision`` (0: it is absent)."""
    return Compare(key, "mod", "=", mod_revision)


@dataclass(frozen=True, slots=True)
class Get:
    """Read ``key``, or with ``prefix`` every key that starts with it; result: ``tuple[KeyValue, ...]``."""

    key: str
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class Put:
    """Write ``key``; result: ``None``."""

    key: str
    value: bytes
    lease: LeaseId = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete ``key``, or with ``prefix`` every key that starts with it; result: how many, ``int``."""

    key: str
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class Txn:
    """If every compare holds do ``then``, else ``otherwise``; atomically; may be nested; result: TxnResult.

    At most 128 operations a level, no key written twice.
    """

    compare: Sequence[Compare] = ()
    then: Sequence[Op] = ()
    otherwise: Sequence[Op] = ()


Op: TypeAlias = Get | Put | Delete | Txn
OpResult: TypeAlias = "tuple[KeyValue, ...] | int | TxnResult | None"


@dataclass(frozen=True, slots=True)
class TxnResult:
    """What a transaction did: which branch, at which store revision, and one result for each operation."""

    succeeded: bool
    revision: Revision
    results: tuple[OpResult, ...]

    def kvs(self, index: int) -> tuple[KeyValue, ...]:
        """Return the result of the ``Get`` at ``index``."""
        result = self.results[index]
        assert isinstance(result, tuple)
        return result

    def nested(self, index: int) -> TxnResult:
        """Return the result of the ``Txn`` at ``index``."""
        result = self.results[index]
        assert isinstance(result, TxnResult)
        return result


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys of a prefix as of one revision."""

    revision: Revision
    kvs: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True)
class Lease:
    """A granted lease; ``ttl`` in seconds is what the store granted, which may be more than was asked."""

    id: LeaseId
    ttl: float


@dataclass(frozen=True, slots=True)
class Changed:
    """A key was written."""

    kv: KeyValue


@dataclass(frozen=True, slots=True)
class Deleted:
    """A key went away at ``mod_revision``."""

    key: str
    mod_revision: Revision


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """Events in revision order; an empty batch is a sign of life from a member that has a leader."""

    events: tuple[Changed | Deleted, ...]


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """One member of the store as seen from here; ``error`` is empty when it answered."""

    endpoint: str
    version: str
    leader: bool
    has_leader: bool
    revision: Revision
    error: str


class Store(Protocol):
    """etcd's API as far as pgherd uses it.  ``timeout``: seconds for the whole call, retries included."""

    async def get(self, key: str, *, timeout: float = 5.0) -> KeyValue | None:
        """Read one key, linearizably.  Raises StoreUnavailable."""

    async def snapshot(self, prefix: str, *, timeout: float = 30.0) -> Snapshot:
        """Read a whole prefix as of one revision, in pages.  Raises StoreUnavailable."""

    async def fingerprint(self, prefix: str, *, timeout: float = 5.0) -> tuple[int, Revision]:
        """Return (number of keys, highest mod_revision) of a prefix, linearizably: to compare a copy with."""

    async def txn(
        self,
        compare: Sequence[Compare],
        then: Sequence[Op],
        otherwise: Sequence[Op] = (),
        *,
        timeout: float = 5.0,
    ) -> TxnResult:
        """Run a transaction.

        Raises StoreUnavailable (nothing done), StoreAmbiguous (perhaps done; an implementation repeats an
        attempt by itself only when that cannot do harm), LeaseNotFound (a Put named a dead lease).
        """

    async def grant(self, ttl: float, *, timeout: float = 5.0) -> Lease:
        """Grant a lease of at least ``ttl`` seconds.  Raises StoreUnavailable."""

    async def keepalive(self, lease: LeaseId, *, timeout: float) -> float:
        """Renew once; return the seconds granted.  Raises LeaseNotFound, StoreUnavailable."""

    async def revoke(self, lease: LeaseId, *, timeout: float = 5.0) -> None:
        """End a lease and delete its keys; a lease that is gone already is fine.  Raises StoreUnavailable."""

    def watch(self, prefix: str, start: Revision) -> AsyncIterator[WatchBatch]:
        """Yield every change of the prefix from revision ``start`` on, each once and in order, for ever.

        Reconnects and rotates members by itself, resuming after the last event seen.  Yields an empty batch
        at least every second while the store is healthy.  Raises StoreCompacted (snapshot again),
        StoreRestored, StoreDenied.  Silence while no member is reachable is silence: watch the clock.
        """

    async def members(self, *, timeout: float = 1.0) -> tuple[MemberStatus, ...]:
        """Ask every configured endpoint how it is; never raises for an endpoint that does not answer."""

    async def close(self) -> None:
        """Close every connection; running calls fail."""
