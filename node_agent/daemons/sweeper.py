"""The sweeper: deletes rows past their age, a batch at a time, and keeps exact books about it.

Policies are rows of ``herd_sweeper.policy``.  Every batch is one fenced transaction that deletes rows and
writes how many into ``herd_sweeper.log``: whoever was killed or superseded, the log and the tables agree.  A
policy that fails is reported alone and the others go on; a database that is away is waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from node_agent.behaviours import Reject, Server, Timer, call, cast
from node_agent.daemons.sweeper_schema import QUERIES
from node_agent.postgres.backend import FenceUnavailable, StatementError
from registry.errors import UnknownOutcome
from registry.units import parse_duration

_MOST_BATCHES = 100
_AT_FIRST = 0.05
"""Seconds from a start to its first sweep: those who waited for the daemon to be back are answered before."""
_NOT_NOW = (FenceUnavailable, StatementError)
"""What a database does that is away, or is not prepared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the present process has done, and what fails, by policy (under "": the database itself)."""

    epoch: int
    start: int
    paused: bool
    policies: int
    deleted: int
    batches: int
    last_sweep: datetime | None
    failing: Mapping[str, str]


@dataclass(slots=True)
class Swept:
    """Rows deleted, by policy, and whether there may be more to delete."""

    deleted: dict[str, int] = field(default_factory=dict)
    more: bool = False


@dataclass(frozen=True, slots=True)
class _Plan:
    paused: bool
    policies: Mapping[str, int]
    """Batch sizes by relation."""


@contextmanager
def _rejecting() -> Iterator[None]:
    """Answer no where the database does not let us, instead of ending the process."""
    try:
        yield
    except _NOT_NOW as error:
        raise Reject(str(error)) from error


class Sweeper(Server):
    """Delete rows past their age as ``herd_sweeper.policy`` says."""

    @dataclass(frozen=True)
    class Args:
        """``database`` is a name in the agent's configuration; ``every`` is "60s", or seconds."""

        database: str
        every: str | float = "60s"

    args: Args

    async def init(self) -> None:
        every = self.args.every
        self._every = parse_duration(every) if isinstance(every, str) else every
        self._timer: Timer | None = None
        self._paused = False
        self._policies = 0
        self._deleted = 0
        self._batches = 0
        self._last_sweep: datetime | None = None
        self._failing: dict[str, str] = {}
        self._next(_AT_FIRST)

    @call
    async def status(self) -> Status:
        """Tell what this process has swept, and which policies fail."""
        return Status(
            epoch=self.epoch,
            start=self.start,
            paused=self._paused,
            policies=self._policies,
            deleted=self._deleted,
            batches=self._batches,
            last_sweep=self._last_sweep,
            failing=dict(self._failing),
        )

    @call
    async def pause(self) -> Status:
        """Stop sweeping until resume, also after a restart or a failover."""
        await self._set_paused(True)
        return await self.status()

    @call
    async def resume(self) -> Status:
        """Sweep again."""
        await self._set_paused(False)
        self._next(0)
        return await self.status()

    @call
    async def sweep_now(self) -> Swept:
        """Sweep until nothing is left, at most 100 batches of each policy; also while paused."""
        total = Swept()
        with _rejecting():
            for _ in range(_MOST_BATCHES):
                swept = await self._round((await self._plan()).policies)
                for relation, deleted in swept.deleted.items():
                    total.deleted[relation] = total.deleted.get(relation, 0) + deleted
                total.more = swept.more
                if not swept.more:
                    break
        return total

    @cast
    async def tick(self) -> None:
        """Sweep one batch of every policy, and come back: at once if there is more, else later."""
        more = False
        try:
            plan = await self._plan()
            if not plan.paused:
                more = (await self._round(plan.policies)).more
        except _NOT_NOW as error:
            self._failed("", str(error))
        self._next(0 if more else self._every)

    async def _plan(self) -> _Plan:
        async with self.backend(self.args.database, read_only=True) as tx:
            paused = await tx.fetch_one(QUERIES["paused"]) == (True,)
            policies = dict(await tx.fetch_all(QUERIES["policies"]))
        self._paused = paused
        self._policies = len(policies)
        self._failing = {
            relation: self._failing[relation] for relation in policies if relation in self._failing
        }
        return _Plan(paused, policies)

    async def _round(self, policies: Mapping[str, int]) -> Swept:
        """Sweep one batch of every policy."""
        swept = Swept()
        for relation, batch_size in policies.items():
            deleted = await self._sweep(relation)
            if deleted:
                swept.deleted[relation] = deleted
            swept.more |= deleted >= batch_size
        self._last_sweep = datetime.now(UTC)
        return swept

    async def _sweep(self, relation: str) -> int:
        values = {"relation": relation, "epoch": self.epoch, "start": self.start}
        try:
            async with self.backend(self.args.database) as tx:
                row = await tx.fetch_one(QUERIES["sweep"], values)
        except (StatementError, UnknownOutcome) as error:
            # After an unknown commit the log is right all the same: it is written by the same transaction.
            self._failed(relation, str(error))
            return 0
        self._failing.pop(relation, None)
        deleted = int(row[0]) if row else 0
        self._deleted += deleted
        self._batches += deleted > 0
        return deleted

    async def _set_paused(self, paused: bool) -> None:
        with _rejecting():
            async with self.backend(self.args.database) as tx:
                await tx.execute(QUERIES["set_paused"], {"paused": paused})
        self._paused = paused

    def _failed(self, key: str, text: str) -> None:
        why = text.splitlines()[0]
        if self._failing.get(key) != why:
            self.log.warning("%s", f"policy {key}: {why}" if key else why)
        self._failing[key] = why

    def _next(self, delay: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.send_after(delay, "tick")
