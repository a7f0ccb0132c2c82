"""Drives the zombie: a superseded owner that is still alive (:mod:`node_agent.sandbox.zombie`)."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from registry.client import Whereabouts


class Zombie:
    """A process with an old token and an open transaction; made by :meth:`of`."""

    def __init__(self, process: asyncio.subprocess.Process, epoch: int) -> None:
        self._process = process
        self.epoch = epoch

    @classmethod
    @asynccontextmanager
    async def of(cls, conninfo: str, owner: Whereabouts) -> AsyncIterator[Zombie]:
        """Start one with the token of ``owner``; its transaction is open when this enters."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "node_agent.sandbox.zombie",
            conninfo, owner.name, str(owner.epoch), str(owner.start),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        zombie = cls(process, owner.epoch)
        try:
            await zombie._hear()
            yield zombie
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def wake(self) -> tuple[str, str]:
        """Let it go on; return what PostgreSQL said to its open and to its next transaction."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        await self._process.stdin.drain()
        return await self._hear(), await self._hear()

    async def _hear(self) -> str:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        said: str = json.loads(line) if line else "it ended without a word"
        return said
