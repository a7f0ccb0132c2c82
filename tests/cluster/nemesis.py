"""Hurts processes, and notes for how long each one certainly did not run."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from registry.clock import SYSTEM_CLOCK
from tests.cluster.history import Pauses
from tests.support.hosts import eventually

_STOPS_WITHIN = 5.0


class Nemesis:
    """``pauses`` is where it notes what it stopped."""

    def __init__(self) -> None:
        self.pauses = Pauses()
        self._stopped: set[int] = set()

    def kill(self, *pids: int) -> None:
        """SIGKILL, in this order and without waiting in between."""
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def signal(self, pid: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    async def stop(self, *pids: int) -> None:
        """SIGSTOP; return when none of them runs any more."""
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            self._stopped.add(pid)
        for pid in pids:
            await eventually(lambda pid=pid: _state(pid) in "TZX", _STOPS_WITHIN, f"{pid} is stopped")  # type: ignore[misc]
            self.pauses.begin(pid, SYSTEM_CLOCK.now())

    async def gone(self, *pids: int) -> None:
        """Return when none of them runs any more."""
        for pid in pids:
            await eventually(lambda pid=pid: _state(pid) in "ZX", _STOPS_WITHIN, f"{pid} is dead")  # type: ignore[misc]

    def resume(self, *pids: int) -> None:
        """SIGCONT; those that were killed meanwhile stay dead."""
        for pid in pids:
            self.pauses.end(pid, SYSTEM_CLOCK.now())
            self.signal(pid, signal.SIGCONT)
            self._stopped.discard(pid)

    def resume_all(self) -> None:
        self.resume(*self._stopped)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
