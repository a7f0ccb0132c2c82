"""Calls and casts from a client through the owner's agent to a Python daemon, and back.

Every round measures ours and the references one after the other; the medians of the rounds are compared.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from typing import Any

import grpc
import uvloop

from registry.client import Client
from tests.bench.hosts import two_hosts
from tests.bench.references import CALLERS, PAYLOAD, Rates, Reference, bare_grpc, reference, stream_latencies

METRICS = ("calls_64", "call_p50", "casts")
ROUNDS = 5
CALLS = 30_000
SEQUENTIAL = 2_000
CASTS_AT_ONCE = 800
"""Casts until the daemon is asked whether it has handled them: its mailbox holds 1000."""
CASTS = 40_000
WARM_UP = 500


def run() -> list[dict[str, Any]]:
    """Measure; return the rows."""
    return uvloop.run(_measure())


async def _measure() -> list[dict[str, Any]]:
    ours: dict[str, list[float]] = {metric: [] for metric in METRICS}
    theirs: list[Rates] = []
    stream: list[float] = []
    async with (
        bare_grpc() as bare,
        reference(bare) as other,
        two_hosts() as hosts,
        Client(hosts.home) as client,
    ):
        assert (await client.whereis("echo")).address == hosts.owner
        await _sequential(client, WARM_UP)
        for _ in range(ROUNDS):
            ours["calls_64"].append(await _calls(client))
            theirs.append(await other.rates())
            ours["casts"].append(await _casts(client))
            ours["call_p50"].append(statistics.median(await _sequential(client, SEQUENTIAL)) * 1e6)
            stream.append(await _stream_p50(bare))
        return list(_rows(ours, theirs, stream, other))


def _rows(
    ours: dict[str, list[float]], theirs: list[Rates], stream: list[float], other: Reference
) -> Iterator[dict[str, Any]]:
    calls, p50, casts = (statistics.median(ours[metric]) for metric in METRICS)
    other_calls = statistics.median(rates.calls for rates in theirs)
    ratio = calls / other_calls
    yield {
        "metric": "calls_64", "value": calls, "unit": "calls/s", "reference": other.name,
        "reference_value": other_calls, "ratio": ratio, "bar": "ratio >= 1", "ok": ratio >= 1,
    }  # fmt: skip
    bare = statistics.median(stream)
    ratio = p50 / bare
    yield {
        "metric": "call_p50", "value": p50, "unit": "us", "reference": "bare grpc.aio stream echo",
        "reference_value": bare, "ratio": ratio, "bar": "ratio <= 2.5", "ok": ratio <= 2.5,
    }  # fmt: skip
    known = [rates.casts for rates in theirs if rates.casts is not None]
    other_casts = statistics.median(known) if known else None
    yield {
        "metric": "casts", "value": casts, "unit": "casts/s",
        "reference": "Erlang gen_server:cast, handled" if other_casts else "",
        "reference_value": other_casts, "ratio": casts / other_casts if other_casts else None,
        "bar": "", "ok": True,
    }  # fmt: skip


async def _calls(client: Client) -> float:
    async def caller() -> None:
        for _ in range(CALLS // CALLERS):
            assert await client.call("echo", "echo", PAYLOAD) == PAYLOAD

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return CALLS // CALLERS * CALLERS / (time.perf_counter() - began)


async def _casts(client: Client) -> float:
    before = told = await client.call("echo", "count")
    began = time.perf_counter()
    while told < before + CASTS:
        await asyncio.gather(*(client.cast("echo", "tell", PAYLOAD) for _ in range(CASTS_AT_ONCE)))
        # Answered after every cast before it was handled.
        told = await client.call("echo", "count")
    assert told == before + CASTS
    return CASTS / (time.perf_counter() - began)


async def _sequential(client: Client, count: int) -> list[float]:
    latencies = []
    for _ in range(count):
        began = time.perf_counter()
        await client.call("echo", "echo", PAYLOAD)
        latencies.append(time.perf_counter() - began)
    return latencies


async def _stream_p50(bare: grpc.aio.Channel) -> float:
    return statistics.median(await stream_latencies(bare, SEQUENTIAL)) * 1e6
