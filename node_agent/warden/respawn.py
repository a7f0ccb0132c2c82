"""How long to wait before a warden or an agent is started again.  Pure."""

from __future__ import annotations

SETTLED_AFTER = 10.0
"""A process that lived this many seconds was all right: its successor starts at once."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0


class Respawn:
    """Counts the deaths in a row of processes that had not settled."""

    def __init__(self) -> None:
        self._young_deaths = 0

    def pause(self, lived: float) -> float:
        """Return the seconds to wait after the death of a process that ``lived`` so many seconds.

        The first death never waits; after that 0.1 s, doubled up to 5 s, until one has settled.
        """
        self._young_deaths = 0 if lived >= SETTLED_AFTER else self._young_deaths + 1
        if self._young_deaths < 2:
            return 0.0
        doubled: float = FIRST_PAUSE * 2 ** min(self._young_deaths - 2, 16)
        return min(doubled, LONGEST_PAUSE)
