"""The hard deadlines a warden holds, one per lease.

Pure.  The rules that keep a worker from outliving the lease it was started under: a deadline only rises,
never after it has passed, and a lease that is over (passed or forgotten) stays over for the life of the
warden. Moments are CLOCK_BOOTTIME in seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import inf


class Leases:
    """All leases an agent of this warden ever named."""

    def __init__(self) -> None:
        self._deadlines: dict[int, float] = {}
        self._over: set[int] = set()

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """Yield the leases that are not over, with their deadlines."""
        return iter(self._deadlines.items())

    def raise_deadline(self, lease: int, deadline: float, now: float) -> bool:
        """Let ``lease`` last until ``deadline``; False if that is not possible any more."""
        if lease == 0 or lease in self._over or not now < deadline < inf:
            return False
        if self._deadlines.get(lease, deadline) <= now:
            return False
        self._deadlines[lease] = max(deadline, self._deadlines.get(lease, deadline))
        return True

    def holds(self, lease: int, now: float) -> bool:
        """Tell whether a worker may run under ``lease`` now; lease 0 is that of workers without one."""
        return lease == 0 or self._deadlines.get(lease, now) > now

    def end(self, lease: int) -> None:
        """Make ``lease`` be over."""
        self._deadlines.pop(lease, None)
        self._over.add(lease)

    def expire(self, now: float) -> list[int]:
        """Return the leases whose deadline has passed since the last call; they are over."""
        passed = [lease for lease, deadline in self._deadlines.items() if deadline <= now]
        for lease in passed:
            self.end(lease)
        return passed

    def earliest(self, among: Collection[int] | None = None) -> float | None:
        """Return the next deadline, of all leases or of those ``among``; None if there is none."""
        return min(
            (deadline for lease, deadline in self._deadlines.items() if among is None or lease in among),
            default=None,
        )
