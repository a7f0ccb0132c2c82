"""A behaviour that says what it does: each request names an operation, and executing it is an effect."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from node_agent.behaviours import Server, call, cast
from tests.cluster.daemons.report import Report

_INSERT = "insert into ledger (op, name, epoch, start) values (%s, %s, %s, %s)"


class Ledger(Server):
    """``broken_on``: hosts where it cannot start; ``never_ready_on``: hosts where it never says ready."""

    @dataclass(frozen=True)
    class Args:
        """Its arguments."""

        observer: str
        broken_on: str = ""
        never_ready_on: str = ""

    args: Args

    async def init(self) -> None:
        if self.host in self.args.broken_on.split():
            raise RuntimeError(f"broken on {self.host}")
        self.report = Report(self.args.observer, self.name, self.epoch, self.start, self.host)
        if self.host in self.args.never_ready_on.split():
            await asyncio.Event().wait()

    @call
    async def add(self, op: str) -> str:
        """Execute an operation."""
        self.report.did(op)
        return self.host

    @cast
    async def note(self, op: str) -> None:
        """Execute an operation that nobody waits for."""
        self.report.did(op)

    @call
    async def write(self, op: str) -> str:
        """Execute an operation that writes a row, in a fenced transaction."""
        self.report.did(op)
        async with self.backend("app") as tx:
            await tx.execute(_INSERT, (op, self.name, self.epoch, self.start))
        return self.host

    @call
    async def write_slowly(self, op: str, seconds: float) -> str:
        """Execute an operation whose transaction is open for so long in the server."""
        self.report.did(op)
        async with self.backend("app") as tx:
            await tx.execute(_INSERT, (op, self.name, self.epoch, self.start))
            await tx.execute("select pg_sleep(%s)", (seconds,))
        return self.host

    @call
    async def crash(self, op: str) -> None:
        """Execute an operation and crash."""
        self.report.did(op)
        raise RuntimeError("asked to crash")
