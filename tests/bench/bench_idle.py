"""What a host costs while nothing happens."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import uvloop

from registry.client import Client
from tests.bench.costs import cpu_seconds, host_processes, proportional_mb
from tests.bench.hosts import SETTLE, Herd, echo, herd
from tests.bench.programs import line_of, program
from tests.bench.row import at_most

METRICS = ("idle_cpu_percent", "idle_mb")

WINDOWS = 5
SECONDS = 20.0
CPU_BAR, MB_BAR = 1.0, 120.0

_BARE_IMPORTS = "import sys, grpc.aio, etcd3.etcdrpc, psycopg; print(flush=True); sys.stdin.read()"


def run() -> list[dict[str, Any]]:
    """Measure both; takes about two minutes."""
    return uvloop.run(_measure())


async def _measure() -> list[dict[str, Any]]:
    """A host with one daemon, whose process is not counted, and three etcd members."""
    async with herd("alpha", members=3) as running:
        return await _idle(running)


async def _idle(running: Herd) -> list[dict[str, Any]]:
    host = running.hosts["alpha"]
    async with Client(host.address) as client:
        await running.apply(client, {"echo": echo()})
    ours = host_processes(host.launcher)
    members = [running.etcd.pid(member) for member in running.etcd.running]
    percent: list[float] = []
    etcd_percent: list[float] = []
    mb: list[float] = []
    bare_mb: list[float] = []
    async with program("-c", _BARE_IMPORTS) as bare:
        await line_of(bare)
        await asyncio.sleep(SETTLE)
        for _ in range(WINDOWS):
            before, etcd_before, began = cpu_seconds(ours), cpu_seconds(members), time.perf_counter()
            await asyncio.sleep(SECONDS)
            took = time.perf_counter() - began
            percent.append(100 * (cpu_seconds(ours) - before) / took)
            etcd_percent.append(100 * (cpu_seconds(members) - etcd_before) / took / len(members))
            mb.append(proportional_mb(ours))
            bare_mb.append(proportional_mb([bare.pid]))
    return [
        at_most("idle_cpu_percent", percent, "%", CPU_BAR, "one of the three etcd members", etcd_percent),
        at_most("idle_mb", mb, "MiB", MB_BAR, "bare imports: grpc.aio, etcd3, psycopg", bare_mb),
    ]
