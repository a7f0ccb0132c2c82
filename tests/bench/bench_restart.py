"""How soon a daemon answers again after its process was killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import uvloop

from registry.client import Client
from tests.bench.hosts import SETTLE, Herd, answered, echo, herd
from tests.bench.programs import line_of, program
from tests.bench.row import at_most

METRICS = ("worker_restart_ms",)

RESTARTS = 15
BETWEEN = 0.5
"""Seconds between two restarts: what one leaves to be done is not the next one's."""
BAR = 30.0


def run() -> list[dict[str, Any]]:
    """Measure; takes about half a minute."""
    return uvloop.run(_measure())


async def _measure() -> list[dict[str, Any]]:
    async with herd("alpha") as running:
        return [await _worker_restart(running)]


async def _worker_restart(running: Herd) -> dict[str, Any]:
    """Kill each of several daemons once: only the first restart in a row is immediate, by design."""
    host = running.hosts["alpha"]
    names = [f"restart-{number}" for number in range(RESTARTS)]
    ours: list[float] = []
    theirs: list[float] = []
    async with Client(host.address) as client, program("-m", "tests.bench.bare_supervisor") as bare:
        await running.apply(client, {name: echo(name) for name in names})
        await asyncio.sleep(SETTLE)
        for name in names:
            before = await client.whereis(name)
            began = time.perf_counter()
            os.kill(before.pid, signal.SIGKILL)
            ours.append(1000 * (await answered(client, name, (before.epoch, before.start)) - began))
            await asyncio.sleep(BETWEEN)
            assert bare.stdin is not None
            bare.stdin.write(b"\n")
            theirs.append(1000 * float(await line_of(bare)))
    reference = "asyncio loop that starts `python -S` again"
    return at_most("worker_restart_ms", ours, "ms", BAR, reference, theirs)
