"""Writes ``status/<name>`` for the names of this node: the latest state of each, never in a worker's way.

A restart on this host needs no etcd; what it changes is told to etcd afterwards.  Only the newest state of a
name is written, and only while its owner key has the same epoch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from registry.errors import StoreError
from registry.names import Names
from registry.ownership import Status

RETRY = 0.5


class Publisher:
    """Keeps the newest status of each name and writes it when etcd lets it."""

    def __init__(self, names: Names, lease: int, on_error: Callable[[str], None]) -> None:
        self._names, self._lease, self._on_error = names, lease, on_error
        self._dirty: dict[str, Status] = {}
        self._wake = asyncio.Event()

    def publish(self, status: Status) -> None:
        """Have this written, unless a newer one for the same name comes first."""
        self._dirty[status.name] = status
        self._wake.set()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._dirty:
                name = next(iter(self._dirty))
                status = self._dirty.pop(name)
                try:
                    await self._names.put_status(status, self._lease)
                except StoreError as error:
                    self._dirty.setdefault(name, status)
                    self._on_error(str(error))
                    await asyncio.sleep(RETRY)
