"""Reading a store's watch in a test: until enough has come, never longer than a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from registry.store import Changed, Deleted, Revision, Store, WatchBatch


@asynccontextmanager
async def watching(store: Store, prefix: str, start: Revision) -> AsyncIterator[AsyncIterator[WatchBatch]]:
    """Watch for the duration of a block."""
    watch = store.watch(prefix, start)
    assert isinstance(watch, AsyncGenerator)
    async with aclosing(watch):
        yield watch


async def events(
    watch: AsyncIterator[WatchBatch], count: int, seconds: float = 10.0
) -> list[Changed | Deleted]:
    """Return the next events, at least ``count``."""
    seen: list[Changed | Deleted] = []
    async with asyncio.timeout(seconds):
        while len(seen) < count:
            seen.extend((await anext(watch)).events)
    return seen


async def sign_of_life(watch: AsyncIterator[WatchBatch], seconds: float = 10.0) -> None:
    """Wait for the next batch, whatever is in it."""
    async with asyncio.timeout(seconds):
        await anext(watch)


def keys(seen: list[Changed | Deleted]) -> list[str]:
    return [event.kv.key if isinstance(event, Changed) else event.key for event in seen]
