"""Which host should own a name: one pure function, the same answer on every host.

Every agent ranks the candidates for itself from what the directory shows and claims in its turn; etcd decides
who comes first.  So a disagreement between two agents costs a little time and never a second owner.

Order of the usable hosts:

1. fewest penalties.  A host is penalised when the name's restart budget was spent there.  This goes before
   preference: a preferred host that cannot run the daemon would otherwise win every round, and "here, then
   elsewhere" would never get elsewhere.  Nobody is shut out: when all are penalised the least is first.
2. tier of ``prefer``, the hosts that are not mentioned last, as in OTP's ``distributed`` applications.
3. rendezvous hash of name and host (Thaler and Ravishankar, 1998): names spread evenly, and when a host comes
   or goes only the names that it gains or had are ranked differently at the top.

The number of names a host already owns is shown to people but does not count: two agents see it differently
for a moment, and would rank differently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a spec asks of a host: labels it must have, tiers of preference, databases it must know."""

    require: Mapping[str, str] = field(default_factory=dict)
    prefer: tuple[tuple[str, ...], ...] = ()
    databases: frozenset[str] = frozenset()

    def tier(self, host: str) -> int:
        """Return the tier of ``host``, counted from 0; hosts that are not mentioned share the last."""
        return next((tier for tier, hosts in enumerate(self.prefer) if host in hosts), len(self.prefer))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live node of a host, as the directory shows it.  ``names`` is how many it owns."""

    host: str
    node: str
    labels: Mapping[str, str]
    databases: frozenset[str]
    draining: bool = False
    names: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where a host stands for a name: its ``rank`` from 0, or None if it cannot own it, and why."""

    host: str
    rank: int | None
    why: str


def rank(
    name: str, constraints: Constraints, candidates: Iterable[Candidate], penalties: Mapping[str, int]
) -> tuple[str, ...]:
    """Return the hosts that may own ``name``, the one that should first."""
    usable = {candidate.host for candidate in candidates if not obstacle(constraints, candidate)}
    return tuple(
        sorted(
            usable,
            key=lambda host: (penalties.get(host, 0), constraints.tier(host), -weight(name, host), host),
        )
    )


def obstacle(constraints: Constraints, candidate: Candidate) -> str:
    """Return why a host cannot own a name of this spec, in words for an operator; empty if it can."""
    reasons = [
        f'label {key} is "{candidate.labels[key]}", the spec requires "{value}"'
        if key in candidate.labels
        else f'it has no label {key}, the spec requires "{value}"'
        for key, value in sorted(constraints.require.items())
        if candidate.labels.get(key) != value
    ]
    reasons += [
        f"its agent.toml has no [database.{database}]"
        for database in sorted(constraints.databases - candidate.databases)
    ]
    if candidate.draining:
        reasons.append("it is being drained")
    return "; ".join(reasons)


def explain(
    name: str, constraints: Constraints, candidates: Iterable[Candidate], penalties: Mapping[str, int]
) -> tuple[Verdict, ...]:
    """Return a verdict on every host: those that may own ``name`` in order, then the others by name."""
    known = sorted(candidates, key=lambda candidate: candidate.host)
    names = {candidate.host: candidate.names for candidate in known}
    ranked = rank(name, constraints, known, penalties)
    able = [
        Verdict(host, place, _merits(constraints, host, penalties.get(host, 0), names[host]))
        for place, host in enumerate(ranked)
    ]
    unable = {
        candidate.host: obstacle(constraints, candidate)
        for candidate in known
        if candidate.host not in ranked
    }
    return (*able, *(Verdict(host, None, why) for host, why in unable.items()))


def _merits(constraints: Constraints, host: str, penalty: int, names: int) -> str:
    tier = constraints.tier(host)
    merits = [f"owns {names} name{'' if names == 1 else 's'}"]
    if constraints.prefer:
        merits.insert(0, f"prefer tier {tier + 1}" if tier < len(constraints.prefer) else "not in prefer")
    if penalty:
        merits.insert(0, f"gave up on it {'once' if penalty == 1 else f'{penalty} times'}")
    return ", ".join(merits)


def weight(name: str, host: str) -> int:
    """Return the rendezvous weight of a host for a name; the largest wins.  The same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{name}\0{host}".encode(), digest_size=8).digest())
