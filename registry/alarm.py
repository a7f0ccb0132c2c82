"""One timer for any number of deadlines.

Whoever holds many requests looks through all of them when the earliest is due; with the usual case of equal
timeouts that is once per timeout, not once per request, and a request costs one comparison.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf

from registry.clock import Boottime, Clock

NEVER: Boottime = inf
_SHORTEST = 0.005
"""Seconds between two rings at least, so that a thousand different deadlines are not a thousand timers."""
_LONGEST = 1.0
"""Seconds of one timer at most: the loop's clock stands still while the machine is suspended."""


class Alarm:
    """Calls ``ring(now)`` when the earliest noted deadline has passed; it returns the next one, or NEVER."""

    def __init__(self, clock: Clock, ring: Callable[[Boottime], Boottime]) -> None:
        self._clock = clock
        self._ring = ring
        self._due = NEVER
        self._timer: asyncio.TimerHandle | None = None

    def note(self, deadline: Boottime) -> None:
        """Ring at ``deadline`` at the latest (and a few milliseconds after it)."""
        if deadline < self._due:
            self._arm(deadline)

    def stop(self) -> None:
        """Forget every deadline."""
        self._due = NEVER
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, deadline: Boottime) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = deadline
        delay = min(max(deadline - self._clock.now(), _SHORTEST), _LONGEST)
        self._timer = asyncio.get_running_loop().call_later(delay, self._fire)

    def _fire(self) -> None:
        self._timer = None
        now = self._clock.now()
        due, self._due = self._due, NEVER
        following = due if now < due else self._ring(now)
        if following < self._due:
            self._arm(following)
