"""What a new agent does with the workers that the one before it left running.

Nothing is relabelled: a worker is taken over only with the spec, at the epoch and under the lease it was
started with, and a named one serves only after etcd has confirmed its owner key.  A node-local one of another
spec is taken over to be stopped, and started anew when nothing of it is left.  Everything else that still
runs is killed before this agent takes any name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from node_agent.lifecycle import Child
from node_agent.restarts import RestartWindow
from node_agent.spec.child import ChildSpec, parse, to_toml
from node_agent.states import Ownership
from node_agent.warden.protocol import WorkerRow
from registry.clock import Boottime
from registry.config import ConfigInvalid, Timing
from registry.store import LeaseId

SESSION = "session"
"""Key of the remembered session in the warden."""


@dataclass(frozen=True, slots=True)
class FormerSession:
    """The session of the agent before this one."""

    node: str
    lease: LeaseId
    ttl: float
    hard_deadline: Boottime


@dataclass(frozen=True, slots=True)
class Adopt:
    """Take this worker over; ``replace`` is why its process must be followed by another one at once."""

    row: WorkerRow
    spec: ChildSpec
    ownership: Ownership | None
    window: RestartWindow
    replace: str = ""


@dataclass(frozen=True, slots=True)
class Kill:
    """Do not take this worker over."""

    row: WorkerRow
    why: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Nothing of this worker is left, and nobody has to decide about its end."""

    row: WorkerRow


def remembered_session(
    remembered: Mapping[str, Any], leases: Mapping[LeaseId, Boottime], now: Boottime
) -> FormerSession | None:
    """Return the session that may be adopted: still before its soft deadline, by the warden's hard one."""
    note = remembered.get(SESSION)
    if not note or (hard := leases.get(note["lease"])) is None:
        return None
    timing = Timing(note["ttl"])
    if now >= hard - (timing.hard - timing.soft):
        return None
    return FormerSession(note["node"], note["lease"], note["ttl"], hard)


def session_note(node: str, lease: LeaseId, ttl: float) -> dict[str, Any]:
    """Return what the warden is to remember of a session."""
    return {"node": node, "lease": lease, "ttl": ttl}


def child_key(key: str) -> str:
    """Key of a remembered child in the warden."""
    return f"child/{key}"


def child_note(child: Child, window: RestartWindow) -> dict[str, Any]:
    """Return what the warden is to remember of a child."""
    return {
        "toml": to_toml(child.spec),
        "claim": child.ownership.claim if child.ownership else "",
        "window": window.to_json(),
    }


def plan(
    rows: Sequence[WorkerRow],
    remembered: Mapping[str, Any],
    former: FormerSession | None,
    local_specs: Mapping[str, ChildSpec],
) -> list[Adopt | Kill | Leave]:
    """Decide about every worker of the warden's table."""
    verdicts = [_decide(row, remembered.get(child_key(row.child)), former, local_specs) for row in rows]
    return [
        Leave(verdict.row) if isinstance(verdict, Kill) and verdict.row.state == "gone" else verdict
        for verdict in verdicts
    ]


def _decide(
    row: WorkerRow,
    note: Mapping[str, Any] | None,
    former: FormerSession | None,
    local_specs: Mapping[str, ChildSpec],
) -> Adopt | Kill:
    unknown = "the agent before this one left no note about it"
    if not row.lease:
        if (spec := local_specs.get(row.child)) is None:
            return Kill(row, "it is not declared any more")
        fresh = RestartWindow(spec.intensity, spec.period)
        if note is None:
            return Adopt(row, spec, None, fresh, replace=unknown)
        if to_toml(spec) != note["toml"]:
            return Adopt(row, spec, None, fresh, replace="its spec has changed")
        return Adopt(row, spec, None, _window(spec, note))
    if note is None:
        return Kill(row, unknown)
    if former is None or row.lease != former.lease:
        return Kill(row, "its lease is over")
    try:
        (spec,) = parse(note["toml"], f"note about {row.child}")
    except ConfigInvalid as invalid:
        return Kill(row, f"its spec is not valid for this version: {invalid}")
    ownership = Ownership(row.name, row.epoch, note["claim"], former.node, former.lease)
    return Adopt(row, spec, ownership, _window(spec, note))


def _window(spec: ChildSpec, note: Mapping[str, Any]) -> RestartWindow:
    return RestartWindow.from_json(spec.intensity, spec.period, note["window"])
