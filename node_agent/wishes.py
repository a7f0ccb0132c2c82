"""The cluster's specs as this host understands them.

A spec travels as TOML text.  Each host parses it against its own configuration, so one that names a database
this host does not have is a wish like any other elsewhere, and has a ``problem`` here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from node_agent.spec.child import ChildSpec, parse
from registry.config import ConfigInvalid
from registry.specs import Desired, SpecRecord


@dataclass(frozen=True, slots=True)
class Wish:
    """A named spec: what should run, whether it should, and why it cannot on this host."""

    name: str
    spec: ChildSpec | None
    running: bool
    problem: str
    record: SpecRecord


class Wishes:
    """Reads wishes from the directory's records; parses each version of a spec once."""

    def __init__(self, databases: Collection[str]) -> None:
        self._databases = databases
        self._parsed: dict[str, tuple[int, Wish]] = {}
        self.conflicts: dict[str, str] = {}

    def read(self, record: SpecRecord) -> Wish:
        """Return the wish of a record."""
        known = self._parsed.get(record.name)
        if known is not None and known[0] == record.mod_revision:
            return known[1]
        wish = self._parse(record)
        self._parsed[record.name] = (record.mod_revision, wish)
        return wish

    def _parse(self, record: SpecRecord) -> Wish:
        running = record.desired is Desired.RUNNING
        try:
            (spec,) = parse(record.toml, f"spec {record.name}", databases=self._databases)
        except ConfigInvalid as invalid:
            why = "; ".join(problem.message for problem in invalid.problems)
            return Wish(record.name, None, running, why, record)
        return Wish(record.name, spec, running, self.conflicts.get(record.name, ""), record)

    def conflict(self, name: str, why: str) -> None:
        """This host's own file declares the name differently: it is no candidate until `apply` decides."""
        self.conflicts[name] = why
        self._parsed.pop(name, None)

    def settle(self, records: Mapping[str, SpecRecord]) -> None:
        """Forget what is not declared any more."""
        for name in [name for name in self._parsed if name not in records]:
            del self._parsed[name]
