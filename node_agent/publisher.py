"""Writes ``status/<name>`` for the names of this node: the latest state of each, never in a worker's way.

A restart on this host needs no etcd; what it changes is told to etcd afterwards.  Only the newest state of a
name is written, and only while its owner key has the same epoch.  *Starting* is written when it lasts: a
restart passes through it in milliseconds, and writing it would take the processor from the new process and
make every agent look whether it can deliver yet.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

from registry.errors import Invalid
from registry.names import Names, Written
from registry.ownership import Status, WorkerState
from registry.store import LeaseId, Revision

LASTS = 0.05
"""Seconds in *starting* after which it is written."""


class Publisher:
    """Keeps the newest status of each name until it is written."""

    def __init__(self, names: Names, lease: LeaseId) -> None:
        self._names, self._lease = names, lease
        self._unwritten: dict[str, Status] = {}
        self._passing: dict[str, Status] = {}
        self._written: dict[str, Revision] = {}
        self._wake = asyncio.Event()

    def publish(self, status: Status) -> None:
        """Have this written, unless a newer one for the same name comes first."""
        if status.state is not WorkerState.STARTING:
            self._passing.pop(status.name, None)
            self._write(status)
        elif status.name in self._unwritten:
            self._write(status)
        else:
            if status.name not in self._passing:
                asyncio.get_running_loop().call_later(LASTS, self._lasts, status.name)
            self._passing[status.name] = status

    def _lasts(self, name: str) -> None:
        status = self._passing.pop(name, None)
        if status is not None:
            self._write(status)

    def _write(self, status: Status) -> None:
        self._unwritten[status.name] = status
        self._wake.set()

    async def run(self) -> None:
        """Write until cancelled.  Raises StoreError; nothing is lost then, call it again."""
        while True:
            while self._unwritten:
                name, status = next(iter(self._unwritten.items()))
                await self._put(status)
                if self._unwritten[name] is status:
                    del self._unwritten[name]
            self._wake.clear()
            await self._wake.wait()

    async def _put(self, status: Status) -> None:
        """Write it; of a daemon that offers more than fits, without the descriptions, or without the methods.

        That it serves matters more, and the other names must not wait for it.
        """
        undescribed = tuple(replace(method, description="") for method in status.methods)
        seen = self._written.get(status.name, 0)
        for methods in (status.methods, undescribed, ()):
            with suppress(Invalid):
                status = replace(status, methods=methods)
                answer = await self._names.put_status(status, self._lease, seen=seen)
                self._written[status.name] = answer.mod_revision if isinstance(answer, Written) else 0
                return
