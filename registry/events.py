"""Everything worth telling, as one frozen value per kind.

Log lines, ``pgherd why``, the narration of the sandbox and (later) metrics are made from these; nothing logs
on its own.  An :class:`EventLog` keeps the last ones in memory, so that ``why`` answers when etcd is down.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import ClassVar

log = logging.getLogger("pgherd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events.  ``name`` is the global name or child id it is about, empty for the host's own."""

    level: ClassVar[int] = logging.INFO
    text: ClassVar[str] = ""
    hint: ClassVar[str] = ""
    """A command that shows more or helps; may be empty."""

    name: str = ""

    def describe(self) -> str:
        """Return the event as one line of English."""
        return self._filled(self.text)

    def advise(self) -> str:
        """Return the hint for this event."""
        return self._filled(self.hint)

    def _filled(self, template: str) -> str:
        return template.format(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


@dataclass(frozen=True, slots=True)
class Recorded:
    """An event and when it happened: wall clock for people only."""

    at: datetime
    event: Event


class EventLog:
    """Receives events, remembers the last ``size``, logs each once, and tells subscribers."""

    def __init__(self, size: int = 5000) -> None:
        self._recent: deque[Recorded] = deque(maxlen=size)
        self._subscribers: list[Callable[[Recorded], None]] = []

    def __call__(self, event: Event) -> None:
        recorded = Recorded(datetime.now(UTC), event)
        self._recent.append(recorded)
        log.log(event.level, "%s", event.describe(), extra={"event": event})
        for tell in tuple(self._subscribers):
            tell(recorded)

    def about(self, name: str) -> Iterator[Recorded]:
        """Yield the remembered events about ``name``, oldest first."""
        return (recorded for recorded in self._recent if recorded.event.name == name)

    def all(self) -> Iterator[Recorded]:
        """Yield all remembered events, oldest first."""
        return iter(tuple(self._recent))

    def subscribe(self, tell: Callable[[Recorded], None]) -> Callable[[], None]:
        """Call ``tell`` for each event from now on; returns the function that ends it."""
        self._subscribers.append(tell)
        return lambda: self._subscribers.remove(tell)


def kind(event: Event) -> str:
    """Return the event's kind in snake case: ``NameClaimed`` is ``name_claimed``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentStarted(Event):
    text = "agent {version} on {host} started (generation {generation}, containment {containment})"
    host: str
    version: str
    generation: int
    containment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentFailed(Event):
    level = logging.ERROR
    text = "agent on {host} cannot go on, the warden will start another: {why}"
    host: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentStopping(Event):
    text = "agent on {host} stops ({mode})"
    host: str
    mode: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdUnreachable(Event):
    level = logging.WARNING
    text = "etcd unreachable: {reason}"
    hint = "pgherd doctor"
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdReachable(Event):
    text = "etcd reachable again"


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStarted(Event):
    text = "node {node} has lease {lease:x}, TTL {ttl:.1f} s"
    node: str
    lease: int
    ttl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionAdopted(Event):
    text = "node {node} adopted with lease {lease:x} after a restart of the agent"
    node: str
    lease: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLost(Event):
    level = logging.ERROR
    text = "node {node} lost its lease: {reason}"
    hint = "pgherd doctor"
    node: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinRefused(Event):
    level = logging.ERROR
    text = "cannot join the cluster: {why}; {remedy}"
    why: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectorySynced(Event):
    text = "directory in sync at revision {revision}: {names} names, {nodes} nodes"
    revision: int
    names: int
    nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryLost(Event):
    level = logging.WARNING
    text = "directory out of sync: {reason}"
    hint = "pgherd doctor"
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordMalformed(Event):
    level = logging.ERROR
    text = "{key} in etcd is ignored: {why}"
    key: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeJoined(Event):
    text = "node {node} joined"
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLeft(Event):
    level = logging.WARNING
    text = "node {node} left"
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NameClaimed(Event):
    text = "{name}: claimed by {node}, epoch {epoch} ({why})"
    node: str
    epoch: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimLost(Event):
    text = "{name}: not claimed: {why}"
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NameReleased(Event):
    text = "{name}: released, epoch {epoch}: {why}"
    epoch: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NameSuperseded(Event):
    level = logging.ERROR
    text = "{name}: epoch {epoch} is not ours any more: {why}"
    epoch: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerChanged(Event):
    text = "{name}: owner is {node}, epoch {epoch}"
    node: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerGone(Event):
    level = logging.WARNING
    text = "{name}: no owner since {node} (epoch {epoch}) is gone"
    hint = "pgherd nodes"
    node: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerReleased(Event):
    text = "{name}: given up by {node}, epoch {epoch}: {why}"
    node: str
    epoch: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceRaised(Event):
    text = "{name}: fence in database {database} raised to {epoch}.{start} in {milliseconds:.0f} ms{ended}"
    database: str
    epoch: int
    start: int
    milliseconds: float
    ended: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceFailed(Event):
    level = logging.ERROR
    text = "{name}: fence in database {database} not raised to {epoch}.{start}: {why}"
    hint = "pgherd doctor"
    database: str
    epoch: int
    start: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStarted(Event):
    text = "{name}: started, pid {pid}, start {start}"
    pid: int
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReady(Event):
    text = "{name}: ready {milliseconds:.0f} ms after its start"
    milliseconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerAdopted(Event):
    text = "{name}: adopted, pid {pid}, not interrupted"
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStopping(Event):
    text = "{name}: stopping ({why})"
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExited(Event):
    level = logging.WARNING
    text = "{name}: pid {pid} ended: {how}"
    hint = "pgherd logs {name}"
    pid: int
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStartFailed(Event):
    level = logging.ERROR
    text = "{name}: could not be started: {why}"
    hint = "pgherd logs {name}"
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRestarting(Event):
    text = "{name}: restart {count} of {intensity} in {period:g} s, in {delay:.1f} s"
    count: int
    intensity: int
    period: float
    delay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGaveUp(Event):
    level = logging.ERROR
    text = "{name}: given up here: {why}"
    hint = "pgherd logs {name}"
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecChanged(Event):
    text = "{name}: spec {what} by {who}"
    what: str
    who: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecInvalid(Event):
    level = logging.ERROR
    text = "{name}: spec not usable on this host: {why}"
    hint = "pgherd specs {name}"
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDropped(Event):
    level = logging.WARNING
    text = "link with {peer} ended: {why}"
    peer: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerNotAdopted(Event):
    level = logging.WARNING
    text = "{name}: pid {pid} of the former agent is killed: {why}"
    pid: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdRestored(Event):
    level = logging.ERROR
    text = "etcd was restored or replaced, every name of this host was given up: {reason}"
    reason: str
