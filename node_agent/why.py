"""Explains where a name or child stands, from what this agent has in memory.  Pure.

The present state comes first, then what would help, then what happened; so the answer is the same with etcd
down, only older, and says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from node_agent.claims import Due, NotHere
from node_agent.lifecycle import Child
from node_agent.pulse import Pulse
from node_agent.states import State
from node_agent.wishes import Wish
from registry.clock import Boottime
from registry.events import Recorded
from registry.names import did_you_mean
from registry.nodes import NodeRecord
from registry.ownership import Owner, PlacementRecord, Status
from registry.placement import Verdict
from registry.specs import Desired

HISTORY = 20
"""Events of the past in one explanation; `pgherd events` has more."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an explanation; ``at``: Unix seconds, 0 for now; ``hint``: a command that would help."""

    what: str
    hint: str = ""
    at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known about one name."""

    name: str
    wish: Wish | None
    owner: Owner | None
    status: Status | None
    placement: PlacementRecord | None
    child: Child | None
    pulse: Pulse | None
    verdict: Due | NotHere | None
    ranking: Sequence[Verdict]
    node: NodeRecord | None
    is_silent: bool
    ttl: float
    host: str
    now: Boottime
    known: Iterable[str]


def explain(facts: Facts, history: Iterable[Recorded]) -> list[Line]:
    """Return the present state of a name, then what happened last on this host, oldest first."""
    last = list(history)[-HISTORY:]
    past = [
        Line(recorded.event.describe(), recorded.event.advise(), recorded.at.timestamp()) for recorded in last
    ]
    return [*_present(facts), *past]


def _present(facts: Facts) -> list[Line]:
    name, owner = facts.name, facts.owner
    if facts.child is not None:
        return _on_this_host(facts.child, facts)
    if facts.wish is None and owner is None:
        return [Line(f"{name} is not declared", did_you_mean(name, facts.known) or "pgherd names")]
    at = facts.wish.record.at if facts.wish is not None else 0.0
    lines = [Line(f"{name}: {_wished(facts.wish)}", _wished_hint(facts.wish), at)]
    if owner is None:
        return lines + _ownerless(facts)
    state = facts.status.state.value if facts.status else "not started yet"
    where = f"{owner.host} ({owner.node}), epoch {owner.epoch}"
    elsewhere = (
        f"pgherd --agent {facts.node.address} why {name}" if facts.node and not facts.is_silent else ""
    )
    lines.append(Line(f"owned by {where}: {state}", elsewhere))
    if facts.is_silent:
        end = f"if that host is gone, its lease ends within {facts.ttl:g} s and another host takes over"
        lines.append(Line(f"the agent of {owner.host} does not answer; {end}", "pgherd nodes"))
    if facts.node is None:
        lines.append(Line(f"the owner's node {owner.node} is not in the directory", "pgherd nodes"))
    return lines


def _wished(wish: Wish | None) -> str:
    if wish is None:
        return "owned, but not declared any more"
    if wish.record.desired is Desired.STOPPED:
        return f"stopped by {wish.record.who}"
    return f"should run (spec by {wish.record.who})"


def _wished_hint(wish: Wish | None) -> str:
    return f"pgherd start {wish.name}" if wish is not None and not wish.running else ""


def _ownerless(facts: Facts) -> list[Line]:
    lines = [Line("nobody owns it")]
    if facts.wish is not None and not facts.wish.running:
        return lines
    match facts.verdict:
        case Due(at=at, why=why):
            left = max(at - facts.now, 0.0)
            when = f"in {left:.1f} s" if left else "now"
            lines.append(Line(f"{facts.host} will claim it {when}: {why}"))
        case NotHere(why=why):
            lines.append(Line(f"{facts.host} cannot take it: {why}"))
        case None:
            lines.append(Line(f"{facts.host} is not a member of the cluster at present", "pgherd status"))
    for verdict in facts.ranking:
        place = f"choice {verdict.rank + 1}" if verdict.rank is not None else "cannot take it"
        lines.append(Line(f"{verdict.host}: {place}: {verdict.why}"))
    if facts.placement is not None and facts.placement.reason:
        lines.append(Line(f"last released: {facts.placement.reason}", at=facts.placement.at))
    return lines


_HINTS: Mapping[State, str] = {
    State.FAILED: "pgherd logs {key}",
    State.BACKOFF: "pgherd logs {key}",
    State.STARTING: "pgherd logs {key}",
    State.STOPPED: "pgherd start {key}",
    State.FENCING: "pgherd doctor",
}


def _on_this_host(child: Child, facts: Facts) -> list[Line]:
    token = f", epoch {child.epoch}, start {child.start}" if child.ownership else ""
    pid = f", pid {child.pid}" if child.pid else ""
    lines = [
        Line(
            f"{child.key}: {child.state.value} on {facts.host}{pid}{token}",
            _HINTS.get(child.state, "").format(key=child.key),
            child.since,
        )
    ]
    if child.obstacle and child.state is not State.READY:
        lines.append(Line(child.obstacle))
    if facts.pulse is not None and (said := facts.pulse.describe()):
        lines.append(Line(said, f"pgherd logs {child.key}" if facts.pulse.is_problem else ""))
    if child.last_exit:
        lines.append(Line(f"its last process ended: {child.last_exit}", f"pgherd logs {child.key}"))
    return lines
