"""Time, for everything that waits or expires.

Deadlines are absolute CLOCK_BOOTTIME seconds (float): the clock that keeps counting while the machine is
suspended, so a lease cannot outlive its holder's sleep.  Nothing in pgherd measures with the wall clock.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

Boottime = float
"""Absolute seconds of CLOCK_BOOTTIME; comparable between processes of one host, meaningless elsewhere."""


class Clock(Protocol):
    """What reads time and waits; tests bring a virtual one."""

    def now(self) -> Boottime:
        """Return the present, in seconds of CLOCK_BOOTTIME."""

    async def sleep_until(self, when: Boottime) -> None:
        """Return once :meth:`now` is at least ``when``."""


class SystemClock:
    """The kernel's CLOCK_BOOTTIME."""

    def now(self) -> Boottime:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def sleep_until(self, when: Boottime) -> None:
        # asyncio sleeps by the monotonic clock, which may be behind this one after a suspend, never ahead.
        await asyncio.sleep(max(when - self.now(), 0.0))


SYSTEM_CLOCK = SystemClock()
