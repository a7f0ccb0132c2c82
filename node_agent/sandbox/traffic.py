"""pgbench fills a history table while the sweeper empties it: the books must balance in the end."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from node_agent.sandbox.cluster import DATABASE, Sandbox
from node_agent.sandbox.process import ServerFailed

CLIENTS, EACH, RATE = 2, 3000, 240
"""pgbench: clients, transactions of each, and transactions a second of all: 25 s of traffic."""

BALANCE = """
select (select coalesce(sum(deleted), 0) from herd_sweeper.log) || ' '
    || (select count(*) from pgbench_history) || ' '
    || (select count(distinct (epoch, start)) from herd_sweeper.log where deleted > 0)
"""


class Traffic:
    """One run of pgbench against the sandbox's database."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._run: asyncio.Task[str] | None = None
        self._inserted = 0

    async def prepare(self) -> None:
        """Make pgbench's tables and tell the sweeper to keep a second of the history."""
        await self._pgbench("--initialize", "--scale=1", "--quiet")
        await self._sandbox.sql(
            "insert into herd_sweeper.policy (relation, age_column, keep, batch_size) "
            "values ('pgbench_history', 'mtime', '1 second', 100)"
        )

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        """Let pgbench run."""
        await self.prepare()
        arguments = (f"--client={CLIENTS}", f"--transactions={EACH}", f"--rate={RATE}", "--no-vacuum")
        self._run = asyncio.create_task(self._pgbench(*arguments))
        try:
            yield
        finally:
            self._run.cancel()
            await asyncio.gather(self._run, return_exceptions=True)

    async def finished(self) -> None:
        """Wait until pgbench is done.  Raises ServerFailed when a transaction of it failed."""
        assert self._run is not None
        report = await self._run
        done = re.search(r"number of transactions actually processed: (\d+)/", report)
        if done is None:
            raise ServerFailed(f"pgbench reported nothing: {report}")
        self._inserted = int(done[1])

    async def balance(self) -> tuple[int, int, int, int]:
        """Return rows inserted, rows swept, rows left, and how many processes swept."""
        swept, left, owners = map(int, (await self._sandbox.sql(BALANCE)).split())
        return self._inserted, swept, left, owners

    async def _pgbench(self, *arguments: str) -> str:
        return await self._sandbox.run("pgbench", *arguments, DATABASE)
