"""Which agent a request is for, and whether it answers: this one, or another that is asked once.

What concerns a child of another host is passed on to that host's agent, so any agent can be asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import grpc

from node_agent.view import View
from registry.errors import HerdError, NoOwner, NoSuchName, Unreachable
from registry.names import did_you_mean
from registry.peers import Peers
from registry.router import unknown_name
from registry.v1 import cluster_pb2, cluster_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

RELAYED = "pgherd-relayed"
"""Metadata that marks a request which another agent has passed on: it is never passed on again."""
FORWARD_TIMEOUT = 5.0
"""Seconds for another agent to answer."""
PING_TIMEOUT = 0.5
"""Seconds for another agent to show that it is alive."""


class Remote:
    """Finds the agent a request is for: this one, or another that it is passed on to once."""

    def __init__(self, view: View, peers: Peers) -> None:
        self._view, self._peers = view, peers

    def of(self, name: str, context: Context) -> grpc.aio.Channel | None:
        """Return the channel to the agent that has the child, None when that is this one.

        Raises NoSuchName, NoOwner, Unreachable.
        """
        view = self._view
        if name in view.supervisor.children:
            return None
        owner = view.directory.lookup(name)
        if owner is None:
            if name in view.directory.specs:
                raise NoOwner(f"{name} runs nowhere", hint=f"pgherd why {name}", details={"name": name})
            if not view.directory.in_sync:
                raise unknown_name(view.directory, name)
            hint = did_you_mean(name, view.known()) or "`pgherd ps` lists all children"
            raise NoSuchName(f"there is no daemon or child named {name}", hint=hint, details={"name": name})
        channel = None if relayed(context) else self._peers.channel(owner.node)
        if channel is None:
            raise Unreachable(
                f"{name} is on {owner.host}, and its agent cannot be asked", hint="pgherd nodes"
            )
        return channel

    def others(self) -> Iterable[tuple[str, grpc.aio.Channel | None]]:
        """Yield every other living host with a channel to its agent."""
        for record in self._view.directory.nodes.values():
            if record.host != self._view.config.host:
                channel = None
                with suppress(HerdError):
                    channel = self._peers.channel(record.node)
                yield record.host, channel

    async def silent(self) -> frozenset[str]:
        """Return the other nodes whose agents do not answer a question that any agent answers at once."""
        mine = self._view.config.host
        nodes = [node for node, record in self._view.directory.nodes.items() if record.host != mine]
        answers = await asyncio.gather(*(self._answers(node) for node in nodes))
        return frozenset(node for node, answered in zip(nodes, answers, strict=True) if not answered)

    async def _answers(self, node: str) -> bool:
        channel = self._peers.channel(node)
        if channel is None:
            return node not in self._view.directory.nodes
        stub = cluster_pb2_grpc.ClusterStub(channel)
        try:
            await stub.Nodes(cluster_pb2.NodesRequest(), timeout=PING_TIMEOUT)
        except grpc.aio.AioRpcError:
            return False
        return True


def relayed(context: Context) -> bool:
    """Return whether another agent has passed this request on."""
    return any(key == RELAYED for key, _ in context.invocation_metadata() or ())
