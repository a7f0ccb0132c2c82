"""The declared wishes: which named workers should exist, and whether they should run.

The text of a spec is kept as it was applied; what it means is for the reader.  ``digest`` says whether two
texts mean the same, so applying the same file again changes nothing and disturbs nobody.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from registry.claiming import single
from registry.errors import Invalid, StoreUnavailable
from registry.ownership import SPECS
from registry.records import Codec, Malformed
from registry.store import Delete, Get, KeyValue, Put, Revision, Store, unchanged

SPECS_PER_TXN = 60
"""As many specs are written at once; etcd takes 128 operations (its ``--max-txn-ops``)."""
LARGEST_SPEC = 1536 * 1024 - 4096
"""Bytes of a spec as it is kept: etcd takes requests of 1.5 MiB (its ``--max-request-bytes``)."""
_BYTES_PER_TXN = 1_000_000
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


@dataclass(frozen=True, slots=True)
class Wanted:
    """What somebody wants to be the spec of ``name``."""

    name: str
    toml: str
    digest: str


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
        """Make this the spec of ``name``: CREATED, CHANGED or UNCHANGED.  Raises StoreError, Invalid."""
        (result,) = await self.apply_many((Wanted(name, toml, digest),), who, timeout=timeout)
        return result

    async def apply_many(
        self, wanted: Sequence[Wanted], who: str, *, timeout: float = 5.0
    ) -> list[SpecResult]:
        """Make these the specs of their names, each named once; results are in the same order.

        Up to :data:`SPECS_PER_TXN` specs of together one megabyte are written in one transaction: all or none
        of them.  More are written in several, one after the other; when a later one fails, the earlier ones
        have happened, and applying all again does the rest.  Raises StoreError, and Invalid, before anything
        is written, for a spec that is too large for etcd.
        """
        wishes = {each.name: self._wish(each.name, each.toml, each.digest, who) for each in wanted}
        results: list[SpecResult] = []
        for names in list(_batches({name: len(encode_spec(wish)) for name, wish in wishes.items()})):
            results += await self._change_together({name: _applying(wishes[name]) for name in names}, timeout)
        return results

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
        (result,) = await self._change_together({name: decide}, timeout)
        return result

    async def _change_together(self, decisions: Mapping[str, Decision], timeout: float) -> list[SpecResult]:
        """Decide about several specs as they were at one moment, and write what changes, all or nothing."""
        keys = [self._prefix + name for name in decisions]
        reads = [Get(key) for key in keys]
        seen = await self._store.txn((), reads, timeout=timeout)
        for _ in range(_ATTEMPTS):
            kvs = [single(seen.kvs(index)) for index in range(len(keys))]
            results, puts = [], []
            for (name, decide), key, kv in zip(decisions.items(), keys, kvs, strict=True):
                before = _read(name, kv)
                what, after = decide(before)
                results.append(SpecResult(name, what, after))
                if after is not None and after is not before:
                    puts.append(Put(key, encode_spec(after)))
            if not puts:
                return results
            compare = [
                unchanged(key, kv.mod_revision if kv else 0) for key, kv in zip(keys, kvs, strict=True)
            ]
            seen = await self._store.txn(compare, puts, reads, timeout=timeout)
            if seen.succeeded:
                written = {put.key for put in puts}
                return [
                    _written(result, seen.revision) if key in written else result
                    for key, result in zip(keys, results, strict=True)
                ]
        raise _too_contended(", ".join(decisions))


def _applying(wish: SpecRecord) -> Decision:
    return lambda before: applied(before, wish)


def _written(result: SpecResult, revision: Revision) -> SpecResult:
    spec = result.spec
    return result if spec is None else replace(result, spec=replace(spec, mod_revision=revision))


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Group names, in their order, for one transaction each.  Raises Invalid for one that fits into none."""
    batch: list[str] = []
    together = 0
    for name, size in sizes.items():
        if size > LARGEST_SPEC:
            raise Invalid(
                f"{name}: its spec is {size / (1 << 20):.2f} MiB, and etcd takes 1.5 MiB at most",
                hint="keep large data in a file or a table, and name that in the spec",
                details={"name": name, "size": str(size), "limit": str(LARGEST_SPEC)},
            )
        if batch and (len(batch) == SPECS_PER_TXN or together + size > _BYTES_PER_TXN):
            yield batch
            batch, together = [], 0
        batch.append(name)
        together += size
    if batch:
        yield batch


def _read(name: str, kv: KeyValue | None) -> SpecRecord | None:
    try:
        return None if kv is None else decode_spec(name, kv)
    except Malformed:
        return None


def _too_contended(names: str) -> StoreUnavailable:
    return StoreUnavailable(f"the spec of {names} changed {_ATTEMPTS} times while it was being written")
