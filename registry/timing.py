"""The deadlines of a session, all derived from its lease's time to live and checked against each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

from registry.toml.source import ConfigInvalid, Problem
from registry.units import format_duration

ETCD_ELECTION = 1.0
"""Seconds of etcd's default ``--election-timeout``; its API does not tell the one in force."""
SHORTEST_ELECTION = 0.5
"""Seconds of the election timeout that the shortest accepted lease is made for."""

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Timing:
    """When a session is renewed, stops being trusted, and kills; all in seconds.

    Every deadline counts from the moment the last acknowledged keepalive was *sent*: etcd counts the lease
    from a later moment, so the holder is always the first to give up.  ``election`` is etcd's election
    timeout.  Raises ConfigInvalid if the lease is too short to be kept.
    """

    ttl: float
    election: float = SHORTEST_ELECTION

    def __post_init__(self) -> None:
        if self.ttl <= 0 or self.ttl != int(self.ttl):
            raise _unusable(self.ttl, "etcd counts leases in whole seconds")
        if not (self.outlives_misses and self.outlives_election):
            shortest = format_duration(default_ttl(self.election))
            raise _unusable(
                self.ttl,
                f"an election timeout of {format_duration(self.election)} can leave etcd leaderless for "
                f"{format_duration(4 * self.election)}, longer than the lease is trusted",
                f'the shortest is "{shortest}"',
            )

    @property
    def keepalive_every(self) -> float:
        """ttl/6: two renewals in a row may fail before trust ends."""
        return self.ttl / 6

    @property
    def attempt(self) -> float:
        """ttl/10: longest wait for one member's answer to a renewal, then the next member is asked."""
        return self.ttl / 10

    @property
    def hard(self) -> float:
        """ttl - (0.5 s + ttl/10): the warden kills; the rest is for clock rates, the kill, and scheduling."""
        return self.ttl - (0.5 + self.ttl / 10)

    @property
    def soft(self) -> float:
        """hard - ttl/6: trust ends, and stop stages have ttl/6 until the hard deadline."""
        return self.hard - self.ttl / 6

    @property
    def outlives_misses(self) -> bool:
        """Trust does not end before the second renewal in a row has failed."""
        return 2 * self.keepalive_every + self.attempt < self.soft

    @property
    def outlives_election(self) -> bool:
        """Four election timeouts (one split vote) after a whole renewal interval end before trust does."""
        return self.keepalive_every + 4 * self.election <= self.soft + _ROUNDING

    def table(self) -> tuple[tuple[str, float, str], ...]:
        """Return (what, seconds, formula) for ``pgherd doctor``."""
        return (
            ("lease", self.ttl, "lease.ttl: etcd frees the names of a host this long after its last renewal"),
            ("keepalive every", self.keepalive_every, "ttl / 6"),
            ("keepalive attempt", self.attempt, "ttl / 10, then the next etcd member"),
            ("trusted until", self.soft, "hard - ttl / 6: calls are refused, workers are stopped"),
            ("killed at", self.hard, "ttl - (0.5 s + ttl / 10): the warden sends SIGKILL"),
            (
                "etcd election",
                4 * self.election,
                "4 x election timeout: one split vote; must fit before trust ends",
            ),
        )


def _unusable(ttl: float, why: str, hint: str = "") -> ConfigInvalid:
    return ConfigInvalid(
        [Problem("", 0, "lease.ttl", f"{format_duration(max(ttl, 0))} is not usable: {why}", hint)]
    )


def default_ttl(election: float) -> float:
    """Return the shortest usable time to live for etcd's election timeout, both in seconds.

    One renewal interval (ttl/6), four election timeouts and the margins (attempt ttl/10, stop stages ttl/6,
    0.5 s) must fit: 8 s at etcd's default of 1 s, 5 s at 0.5 s.  Below 2 s two renewals would not.
    """
    return float(max(2, math.ceil((4 * election + 0.5) / (1 - 1 / 6 - 1 / 10 - 1 / 6) - _ROUNDING)))
