"""Clocks for tests."""

from __future__ import annotations

import asyncio

from registry.clock import Boottime


class LoopClock:
    """The event loop's own time: virtual under ``@pytest.mark.looptime``, so that waiting takes none."""

    def now(self) -> Boottime:
        return asyncio.get_running_loop().time()

    async def sleep_until(self, when: Boottime) -> None:
        await asyncio.sleep(max(when - self.now(), 0.0))


class ManualClock:
    """Stands still until it is told to move; whoever sleeps is woken when it has moved far enough."""

    def __init__(self, now: Boottime = 1000.0) -> None:
        self._now = now
        self._moved = asyncio.Event()

    def now(self) -> Boottime:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds
        self._moved.set()
        self._moved = asyncio.Event()

    async def sleep_until(self, when: Boottime) -> None:
        while self._now < when:
            await self._moved.wait()
