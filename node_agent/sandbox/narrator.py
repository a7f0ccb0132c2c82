"""Tells what happens in a sandbox: the events of all its agents, in one stream of sentences."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime

import grpc

from node_agent.sandbox.cluster import Host
from registry import security
from registry.v1 import cluster_pb2, cluster_pb2_grpc

TOLD = frozenset(
    {
        "agent_started",
        "etcd_reachable",
        "etcd_unreachable",
        "fence_failed",
        "fence_raised",
        "name_claimed",
        "name_released",
        "name_superseded",
        "session_adopted",
        "session_lost",
        "spec_changed",
        "spec_invalid",
        "worker_adopted",
        "worker_exited",
        "worker_gave_up",
        "worker_ready",
        "worker_restarting",
        "worker_start_failed",
        "worker_stopping",
    }
)
"""Kinds of events worth a line; what every agent says about the same fact is left to the host it is about."""
RETRY = 0.3


async def narrate(host: Host, tell: Callable[[str], None]) -> None:
    """Tell what the agent of ``host`` says, for ever; an agent that is gone is waited for."""
    seen = 0.0
    up = True
    while True:
        try:
            async with security.channel(host.target) as channel:
                stub = cluster_pb2_grpc.ClusterStub(channel)
                async for record in stub.Events(cluster_pb2.EventsRequest(follow=True)):
                    up = True
                    if record.at > seen:
                        seen = record.at
                        if record.kind in TOLD:
                            tell(sentence(host.name, record))
        except grpc.aio.AioRpcError:
            if up:
                up = False
                tell(f"{datetime.now():%H:%M:%S} {host.name:>6}  its agent does not answer")  # noqa: DTZ005
        await asyncio.sleep(RETRY)


def sentence(host: str, record: cluster_pb2.EventRecord) -> str:
    """Return an event as a line: when (local time), where, what."""
    at = datetime.fromtimestamp(record.at)  # noqa: DTZ006
    return f"{at:%H:%M:%S} {host:>6}  {record.text}"
