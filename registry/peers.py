"""The other agents: one link to each, opened when it is needed, closed when its node leaves.

A node is one life of a host's session, so a link never survives into the next life: when the directory says
that a node has left, everything it had is answered UNKNOWN_OUTCOME at once, however deaf its host may be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from registry.clock import Boottime, Clock
from registry.directory import Change, Directory
from registry.errors import HerdError, Unreachable, WrongEpoch
from registry.events import Event, LinkDropped
from registry.link import Asker, Link
from registry.v1 import messages_pb2 as pb

FIRST_BACKOFF = 0.05
"""Seconds after the first failure in which no new link is tried; doubled for each further one."""
LONGEST_BACKOFF = 1.0
REMEMBER = 600.0
"""Seconds for which it is known when a node that has left was last heard."""


@dataclass(slots=True)
class _Peer:
    """A living node.  ``channel`` serves the link and whatever else is asked of that agent."""

    node: str
    address: str
    channel: grpc.aio.Channel
    link: Link | None = None
    task: asyncio.Task[None] | None = None
    failures: int = 0
    try_at: Boottime = 0.0
    why: str = ""


class Peers:
    """Links to the agents of other hosts than ``host``, whose former nodes may still be in the directory.

    ``node()`` is our own id, empty while we are no member, ``connect(address)`` makes a channel
    (:mod:`registry.security`).  Links are carried by :meth:`run`; before and after it every request is taken
    back.
    """

    def __init__(
        self,
        directory: Directory,
        clock: Clock,
        emit: Callable[[Event], None],
        *,
        host: str,
        node: Callable[[], str],
        connect: Callable[[str], grpc.aio.Channel],
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._emit = emit
        self._host = host
        self._node = node
        self._connect = connect
        self._peers: dict[str, _Peer] = {}
        self._heard: dict[str, Boottime] = {}
        self._group = asyncio.TaskGroup()
        self._running = False

    async def run(self) -> None:
        """Carry the links until cancelled."""
        unsubscribe = self._directory.subscribe(self._changed)
        try:
            async with self._group:
                self._running = True
                try:
                    await asyncio.get_running_loop().create_future()
                finally:
                    self._running = False
                    unsubscribe()
        finally:
            peers, self._peers = self._peers, {}
            for peer in peers.values():
                await peer.channel.close()

    def request(self, node: str, frame: pb.Frame, asker: Asker) -> None:
        """Send a request to the agent of ``node``; ``asker`` hears what became of it, perhaps at once."""
        try:
            peer = self._peers.get(node) or self._meet(node)
        except HerdError as error:
            asker.taken_back(error)
            return
        if peer is None or not self._running:
            asker.taken_back(self._no_peer(node, frame.to))
            return
        link, now = peer.link, self._clock.now()
        if link is None:
            if now < peer.try_at:
                why = f"agent {peer.node} at {peer.address} could not be reached: {peer.why}"
                asker.taken_back(Unreachable(why, details={"node": node}))
                return
            link = self._open(peer)
        link.request(frame, asker, now)

    def channel(self, node: str) -> grpc.aio.Channel | None:
        """Return a channel to the agent of ``node`` for unary requests; None when it is not a living peer.

        Raises Denied, Unreachable.
        """
        peer = self._peers.get(node) or self._meet(node)
        return peer.channel if peer else None

    def heard(self, node: str) -> Boottime | None:
        """Return when the agent of ``node`` last said anything to us, as far as it is remembered."""
        peer = self._peers.get(node)
        on_link = peer.link.heard if peer and peer.link else 0.0
        return max(on_link, self._heard.get(node, 0.0)) or None

    def hear(self, node: str) -> None:
        """Note that ``node`` has just said something, on a link of its own."""
        self._heard[node] = self._clock.now()

    def _meet(self, node: str) -> _Peer | None:
        record = self._directory.nodes.get(node)
        if record is None or record.host == self._host:
            return None
        try:
            channel = self._connect(record.address)
        except OSError as error:
            raise Unreachable(f"node {node} at {record.address}: {error}", details={"node": node}) from error
        peer = self._peers[node] = _Peer(node, record.address, channel)
        return peer

    def _no_peer(self, node: str, name: str) -> HerdError:
        record = self._directory.nodes.get(node)
        if record is not None and record.host == self._host:
            return WrongEpoch(f"{name} is not on this host", details={"name": name, "node": node})
        return Unreachable(f"node {node}: it has left, or we are leaving", details={"node": node})

    def _open(self, peer: _Peer) -> Link:
        peer.link = Link(f"{peer.node} at {peer.address}", peer.channel, self._clock, node=self._node())
        peer.task = self._group.create_task(self._carry(peer, peer.link))
        return peer.link

    async def _carry(self, peer: _Peer, link: Link) -> None:
        try:
            await link.run()
        finally:
            self._ended(peer, link)

    def _ended(self, peer: _Peer, link: Link) -> None:
        if link.heard:
            self._heard[peer.node] = max(link.heard, self._heard.get(peer.node, 0.0))
            peer.failures = 0
        peer.failures += 1
        peer.try_at = self._clock.now() + min(FIRST_BACKOFF * 2 ** (peer.failures - 1), LONGEST_BACKOFF)
        peer.why = link.why
        peer.link = peer.task = None
        if self._running and peer.failures == 1:
            # The first of a series: a peer that is down is tried again and again.
            self._emit(LinkDropped(peer=link.peer, why=link.why))

    def _changed(self, change: Change) -> None:
        """Close the link to a node that has left, or that is found at another address."""
        peer = self._peers.get(change.key)
        if change.section != "nodes" or peer is None:
            return
        record = self._directory.nodes.get(peer.node)
        if record is not None and record.address == peer.address:
            return
        del self._peers[peer.node]
        self._group.create_task(self._part(peer))
        self._forget()

    async def _part(self, peer: _Peer) -> None:
        if peer.link is not None and peer.task is not None:
            peer.link.why = "its node has left"
            peer.task.cancel()
        await peer.channel.close()

    def _forget(self) -> None:
        long_ago = self._clock.now() - REMEMBER
        self._heard = {node: heard for node, heard in self._heard.items() if heard > long_ago}
