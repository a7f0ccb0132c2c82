"""Python programs that a benchmark is compared with; each ends when its input does."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def program(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run Python with these arguments; it ends when its input does."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdin=pipe, stdout=pipe)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


async def line_of(process: asyncio.subprocess.Process) -> bytes:
    """Return the next line it writes."""
    assert process.stdout is not None
    return await asyncio.wait_for(process.stdout.readline(), 30)
