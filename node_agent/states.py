"""Where a child can stand, what it may become next, and by what right it runs.

adopting ─▶ starting ─▶ ready ─▶ stopping ─▶ stopped
fencing ──▶ starting     │  └──▶ backoff ─▶ fencing
                         └──▶ finished, failed, superseded
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from registry.clock import Boottime


class State(enum.Enum):
    """Where a child stands; the values are what ``pgherd ps`` prints."""

    ADOPTING = "adopting"
    FENCING = "fencing"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    STOPPED = "stopped"
    FINISHED = "finished"
    FAILED = "failed"
    SUPERSEDED = "superseded"


_AFTER_A_PROCESS = frozenset(
    {State.BACKOFF, State.FENCING, State.FINISHED, State.FAILED, State.SUPERSEDED, State.STOPPED}
)
TRANSITIONS: Mapping[State, frozenset[State]] = {
    # A process of the agent before this one; not ours until its owner key is confirmed.
    State.ADOPTING: frozenset({State.STARTING, State.STOPPING}) | _AFTER_A_PROCESS,
    # The token goes into every database of `fence` before the process exists.
    State.FENCING: frozenset({State.STARTING, State.STOPPED, State.SUPERSEDED}),
    # The process exists and is not ready to serve.
    State.STARTING: frozenset({State.READY, State.STOPPING}) | _AFTER_A_PROCESS,
    # Calls reach it.
    State.READY: frozenset({State.STOPPING}) | _AFTER_A_PROCESS,
    # Its stop stages run; nothing new reaches it.
    State.STOPPING: frozenset({State.STOPPED, State.FENCING, State.SUPERSEDED}),
    # Waiting before the next start.
    State.BACKOFF: frozenset({State.FENCING, State.STOPPED, State.SUPERSEDED}),
    # Ends: asked to stop; ended by itself and not to be restarted; restart budget spent; owner elsewhere.
    State.STOPPED: frozenset(),
    State.FINISHED: frozenset(),
    State.FAILED: frozenset(),
    State.SUPERSEDED: frozenset(),
}

ENDS = frozenset(state for state, following in TRANSITIONS.items() if not following)


@dataclass(frozen=True, slots=True)
class Ownership:
    """The right to run a name: an epoch under a lease of this node."""

    name: str
    epoch: int
    claim: str
    node: str
    lease: int


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a child, as the warden started it."""

    worker: str
    pid: int
    start: int
    since: Boottime
