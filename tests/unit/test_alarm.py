"""One timer for many deadlines."""

from __future__ import annotations

import asyncio

import pytest

from registry.alarm import NEVER, Alarm
from tests.support.clocks import LoopClock

pytestmark = pytest.mark.looptime


class Deadlines:
    """Holds deadlines, and notes when it was told that they had passed."""

    def __init__(self) -> None:
        self.clock = LoopClock()
        self.held: list[float] = []
        self.passed: list[tuple[float, float]] = []
        self.rings = 0
        self.alarm = Alarm(self.clock, self._ring)

    def hold(self, seconds: float) -> None:
        deadline = self.clock.now() + seconds
        self.held.append(deadline)
        self.alarm.note(deadline)

    def _ring(self, now: float) -> float:
        self.rings += 1
        self.passed += [(deadline, now) for deadline in self.held if deadline <= now]
        self.held = [deadline for deadline in self.held if deadline > now]
        return min(self.held, default=NEVER)


async def test_each_deadline_is_noticed_soon_after_it_passed() -> None:
    deadlines = Deadlines()
    for seconds in (3.0, 0.5, 0.501, 7.0, 0.5):
        deadlines.hold(seconds)
    await asyncio.sleep(10)
    assert len(deadlines.passed) == 5
    assert all(0 <= noticed - deadline < 0.01 for deadline, noticed in deadlines.passed)


async def test_equal_timeouts_ring_once_a_timeout() -> None:
    deadlines = Deadlines()
    for _ in range(100):
        deadlines.hold(5.0)
        await asyncio.sleep(0.001)
    deadlines.held = deadlines.held[-1:]
    await asyncio.sleep(6)
    assert len(deadlines.passed) == 1
    assert deadlines.rings <= 2


async def test_stopped_alarm_is_silent_until_something_is_noted() -> None:
    deadlines = Deadlines()
    deadlines.hold(1.0)
    deadlines.alarm.stop()
    await asyncio.sleep(2)
    assert deadlines.rings == 0
    deadlines.hold(1.0)
    await asyncio.sleep(2)
    assert len(deadlines.passed) == 2
