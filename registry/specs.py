"""The declared wishes: which named workers should exist, and whether they should run.

The text of a spec is kept as it was applied; what it means is for the reader.  ``digest`` says whether two
texts mean the same, so applying the same file again changes nothing and disturbs nobody.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from registry.claiming import single
from registry.errors import StoreUnavailable
from registry.ownership import SPECS
from registry.records import Codec, Malformed
from registry.store import Delete, Get, KeyValue, Put, Revision, Store, unchanged

_ATTEMPTS = 16


class Desired(enum.StrEnum):
    """Whether the worker should run; survives failover, reboot and a new text."""

    RUNNING = "running"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecRecord:
    """The spec of ``name``: TOML text, its digest, the wish, who changed it last, and when (Unix seconds)."""

    name: str
    toml: str
    desired: Desired
    who: str
    at: float
    digest: str
    mod_revision: Revision = 0


_CODEC = Codec(SpecRecord, outside=("name", "mod_revision"))


def encode_spec(record: SpecRecord) -> bytes:
    """Return the value of a spec key."""
    return _CODEC.encode(record)


def decode_spec(name: str, kv: KeyValue) -> SpecRecord:
    """Read a spec key.  Raises Malformed."""
    return _CODEC.decode(kv.value, name=name, mod_revision=kv.mod_revision)


class What(enum.StrEnum):
    """What happened to a spec."""

    CREATED = "created"
    CHANGED = "changed"
    UNCHANGED = "unchanged"
    DELETED = "deleted"
    ABSENT = "absent"
    CONFLICT = "conflict"


@dataclass(frozen=True, slots=True)
class SpecResult:
    """What happened, and the spec as it is now (for ``DELETED``: as it was)."""

    name: str
    what: What
    spec: SpecRecord | None


def applied(before: SpecRecord | None, wish: SpecRecord) -> tuple[What, SpecRecord]:
    """Return what applying ``wish`` does and the record afterwards; the desired state stays as it was."""
    if before is None:
        return What.CREATED, wish
    if before.digest == wish.digest:
        return What.UNCHANGED, before
    return What.CHANGED, replace(wish, desired=before.desired)


def offered(before: SpecRecord | None, wish: SpecRecord) -> tuple[What, SpecRecord]:
    """Return what offering ``wish`` does: it creates, and never replaces one that means something else."""
    if before is None:
        return What.CREATED, wish
    return What.UNCHANGED if before.digest == wish.digest else What.CONFLICT, before


Decision = Callable[[SpecRecord | None], tuple[What, SpecRecord | None]]


class Specs:
    """The spec keys of one cluster; each change compares what it was decided on.

    Every method is safe to repeat after StoreAmbiguous; ``timeout`` bounds each transaction.  A value that
    cannot be read counts as absent and is replaced by ``apply``.
    """

    def __init__(self, store: Store, prefix: str, *, wall: Callable[[], float] = time.time) -> None:
        self._store = store
        self._prefix = prefix + SPECS
        self._wall = wall

    async def apply(self, name: str, toml: str, digest: str, who: str, *, timeout: float = 5.0) -> SpecResult:
        """Make this the spec of ``name``: CREATED, CHANGED or UNCHANGED.  Raises StoreError."""
        wish = self._wish(name, toml, digest, who)
        return await self._change(name, lambda before: applied(before, wish), timeout)

    async def offer(self, name: str, toml: str, digest: str, who: str, *, timeout: float = 5.0) -> SpecResult:
        """Create the spec unless there is one: CREATED, UNCHANGED, or CONFLICT with one that differs.

        For specs found in a host's own files: two hosts whose files differ must not overwrite each other.
        Raises StoreError.
        """
        wish = self._wish(name, toml, digest, who)
        return await self._change(name, lambda before: offered(before, wish), timeout)

    async def set_desired(self, name: str, desired: Desired, who: str, *, timeout: float = 5.0) -> SpecResult:
        """Wish that it runs or does not: CHANGED, UNCHANGED or ABSENT.  Raises StoreError."""
        at = self._wall()

        def decide(before: SpecRecord | None) -> tuple[What, SpecRecord | None]:
            if before is None:
                return What.ABSENT, None
            if before.desired is desired:
                return What.UNCHANGED, before
            return What.CHANGED, replace(before, desired=desired, who=who, at=at)

        return await self._change(name, decide, timeout)

    async def delete(self, name: str, *, timeout: float = 5.0) -> SpecResult:
        """Remove the spec: DELETED or ABSENT.  Raises StoreError."""
        for _ in range(_ATTEMPTS):
            kv = await self._store.get(self._prefix + name, timeout=timeout)
            if kv is None:
                return SpecResult(name, What.ABSENT, None)
            result = await self._store.txn(
                (unchanged(kv.key, kv.mod_revision),), (Delete(kv.key),), timeout=timeout
            )
            if result.succeeded:
                return SpecResult(name, What.DELETED, _read(name, kv))
        raise _too_contended(name)

    async def read(self, name: str, *, timeout: float = 5.0) -> SpecRecord | None:
        """Read the spec of ``name``, linearizably.  Raises StoreUnavailable."""
        return _read(name, await self._store.get(self._prefix + name, timeout=timeout))

    def _wish(self, name: str, toml: str, digest: str, who: str) -> SpecRecord:
        return SpecRecord(
            name=name, toml=toml, desired=Desired.RUNNING, who=who, at=self._wall(), digest=digest
        )

    async def _change(self, name: str, decide: Decision, timeout: float) -> SpecResult:
        key = self._prefix + name
        kv = await self._store.get(key, timeout=timeout)
        for _ in range(_ATTEMPTS):
            before = _read(name, kv)
            what, after = decide(before)
            if after is None or after is before:
                return SpecResult(name, what, after)
            result = await self._store.txn(
                (unchanged(key, kv.mod_revision if kv else 0),),
                (Put(key, encode_spec(after)),),
                (Get(key),),
                timeout=timeout,
            )
            if result.succeeded:
                return SpecResult(name, what, replace(after, mod_revision=result.revision))
            kv = single(result.kvs(0))
        raise _too_contended(name)


def _read(name: str, kv: KeyValue | None) -> SpecRecord | None:
    try:
        return None if kv is None else decode_spec(name, kv)
    except Malformed:
        return None


def _too_contended(name: str) -> StoreUnavailable:
    return StoreUnavailable(f"the spec of {name} changed {_ATTEMPTS} times while it was being written")
