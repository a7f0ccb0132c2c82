"""Keys with revisions, and transactions on them, decided and carried out as etcd does.  No time, no faults.

etcd evaluates every comparison, those of nested transactions too, against the state before the transaction,
then runs the branches taken; reads inside see the writes before them; all writes share one new revision, and
a transaction that wrote nothing makes none.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from registry.errors import LeaseNotFound
from registry.store import (
    Changed,
    Compare,
    Delete,
    Deleted,
    Get,
    KeyValue,
    LeaseId,
    OpResult,
    Put,
    Revision,
    Txn,
    TxnResult,
)

Event: TypeAlias = Changed | Deleted


@dataclass(frozen=True, slots=True)
class _Path:
    """The branch a transaction takes; nested transactions are decided already."""

    succeeded: bool
    steps: tuple[Get | Put | Delete | _Path, ...]

    def puts(self) -> Iterator[Put]:
        for step in self.steps:
            if isinstance(step, Put):
                yield step
            elif isinstance(step, _Path):
                yield from step.puts()


class Keyspace:
    """The keys, and the revision they are at."""

    def __init__(self) -> None:
        self.revision: Revision = 1
        self.keys: dict[str, KeyValue] = {}

    def apply(self, txn: Txn, leases: Container[LeaseId]) -> tuple[TxnResult, list[Event]]:
        """Run a transaction; ``leases`` are those that live.  Raises LeaseNotFound, having done nothing."""
        path = self._decide(txn)
        _check(path, leases)
        written: list[Event] = []
        result = self._run(path, self.revision + 1, written)
        if not written:
            return self._run(path, self.revision, written), written
        self.revision += 1
        return result, written

    def delete_keys_of(self, lease: LeaseId) -> list[Event]:
        """Delete every key of a lease, at one revision."""
        keys = [kv.key for kv in self.keys.values() if kv.lease == lease]
        if keys:
            self.revision += 1
        return [self._remove(key, self.revision) for key in keys]

    def range(self, prefix: str) -> tuple[KeyValue, ...]:
        """Return the keys that start with ``prefix``, in order."""
        return tuple(self.keys[key] for key in sorted(self.keys) if key.startswith(prefix))

    def _decide(self, txn: Txn) -> _Path:
        succeeded = all(self._holds(compare) for compare in txn.compare)
        steps = txn.then if succeeded else txn.otherwise
        if max(len(txn.compare), len(txn.then), len(txn.otherwise)) > 128:
            raise ValueError("etcd takes at most 128 operations a level")
        return _Path(succeeded, tuple(self._decide(op) if isinstance(op, Txn) else op for op in steps))

    def _holds(self, compare: Compare) -> bool:
        kv = self.keys.get(compare.key) or KeyValue(compare.key, b"", 0, 0, 0, 0)
        present: int | bytes
        match compare.target:
            case "create":
                present = kv.create_revision
            case "mod":
                present = kv.mod_revision
            case "version":
                present = kv.version
            case "lease":
                present = kv.lease
            case "value":
                if kv.version == 0:
                    return False
                present = kv.value
            case target:
                assert_never(target)
        return _compare(present, compare.op, compare.operand)

    def _run(self, path: _Path, revision: Revision, written: list[Event]) -> TxnResult:
        results: list[OpResult] = []
        for step in path.steps:
            match step:
                case Get(key, prefix):
                    results.append(self.range(key) if prefix else self._only(key))
                case Put():
                    written.append(Changed(self._write(step, revision)))
                    results.append(None)
                case Delete(key, prefix):
                    gone = self.range(key) if prefix else self._only(key)
                    written += [self._remove(kv.key, revision) for kv in gone]
                    results.append(len(gone))
                case _Path():
                    results.append(self._run(step, revision, written))
                case _:
                    assert_never(step)
        return TxnResult(path.succeeded, revision, tuple(results))

    def _only(self, key: str) -> tuple[KeyValue, ...]:
        return (self.keys[key],) if key in self.keys else ()

    def _write(self, put: Put, revision: Revision) -> KeyValue:
        before = self.keys.get(put.key)
        kv = KeyValue(
            key=put.key,
            value=put.value,
            create_revision=before.create_revision if before else revision,
            mod_revision=revision,
            version=before.version + 1 if before else 1,
            lease=put.lease,
        )
        self.keys[put.key] = kv
        return kv

    def _remove(self, key: str, revision: Revision) -> Event:
        del self.keys[key]
        return Deleted(key, revision)


def _check(path: _Path, leases: Container[LeaseId]) -> None:
    seen: set[str] = set()
    for put in path.puts():
        if put.lease and put.lease not in leases:
            raise LeaseNotFound(f"lease {put.lease:x} is gone")
        if put.key in seen:
            raise ValueError(f"{put.key} is written twice in one transaction")
        seen.add(put.key)


def _compare(present: int | bytes, op: str, operand: int | bytes) -> bool:
    assert isinstance(operand, type(present))
    match op:
        case "=":
            return present == operand
        case "!=":
            return present != operand
        case "<":
            return present < operand  # type: ignore[operator]
        case _:
            return present > operand  # type: ignore[operator]
