"""What happened in a cluster test, on one clock: who ran when, what was asked, done and committed.

Moments are CLOCK_BOOTTIME seconds.  Nothing here comes from an agent: lives are seen by an observer that
every worker reports to and whose end it sees by pidfd, effects are told by the workers as they happen,
commits are read from PostgreSQL, calls are noted by whoever made them, pauses by whoever sent SIGSTOP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Token(NamedTuple):
    """Who acts: the ownership, and the process counted within it."""

    epoch: int
    start: int


NOBODY = Token(0, 0)


@dataclass(frozen=True, slots=True)
class Life:
    """One process under a name, from its first act to its death; ``ended`` None: it still runs.

    ``pauses`` are the times in which it was certainly stopped by SIGSTOP.
    """

    name: str
    token: Token
    host: str
    pid: int
    began: float
    ended: float | None = None
    pauses: tuple[tuple[float, float | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A request as its sender saw it.

    ``outcome`` is "reply", "refused" or "unknown" (also when nothing was heard at all), ``finished`` when
    that was known.  ``token`` is who replied.
    """

    op: str
    name: str
    kind: str
    sent: float
    finished: float | None = None
    outcome: str = "unknown"
    token: Token | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Effect:
    """A request was executed, at this moment, by this process."""

    op: str
    name: str
    token: Token
    at: float


@dataclass(frozen=True, slots=True)
class Commit:
    """A fenced transaction of this process is in the table; ``at`` orders commits of one server."""

    op: str
    name: str
    token: Token
    at: float


@dataclass(frozen=True, slots=True)
class History:
    """Everything that is known about one test."""

    lives: tuple[Life, ...] = ()
    calls: tuple[Call, ...] = ()
    effects: tuple[Effect, ...] = ()
    commits: tuple[Commit, ...] = ()


@dataclass(slots=True)
class Pauses:
    """Which processes were stopped, from when to when."""

    known: dict[int, list[tuple[float, float | None]]] = field(default_factory=dict)

    def begin(self, pid: int, at: float) -> None:
        """``pid`` is stopped, since ``at`` at the latest."""
        self.known.setdefault(pid, []).append((at, None))

    def end(self, pid: int, at: float) -> None:
        """``pid`` may run again from ``at`` on."""
        spans = self.known.get(pid, [])
        if spans and spans[-1][1] is None:
            spans[-1] = (spans[-1][0], at)

    def of(self, pid: int) -> tuple[tuple[float, float | None], ...]:
        return tuple(self.known.get(pid, ()))
