"""Whether a child whose process has ended is started again: the rules of Erlang/OTP's ``supervisor``.

From the manual (https://www.erlang.org/doc/apps/stdlib/supervisor.html):

- "A permanent child process is always restarted.  A temporary child process is never restarted [...].  A
  transient child process is restarted only if it terminates abnormally."
- "If more than MaxR number of restarts occur within MaxT seconds, the supervisor terminates all its children
  and then itself": with more than ``intensity`` restarts inside ``period`` the child gives up here.

Two things are pgherd's own.  OTP restarts without a pause; here the first restart is immediate and the next
wait 1 s, 2 s, 4 s ... up to 60 s, until a process was healthy for 60 s.  And a process that was superseded by
another owner is never restarted and counts for nothing.

Pure: no clock, no I/O, no asyncio; times are CLOCK_BOOTTIME seconds brought by the caller.
"""

from __future__ import annotations

import enum
import signal as signals
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, assert_never

from registry.clock import Boottime

BACKOFF_BASE = 1.0
"""Seconds before the second restart in a row; the first is immediate."""
BACKOFF_FACTOR = 2.0
BACKOFF_CAP = 60.0
"""Longest wait before jitter: a broken child still shows up in the log once a minute."""
BACKOFF_JITTER = 0.2
"""Share by which a wait is longer or shorter, so that hosts that fail together do not retry together."""
HEALTHY_AFTER = 60.0
"""Seconds of readiness after which the next restart is immediate again."""
SUPERSEDED_CODE = 75
"""Exit code (sysexits' EX_TEMPFAIL) by which a worker says that another owner has taken over."""


class Restart(enum.Enum):
    """When a child is started again."""

    PERMANENT = "permanent"
    TRANSIENT = "transient"
    TEMPORARY = "temporary"


class Exit(enum.Enum):
    """How a process ended, as far as it matters here."""

    NORMAL = "normal"
    ABNORMAL = "abnormal"
    START_FAILED = "start failed"
    SUPERSEDED = "superseded"
    STOPPED = "stopped"


def classify(
    code: int | None,
    signal: int | None,
    success_exit: Collection[int | str],
    *,
    asked_to_stop: bool,
    superseded_code: int | None = SUPERSEDED_CODE,
) -> Exit:
    """Return what an exit means: by ``code``, or by ``signal`` (its number) for a process that was killed.

    ``success_exit`` has the codes and signal names (``"SIGINT"``) that count as a normal end.  Whatever a
    process that was asked to stop says, it stopped.  Superseded goes before ``success_exit``: to start it
    again would be wrong however its author counts the code.
    """
    if asked_to_stop:
        return Exit.STOPPED
    if signal:
        return Exit.NORMAL if signal_name(signal) in success_exit else Exit.ABNORMAL
    if superseded_code is not None and code == superseded_code:
        return Exit.SUPERSEDED
    return Exit.NORMAL if code in success_exit else Exit.ABNORMAL


def signal_name(number: int) -> str:
    """Return ``SIGINT`` for 2; the number as text for a signal without a name."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return str(number)


@dataclass(frozen=True, slots=True)
class RestartWindow:
    """The restarts of one child that still count, oldest first.

    ``streak`` is the number of restarts since a process was last healthy: it decides the pause, ``times`` the
    budget.  The warden keeps :meth:`to_json` while the agent is restarted.
    """

    intensity: int
    period: float
    times: tuple[Boottime, ...] = ()
    streak: int = 0

    def record(self, now: Boottime) -> RestartWindow:
        """Return the window with a restart at ``now``; one exactly ``period`` ago still counts, as in OTP."""
        kept = tuple(time for time in self.times if now <= time + self.period)
        return replace(self, times=(*kept, now), streak=self.streak + 1)

    @property
    def exceeded(self) -> bool:
        """There were more than ``intensity`` restarts."""
        return len(self.times) > self.intensity

    def cleared(self) -> RestartWindow:
        """Return the window of a child that is started afresh."""
        return RestartWindow(self.intensity, self.period)

    def to_json(self) -> list[float]:
        """Return the streak, then the times."""
        return [self.streak, *self.times]

    @staticmethod
    def from_json(intensity: int, period: float, kept: Sequence[float]) -> RestartWindow:
        """Return the window kept by :meth:`to_json`, under the limits of today's spec."""
        if not kept:
            return RestartWindow(intensity, period)
        return RestartWindow(intensity, period, tuple(kept[1:]), int(kept[0]))


@dataclass(frozen=True, slots=True)
class Again:
    """Start it again after ``delay`` seconds."""

    delay: float
    window: RestartWindow


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Not here: the budget is spent.  ``window`` is empty, for the day it is started here again."""

    why: str
    window: RestartWindow


@dataclass(frozen=True, slots=True)
class Finished:
    """Not again, and nothing is wrong with that."""

    why: str


Decision: TypeAlias = Again | GiveUp | Finished


def decide(
    restart: Restart,
    exit: Exit,
    window: RestartWindow,
    now: Boottime,
    random: float,
    *,
    healthy_for: float = 0.0,
) -> Decision:
    """Return what follows the end of a process at ``now``.

    ``random`` in [0, 1) spreads the pause; ``healthy_for`` is how long the process was ready, in seconds.  A
    process that could not be started counts like one that crashed.
    """
    match exit:
        case Exit.STOPPED:
            return Finished("stopped as asked")
        case Exit.SUPERSEDED:
            return Finished("superseded by another owner")
        case Exit.NORMAL if restart is not Restart.PERMANENT:
            return Finished(f"ended normally, and it is {restart.value}")
        case Exit.ABNORMAL | Exit.START_FAILED if restart is Restart.TEMPORARY:
            return Finished(f"{_ENDED[exit]}, and it is temporary")
        case Exit.NORMAL | Exit.ABNORMAL | Exit.START_FAILED:
            return _restart(exit, window, now, random, healthy_for)
    assert_never(exit)


_ENDED = {
    Exit.NORMAL: "ended normally",
    Exit.ABNORMAL: "ended abnormally",
    Exit.START_FAILED: "could not be started",
}


def _restart(exit: Exit, window: RestartWindow, now: Boottime, random: float, healthy_for: float) -> Decision:
    healthy = healthy_for >= HEALTHY_AFTER
    window = (replace(window, streak=0) if healthy else window).record(now)
    if window.exceeded:
        times = "once" if len(window.times) == 1 else f"{len(window.times)} times"
        why = (
            f"{_ENDED[exit]} {times} within {window.period:g} s, "
            f"{window.intensity} restart{'' if window.intensity == 1 else 's'} allowed"
        )
        return GiveUp(why, window.cleared())
    return Again(pause(window.streak, random), window)


def pause(streak: int, random: float) -> float:
    """Return the seconds before restart number ``streak`` in a row; ``random`` in [0, 1) is the jitter."""
    if streak <= 1:
        return 0.0
    doublings = min(streak - 2, 32)
    wait = min(BACKOFF_BASE * BACKOFF_FACTOR**doublings, BACKOFF_CAP)
    return wait * (1 + BACKOFF_JITTER * (2 * random - 1))
