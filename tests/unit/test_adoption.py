"""What a new agent takes over of the one before it."""

from __future__ import annotations

from typing import Any

from node_agent.adoption import (
    SESSION,
    Adopt,
    FormerSession,
    Kill,
    Leave,
    child_key,
    plan,
    remembered_session,
    session_note,
)
from node_agent.restarts import RestartWindow
from node_agent.spec.child import ChildSpec, parse, to_toml
from node_agent.warden.protocol import WorkerRow, WorkerState
from registry.config import Timing

NAMED = 'schema = 1\n[[child]]\nid = "s"\nname = "sweeper"\nrun.command = ["sleep", "9"]\n'
LOCAL = 'schema = 1\n[[child]]\nid = "local"\nrun.command = ["sleep", "9"]\n'
FORMER = FormerSession("alpha-1", 77, 5.0, 1000.0)


def spec(text: str) -> ChildSpec:
    (only,) = parse(text, "x.toml")
    return only


def row(
    child: str, *, lease: int, name: str = "", epoch: int = 0, state: WorkerState = "running"
) -> WorkerRow:
    return WorkerRow(
        worker="w",
        child=child,
        name=name,
        lease=lease,
        epoch=epoch,
        start=3,
        pid=10,
        state=state,
        since=1.0,
    )


def note(of: ChildSpec) -> dict[str, Any]:
    return {"toml": to_toml(of), "claim": "c", "window": [1, 5.0]}


def test_a_named_worker_is_adopted_with_its_token_spec_and_restart_window() -> None:
    known = spec(NAMED)
    named = row("sweeper", lease=77, name="sweeper", epoch=5)
    (verdict,) = plan([named], {child_key("sweeper"): note(known)}, FORMER, {})
    assert isinstance(verdict, Adopt)
    assert verdict.spec == known
    assert verdict.ownership is not None
    assert (verdict.ownership.epoch, verdict.ownership.lease, verdict.ownership.claim) == (5, 77, "c")
    assert verdict.window.times == (5.0,)


def test_a_named_worker_of_another_lease_is_killed() -> None:
    named = row("sweeper", lease=76, name="sweeper", epoch=5)
    notes = {child_key("sweeper"): note(spec(NAMED))}
    assert plan([named], notes, FORMER, {}) == [Kill(named, "its lease is over")]
    assert plan([named], notes, None, {}) == [Kill(named, "its lease is over")]


def test_a_local_worker_needs_an_unchanged_declaration() -> None:
    local = row("local", lease=0)
    notes = {child_key("local"): note(spec(LOCAL))}
    (verdict,) = plan([local], notes, None, {"local": spec(LOCAL)})
    assert isinstance(verdict, Adopt)
    changed = spec(LOCAL.replace('"9"', '"10"'))
    assert plan([local], notes, None, {"local": changed}) == [
        Adopt(local, changed, None, RestartWindow(changed.intensity, changed.period), "its spec has changed")
    ]
    assert plan([local], notes, None, {}) == [Kill(local, "it is not declared any more")]


def test_a_worker_nobody_left_a_note_about_is_killed() -> None:
    (verdict,) = plan([row("sweeper", lease=77, name="sweeper", epoch=5)], {}, FORMER, {})
    assert isinstance(verdict, Kill)
    (verdict,) = plan([row("x", lease=0)], {}, None, {})
    assert isinstance(verdict, Kill)


def test_a_local_worker_nobody_left_a_note_about_is_replaced() -> None:
    """Killing it and starting another at once would be refused by the warden, and count as a failure."""
    (verdict,) = plan([row("x", lease=0)], {}, None, {"x": spec(LOCAL)})
    assert isinstance(verdict, Adopt)
    assert verdict.replace


def test_what_ended_before_is_neither_killed_nor_adopted_unless_its_end_is_to_be_decided_about() -> None:
    gone = row("sweeper", lease=77, name="sweeper", epoch=5, state="gone")
    local = row("x", lease=0, state="gone")
    assert plan([gone, local], {}, FORMER, {}) == [Leave(gone), Leave(local)]
    notes = {child_key("sweeper"): note(spec(NAMED))}
    assert plan([gone], notes, None, {}) == [Leave(gone)]
    (verdict,) = plan([gone], notes, FORMER, {})
    assert isinstance(verdict, Adopt)


def test_a_session_is_adopted_only_before_its_soft_deadline() -> None:
    timing = Timing(5.0)
    remembered = {SESSION: session_note("alpha-1", 77, 5.0)}
    soft = 1000.0 - (timing.hard - timing.soft)
    assert remembered_session(remembered, {77: 1000.0}, soft - 0.01) == FORMER
    assert remembered_session(remembered, {77: 1000.0}, soft) is None
    assert remembered_session(remembered, {78: 1000.0}, 0.0) is None
    assert remembered_session({}, {77: 1000.0}, 0.0) is None
